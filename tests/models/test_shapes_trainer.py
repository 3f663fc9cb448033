"""Training is one command, goes on where it was cut off, and writes a checkpoint that serves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.shapes.checkpoint import FOLDER
from models.shapes.eval import Model, Trial, user
from models.shapes.pictures import draw_shapes
from models.shapes.wording import Question

ROOT = Path(__file__).resolve().parents[2]


def train(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "models.shapes.train", "--rows", "4", "--out", folder / "out", "--state", folder / "state"]
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


# bfloat16, the default, is slow on a processor that does not compute it; the last test uses it.
FROM_NOTHING = ("--dense-steps", "1", "--no-bf16")


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that ended after two steps."""
    folder = tmp_path_factory.mktemp("cut-off")
    train(folder, *FROM_NOTHING, "--processes", "2", "--steps", "2")
    return folder


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_interrupted_run_resumes_and_its_checkpoint_answers(tmp_path, cut_off, processes):
    shutil.copytree(cut_off, tmp_path, dirs_exist_ok=True)

    again = train(tmp_path, *FROM_NOTHING, "--processes", processes, "--steps", "3")

    assert re.search(r"\b3/3\b", again) and not re.search(r"\b[01]/3\b", again)
    picture = draw_shapes([("red", "circle")])
    trial = Trial("color", "en", None, [user("What color is it?", 1)], [picture], Question("", "en", "", "", ""), False)
    assert isinstance(Model(tmp_path / "out", "cpu").answer(trial), str)


def test_training_can_continue_from_the_shipped_weights(tmp_path):
    shown = train(tmp_path, "--init", str(FOLDER), "--dense-steps", "0", "--steps", "2", "--processes", "1")

    # from nothing the answers' loss is above 5 for dozens of steps; the shipped weights know them already
    assert float(re.findall(r"answers=([\d.]+)", shown)[-1]) < 1.0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (FOLDER / "tokenizer.json").read_bytes()
