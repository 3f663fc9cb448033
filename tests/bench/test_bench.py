"""The benchmark's own arithmetic, and one real run of it against the real server with the demo model."""

from __future__ import annotations

import json

import pytest

from bench import serve, servers
from bench.checkpoint import words
from bench.client import Sample
from bench.report import Results, percentile, summarise
from bench.workloads import WORDS, question
from models.shapes.checkpoint import FOLDER as DEMO


def sample(started: float, moments: list[float], tokens: int, turn: int = 1, error: str | None = None) -> Sample:
    return Sample(started, moments, tokens=tokens, ended=moments[-1] if moments else started, turn=turn, error=error)


def test_percentiles_lie_between_the_nearest_values():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 1.0], 0.95) == pytest.approx(0.95)
    assert percentile([], 0.5) is None


def test_a_cell_counts_tokens_over_its_duration_without_failures():
    samples = [
        sample(0.0, [1.0, 2.0, 3.0], 3),
        sample(0.0, [2.0, 4.0], 5, turn=2),  # five tokens in two pieces
        sample(0.0, [], 0, error="503"),
    ]

    cell = summarise(samples, "r", "s", "C", 2, None)

    assert cell.tokens_per_s == 8 / 4.0
    assert (cell.first_turn, cell.later_turns) == (1.0, 2.0)
    assert cell.tpot_p50 == percentile([1.0, 0.5], 0.5)
    assert (cell.requests, cell.errors) == (3, 1)


def test_ratios_compare_within_a_round_and_use_the_base_highest_load():
    def cell(name: str, round_name: str, parallel: int, rate: float):
        return summarise([sample(0.0, [0.5, 1.0], int(rate))], round_name, name, "A", parallel, None)

    results = Results(
        [
            cell("base", "1", 1, 10), cell("base", "1", 4, 8), cell("ours", "1", 16, 80),
            cell("base", "2", 1, 20), cell("base", "2", 4, 20), cell("ours", "2", 16, 100),
        ],
        "base",
    )  # fmt: skip

    assert results.ratios("ours", "A", 16) == [5.0, 10.0]
    assert "| A | 16 | ours | 90.0 | 7.5x (5.0-10.0) |" in results.table()


def test_a_peer_is_compared_at_the_same_load_in_the_same_round_and_not_where_one_failed():
    def cell(name: str, round_name: str, parallel: int, rate: float, error: str | None = None):
        failed = [sample(0.0, [], 0, error=error)] if error else []
        return summarise([sample(0.0, [0.5, 1.0], int(rate)), *failed], round_name, name, "A", parallel, None)

    results = Results(
        [
            cell("ours", "1", 1, 30), cell("peer", "1", 1, 20), cell("ours", "2", 1, 60), cell("peer", "2", 1, 60),
            cell("ours", "1", 4, 80), cell("peer", "1", 4, 10, error="502"), cell("ours", "3", 1, 99),
        ],
        "base",
    )  # fmt: skip

    assert results.matrix("ours", "peer").splitlines()[::2] == ["| workload | 1 | 4 |", "| A | 1.25 (1.00-1.50) |  |"]


def test_questions_have_as_many_tokens_as_words():
    import random

    from tokenizers import Tokenizer

    text = question(random.Random(3), 64)

    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert len(ids) == 64 and set(ids) <= set(words().values())
    assert len(WORDS) > 200


def test_the_server_is_driven_over_the_protocol(tmp_path, capsys):
    results = tmp_path / "results.jsonl"

    load = "--workloads B --parallel 2 --rounds 1 --waves 1 --tokens 3 --dtype float32 --without a --together"
    with servers.this(DEMO, "float32", "cpu") as peer:
        other = ["--url", f"peer={peer.address.url}/v1", "--url-key", peer.address.key]
        serve.main([*load.split(), *other, "--model", str(DEMO), "--results", str(results)])

    cell, theirs = map(json.loads, results.read_text().splitlines())
    assert (cell["server"], cell["requests"], cell["errors"]) == ("b: this server", 3, 0)
    assert (theirs["server"], theirs["requests"], theirs["errors"]) == ("c: peer", 3, 0)
    assert "as a part of those of peer" in capsys.readouterr().out
    assert cell["tokens_per_s"] > 0 and 0 < cell["ttft_p50"] <= cell["ttft_p95"] < 60
    assert cell["peak_bytes"] > 100 * 2**20


def test_the_naive_server_answers_with_text_and_usage():
    from bench.naive import Answerer
    from bench.workloads import WORKLOADS, turns

    messages = [{"role": "user", "content": turns(WORKLOADS["B"], "1")[0]}]
    events = list(Answerer(DEMO, "float32", "cpu").stream({"messages": messages, "max_tokens": 3}))

    usage = json.loads(events[-2].removeprefix("data: "))["usage"]
    assert events[-1] == "data: [DONE]\n\n"
    assert usage["completion_tokens"] == 3 and usage["prompt_tokens"] > 40


def test_the_profile_of_the_edge_adds_up():
    from bench.answer import report

    row = {"body": 0.001, "vision": 0.003, "between, SSE, socket": 0.0, "all": 0.004}

    lines = report([row, row], "demo").splitlines()

    assert lines[3] == "| vision | 3.00 | 75% | 3.00 |" and lines[-1] == "| all | 4.00 | 100% | 4.00 |"
