"""Choosing the next token of every row of a batch at once.

Every row has its own settings and its own random numbers, drawn from its seed and the number of the
token alone; so an answer does not depend on who else is in the batch. Same order of steps as
transformers, so greedy answers agree with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Items

import numpy as np
import torch

from api.engine.loaded_model import SampledToken
from api.engine.request import SamplingParams, TokenLogprob
from api.engine.sequence import Sequence

# A cut to at most so many tokens is found without sorting the vocabulary.
SMALL_K = 1024


class NothingAllowed(ValueError):
    """A grammar forbids every token."""


class Sampler:
    def __init__(self, slots: int, vocabulary_size: int, device: torch.device) -> None:
        self._size, self._device = vocabulary_size, device
        # What each slot's request has in its prompt or answer, and how often in its answer.
        self._seen = torch.zeros(slots, vocabulary_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(slots, vocabulary_size, dtype=torch.int16, device=device)
        self._seeds = np.zeros(slots, dtype=np.uint64)

    def begin(self, sequence: Sequence) -> None:
        """A request has been given its slot, for the first time or after it had to give way."""
        sampling, slot = sequence.request.sampling, sequence.slot
        assert slot is not None
        seed = sampling.seed
        if seed is None:  # one for each request, or it would draw other tokens after it had to give way
            sequence.random_seed = sequence.random_seed or secrets.randbits(63)
            seed = sequence.random_seed
        self._seeds[slot] = seed % 2**64
        if sampling.repetition_penalty != 1.0:
            self._seen[slot] = False
            self._seen[slot, self._tensor(sequence.token_ids)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts[slot] = 0
            for token in sequence.output_ids:
                self._counts[slot, token] += 1

    def choose(self, logits: torch.Tensor, sequences: Items[Sequence]) -> list[SampledToken]:
        """One token for each row of logits [rows, vocabulary] in float32."""
        scores = self._shape(logits, sequences)
        chosen = scores.argmax(-1)
        drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
        if drawn:
            places = self._tensor(drawn)
            chosen[places] = self._draw(scores[places], [sequences[row] for row in drawn])
        tokens = chosen.tolist()
        for row, sequence in enumerate(sequences):
            if sequence.output is not None and sequence.output.forced is not None:
                tokens[row] = sequence.output.forced
        choices = self._explain(logits, tokens, sequences)
        self._note(tokens, sequences)
        return choices

    # Scores: what requests want to be different from the model's own logits.

    def _shape(self, logits: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        settings = [s.request.sampling for s in sequences]
        scores = logits
        if any(s.logit_bias for s in settings):
            scores = self._bias(scores, settings)
        if any(s.repetition_penalty != 1.0 for s in settings):
            scores = self._penalise_seen(scores, sequences)
        if any(s.presence_penalty or s.frequency_penalty for s in settings):
            scores = self._penalise_counts(scores, sequences)
        return self._mask(scores, sequences)

    def _bias(self, scores: torch.Tensor, settings: Items[SamplingParams]) -> torch.Tensor:
        entries = [(row, token, bias) for row, s in enumerate(settings) for token, bias in s.logit_bias]
        rows, tokens, biases = zip(*entries, strict=True)
        values = torch.tensor(biases, dtype=scores.dtype, device=self._device)
        return scores.index_put((self._tensor(rows), self._tensor(tokens)), values, accumulate=True)

    def _penalise_seen(self, scores: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        rows = [row for row, s in enumerate(sequences) if s.request.sampling.repetition_penalty != 1.0]
        some = scores[rows]
        penalty = self._column([sequences[row].request.sampling.repetition_penalty for row in rows])
        lowered = torch.where(some < 0, some * penalty, some / penalty)
        return _replace(scores, rows, torch.where(self._seen[self._slots(sequences, rows)], lowered, some))

    def _penalise_counts(self, scores: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        settings = [s.request.sampling for s in sequences]
        rows = [row for row, s in enumerate(settings) if s.presence_penalty or s.frequency_penalty]
        counts = self._counts[self._slots(sequences, rows)].float()
        frequency = self._column([settings[row].frequency_penalty for row in rows])
        presence = self._column([settings[row].presence_penalty for row in rows])
        return _replace(scores, rows, scores[rows] - frequency * counts - presence * (counts > 0))

    def _mask(self, scores: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        answers = [s.output for s in sequences]
        barred = [(row, token) for row, a in enumerate(answers) if a is not None for token in a.barred_ids]
        if barred:
            rows, tokens = zip(*barred, strict=True)
            values = torch.full((len(barred),), -torch.inf, device=self._device)
            scores = scores.index_put((self._tensor(rows), self._tensor(tokens)), values)
        ruled = [row for row, a in enumerate(answers) if a is not None and a.grammar is not None and a.forced is None]
        if ruled:
            words = np.stack([np.asarray(answers[row].grammar.allowed()).reshape(-1) for row in ruled])
            allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : self._size].astype(bool)
            if not allowed.any(axis=1).all():
                raise NothingAllowed("the grammar allows no token")
            bits = torch.zeros(len(ruled), self._size, dtype=torch.bool, device=self._device)
            bits[:, : allowed.shape[1]] = torch.from_numpy(allowed).to(self._device)
            scores = _replace(scores, ruled, scores[ruled].masked_fill(~bits, -torch.inf))
        return scores

    # Random choice: cut the distribution, then invert its cumulative sum at one random number for each row.

    def _draw(self, scores: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        settings = [s.request.sampling for s in sequences]
        scores = scores / self._column([s.temperature for s in settings])
        random = self._uniform(sequences)
        chosen = torch.zeros(len(sequences), dtype=torch.long, device=self._device)
        # How a row is handled depends on its own settings only, or its neighbours would change its tokens.
        ways: dict[str, list[int]] = {"few": [], "sorted": [], "all": []}
        for row, s in enumerate(settings):
            ways["few" if 0 < s.top_k <= SMALL_K else "sorted" if s.top_p < 1.0 or s.top_k > 0 else "all"].append(row)
        for way, rows in ways.items():
            if not rows:
                continue
            some, among = [settings[row] for row in rows], scores[rows]
            if way == "all":
                chosen[rows] = _invert(self._cut_unlikely(among.softmax(-1), some), random[rows])
                continue
            widest = min(max(s.top_k for s in some), self._size) if way == "few" else self._size
            values, tokens = (
                among.topk(widest, sorted=True) if way == "few" else among.sort(descending=True, stable=True)
            )
            place = _invert(self._cut(values, some), random[rows])
            chosen[rows] = tokens.gather(-1, place[:, None])[:, 0]
        return chosen

    def _cut(self, values: torch.Tensor, settings: Items[SamplingParams]) -> torch.Tensor:
        """Chances of ordered values [rows, kept], best first, with what top-k, top-p and min-p drop set to 0."""
        ranks = torch.arange(values.shape[-1], device=self._device)
        most = self._column([s.top_k or self._size for s in settings])
        chances = values.masked_fill(ranks >= most, -torch.inf).softmax(-1)
        # A token goes if the better ones already reach top_p; the best one always stays.
        better = chances.cumsum(-1) - chances
        dropped = (better >= self._column([s.top_p for s in settings])) & (ranks > 0)
        return self._cut_unlikely(chances.masked_fill(dropped, 0.0), settings)

    def _cut_unlikely(self, chances: torch.Tensor, settings: Items[SamplingParams]) -> torch.Tensor:
        if not any(s.min_p for s in settings):
            return chances
        least = self._column([s.min_p for s in settings]) * chances.max(-1, keepdim=True).values
        return chances.masked_fill(chances < least, 0.0)

    def _uniform(self, sequences: Items[Sequence]) -> torch.Tensor:
        """A random number from 0 to 1 for each row: SplitMix64 of its seed, at the place of its next token."""
        slots = np.array([s.slot for s in sequences])
        place = np.array([len(s.output_ids) + 1 for s in sequences], dtype=np.uint64)
        z = _mix(self._seeds[slots]) + place * np.uint64(0x9E3779B97F4A7C15)
        return torch.from_numpy((_mix(z) >> np.uint64(11)).astype(np.float64) / 2**53).to(self._device)

    # Afterwards.

    def _explain(self, logits: torch.Tensor, tokens: list[int], sequences: Items[Sequence]) -> list[SampledToken]:
        choices = [SampledToken(token) for token in tokens]
        rows = [row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
        if not rows:
            return choices
        counts = [sequences[row].request.sampling.logprobs or 0 for row in rows]
        logprobs = logits[rows].log_softmax(-1)
        best = logprobs.topk(max(*counts, 1), sorted=True)
        values, places = best.values.tolist(), best.indices.tolist()
        own = logprobs.gather(-1, self._tensor([[tokens[row]] for row in rows]))[:, 0].tolist()
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            top = tuple(zip(places[number][:count], values[number][:count], strict=True))
            choices[row] = SampledToken(tokens[row], TokenLogprob(tokens[row], own[number], top))
        return choices

    def _note(self, tokens: list[int], sequences: Items[Sequence]) -> None:
        slots, chosen = self._tensor([s.slot for s in sequences]), self._tensor(tokens)
        if any(s.request.sampling.repetition_penalty != 1.0 for s in sequences):
            self._seen[slots, chosen] = True
        if any(s.request.sampling.presence_penalty or s.request.sampling.frequency_penalty for s in sequences):
            self._counts[slots, chosen] += 1

    def _slots(self, sequences: Items[Sequence], rows: list[int]) -> torch.Tensor:
        return self._tensor([sequences[row].slot for row in rows])

    def _column(self, values: Items[float]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)[:, None]

    def _tensor(self, values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _replace(scores: torch.Tensor, rows: list[int], values: torch.Tensor) -> torch.Tensor:
    if len(rows) == len(scores):
        return values
    scores = scores.clone()
    scores[rows] = values
    return scores


def _invert(chances: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """The place where the cumulative sum of chances [rows, n] passes a random part of its total."""
    sums = chances.double().cumsum(-1)
    place = torch.searchsorted(sums, (random * sums[:, -1])[:, None], right=True)[:, 0]
    # Rounding may step past the last token that has a chance.
    last = (chances > 0).long().mul_(torch.arange(1, chances.shape[-1] + 1, device=chances.device)).argmax(-1)
    return torch.minimum(place, last)


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
