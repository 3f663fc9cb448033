"""Sampling on the device: the tokens of all rows in a fixed number of operations, without a wait.

The twin of `api.engine.model.sampler` for rows whose choice needs nothing of the host: greedy, or the `MAX_TOP_K` most
probable tokens at most; with penalties where the operations have a kernel for them (penalties.py). May be captured in a
CUDA graph.
"""

from __future__ import annotations

import torch

from api.engine.model.sampler import NOT_FINITE, has_penalty
from api.engine.request import SamplingParams
from api.engine.sequence import Sequence

MAX_TOP_K = 64


def chosen_on_device(sequence: Sequence, penalises: bool) -> bool:
    """Whether `choose_tokens` can choose the next token of a sequence."""
    output = sequence.output
    return needs_no_host(sequence.request.sampling, penalises) and (
        output is None or (output.grammar is None and output.forced is None and not output.barred_ids)
    )


def needs_no_host(sampling: SamplingParams, penalises: bool) -> bool:
    """Whether the host has no part in the choice, as long as no token is forced, barred or ruled by a grammar.
    `penalises`: whether the device can."""
    if sampling.logit_bias or sampling.logprobs is not None or (has_penalty(sampling) and not penalises):
        return False
    return sampling.temperature == 0 or 0 < sampling.top_k <= MAX_TOP_K


def choose_tokens(
    logits: torch.Tensor,  # float32 [rows, vocabulary]
    temperature: torch.Tensor,  # float32 [rows]; 0: greedy
    top_k: torch.Tensor,  # int32 [rows], 1 to MAX_TOP_K; of no meaning in greedy rows
    top_p: torch.Tensor,  # float32 [rows]
    min_p: torch.Tensor,  # float32 [rows]
    random: torch.Tensor,  # float64 [rows], in [0, 1)
) -> torch.Tensor:
    """int32 [rows]; NOT_FINITE for a row with a logit that is not finite."""
    greedy = temperature == 0
    width = min(MAX_TOP_K, logits.shape[-1])
    values, tokens = logits.topk(width, sorted=True)
    values = values / temperature.masked_fill(greedy, 1.0)[:, None]
    ranks = torch.arange(width, device=logits.device)
    probabilities = values.masked_fill(ranks >= top_k[:, None], -torch.inf).softmax(-1)
    # A token is dropped if the more probable ones already reach top_p; the most probable one always stays.
    better = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((better >= top_p[:, None]) & (ranks > 0), 0.0)
    least = min_p[:, None] * probabilities[:, :1]
    probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    # Invert the cumulative sum at the random number. Rounding may overshoot the last token of non-zero probability.
    sums = probabilities.double().cumsum(-1)
    index = (sums <= (random * sums[:, -1])[:, None]).sum(-1)
    last = ((probabilities > 0) * (ranks + 1)).amax(-1) - 1
    index = torch.minimum(index, last.clamp(min=0))
    sampled = tokens.gather(-1, index[:, None])[:, 0]
    sampled = torch.where(greedy, logits.argmax(-1), sampled)
    totals = logits.sum(-1)  # finite if all of them are
    return sampled.masked_fill((totals - totals) != 0, NOT_FINITE).int()
