"""Proof at the start that recorded steps compute what the same operations compute one by one, that they count tokens for
penalties, and that tokens are sampled on the device as the host samples them. Writes to the KV cache, which must be empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from api.engine.cuda.graphs import Size, StepGraphs
from api.engine.kv_cache import BlockTable, Node
from api.engine.request import Request, SamplingParams
from api.engine.scheduler import Batch, Chunk
from api.engine.sequence import Sequence

# Relative, of all logits of a step: libraries compute other numbers of rows in other ways, which round differently.
MOST_DIFFERENCE = 0.1
PROMPT_TOKENS = 5  # of the shortest decoding sequence; others have up to 6 more
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 2, "top_p": 0.6, "seed": 1},
    {"temperature": 1.1, "top_k": 50, "min_p": 0.02, "seed": 2},
    {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
)


class Steps(Protocol):
    """What the proof needs of a CudaRunner."""

    records: bool  # whether recorded steps are used

    @property
    def graphs(self) -> StepGraphs: ...
    def begin(self, sequence: Sequence) -> None: ...
    def launch(self, batch: Batch) -> Any: ...
    def collect(self, flight: Any) -> list[Any]: ...
    def sample_on_host(self, logits: torch.Tensor, sequences: tuple[Sequence, ...]) -> list[Any]: ...
    def has_counted(self, sequence: Sequence) -> bool: ...


@dataclass
class StepProof:
    """What was found wrong; None: nothing. `steps` and `tokens` were compared."""

    steps: int = 0
    tokens: int = 0
    difference: float = 0.0  # the largest
    recorded: str | None = None
    sampled: str | None = None
    # What each recorded step took: sequences that decode, tokens of prompts, seconds.
    costs: list[tuple[int, int, float]] = field(default_factory=list)


def prove_steps(runner: Steps, sequences: int, pages: int, page_tokens: int, vocabulary: int) -> StepProof:
    """`sequences` may run at once; the KV cache has `pages` pages. Every recorded size that fits is compared."""
    proof = StepProof()
    decoding = [_sequence(slot, PROMPT_TOKENS + slot % 7, (slot,), vocabulary) for slot in range(min(sequences, pages // 2))]
    for sequence in decoding:
        runner.begin(sequence)
        runner.collect(_without_graphs(runner, Batch((), (Chunk(sequence, 0, len(sequence.keys)),))))
        sequence.computed = len(sequence.keys)
        sequence.append(1)
    free = range(len(decoding), pages)
    for size, batch in _batches(runner, decoding, free, page_tokens, vocabulary):
        flight = runner.launch(batch)
        tokens = [sampled.token for sampled in runner.collect(flight)]
        proof.costs.append((len(batch.decode), batch.chunk_tokens, flight.seconds))
        if not all(map(runner.has_counted, batch.sampled)):
            proof.recorded = f"a recorded step ({size.kind} {size.rows}) counts tokens wrongly"
            return proof
        found = flight.logits[flight.rows].clone()
        other = _without_graphs(runner, batch)
        runner.collect(other)
        expected = other.logits[other.rows]
        difference = float((found - expected).norm() / expected.norm())
        proof.steps, proof.difference = proof.steps + 1, max(proof.difference, difference)
        if not difference <= MOST_DIFFERENCE:  # also if it is not a number
            proof.recorded = f"a recorded step ({size.kind} {size.rows}) differs by {difference:.3f}"
            return proof
        theirs = [sampled.token for sampled in runner.sample_on_host(found, batch.sampled)]
        proof.tokens += len(tokens)
        # Of equal logits, which are frequent in bfloat16, either way may take another one.
        if wrong := sum(float(row[a]) != float(row[b]) for row, a, b in zip(found, tokens, theirs, strict=True)):
            proof.sampled = f"{wrong} of {len(tokens)} tokens differ"
    return proof


def _batches(
    runner: Steps, decoding: list[Sequence], free: range, page_tokens: int, vocabulary: int
) -> Iterator[tuple[Size, Batch]]:
    """A batch for each recorded size, as far as sequences and pages allow."""
    for size in runner.graphs.captured:
        if size.kind == "decode":
            if size.rows <= len(decoding):
                yield size, Batch(tuple(decoding[: size.rows]))
            continue
        needed = -(-size.rows // page_tokens)
        if needed > len(free) or len(decoding) < 2:
            continue
        prompt = _sequence(len(decoding) - 1, size.rows, tuple(free[:needed]), vocabulary)
        runner.begin(prompt)  # in the slot of one that does not decode in this batch
        chunks = (Chunk(prompt, 0, size.rows),)
        yield size, Batch(tuple(decoding[:-1][: len(KINDS)]) if size.kind == "mixed" else (), chunks)
        runner.begin(decoding[-1])


def _without_graphs(runner: Steps, batch: Batch) -> Any:
    runner.records = False
    try:
        return runner.launch(batch)
    finally:
        runner.records = True


def _sequence(slot: int, tokens: int, pages: tuple[int, ...], vocabulary: int) -> Sequence:
    ids = tuple((37 * slot + 101 * n) % vocabulary for n in range(tokens))
    sequence = Sequence(Request(f"proof {slot}", ids, SamplingParams(1, **KINDS[slot % len(KINDS)])), lambda event: None)
    sequence.slot, sequence.block_table = slot, BlockTable(Node(-1, (), None), [*pages], 0, None, [], 0)
    return sequence
