"""The KV cache after loading: sized by what the largest steps leave, with a card's memory replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError, Model
from api.engine.loading.card import GIB, MIB
from api.engine.loading.card import pretended_card as card_of
from api.engine.loading.loader import load
from api.engine.loading.memory_plan import MemoryPlan, choose
from api.engine.loading.picture_limit import flash_shape, largest_picture, limit_pictures
from api.engine.loading.rehearsal import size_cache

DEMO = Path(__file__).resolve().parents[4] / "models" / "shapes"


class Memory:
    """A card with 19.3 GiB of weights, where the largest steps take `workspace` more."""

    def __init__(self, free: int, workspace: int = 900 * MIB) -> None:
        self._free, self._workspace, self._weights = free, workspace, int(19.3 * GIB)
        self.resets = 0

    def free_bytes(self) -> int:
        return self._free

    def allocated_bytes(self) -> int:
        return self._weights

    def reset_peak(self) -> None:
        self.resets += 1

    def peak_bytes(self) -> int:
        assert self.resets == 1
        return self._weights + self._workspace


class Runner:
    def __init__(self, error: Exception | None = None) -> None:
        self._error, self.asked = error, ()

    def rehearse(self, image_tokens: int, chunk_tokens: int, rows: int) -> None:
        self.asked = (image_tokens, chunk_tokens, rows)
        if self._error:
            raise self._error


@pytest.fixture(scope="module")
def plan() -> MemoryPlan:
    return choose(flash_shape(), card_of(80 * GIB), EngineConfig())


def test_a_large_card_is_used_whole(plan: MemoryPlan, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    with caplog.at_level("INFO"):
        tokens, reason = size_cache(runner, plan, Memory(58 * GIB))

    assert runner.asked == (6144, 1024, 65)
    assert tokens > 33 * 32_768
    assert tokens * plan.kv_token_bytes < 58 * GIB - 900 * MIB - GIB
    assert "58.0 GiB free after loading" in reason and "900 MiB measured" in reason
    assert "event=memory part=workspace planned_mib=871 measured_mib=900" in caplog.text


def test_more_work_than_planned_makes_the_cache_smaller(plan: MemoryPlan) -> None:
    as_planned, _ = size_cache(Runner(), plan, Memory(58 * GIB))
    more, _ = size_cache(Runner(), plan, Memory(58 * GIB, workspace=4 * GIB))
    assert (as_planned - more) * plan.kv_token_bytes == pytest.approx(4 * GIB - 900 * MIB, abs=plan.kv_token_bytes * 512)


def test_set_cache_is_kept_unless_there_is_less(plan: MemoryPlan) -> None:
    tokens, reason = size_cache(Runner(), plan, Memory(58 * GIB), asked_bytes=GIB)
    assert (tokens * plan.kv_token_bytes, reason) == (GIB - GIB % (256 * plan.kv_token_bytes), "1024 MiB: set by GLM_KV_CACHE_BYTES")
    _, reason = size_cache(Runner(), plan, Memory(58 * GIB), asked_bytes=70 * GIB)
    assert "asks for more than there is" in reason


def test_no_room_is_told(plan: MemoryPlan) -> None:
    with pytest.raises(LoadError, match=r"room for 0 tokens of KV cache, and 2048 are needed.*GLM_WEIGHTS=nf4"):
        size_cache(Runner(), plan, Memory(2 * GIB))
    with pytest.raises(LoadError, match=r"no room for a picture of 6144 image tokens.*GLM_MAX_PICTURE_TOKENS"):
        size_cache(Runner(torch.OutOfMemoryError("CUDA out of memory")), plan, Memory(58 * GIB))


def test_the_real_runner_rehearses_and_takes_another_cache(demo: Model) -> None:
    runner = demo.runner
    runner.rehearse(42, 512, 9)
    runner.rehearse(37, 16, 1)  # a prime number of image tokens
    runner.resize_kv(20)
    assert [len(kv) for kv in runner.decoder.kv] == [21 * demo.capacity.page_tokens] * runner.decoder.layers
    assert not any(kv.any() for kv in runner.decoder.kv)
    runner.warm_up()


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(EngineConfig(model=str(DEMO), device="cpu", kernels="torch", slots=2, context_tokens=512), lambda fraction: None)


def test_pictures_are_scaled_down_to_the_limit() -> None:
    import transformers
    from PIL import Image

    from api.engine.image_processor import CheckpointImageProcessor

    processor = transformers.AutoImageProcessor.from_pretrained(DEMO, backend="pil")
    assert largest_picture(processor) == 42
    assert limit_pictures(processor, 0) == 42
    assert limit_pictures(processor, 100) == 42
    assert limit_pictures(processor, 20) == 20
    limited = CheckpointImageProcessor(processor)
    picture = Image.new("RGB", (1200, 900))
    assert limited.count_tokens(1200, 900) == limited.process(picture).tokens <= 20


def test_a_limit_of_the_operator_holds_without_a_card() -> None:
    config = EngineConfig(model=str(DEMO), device="cpu", kernels="torch", slots=2, context_tokens=512, max_picture_tokens=20)
    model = load(config, lambda fraction: None)
    assert model.image_processor.count_tokens(1200, 900) <= 20
    assert model.facts["largest_picture_tokens"] == 20
    assert model.facts["weights"] == "bf16" and model.facts["plan"] is None
