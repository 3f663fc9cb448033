"""Each family of models that the engine serves: a tiny random checkpoint answers as transformers' `generate` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from prompts import Steps, ask, draw_image, generate, next_logits, request_for
from safetensors.torch import load_file, save_file

from api.engine.config import EngineConfig
from api.engine.kernels import build as kernels
from api.engine.loaded_model import LoadError
from api.engine.loading.families import FAMILIES, shapes_of
from api.engine.loading.loader import load
from api.engine.sequence import make_sequence

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 48, "image_size": 112,
    "initializer_range": 0.3,
}  # fmt: skip
# Head_dim 16 where hidden_size / heads is 8, as GLM-OCR has 128 and 64; a whole head turns in GLM-OCR.
CASES = {
    "glm4v": {"text": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]}}},
    "glm46v": {"text": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]}}},
    "glmga": {"text": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1]}}},
    "glm_ocr": {
        "text": {"head_dim": 16, "rope_parameters": {"rope_theta": 100.0, "mrope_section": [2, 3, 3]}},
        "vision": {"attention_bias": True},
    },
    "glm_ocr without biases": {
        "text": {"head_dim": 16, "rope_parameters": {"rope_theta": 100.0, "mrope_section": [2, 3, 3]}},
        "vision": {"attention_bias": False},
    },
}  # fmt: skip
PROMPTS = {
    "text": ([ask("Hello, what is this?")], []),
    "two pictures": ([ask("The red circle?", 2)], [draw_image(2, (90, 200)), draw_image(3, (128, 128))]),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, case = request.param.split()[0], CASES[request.param]
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp(model_type) / "model"))
    given = json.loads((folder / "config.json").read_text("utf-8"))
    special = {name: value for name, value in given.items() if name.endswith("_token_id")}
    kept = {name: given["text_config"][name] for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    rope = {"rope_type": "default", **case["text"]["rope_parameters"]}
    config = transformers.AutoConfig.for_model(
        model_type, **special, text_config={**TEXT, **kept, **case["text"], "rope_parameters": rope},
        vision_config={**VISION, **case.get("vision", {})},
    )  # fmt: skip
    torch.manual_seed(5)
    network = getattr(transformers, FAMILIES[model_type].class_name)(config)
    with torch.no_grad():  # norms of one and biases of zero would hide that they are left out
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(float("norm" in name and name.endswith("weight")), 0.3)
    network.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text("utf-8"))["model_type"] == model_type
    return folder


def reference_of(folder: Path):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def load_folder(folder: Path, **options):
    return load(EngineConfig(model=str(folder), threads=1, device="cpu", slots=2, **options), lambda fraction: None)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("chunk_tokens", [512, 23], ids=["whole", "chunked"])
def test_greedy_tokens_equal_those_of_generate(folder: Path, prompt: str, chunk_tokens: int) -> None:
    model, reference = load_folder(folder), reference_of(folder)
    request = request_for(model, *PROMPTS[prompt])

    ours = Steps(model, chunk_tokens).run(request)[0]

    assert ours == generate(reference, model, request)
    assert len(set(ours)) > 1
    assert model.facts["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert torch.equal(
        model.runner.decoder.embeddings, reference.model.language_model.embed_tokens.weight
    )  # the weights are those of the folder, not of the fixture


@pytest.mark.parametrize("computed_by", ["torch", *(["compiled"] if kernels.processor_supported() else [])])
def test_in_bf16_the_logits_are_near_those_of_transformers(folder: Path, computed_by: str) -> None:
    model = load_folder(folder, dtype="bfloat16", kernels="torch" if computed_by == "torch" else "auto")
    request = request_for(model, *PROMPTS["two pictures"])
    expected = next_logits(reference_of(folder), model, request)
    sequence = make_sequence(request, lambda event: None, model.vocabulary.special["<|image|>"])
    found = model.runner.answer_alone(sequence)

    assert float((found - expected).norm() / expected.norm()) < 0.15  # bf16 alone is up to 0.07


def test_every_family_has_a_case() -> None:
    assert {name.split()[0] for name in CASES} == set(FAMILIES)


@pytest.mark.parametrize("folder", ["glm_ocr"], indirect=True)
def test_the_layer_that_drafts_tokens_is_left_out(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "with-draft"))
    tensors = load_file(copy / "model.safetensors")
    drafts = {"eh_proj.weight": torch.ones(32, 64), "mlp.down_proj.weight": torch.ones(32, 48)}
    tensors |= {f"model.language_model.layers.2.{name}": tensor for name, tensor in drafts.items()}
    save_file(tensors, copy / "model.safetensors")
    model = load_folder(copy)
    request = request_for(model, *PROMPTS["text"])

    assert Steps(model).run(request) == Steps(load_folder(folder)).run(request)


@pytest.mark.parametrize("folder", ["glm46v"], indirect=True)
def test_another_family_has_no_such_layer(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "with-draft"))
    tensors = load_file(copy / "model.safetensors") | {"model.language_model.layers.2.x": torch.ones(1)}
    save_file(tensors, copy / "model.safetensors")

    with pytest.raises(LoadError, match=r"unknown: model\.language_model\.layers\.2\.x"):
        load_folder(copy)


def test_glm_ocr_has_the_size_that_its_class_says() -> None:
    config = transformers.AutoConfig.for_model("glm_ocr")

    shapes = shapes_of(config)

    assert config.text_config.num_hidden_layers == 16
    assert not any("position_embedding" in name or "post_conv" in name for name in shapes)
    assert not any("q_proj.bias" in name for name in shapes)
    assert "model.visual.blocks.0.attn.q_norm.weight" in shapes
