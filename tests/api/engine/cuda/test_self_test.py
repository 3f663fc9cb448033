"""The proof at start: wrong, failing and slow paths are found, each alone, and right ones are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from api.engine.cuda.operations import PATHS, CudaOperations
from api.engine.cuda.self_test import prove
from api.engine.cuda.shape import Shape
from api.engine.model.recipe import make_recipe

SHAPE = Shape(heads=8, kv_heads=2, head_dim=32, hidden=128, inner=256, image_heads=4, image_head_dim=32, page_tokens=16)
CPU = torch.device("cpu")


class Right(CudaOperations):
    """Every path by plain torch, so that it runs without a card."""

    def __init__(self, recipe: str = "bf16") -> None:
        super().__init__(SHAPE.page_tokens, recipe=make_recipe(recipe))
        self.use_plain(PATHS)


class Penalising(Right):
    """With a way to lower logits in place, in which half of the rows are spoilt."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    @property
    def penalise(self) -> Any:
        return self._penalise

    def _penalise(self, logits: torch.Tensor, *tables: torch.Tensor) -> None:
        if self._how == "raises":
            raise RuntimeError("no kernel image is available for execution on the device")
        logits[len(logits) // 2 :] *= float("nan") if self._how == "nan" else 1.05


def broken(path: str, how: str) -> CudaOperations:
    """Right operations but for one path."""
    if path == "penalties":
        return Penalising(how)
    ops = Right({"float8": "fp8", "nf4": "nf4"}.get(path, "bf16"))
    name = {"decode": "attend_decode", "prefill": "attend_prefill", "norms": "add_norm", "rotation": "rotate_store",
            "activation": "activate", "image": "attend_image", "images": "attend_images", "float8": "linear", "nf4": "linear"}[path]  # fmt: skip
    right = getattr(ops, name)

    def wrong(*args: object, **kwargs: object) -> object:
        if how == "raises":
            raise RuntimeError("no kernel image is available for execution on the device")
        result = right(*args, **kwargs)
        if name == "linear":
            return lambda x: spoilt(result(x))
        return spoilt(result)

    def spoilt(result: Any) -> Any:
        first = result[0] if isinstance(result, tuple) else result
        first.view(-1)[first.numel() // 2 :] *= float("nan") if how == "nan" else 1.05
        return result

    setattr(ops, name, wrong)
    return ops


@pytest.mark.parametrize(("recipe", "needless"), [("bf16", {"float8", "nf4"}), ("fp8", {"nf4"}), ("nf4", {"float8"})])
def test_right_operations_are_proven(recipe: str, needless: set[str]) -> None:
    proofs = prove(Right(recipe), SHAPE, CPU, torch.bfloat16)

    assert [proof.path for proof in proofs] == [path for path in PATHS if path not in needless]
    assert all(proof.proven or "slower" in proof.reason for proof in proofs), proofs


@pytest.mark.parametrize("how", ["raises", "wrong", "nan"])
@pytest.mark.parametrize("path", PATHS)
def test_a_broken_path_is_switched_off_alone(path: str, how: str) -> None:
    proofs = {proof.path: proof for proof in prove(broken(path, how), SHAPE, CPU, torch.bfloat16)}

    assert not proofs[path].proven
    assert ("no kernel image" if how == "raises" else "relative error") in proofs[path].reason
    assert not any("error is" in proofs[other].reason for other in proofs if other != path)
