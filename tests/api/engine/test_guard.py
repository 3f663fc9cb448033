"""The guard with the demo model: numbers that are not finite, fingerprints, reloads and faults."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.engine.config import EngineConfig
from api.engine.engine import Engine
from api.engine.kernels import build
from api.engine.loaded_model import Model
from api.engine.loading.loader import load
from api.engine.model.weights import raw_bytes, weights_of
from api.engine.request import Delta, Done, Failed, Failure, Request, SamplingParams
from api.health.fault_injection import FILE_NAME, FaultInjection, flip_bit, swap_colors

SHAPES = Path(__file__).resolve().parents[3] / "models" / "shapes"
WAIT_S = 60.0
NEIGHBOURS = 31
TOKENS = 24
KINDS = ["float32", *(["bfloat16"] if build.processor_supported() else [])]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Model:
    config = EngineConfig(model=str(SHAPES), device="cpu", dtype=request.param, threads=1, slots=32, context_tokens=512)
    loaded = load(config, lambda fraction: None)
    assert loaded.facts["kernels"] == ("torch" if request.param == "float32" else "compiled")
    return loaded


@pytest.fixture
def started(model: Model, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start() -> Engine:
        faulty = FaultInjection(tmp_path).wrap(model)
        engines.append(Engine(lambda progress: faulty, 64))
        engines[-1].start()
        until(lambda: engines[-1].guard_report()["fingerprint"] == "same")
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop(WAIT_S)
    model.integrity.reload()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(engine: Engine, model: Model, texts: list[str], tokens: int = TOKENS) -> list[tuple[str, Done | Failed]]:
    """Greedy answers of `tokens` tokens to all, computed together."""
    inboxes: list[queue.Queue] = []
    for number, text in enumerate(texts):
        rendered = model.template.render([{"role": "user", "content": text}], None, False)
        ids = tuple(model.vocabulary.encode(rendered))
        inboxes.append(queue.Queue())
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, min_tokens=tokens)
        engine.submit(Request(f"r{number}", ids, sampling), inboxes[-1].put)
    answers = []
    for inbox in inboxes:
        text = ""
        while isinstance(event := inbox.get(timeout=WAIT_S), Delta):
            text += event.text
        answers.append((text, event))
    return answers


# The first is the longest, so that it is the first row of a batch, and it holds the first page of a new cache.
TEXTS = ["What can you do, and what else? " * 3] + [f"What is {n}, and what is {7 * n}?" for n in range(NEIGHBOURS)]


def test_a_row_that_is_not_a_number_fails_and_its_31_neighbours_keep_their_tokens(started, model, tmp_path) -> None:
    expected = ask(started(), model, TEXTS)
    engine = started()

    def poison() -> None:
        until(lambda: sum(item["answer_tokens"] > 2 for item in engine.in_flight()) == NEIGHBOURS + 1)
        (tmp_path / FILE_NAME).write_text(json.dumps({"fault": "nan-layer", "layer": 1, "row": 0}), encoding="utf-8")

    watcher = threading.Thread(target=poison)
    watcher.start()
    answers = ask(engine, model, TEXTS)
    watcher.join(WAIT_S)

    ends = [end.kind for _, end in answers if isinstance(end, Failed)]
    assert ends == [Failure.NONFINITE] and isinstance(answers[0][1], Failed)
    assert [text for text, _ in answers[1:]] == [text for text, _ in expected[1:]]
    report = engine.guard_report()
    assert (report["nonfinite_total"], report["nonfinite_recent"], report["fingerprint"]) == (1, 1, "same")
    # The same request again: it reads nothing that the failed one has written.
    assert ask(engine, model, TEXTS[:1])[0][0] == expected[0][0]


def test_pages_with_numbers_that_are_not_finite_do_not_harm_their_next_owner(started, model, tmp_path) -> None:
    expected = ask(started(), model, TEXTS[:3])
    engine = started()
    (tmp_path / FILE_NAME).write_text(json.dumps({"fault": "nan-layer", "layer": 0}), encoding="utf-8")
    assert isinstance(ask(engine, model, TEXTS[:1])[0][1], Failed)

    answers = ask(engine, model, TEXTS[:3])

    assert [text for text, _ in answers] == [text for text, _ in expected]


@pytest.mark.parametrize("cure", ["drop-caches", "reload-weights"])
def test_after_a_cure_only_new_numbers_that_are_not_finite_are_recent(cure, started, model, tmp_path) -> None:
    engine = started()
    (tmp_path / FILE_NAME).write_text(json.dumps({"fault": "nan-layer", "layer": 0}), encoding="utf-8")
    ask(engine, model, TEXTS[:1])
    assert engine.guard_report()["nonfinite_recent"] == 1

    engine.command(cure, WAIT_S)

    report = engine.guard_report()
    assert (report["nonfinite_total"], report["nonfinite_recent"]) == (1, 0)


@pytest.mark.parametrize(
    ("part", "stage"),
    [("decoder.layers.0.qkv", "layer-0"), ("vision.blocks.0.qkv", "vision"), ("decoder.head", "logits")],
)
def test_a_flipped_bit_is_found_and_a_reload_mends_it(part: str, stage: str, started, model) -> None:
    engine = started()
    flip_bit(model.runner, part)
    engine.command("fingerprint", WAIT_S)
    report = engine.guard_report()

    assert (report["fingerprint"], report["fingerprint_stage"]) == ("differs", stage)
    assert engine.command("reload-weights", WAIT_S) > 0
    assert engine.guard_report()["fingerprint"] == "same"
    assert engine.guard_report()["fingerprint_age_s"] < WAIT_S


def test_a_weight_that_no_fingerprint_reads_is_found_by_its_sum(started, model, monkeypatch) -> None:
    monkeypatch.setattr(model.integrity, "every_s", 0.05)
    engine = started()
    time.sleep(0.3)  # the sums of the reference
    embeddings = dict(weights_of(model.runner))["decoder.embeddings"]
    used = model.vocabulary.special["<|endoftext|>"]
    flip_bit(model.runner, "decoder.embeddings", used * embeddings.shape[1], 1)

    until(lambda: engine.guard_report()["fingerprint"] == "differs")

    assert engine.guard_report()["fingerprint_stage"] == "weights"
    engine.command("reload-weights", WAIT_S)
    time.sleep(0.3)
    assert engine.guard_report()["fingerprint"] == "same"


def test_swapped_colours_differ_in_the_vision_tower(started, model) -> None:
    engine = started()
    before = [raw_bytes(t).clone() for n, t in weights_of(model.runner) if n.startswith("vision.embed")]
    swap_colors(model.runner)
    engine.command("fingerprint", WAIT_S)
    assert engine.guard_report()["fingerprint_stage"] == "vision"
    swap_colors(model.runner)  # twice is as before, to the last bit
    after = [raw_bytes(t) for n, t in weights_of(model.runner) if n.startswith("vision.embed")]

    engine.command("fingerprint", WAIT_S)

    assert engine.guard_report()["fingerprint"] == "same"
    assert all(bool((one == other).all()) for one, other in zip(before, after, strict=True))


def test_a_reload_waits_for_running_requests_and_those_that_wait_follow(started, model) -> None:
    engine = started()
    expected = ask(engine, model, TEXTS[:1], 120)[0][0]
    results: list = []
    asking = threading.Thread(target=lambda: results.extend(ask(engine, model, TEXTS[:1] * 2, 120)))
    asking.start()
    until(lambda: engine.stats().running > 0)

    engine.command("reload-weights", WAIT_S)

    asking.join(WAIT_S)
    assert [text for text, _ in results] == [expected] * 2


def test_a_fingerprint_uses_and_changes_no_cache(started, model) -> None:
    engine = started()
    ask(engine, model, TEXTS[:2])
    before = engine.stats()

    engine.command("fingerprint", WAIT_S)

    after = engine.stats()
    for name in ("kv_used_tokens", "prefix_cache_queries", "encoder_cache_queries", "steps"):
        assert getattr(before, name) == getattr(after, name)
