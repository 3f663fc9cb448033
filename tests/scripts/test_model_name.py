"""What start.sh says of GLM_MODEL before it stops anything is what the API would say after."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.engine.loaded_model import LoadError
from api.engine.loading import loader
from deploy import model_name


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, files in {"whole": ("config.json", "model.safetensors"), "bare": ("model.safetensors",), "empty": ()}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("whole", True), ("bare", False), ("empty", False), ("nowhere", False), ("/no/such/folder", False), ("./no/folder", False),
        ("owner/name", True), ("owner/name@v1.0", True), ("owner/name@", False), ("../name", False), ("a/b/c", False),
    ],
)  # fmt: skip
def test_it_agrees_with_the_loader(folders: Path, model: str, named: bool) -> None:
    assert (model_name.why_none(model, folders) == "") is named
    try:
        loader._local_folder(model, folders)
        loads = True
    except LoadError:
        loads = False
    assert loads is named


def test_auto_is_always_something() -> None:
    assert model_name.why_none("auto") == ""
