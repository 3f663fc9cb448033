"""Weights by name from safetensors files: the same as transformers loads, and every kind of misfit named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from network_source import NetworkSource
from safetensors.torch import load_file, save_file

from api.engine.config import EngineConfig
from api.engine.loaded_model import LoadError
from api.engine.loading import safetensors_file
from api.engine.loading.loader import load
from api.engine.loading.safetensors_file import SafetensorsFile, TensorReader, write
from api.engine.loading.safetensors_source import Checkpoint, SafetensorsSource
from settings import ROOT

CPU = torch.device("cpu")
FIRST = "model.language_model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def configure(folder: Path, part: str | None = None, **values) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (config[part] if part else config).update(values)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def load_folder(folder: Path):
    return load(EngineConfig(model=str(folder), threads=1, device="cpu", slots=1), lambda fraction: None)


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> SafetensorsSource:
    from transformers import AutoConfig

    return SafetensorsSource(Checkpoint(folder, AutoConfig.from_pretrained(folder)), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tensors_are_those_of_transformers(folder: Path, dtype: torch.dtype) -> None:
    from transformers import Glm4vForConditionalGeneration

    network = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    expected, source = NetworkSource(network), source_of(folder, dtype)

    for name, _ in network.named_parameters():
        assert torch.equal(source.take(name), expected.take(name)), name
    assert source.untaken() == [] and source.find("lm_head.bias") is None


def older(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def swapped(name: str) -> str:
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "language_model.model.")


@pytest.mark.parametrize("rename", [older, swapped])
def test_names_of_older_checkpoints_are_understood(folder: Path, rename: Callable[[str], str]) -> None:
    expected = load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})

    source = source_of(folder)

    for name, tensor in expected.items():
        assert torch.equal(source.take(name), tensor), name


def test_a_head_that_is_the_table_of_embeddings_is_read_from_it(folder: Path) -> None:
    from transformers import Glm4vForConditionalGeneration

    network = Glm4vForConditionalGeneration.from_pretrained(folder)
    network.config.tie_word_embeddings = True
    network.tie_weights()
    network.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")

    model = load_folder(folder)

    assert torch.equal(source_of(folder).take("lm_head.weight"), network.model.language_model.embed_tokens.weight)
    assert model.facts["parameters"] == sum(p.numel() for p in network.parameters())


def test_a_checkpoint_in_several_files_is_read_by_its_index(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = list(tensors), ("a.safetensors", "b.safetensors")
    placed = {name: files[number % 2] for number, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}), "utf-8")
    save_file({"stray": torch.ones(1)}, folder / "c.safetensors")  # not in the index

    load_folder(folder)
    (folder / "b.safetensors").unlink()

    with pytest.raises(LoadError, match=r"names files that are missing: b\.safetensors\. Download"):
        load_folder(folder)


def test_all_that_does_not_fit_is_named_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.visual.merger.proj.weight"]
        tensors["model.language_model.layers.9.mlp.extra"] = torch.ones(1)
        tensors[FIRST] = tensors[FIRST][:, :-1].contiguous()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    rewrite(folder, change)

    with pytest.raises(LoadError) as error:
        load_folder(folder)
    message = str(error.value)
    assert "missing: model.visual.merger.proj.weight" in message
    assert "unknown: model.language_model.layers.9.mlp.extra" in message
    assert f"{FIRST} [32, 47] instead of [32, 48]" in message
    assert "lm_head.weight I8" in message


def test_a_long_list_is_cut(folder: Path) -> None:
    rewrite(folder, lambda tensors: {"lm_head.weight": tensors["lm_head.weight"]})

    with pytest.raises(LoadError, match=r"missing: [^,]+(, [^,]+){3} and \d+ more"):
        load_folder(folder)


def test_a_file_that_is_cut_off_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 1000, 5):
        file.write_bytes(whole[:size])
        with pytest.raises(LoadError, match=r"model\.safetensors: (cut off|no safetensors file)"):
            load_folder(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_not_a_crash(folder: Path) -> None:
    source = source_of(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(3000)

    with pytest.raises(LoadError, match="cannot be read: it ends before byte"):
        for name in list(load_shapes(source)):
            source.take(name)


def load_shapes(source: SafetensorsSource) -> list[str]:
    return list(source._checkpoint.shapes)


def test_other_files_than_safetensors_are_refused_with_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(LoadError, match=r"only \*\.safetensors are loaded.*pytorch_model\.bin.*save_pretrained"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_config", {"hidden_act": "gelu"}, r"text_config\.hidden_act must be silu\. Given: gelu"),
        ("vision_config", {"hidden_act": "gelu"}, r"vision_config\.hidden_act must be silu\. Given: gelu"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
            r"rope_type must be default\. Given: linear",
        ),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}},
            r"the sum of mrope_section must be half of the 8 rotated dimensions of a head\. Given: \[1, 1, 1\]",
        ),
        ("vision_config", {"spatial_merge_size": 4}, r"merge_size must be 4, the spatial_merge_size|another shape"),
        (None, {"quantization_config": {"quant_method": "awq"}}, "quantised checkpoints are not loaded"),
    ],
)  # fmt: skip
def test_a_config_that_the_engine_does_not_compute_is_refused(folder: Path, part, values: dict, message: str) -> None:
    configure(folder, part, **values)

    with pytest.raises(LoadError, match=message):
        load_folder(folder)


def test_patches_of_another_size_than_the_encoder_takes_are_refused(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "patch_size": 16}), "utf-8")

    with pytest.raises(LoadError, match=r"patch_size must be 14, the patch_size of config\.json\. Given: 16"):
        load_folder(folder)


def test_a_tensor_that_the_engine_does_not_ask_for_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SafetensorsSource, "find", lambda self, name: None)

    with pytest.raises(LoadError, match=r"does not know what these weights are for: .*q_proj\.bias"):
        load_folder(folder)


def test_the_progress_counts_bytes(folder: Path) -> None:
    seen: list[float] = []

    load(EngineConfig(model=str(folder), threads=1, device="cpu", slots=1), seen.append)

    tensors = load_file(folder / "model.safetensors")
    assert len(seen) >= len(tensors) and seen == sorted(seen)


def test_weights_are_loaded_again_from_the_files_and_stay_if_those_are_damaged(folder: Path) -> None:
    model = load_folder(folder)
    before = list(model.integrity.weight_sums())
    with torch.inference_mode():
        model.runner.decoder.embeddings[3] += 1
    assert list(model.integrity.weight_sums()) != before

    model.integrity.reload()

    assert list(model.integrity.weight_sums()) == before
    decoder = model.runner.decoder
    rewrite(folder, lambda tensors: {name: tensors[name] for name in list(tensors)[1:]})
    with pytest.raises(LoadError, match="missing"):
        model.integrity.reload()
    assert model.runner.decoder is decoder and list(model.integrity.weight_sums()) == before


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 4096)
    monkeypatch.setattr(safetensors_file, "READ_BYTES", 1000)
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3000), "empty": torch.ones(0, 4), "b": torch.randn(7, 5).bfloat16()}

    assert sum(write(path, tensors, {"made": "here"})) == 3000 * 4 + 70
    file, came = SafetensorsFile(path), []
    reader = TensorReader(CPU, came.append)
    read = {name: reader.read(file, name) for name in tensors}
    reader.close()

    assert all(torch.equal(read[name], tensors[name]) for name in tensors) and file.metadata == {"made": "here"}
    assert came == [4096, 4096, 12000 - 8192, 70]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


LARGE = """
    import json, resource, sys
    import torch, transformers
    from api.engine.config import EngineConfig
    from api.engine.loading.loader import load

    folder, allowed = sys.argv[1], int(sys.argv[2])
    torch.ones(8, 8) @ torch.ones(8, 8)
    import api.engine.kernels.operations
    size = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (size + allowed, size + allowed))
    model = load(
        EngineConfig(model=folder, threads=1, device="cpu", slots=1, dtype="bfloat16", kernels="torch",
                     context_tokens=512, kv_cache_bytes=2**24), lambda fraction: None)
    print(model.facts["parameters"])
"""


def test_a_checkpoint_of_2_gb_is_loaded_with_1_gb_more_than_its_size(folder: Path) -> None:
    """The limit counts all private memory of the process beyond what it has after its imports."""
    configure(folder, "text_config", hidden_size=2048, intermediate_size=8192, num_hidden_layers=18,
              num_attention_heads=16, num_key_value_heads=2, head_dim=128)  # fmt: skip
    configure(folder, "vision_config", out_hidden_size=2048)
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    configure(folder, "text_config", rope_parameters=rope)
    from transformers import AutoConfig

    from api.engine.loading.families import shapes_of

    (folder / "model.safetensors").unlink()
    shapes = shapes_of(AutoConfig.from_pretrained(folder))
    size = sparse_checkpoint(folder / "model.safetensors", shapes)
    assert size > 2e9

    script = textwrap.dedent(LARGE)
    command = [sys.executable, "-c", script, str(folder), str(size + 2**30)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 2 == size
    command[-1] = str(size - 2**28)  # the limit limits
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode


def sparse_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A file of zeros, which take no room on the disk. Returns the bytes of its tensors."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at
