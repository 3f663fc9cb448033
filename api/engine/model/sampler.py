"""Samples the next token of every row of a batch at once.

Each row has its own sampling parameters, and random numbers that depend on its seed and the index of the token alone, so
its output does not depend on the rest of the batch. Biases, penalties and masks are applied in the order of transformers'
logits processors (5.23, GenerationMixin._get_logits_processor), so greedy output agrees with it. Engine thread only.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Items

import numpy as np
import torch

from api.engine.loaded_model import SampledToken
from api.engine.request import SamplingParams, TokenLogprob
from api.engine.sequence import Sequence
from api.engine.text.output import GrammarViolation

# Stands for the token of a row whose logits are not finite, until the tokens are on the CPU.
NOT_FINITE = -1
# Up to this top_k, `topk` is used instead of sorting the vocabulary.
MAX_PARTIAL_SORT = 1024


class Sampler:
    """Keeps the seed of one sequence for each of `slots` and, for penalties, which tokens it has and how often."""

    def __init__(self, slots: int, vocabulary_size: int, device: torch.device) -> None:
        self._size, self._device = vocabulary_size, device
        # For each slot: whether a token occurs in prompt or output, and its count in the output.
        self.seen = torch.zeros(slots, vocabulary_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(slots, vocabulary_size, dtype=torch.int16, device=device)
        self._counted = [0] * slots  # so many tokens of the output are in both
        self._seeds = np.zeros(slots, dtype=np.uint64)

    def begin(self, sequence: Sequence) -> None:
        """Prepare the slot of a sequence, which has it for the first time or again after a preemption."""
        sampling, slot = sequence.request.sampling, sequence.slot
        assert slot is not None
        seed = sampling.seed
        if seed is None:  # kept by the sequence, so that it samples the same tokens after a preemption
            sequence.random_seed = sequence.random_seed or secrets.randbits(63)
            seed = sequence.random_seed
        self._seeds[slot] = seed % 2**64
        if has_penalty(sampling):
            self._count_again(sequence, len(sequence.output_ids))

    def sample(
        self, logits: torch.Tensor, sequences: Items[Sequence], penalised: Items[bool] | None = None
    ) -> list[SampledToken]:
        """One token for each row of float32 logits [rows, vocabulary]. Raises GrammarViolation.

        Rows that are `penalised` already are not penalised again. A row with a logit that is not finite is marked, at the
        cost of one sum: the mark travels with the tokens, so that nothing waits for it.
        """
        penalties = [row for row, s in enumerate(sequences) if has_penalty(s.request.sampling)]
        if penalties:
            self.count([sequences[row] for row in penalties])
        left = [row for row in penalties if not (penalised and penalised[row])]
        scores = self._process_logits(logits, sequences, left)
        sampled = scores.argmax(-1)
        random = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
        if random:
            rows = self._tensor(random)
            sampled[rows] = self._sample_random(scores[rows], [sequences[row] for row in random])
        tokens, broken = self._on_cpu(sampled, logits)
        for row in broken:
            tokens[row] = 0  # a valid index for what follows
        for row, sequence in enumerate(sequences):
            if sequence.output is not None and sequence.output.forced is not None:
                tokens[row] = sequence.output.forced
        result = self._with_logprobs(logits, tokens, sequences)
        for row in broken:
            result[row] = SampledToken(0, finite=False)
        return result

    def _on_cpu(self, sampled: torch.Tensor, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """The sampled tokens, and the rows whose logits are not finite. One sum tells: it is finite if all of them are."""
        if self._device.type == "cpu":  # numpy's calls cost a third of torch's
            with np.errstate(all="ignore"):
                finite = np.isfinite(logits.numpy().sum(-1))
            return sampled.tolist(), [] if finite.all() else np.flatnonzero(~finite).tolist()
        sums = logits.sum(-1)
        tokens = sampled.masked_fill_((sums - sums) != 0, NOT_FINITE).tolist()
        return tokens, [row for row, token in enumerate(tokens) if token == NOT_FINITE]

    # Scores: logits after biases, penalties and masks.

    def _process_logits(self, logits: torch.Tensor, sequences: Items[Sequence], penalties: list[int]) -> torch.Tensor:
        """`penalties`: the rows that have some."""
        params = [s.request.sampling for s in sequences]
        scores = logits
        if any(s.logit_bias for s in params):
            scores = self._bias(scores, params)
        if penalties:
            scores = self._penalise(scores, sequences, penalties)
        return self._mask(scores, sequences)

    def _bias(self, scores: torch.Tensor, params: Items[SamplingParams]) -> torch.Tensor:
        entries = [(row, token, bias) for row, s in enumerate(params) for token, bias in s.logit_bias]
        rows, tokens, biases = zip(*entries, strict=True)
        values = torch.tensor(biases, dtype=scores.dtype, device=self._device)
        return scores.index_put((self._tensor(rows), self._tensor(tokens)), values, accumulate=True)

    def _penalise(self, scores: torch.Tensor, sequences: Items[Sequence], rows: list[int]) -> torch.Tensor:
        params = {row: sequences[row].request.sampling for row in rows}
        if repeated := [row for row in rows if params[row].repetition_penalty != 1.0]:
            penalty = self._column([params[row].repetition_penalty for row in repeated])
            seen = self.seen[self._slots(sequences, repeated)]
            scores = _replace(scores, repeated, penalise_seen(scores[repeated], seen, penalty))
        if counted := [row for row in rows if params[row].presence_penalty or params[row].frequency_penalty]:
            presence = self._column([params[row].presence_penalty for row in counted])
            frequency = self._column([params[row].frequency_penalty for row in counted])
            counts = self.counts[self._slots(sequences, counted)]
            scores = _replace(scores, counted, penalise_counts(scores[counted], counts, presence, frequency))
        return scores

    def _mask(self, scores: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        outputs = [s.output for s in sequences]
        barred = [(row, token) for row, o in enumerate(outputs) if o is not None for token in o.barred_ids]
        if barred:
            rows, tokens = zip(*barred, strict=True)
            values = torch.full((len(barred),), -torch.inf, device=self._device)
            scores = scores.index_put((self._tensor(rows), self._tensor(tokens)), values)
        bound = [row for row, o in enumerate(outputs) if o is not None and o.grammar is not None and o.forced is None]
        if bound:
            words = np.stack([np.asarray(outputs[row].grammar.allowed()).reshape(-1) for row in bound])
            allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : self._size].astype(bool)
            if not allowed.any(axis=1).all():
                raise GrammarViolation("the grammar allows no token")
            bits = torch.zeros(len(bound), self._size, dtype=torch.bool, device=self._device)
            bits[:, : allowed.shape[1]] = torch.from_numpy(allowed).to(self._device)
            scores = _replace(scores, bound, scores[bound].masked_fill(~bits, -torch.inf))
        return scores

    # Random sampling: truncate the distribution, then invert its cumulative sum at one random number for each row.

    def _sample_random(self, scores: torch.Tensor, sequences: Items[Sequence]) -> torch.Tensor:
        params = [s.request.sampling for s in sequences]
        scores = scores / self._column([s.temperature for s in params])
        random = self._uniform(sequences)
        sampled = torch.zeros(len(sequences), dtype=torch.long, device=self._device)
        # The method depends on the row's own parameters only: other rows must not change its tokens.
        methods: dict[str, list[int]] = {"few": [], "sorted": [], "all": []}
        for row, s in enumerate(params):
            methods["few" if 0 < s.top_k <= MAX_PARTIAL_SORT else "sorted" if s.top_p < 1.0 or s.top_k > 0 else "all"].append(row)
        for method, rows in methods.items():
            if not rows:
                continue
            some, among = [params[row] for row in rows], scores[rows]
            if method == "all":
                sampled[rows] = _invert(self._apply_min_p(among.softmax(-1), some), random[rows])
                continue
            widest = min(max(s.top_k for s in some), self._size) if method == "few" else self._size
            values, tokens = (
                among.topk(widest, sorted=True) if method == "few" else among.sort(descending=True, stable=True)
            )
            index = _invert(self._truncate(values, some), random[rows])
            sampled[rows] = tokens.gather(-1, index[:, None])[:, 0]
        return sampled

    def _truncate(self, values: torch.Tensor, params: Items[SamplingParams]) -> torch.Tensor:
        """Probabilities of scores [rows, n] in descending order; those that top-k, top-p or min-p drop become 0."""
        ranks = torch.arange(values.shape[-1], device=self._device)
        most = self._column([s.top_k or self._size for s in params])
        probabilities = values.masked_fill(ranks >= most, -torch.inf).softmax(-1)
        # A token is dropped if the more probable ones already reach top_p; the most probable one always stays.
        better = probabilities.cumsum(-1) - probabilities
        dropped = (better >= self._column([s.top_p for s in params])) & (ranks > 0)
        return self._apply_min_p(probabilities.masked_fill(dropped, 0.0), params)

    def _apply_min_p(self, probabilities: torch.Tensor, params: Items[SamplingParams]) -> torch.Tensor:
        if not any(s.min_p for s in params):
            return probabilities
        least = self._column([s.min_p for s in params]) * probabilities.max(-1, keepdim=True).values
        return probabilities.masked_fill(probabilities < least, 0.0)

    def random_numbers(self, slots: np.ndarray, numbers: Items[int]) -> np.ndarray:
        """A random number in [0, 1) for each slot: SplitMix64 (Steele et al., 2014) of its seed and next token's index,
        from 1."""
        z = _mix(self._seeds[slots]) + np.array(numbers, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(z) >> np.uint64(11)).astype(np.float64) / 2**53

    def _uniform(self, sequences: Items[Sequence]) -> torch.Tensor:
        slots = np.array([s.slot for s in sequences])
        random = self.random_numbers(slots, [len(s.output_ids) + 1 for s in sequences])
        return torch.from_numpy(random).to(self._device)

    def _with_logprobs(self, logits: torch.Tensor, tokens: list[int], sequences: Items[Sequence]) -> list[SampledToken]:
        sampled = [SampledToken(token) for token in tokens]
        rows = [row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
        if not rows:
            return sampled
        counts = [sequences[row].request.sampling.logprobs or 0 for row in rows]
        logprobs = logits[rows].log_softmax(-1)
        best = logprobs.topk(max(*counts, 1), sorted=True)
        values, ids = best.values.tolist(), best.indices.tolist()
        own = logprobs.gather(-1, self._tensor([[tokens[row]] for row in rows]))[:, 0].tolist()
        for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
            top = tuple(zip(ids[number][:count], values[number][:count], strict=True))
            sampled[row] = SampledToken(tokens[row], TokenLogprob(tokens[row], own[number], top))
        return sampled

    # Tokens for penalties. What is counted follows from the output alone, so that a step may be repeated.

    def count(self, sequences: Items[Sequence]) -> None:
        """Count the tokens of sequences with penalties, as far as they are not counted yet."""
        slots, tokens = [], []
        for sequence in sequences:
            slot, known = sequence.slot, len(sequence.output_ids)
            assert slot is not None
            if self._counted[slot] > known:
                self._count_again(sequence, known)
            missing = sequence.output_ids[self._counted[slot] :]
            slots += [slot] * len(missing)
            tokens += missing
            self._counted[slot] = known
        if slots:
            self._add(self._tensor(slots), self._tensor(tokens))

    def leave_input(self, sequence: Sequence, ahead: int) -> None:
        """Before a decoding step in which the device counts the input of a sequence by `count_inputs`: count all tokens
        before it. `ahead`: how many tokens are not known yet."""
        slot, before = sequence.slot, len(sequence.output_ids) + ahead - 1
        assert slot is not None
        if self._counted[slot] != before:  # a step is repeated, or its input was not sampled in the step before
            self._count_again(sequence, before)
        self._counted[slot] = before + 1

    def count_inputs(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count one token of each of these slots, integers [rows]. May be recorded in a graph. A slot that occurs twice
        counts wrongly."""
        at = slots.long() * self._size + tokens
        counts = self.counts.view(-1)
        self.seen.view(-1).index_copy_(0, at, torch.ones_like(at, dtype=torch.bool))
        counts.index_copy_(0, at, counts.index_select(0, at) + 1)

    def has_counted(self, sequence: Sequence) -> bool:
        """Whether exactly the tokens of a sequence with penalties are counted. Waits for the device."""
        seen, counts = torch.zeros_like(self.seen[0]), torch.zeros_like(self.counts[0])
        seen.index_fill_(0, self._tensor(sequence.token_ids), True)
        output = self._tensor(sequence.output_ids)
        counts.index_add_(0, output, torch.ones(len(output), dtype=counts.dtype, device=self._device))
        return torch.equal(self.seen[sequence.slot], seen) and torch.equal(self.counts[sequence.slot], counts)

    def _count_again(self, sequence: Sequence, outputs: int) -> None:
        """Start from the prompt and so many tokens of the output."""
        slot, output = sequence.slot, sequence.output_ids[:outputs]
        assert slot is not None
        self.seen[slot].zero_()
        self.counts[slot].zero_()
        self.seen[slot].index_fill_(0, self._tensor([*sequence.request.prompt_ids, *output]), True)
        if output:
            self._add(self._tensor([slot] * len(output)), self._tensor(output))
        self._counted[slot] = outputs

    def _add(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        at = slots * self._size + tokens
        self.seen.view(-1).index_fill_(0, at, True)
        self.counts.view(-1).index_add_(0, at, torch.ones(len(at), dtype=torch.int16, device=self._device))

    def _slots(self, sequences: Items[Sequence], rows: list[int]) -> torch.Tensor:
        return self._tensor([sequences[row].slot for row in rows])

    def _column(self, values: Items[float]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)[:, None]

    def _tensor(self, values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def has_penalty(sampling: SamplingParams) -> bool:
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


def penalise_seen(scores: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Scores [rows, vocabulary], lowered by a factor [rows, 1] where a token is in prompt or output."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def penalise_counts(
    scores: torch.Tensor, counts: torch.Tensor, presence: torch.Tensor, frequency: torch.Tensor
) -> torch.Tensor:
    """Scores [rows, vocabulary], lowered by penalties [rows, 1] for tokens that are `counts` times in the output."""
    times = counts.to(scores.dtype)
    return scores - frequency * times - presence * (times > 0)


def _replace(scores: torch.Tensor, rows: list[int], values: torch.Tensor) -> torch.Tensor:
    if len(rows) == len(scores):
        return values
    scores = scores.clone()
    scores[rows] = values
    return scores


def _invert(probabilities: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Index at which the cumulative sum of probabilities [rows, n] exceeds the fraction `random` [rows] of its total."""
    sums = probabilities.double().cumsum(-1)
    index = torch.searchsorted(sums, (random * sums[:, -1])[:, None], right=True)[:, 0]
    # Rounding may overshoot the last token of non-zero probability.
    last = (probabilities > 0).long().mul_(torch.arange(1, probabilities.shape[-1] + 1, device=probabilities.device)).argmax(-1)
    return torch.minimum(index, last)


def _mix(z: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
