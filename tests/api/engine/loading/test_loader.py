"""From a configuration to a model: the choices, their reasons, and the errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError
from api.engine.loading.loader import load, without_folders
from api.engine.loading.placement import choose_dtype, choose_model, choose_threads, usable_cores

GIB = 2**30


def test_the_demo_is_chosen_without_a_gpu() -> None:
    choice = choose_model(EngineConfig(model="auto"), "cpu")

    assert choice.value.endswith("models/shapes")
    assert "no CUDA GPU" in choice.reason


def test_flash_is_chosen_on_every_card() -> None:
    choice = choose_model(EngineConfig(model="auto"), "cuda")

    assert choice.value == "zai-org/GLM-4.6V-Flash"
    assert "GLM_MODEL=models/shapes" in choice.reason


def test_flash_has_another_id_on_modelscope() -> None:
    choice = choose_model(EngineConfig(model="auto", hub="modelscope"), "cuda")

    assert choice.value == "ZhipuAI/GLM-4.6V-Flash"


def test_a_configured_model_is_used() -> None:
    assert choose_model(EngineConfig(model="a/b"), "cpu").value == "a/b"


def test_small_weights_run_in_full_precision_and_large_ones_in_half() -> None:
    assert choose_dtype(EngineConfig(), "cpu", 10_000_000).value == "float32"
    assert choose_dtype(EngineConfig(), "cpu", 20 * GIB).value == "bfloat16"
    assert choose_dtype(EngineConfig(dtype="float16"), "cpu", 20 * GIB).value == "float16"


def test_threads_depend_on_the_model_and_leave_a_core_to_http() -> None:
    cores = usable_cores()
    assert choose_threads(EngineConfig(threads=0), 20 * GIB).value == str(cores if cores <= 2 else cores - 1)
    assert choose_threads(EngineConfig(threads=0), 10_000_000).value == "1"
    assert choose_threads(EngineConfig(threads=3), 10_000_000).value == "3"


def test_a_checkpoint_loads_with_progress_and_facts(tiny_checkpoint: Path) -> None:
    seen: list[float] = []

    model = load(EngineConfig(model=str(tiny_checkpoint), threads=1, device="cpu"), seen.append)

    assert seen == sorted(seen) and len(seen) > 5 and 0.9 < seen[-1] <= 1.0
    assert model.id == tiny_checkpoint.name
    assert model.facts["class"] == "Glm4vForConditionalGeneration"
    assert model.facts["demo"] is False and model.facts["knows"] is None
    choices = {"model", "device", "dtype", "threads", "context_tokens", "slots", "kv_cache", "kernels", "weights_read"}
    assert model.facts["choices"].keys() == choices
    assert model.facts["kernels"] == "torch" and "float32" in model.facts["choices"]["kernels"]
    assert model.context_tokens == 2048
    assert len(model.end_ids) == 3


def test_a_demo_folder_is_described_in_the_facts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    demo = {"id": "glm-test-demo", "knows": {"en": "shapes", "zh": "图形"}}
    (folder / "demo.json").write_text(json.dumps(demo), "utf-8")

    model = load(EngineConfig(model=str(folder), threads=1, device="cpu"), lambda fraction: None)

    assert (model.id, model.facts["demo"], model.facts["knows"]) == ("glm-test-demo", True, demo["knows"])


def test_the_checkpoint_loads_under_the_other_class_name_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "glm46v"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "glm46v"}), "utf-8")

    model = load(EngineConfig(model=str(folder), threads=1, device="cpu"), lambda fraction: None)

    assert model.facts["class"] == "Glm46VForConditionalGeneration"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-thing", "neither a folder nor a hub id"),
        ("/no/such/folder", "neither a folder nor a hub id"),
        ("tests", "needs config.json and"),
    ],
)
def test_a_missing_model_is_named_in_the_error(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load(EngineConfig(model=name, threads=1, device="cpu"), lambda fraction: None)


def test_another_architecture_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', "utf-8")

    with pytest.raises(LoadError, match=r"model_type must be one of .*Given: 'llama'"):
        load(EngineConfig(model=str(folder), threads=1, device="cpu"), lambda fraction: None)


def test_a_context_longer_than_the_model_allows_is_refused(tiny_checkpoint: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint), threads=1, device="cpu", context_tokens=4096)

    with pytest.raises(LoadError, match="must be <= 2048"):
        load(config, lambda fraction: None)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("/home/ann/.cache/glm-web/kernels-1f.so", "kernels-1f.so"),
        ("it failed (remove /home/ann/.cache/kernels.so.trial to try again)", "it failed (remove kernels.so.trial to try again)"),
        ("/usr/bin/c++ failed with exit code 1: /tmp/x/kernels.cpp:3: error", "c++ failed with exit code 1: kernels.cpp:3: error"),
        ("bf16/fp8, 3.5 / 4 GiB and/or https://example.org/a/b stay", "bf16/fp8, 3.5 / 4 GiB and/or https://example.org/a/b stay"),
    ],
)
def test_reasons_at_info_name_no_folder_of_the_machine(reason: str, shown: str) -> None:
    assert without_folders(reason) == shown
