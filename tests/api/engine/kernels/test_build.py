"""Compiling the kernels, trying them in a child process, and the fallback to torch.

No library is loaded in this process: torch aborts when a second one registers the same operations.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prompts import STEPS, Steps, ask, request_for

from api.engine.config import EngineConfig
from api.engine.kernels import build, trial
from api.engine.kernels.build import KernelError
from api.engine.loaded_model import Model
from api.engine.loading import operations as choice
from api.engine.loading.loader import load
from api.engine.model.operations import AttentionMetadata, TorchOperations
from api.engine.model.recipe import BF16

HAS_INSTRUCTION = build.processor_supported()
CPU_WITH = "avx512f avx512_bf16"


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that the processor has AVX512_BF16, and compiles for one that has."""
    monkeypatch.setattr(build, "_processor_flags", lambda: CPU_WITH)
    monkeypatch.setattr(build, "TARGET", ("-march=cooperlake",))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of libraries for this module: compiling takes ten seconds and more."""
    return tmp_path_factory.mktemp("cache")


def untried(library: Path) -> Path:
    library.with_suffix(".trial").unlink(missing_ok=True)
    return library


def interpreter(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the child process of the trial run a shell script."""
    program = folder / "python-stand-in"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_models_in_bfloat16_on_a_cpu_with_avx512_bf16_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: CPU_WITH)

    assert build.unsupported("cpu", torch.bfloat16, 16, (128, 80)) is None
    assert "float32" in str(build.unsupported("cpu", torch.float32, 16, (128, 64)))
    assert "CPU" in str(build.unsupported("cuda", torch.bfloat16, 16, (128, 64)))
    assert "88" in str(build.unsupported("cpu", torch.bfloat16, 16, (128, 88)))
    assert "32" in str(build.unsupported("cpu", torch.bfloat16, 32, (64, 64)))
    monkeypatch.setattr(build, "_processor_flags", lambda: "avx2 avx512f")
    assert "AVX512_BF16" in str(build.unsupported("cpu", torch.bfloat16, 16, (128, 64)))


def test_with_amx_the_products_are_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: CPU_WITH)
    assert build.has_fast_products()
    monkeypatch.setattr(build, "_processor_flags", lambda: "avx512_bf16 amx_tile amx_bf16")
    assert not build.has_fast_products()


def test_a_library_is_compiled_once(processor: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.compile_library(cache)
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail("compiled again"))

    assert build.compile_library(cache) == first
    assert [file.name for file in cache.iterdir() if file.suffix == ".so"] == [first.name]


def test_an_unsupported_instruction_kills_the_child_process_only(
    processor: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = untried(build.compile_library(cache))
    if HAS_INSTRUCTION:
        assert build.try_library(library) == library
        return

    with pytest.raises(KernelError, match="SIGILL"):
        build.try_library(library)

    monkeypatch.setattr(build, "_try_in_child", lambda library: pytest.fail("tried again"))
    with pytest.raises(KernelError, match=r"SIGILL.*remove .*\.trial to try again"):
        build.try_library(library)


def test_after_a_trial_killed_by_an_illegal_instruction_torch_computes(
    processor: None, cache: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_folder", lambda: cache)
    untried(build.compile_library(cache))
    interpreter(tmp_path, "kill -ILL $$", monkeypatch)
    for _ in range(2):  # two starts; the second must not try it again
        model = loaded(tiny_checkpoint)

        assert model.facts["kernels"] == "torch"
        assert "killed by SIGILL" in model.facts["choices"]["kernels"]
        assert len(Steps(model).run(request_for(model, [ask("Hello")], []))[0]) == STEPS
        monkeypatch.setattr(build, "_try_in_child", lambda library: pytest.fail("tried again"))


def test_a_trial_that_hangs_is_killed_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "kernels.so"
    library.write_text("")
    interpreter(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(build, "TRIAL_LIMIT_S", 0.2)

    with pytest.raises(KernelError, match=r"did not finish within 0\.2 s"):
        build.try_library(library)

    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("tried again"))
    with pytest.raises(KernelError, match="did not finish"):
        build.try_library(library)


def test_a_file_that_is_not_a_library_is_refused_with_its_name(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_text("cut off")

    with pytest.raises(KernelError, match=r"kernels\.so"):
        build.try_library(library)


def test_a_library_with_wrong_results_does_not_pass() -> None:
    class Wrong(TorchOperations):
        def attend_decode(self, qkv: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
            return super().attend_decode(qkv, kv, metadata) * 1.5

    trial.compare(TorchOperations(build.PAGE_TOKENS))
    with pytest.raises(KernelError, match="the results of attend_decode differ"):
        trial.compare(Wrong(build.PAGE_TOKENS))


def test_without_a_compiler_torch_computes(
    processor: None, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")

    model = loaded(tiny_checkpoint)

    assert model.facts["kernels"] == "torch"
    assert "no C++ compiler" in model.facts["choices"]["kernels"] and "g++" in model.facts["choices"]["kernels"]


def test_the_error_of_a_failing_compiler_is_reported(
    processor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_of(tmp_path, "echo 'warning: first' >&2\necho 'error: No space left on device' >&2\nexit 4", monkeypatch)

    with pytest.raises(KernelError, match=r"c\+\+stand-in failed with exit code 4: error: No space left on device"):
        build.PendingLibrary(tmp_path / "cache").wait(30)

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_slow_compiler_does_not_delay_the_start(
    processor: None, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = tmp_path / "go on"
    os.mkfifo(go_on)
    compiler_of(tmp_path, f"read line < '{go_on}'; exit 4", monkeypatch)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(choice, "WAIT_S", 0.1)

    model = loaded(tiny_checkpoint)

    go_on.write_text("\n")  # the compiler ends
    assert model.facts["kernels"] == "torch"
    assert "the next start will use them" in model.facts["choices"]["kernels"]


def test_without_memory_for_the_weights_torch_computes(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory:
        needs_masks = False
        recipe = BF16

        def linear(self, *arguments: object, **options: object) -> None:
            raise RuntimeError("not enough memory for 4096 bytes of weights")

    monkeypatch.setattr(choice.OperationsChoice, "choose", lambda self: (OutOfMemory(), choice.Selection("compiled", "x")))

    model = loaded(tiny_checkpoint)

    assert model.facts["kernels"] == "torch" and "not enough memory" in model.facts["choices"]["kernels"]


def loaded(checkpoint: Path) -> Model:
    config = EngineConfig(model=str(checkpoint), threads=1, device="cpu", slots=2, dtype="bfloat16")
    return load(config, lambda fraction: None)


def compiler_of(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = folder / "c++stand-in"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
