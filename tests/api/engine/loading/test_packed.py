"""Quantised weights are kept for the next start, and nothing that is damaged, unfinished or old is trusted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from api.engine.config import EngineConfig
from api.engine.loaded_model import Model
from api.engine.loading import packed, safetensors_file
from api.engine.loading.loader import load
from api.engine.loading.safetensors_file import TensorReader
from settings import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo, whose matrices are large enough for NF4."""
    return Path(shutil.copytree(ROOT / "models" / "shapes", tmp_path / "demo"))


def load_nf4(folder: Path, weights="nf4") -> Model:
    return load(EngineConfig(model=str(folder), threads=1, device="cpu", slots=1, weights=weights), lambda fraction: None)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / packed.FOLDER).iterdir())


def origin(model: Model) -> str:
    return model.facts["choices"]["weights_read"]


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    original = TensorReader.read

    def read(self, file, name, device=None):
        sizes.append(file.tensors[name].nbytes)
        return original(self, file, name, device)

    monkeypatch.setattr(TensorReader, "read", read)
    return sizes


@pytest.mark.parametrize("recipe", ["nf4", "fp8"])
def test_the_second_start_reads_the_quantised_weights_alone(folder: Path, recipe, monkeypatch) -> None:
    sizes = bytes_read(monkeypatch)
    first = load_nf4(folder, recipe)
    whole = sum(sizes)
    sizes.clear()

    second = load_nf4(folder, recipe)

    assert "the next reads" in origin(first) and "quantised before" in origin(second)
    assert list(second.integrity.weight_sums()) == list(first.integrity.weight_sums())
    assert sum(sizes) < whole * 0.8 and kept(folder) == [f"{recipe}.safetensors"]
    second.integrity.reload()
    assert list(second.integrity.weight_sums()) == list(first.integrity.weight_sums())


def test_the_weights_in_their_own_format_are_not_kept_twice(folder: Path) -> None:
    assert "no larger" in origin(load_nf4(folder, "bf16"))
    assert not (folder / packed.FOLDER).exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_file_is_replaced(damage, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(load_nf4(folder).integrity.weight_sums())
    damage(folder / packed.FOLDER / "nf4.safetensors")

    model = load_nf4(folder)

    assert "packed_removed" in caplog.text and "the next reads" in origin(model)
    assert list(model.integrity.weight_sums()) == expected
    assert "quantised before" in origin(load_nf4(folder))


def test_a_file_of_other_weights_is_replaced(folder: Path) -> None:
    load_nf4(folder)
    os.utime(folder / "model.safetensors")  # another revision

    assert "the next reads" in origin(load_nf4(folder))
    assert "quantised before" in origin(load_nf4(folder))


def test_a_file_of_other_software_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_nf4(folder)
    monkeypatch.setattr(packed, "version", lambda package: "next")

    assert "the next reads" in origin(load_nf4(folder))


def test_without_room_on_the_disk_the_weights_are_loaded_and_not_kept(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(packed, "SPARE_BYTES", 2**60)

    model = load_nf4(folder)

    assert "not kept for the next: " in origin(model) and "are needed" in origin(model)
    assert kept(folder) == []


def test_where_the_checkpoint_cannot_be_written_to_the_cache_is_used(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    assert "the next reads nf4.safetensors" in origin(load_nf4(folder))
    assert len([*(tmp_path / "cache").rglob("nf4.safetensors")]) == 1
    assert "quantised before" in origin(load_nf4(folder))
    assert not (folder / packed.FOLDER).exists()


KILLED = """
    import sys, time
    from pathlib import Path
    from api.engine.config import EngineConfig
    from api.engine.loading import safetensors_file
    from api.engine.loading.loader import load

    safetensors_file.PIECE_BYTES = 65536
    def slow(descriptor):
        print("written", flush=True)
        time.sleep(60)
    if sys.argv[2] == "end":  # all bytes are there, the name is not
        safetensors_file.os.fsync = slow
    else:
        original = safetensors_file.write
        def stopping(*arguments):
            for number, count in enumerate(original(*arguments)):
                if number == 5:
                    slow(0)
                yield count
        import api.engine.loading.packed as packed
        packed.write = stopping
    load(EngineConfig(model=sys.argv[1], threads=1, device="cpu", slots=1, weights="nf4"), lambda fraction: None)
"""


@pytest.mark.parametrize("when", ["middle", "end"])
def test_a_process_killed_while_it_packs_leaves_nothing_that_is_trusted(folder: Path, when: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), when]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        (remains,) = kept(folder)
        assert remains.endswith(".tmp")
        other = load_nf4(folder)  # beside it: what it writes now stays
        assert kept(folder) == sorted([remains, "nf4.safetensors"]) and "the next reads" in origin(other)
        (folder / packed.FOLDER / "nf4.safetensors").unlink()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(0.05)

    model = load_nf4(folder)

    assert "the next reads" in origin(model) and kept(folder) == ["nf4.safetensors"]
    assert "quantised before" in origin(load_nf4(folder))
    assert safetensors_file.SafetensorsFile(folder / packed.FOLDER / "nf4.safetensors").tensors
