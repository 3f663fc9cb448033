"""The memory plan: of each class of card as a table, and compared with what a pretended card counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended_card import CUDA, PretendedOperations, PretendedSource, pretended_card
from transformers import Glm4vConfig

from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError
from api.engine.loading import memory_plan
from api.engine.loading.card import GIB, MIB, Card, parse_size, speed_of
from api.engine.loading.card import pretended_card as card_of
from api.engine.loading.families import shapes_of
from api.engine.loading.memory_plan import (
    LEAST_TOKENS,
    Measured,
    MemoryPlan,
    ModelShape,
    beside,
    choose,
    kv_budget,
    report,
    shape_of,
)
from api.engine.model import decoder
from api.engine.model.decoder import Decoder
from api.engine.model.operations import AttentionMetadata, ForwardBatch
from api.engine.model.recipe import make_recipe
from api.engine.model.sampler import Sampler
from api.engine.model.vision_encoder import VisionEncoder
from api.engine.request import SamplingParams

PAGE = 16
NOT_COUNTED = ("step buffers", "CUDA graphs", "libraries", "reserve")
# By GiB of the card: recipe, image tokens of the largest picture, KV tokens, requests at once, context.
PLANS = {
    8: ("nf4", 1280, 26_880, 8, 8192),
    12: ("nf4", 6144, 55_808, 16, 20_480),
    16: ("fp8", 6144, 61_184, 16, 32_768),
    24: ("fp8", 6144, 257_280, 32, 32_768),
    80: ("bf16", 6144, 1_432_320, 64, 32_768),
}
# MiB: text layers, head, embeddings, vision encoder; workspace of vision and of text beyond it, staging, step buffers,
# tables, encoder cache; CUDA graphs, libraries, reserve.
PARTS = {
    8: (4378, 333, 0, 855, 190, 23, 11, 23, 72, 64, 330, 450, 160),
    12: (4378, 333, 1184, 1702, 816, 0, 55, 32, 81, 128, 339, 450, 238),
    16: (7788, 593, 1184, 1702, 816, 0, 55, 32, 87, 256, 218, 450, 318),
    24: (7788, 593, 1184, 1702, 816, 0, 55, 53, 94, 256, 316, 450, 477),
    80: (15562, 1184, 1184, 1702, 816, 0, 55, 88, 108, 1024, 315, 450, 1024),
}


@pytest.fixture(scope="module")
def nine() -> ModelShape:
    """GLM-4.6V-Flash, by the defaults of transformers."""
    config = Glm4vConfig()
    return shape_of(config, shapes_of(config))


@pytest.mark.parametrize("size", PLANS)
def test_plan_of_each_class_of_card(nine: ModelShape, size: int) -> None:
    plan = choose(nine, card_of(size * GIB), EngineConfig())

    assert (plan.recipe.name, plan.picture_tokens, plan.kv_tokens, plan.slots, plan.context_tokens) == PLANS[size]
    assert tuple(round(part.bytes / MIB) for part in plan.parts) == PARTS[size]
    assert plan.used_bytes + plan.kv_tokens * plan.kv_token_bytes <= plan.card.usable_bytes
    assert plan.kv_token_bytes == 40 * 1024
    assert plan.recipe.host_embeddings == (size == 8)
    assert (plan.recipe.vision == "plain") == (size > 8)


@pytest.mark.parametrize("size", PLANS)
def test_pretended_card_counts_what_the_plan_says(nine: ModelShape, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = choose(nine, card_of(size * GIB), EngineConfig())

    counted, loading = _live_bytes(nine, plan, monkeypatch)

    planned = sum(part.bytes for part in plan.parts if part.name not in NOT_COUNTED)
    planned += plan.kv_tokens * plan.kv_token_bytes
    assert abs(planned - counted) < 0.05 * counted, f"planned {planned / GIB:.2f} GiB, counted {counted / GIB:.2f}"
    assert 0 <= planned - counted < 192 * MIB  # not a share of the weights and the cache, which are exact
    assert loading <= plan.loading_bytes


def _live_bytes(shape: ModelShape, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Most bytes at once: the exact shape is loaded, a picture encoded, a chunk and a step of all slots computed. And the
    most while the weights were loaded."""
    with pretended_card() as counter:
        monkeypatch.setattr(decoder, "device_view", counter.host_view)
        source, operations = PretendedSource(Glm4vConfig(), dict(shape.weights)), PretendedOperations(PAGE, plan.recipe)
        text = Decoder(source, plan.context_tokens, 0, PAGE, operations)
        vision = VisionEncoder(source, operations)
        loading = counter.peak
        text.kv = text.new_kv(plan.kv_tokens + PAGE)
        cache = torch.empty(plan.encoder_cache_bytes, dtype=torch.uint8, device=CUDA)
        sampler = Sampler(plan.slots + 1, text.vocabulary_size, CUDA)
        counter.reset_peak()

        def chunk(inputs: torch.Tensor) -> torch.Tensor:
            part = AttentionMetadata(0, len(inputs), _long(64))
            return text.run(_batch(inputs, part, _long(1)))

        side = 32
        largest = plan.picture_tokens * shape.patches_per_token // side
        for rows in (side, largest):  # an earlier, small picture first
            patches = np.zeros((side * rows, shape.patch_values), np.float32)
            picture = vision.begin(patches, (1, side, rows))
            chunk(text.embeddings.index_select(0, _long(plan.chunk_tokens)))  # for others, between two slices
            features = vision.advance(picture, limit_s=float("inf"))
            assert features is not None
            del picture
            chunk(features.narrow(0, 0, min(len(features), plan.chunk_tokens)))
            del features
        rows = plan.slots + 1
        step = AttentionMetadata(0, rows, _long(rows, 64), lengths=_long(rows))
        logits = text.run(_batch(text.embeddings.index_select(0, _long(rows)), step, None))
        request = SimpleNamespace(sampling=SamplingParams(1, temperature=1.0, top_p=0.9, seed=1))
        sampler._sample_random(
            logits, [SimpleNamespace(request=request, slot=slot, output_ids=[]) for slot in range(rows)]
        )
        assert len(cache) == plan.encoder_cache_bytes
        return counter.peak, loading


def _batch(inputs: torch.Tensor, part: AttentionMetadata, indices: torch.Tensor | None) -> ForwardBatch:
    cos, sin = (torch.empty(len(inputs), 128, dtype=inputs.dtype, device=CUDA) for _ in range(2))
    return ForwardBatch(inputs, cos, sin, _long(len(inputs)), (part,), indices)


def _long(*size: int) -> torch.Tensor:
    return torch.empty(*size, dtype=torch.long, device=CUDA)


def test_recipe_follows_what_the_card_can_compute(nine: ModelShape) -> None:
    expected = {
        ("RTX 3090", 24): "bf16", ("L4", 22.5): "fp8", ("RTX 4090", 24): "fp8", ("A10", 22.5): "bf16",
        ("T4", 16): "nf4", ("RTX 4080", 16): "fp8", ("RTX 3060", 12): "nf4", ("RTX 5090", 32): "bf16",
        ("NVIDIA A100-SXM4-40GB", 40): "bf16",
    }  # fmt: skip
    chosen = {
        (name, size): choose(nine, card_of(int(size * GIB), name), EngineConfig()).recipe.name
        for name, size in expected
    }
    assert chosen == expected


def test_every_card_from_8_gib_on_gets_the_model(nine: ModelShape) -> None:
    for size in (8, 9, 10, 11, 12, 14, 16, 20, 22, 24, 32, 40, 48, 80, 96, 141):
        plan = choose(nine, card_of(size * GIB), EngineConfig())
        assert plan.kv_tokens >= LEAST_TOKENS, size
        assert plan.context_tokens <= plan.kv_tokens


def test_too_small_a_card_is_told_what_would_help(nine: ModelShape) -> None:
    with pytest.raises(LoadError, match=r"nf4 with 16,384 tokens of KV cache needs 1\.\d GiB more than the 5\.8 GiB .* GLM_MODEL=models/shapes"):
        choose(nine, card_of(6 * GIB), EngineConfig())
    taken = Card("busy", 24 * GIB, 3 * GIB, (8, 9))
    with pytest.raises(LoadError, match=r"end what else uses the card \(21\.0 of 24\.0 GiB are taken\)"):
        choose(nine, taken, EngineConfig())
    text, fits = report(nine, card_of(6 * GIB), EngineConfig())
    assert not fits and "text layers" in text and "does not fit" in text


def test_named_recipe_is_taken_or_refused(nine: ModelShape) -> None:
    assert choose(nine, card_of(24 * GIB), EngineConfig(weights="nf4")).recipe == make_recipe("nf4")
    with pytest.raises(LoadError, match=r"GLM_WEIGHTS=bf16 does not fit.*set GLM_WEIGHTS=nf4 or auto"):
        choose(nine, card_of(12 * GIB), EngineConfig(weights="bf16"))
    with pytest.raises(LoadError, match=r"GLM_WEIGHTS=fp8 needs a card of compute capability 8\.9"):
        choose(nine, card_of(24 * GIB, "RTX 3090"), EngineConfig(weights="fp8"))
    with pytest.raises(LoadError, match="too old"):
        choose(nine, Card("Tesla P40", 24 * GIB, 23 * GIB, (6, 1)), EngineConfig())


def test_pictures_of_a_slow_card_are_smaller(nine: ModelShape) -> None:
    slow = choose(nine, card_of(12 * GIB, "RTX 3060"), EngineConfig())
    assert slow.picture_tokens < 2000 and "about 4 s" in slow.picture_reason
    assert choose(nine, card_of(24 * GIB, "RTX 4090"), EngineConfig()).picture_tokens == 6144
    assert choose(nine, card_of(12 * GIB, "RTX 3060"), EngineConfig(max_picture_tokens=4096)).picture_tokens == 4096


def test_two_large_photos_and_a_thought_fit_the_context_from_12_gib_on(nine: ModelShape) -> None:
    for size in (12, 16, 24, 80):
        plan = choose(nine, card_of(size * GIB), EngineConfig())
        assert 2 * plan.picture_tokens + memory_plan.defaults_for(plan.card).thinking_tokens <= plan.context_tokens


def test_reading_the_weights_is_the_limit_of_the_speed(nine: ModelShape) -> None:
    plan = choose(nine, card_of(24 * GIB, "RTX 4090"), EngineConfig())
    assert plan.token_ms == pytest.approx(8.7, abs=0.1)
    assert plan.first_token_s["text"] < 0.02
    text, _ = report(nine, plan.card, EngineConfig())
    assert "a token takes at least 8.7 ms" in text
    assert "its speed is not either" in report(nine, card_of(24 * GIB), EngineConfig())[0]


def test_cache_takes_what_the_measurement_leaves(nine: ModelShape) -> None:
    plan = choose(nine, card_of(80 * GIB), EngineConfig())
    weights = sum(
        plan.bytes_of(name)
        for name in ("text layers", "head", "embeddings", "vision encoder", "tables", "step buffers")
    )
    measured = Measured(weights, plan.bytes_of("vision workspace"), 57 * GIB)
    cache = kv_budget(plan, measured)
    assert cache == 57 * GIB - GIB - plan.bytes_of("CUDA graphs") - GIB - measured.workspace_bytes
    assert cache // plan.kv_token_bytes > 33 * plan.context_tokens  # the card is used whole
    assert kv_budget(plan, Measured(weights, 60 * GIB, 57 * GIB)) == 0
    assert beside(plan, measured, cache)["weights"] == (weights, weights)


def test_sizes_and_names_of_cards() -> None:
    assert parse_size("12GiB") == parse_size("12 GB") == parse_size("12g") == 12 * GIB
    assert parse_size("8188MiB") == 8188 * MIB
    for wrong in ("", "12", "a lot", "512MiB", "-8GiB"):
        with pytest.raises(ValueError, match="Given"):
            parse_size(wrong)
    names = {
        "NVIDIA GeForce RTX 4090": 1008, "NVIDIA GeForce RTX 3060 Ti": 448, "NVIDIA L4": 300, "NVIDIA L40S": 864,
        "NVIDIA A100-SXM4-40GB": 1555, "NVIDIA H100 80GB HBM3": 3350, "NVIDIA H100 PCIe": 2000, "Tesla T4": 320,
        "NVIDIA RTX 6000 Ada Generation": 960, "NVIDIA H200": 4800, "RTX4090": 1008, "rtx3060ti": 448, "NVIDIA A10": 600, "NVIDIA RTX A2000 12GB": 288,
    }  # fmt: skip
    assert {name: speed_of(name).gb_per_s for name in names} == names
    assert speed_of("NVIDIA GeForce RTX 4060 Laptop GPU") is None
    assert speed_of("NVIDIA GB999") is None


def test_the_classes_of_cards_are_those_that_the_plan_of_each_says(nine: ModelShape):
    """What GET /info says of cards that are not here."""
    found = {each["gib"]: tuple(each[name] for name in ("weights", "largest_picture_tokens", "kv_tokens", "slots", "context_tokens"))
             for each in memory_plan.by_class(nine, EngineConfig())}  # fmt: skip

    assert list(found) == list(memory_plan.CLASSES_GIB) and set(found) >= set(PLANS) & set(memory_plan.CLASSES_GIB)
    assert {size: found[size] for size in PLANS if size in found} == {size: PLANS[size] for size in PLANS if size in found}
