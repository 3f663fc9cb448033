"""What errors of a CUDA device mean, and that a step that cannot be recorded or queued harms no later one."""

from __future__ import annotations

import pytest
import torch
from prompts import Steps, ask, request_for

from api.engine.cuda.faults import scope_of
from api.engine.loaded_model import Model


@pytest.mark.parametrize(
    ("error", "scope"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), "device"),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), "request"),
        (ValueError("no"), "request"),
    ],
)
def test_the_scope_of_an_error(error: Exception, scope: str) -> None:
    assert scope_of(error) == scope


@pytest.mark.parametrize("sampling", [{}, {"repetition_penalty": 1.2, "frequency_penalty": 0.3}], ids=["plain", "penalties"])
def test_a_step_that_could_not_be_queued_is_computed_again_from_full_tables(
    sampling: dict[str, float], plain: Model, replayed: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(plain, [ask("Hello, what is this? " * 3)], [], max_tokens=40, **sampling)
    expected = Steps(plain).run(request)[0]
    runner, steps = replayed.runner, Steps(replayed)
    sequence = steps.add(request)
    upload, failures = runner._staging.upload, []

    def failing(changes: int, tokens: int) -> None:
        if changes and len(failures) < 3 and len(sequence.output_ids) > 2:  # a page has been added
            failures.append(changes)
            raise torch.OutOfMemoryError("CUDA out of memory")
        upload(changes, tokens)

    monkeypatch.setattr(runner._staging, "upload", failing)
    while steps.scheduler.has_work:
        try:
            steps.step()
        except torch.OutOfMemoryError as error:
            assert runner.failure(error) == "memory"

    assert sequence.output_ids == expected and failures


def test_recording_stops_when_memory_runs_out(replayed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = replayed.runner

    def full(work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner._queue, "capture", full)
    graphs = runner.graphs
    graphs._missing = [size for size in graphs.captured if size.kind == "prompt"]

    assert not runner.prepare_next()
    assert graphs.complete and graphs.off is None and graphs.captured
