"""Choosing one token from logits. Same order of steps as transformers, so greedy answers agree with it."""

from __future__ import annotations

import torch

from api.engine.request import Sampling


class Sampler:
    """One request's choice of tokens, with its own random numbers; independent of its neighbours."""

    def __init__(self, sampling: Sampling, prompt_ids: tuple[int, ...], vocabulary_size: int) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._seen = torch.zeros(vocabulary_size, dtype=torch.bool)
        self._seen[list(prompt_ids)] = True

    def choose(self, logits: torch.Tensor) -> int:
        """Take the logits of one position, [vocabulary], on any device."""
        scores = self._penalise(logits.detach().to("cpu", torch.float32))
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            scores = self._cut_top_p(self._cut_top_k(scores / self._sampling.temperature))
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self._seen[token] = True
        return token

    def _penalise(self, scores: torch.Tensor) -> torch.Tensor:
        penalty = self._sampling.repetition_penalty
        if penalty == 1.0:
            return scores
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(self._seen, lowered, scores)

    def _cut_top_k(self, scores: torch.Tensor) -> torch.Tensor:
        k = self._sampling.top_k
        if k <= 0 or k >= scores.numel():
            return scores
        return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)

    def _cut_top_p(self, scores: torch.Tensor) -> torch.Tensor:
        if self._sampling.top_p >= 1.0:
            return scores
        ordered, places = scores.sort(descending=True)
        chances = ordered.softmax(-1)
        # A token goes if the better ones already reach top_p; the best one always stays.
        cut = chances.cumsum(-1) - chances >= self._sampling.top_p
        cut[0] = False
        return scores.masked_fill(torch.zeros_like(cut).scatter(0, places, cut), -torch.inf)
