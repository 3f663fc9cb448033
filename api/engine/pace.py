"""How much new work a step may carry so that running answers keep their pace.

Learns from measured steps what a batch costs on this machine. A prompt chunk or a slice of the vision
tower makes everyone who decodes wait; with nobody decoding, a step is only kept short enough for an
abort to be noticed. Knows seconds and counts, no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# A step with new work in it may take so many times what the running answers alone would need.
PATIENCE = 2.4
# With nobody waiting for a token: short enough to notice aborts and new requests.
IDLE_STEP_S = 0.6
# No step is ever slowed down to less than this much new work, or a busy engine would admit nobody.
LEAST_TOKENS = 16
MEMORY = 0.8  # weight of the past in the running means
# A step is called stuck when it takes this many times longer than it should, and at least MIN_DEADLINE_S.
STUCK = 20.0
MIN_DEADLINE_S = 30.0


@dataclass
class Pace:
    max_chunk_tokens: int = 512
    max_rows: float = float("inf")  # requests in one forward pass
    _decode_s: dict[int, float] = field(default_factory=dict)  # by batch size rounded up to a power of two
    _token_s: float = 0.0  # one more prompt token in a batch
    _slice_s: float = 0.0  # longest slice of the vision tower lately

    def chunk_tokens(self, decoding: int, spent_s: float = 0.0) -> int:
        """Prompt tokens for the next batch, when `spent_s` of the step went into a picture already."""
        if not self._token_s:
            return self.max_chunk_tokens
        tokens = int((self._new_work_s(decoding) - spent_s) / self._token_s)
        return min(max(LEAST_TOKENS, tokens), self.max_chunk_tokens)

    def slice_s(self, decoding: int) -> float:
        """Seconds that a picture may take in the next step."""
        return self._new_work_s(decoding)

    def deadline_s(self, decoding: int, tokens: int) -> float:
        """How long a batch may take before it must be called stuck."""
        expected = self._decode_estimate(decoding) + tokens * self._token_s if self._token_s else MIN_DEADLINE_S
        return max(MIN_DEADLINE_S, STUCK * expected)

    def picture_deadline_s(self) -> float:
        return max(MIN_DEADLINE_S, STUCK * (self._slice_s + IDLE_STEP_S))

    def ran_out_of_memory(self, rows: int, tokens: int) -> None:
        """Ask for less from now on; what the memory holds does not grow again while the server runs."""
        if tokens > LEAST_TOKENS:
            self.max_chunk_tokens = min(self.max_chunk_tokens, tokens // 2)
        elif rows > 1:
            self.max_rows = min(self.max_rows, rows // 2)

    def saw_batch(self, decoding: int, tokens: int, took_s: float) -> None:
        if tokens == 0:
            size = _bucket(decoding)
            self._decode_s[size] = _mean(self._decode_s.get(size), took_s)
        elif tokens >= LEAST_TOKENS:
            extra = max(took_s - self._decode_estimate(decoding), 0.1 * took_s)
            self._token_s = _mean(self._token_s or None, extra / tokens)

    def saw_slice(self, took_s: float) -> None:
        self._slice_s = max(took_s, MEMORY * self._slice_s)

    def _new_work_s(self, decoding: int) -> float:
        if not decoding:
            return IDLE_STEP_S
        alone = self._decode_estimate(decoding)
        # Measured against the pace of a small batch: answers that joined must not stretch everybody's patience.
        least = min(self._decode_s.values(), default=alone)
        return max(PATIENCE * least - alone, (PATIENCE - 1) * alone / 2)

    def _decode_estimate(self, decoding: int) -> float:
        if not decoding:
            return 0.0
        size = _bucket(decoding)
        if size in self._decode_s:
            return self._decode_s[size]
        known = sorted(self._decode_s)
        return self._decode_s[min(known, key=lambda k: abs(k - size))] if known else 0.05


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _mean(old: float | None, new: float) -> float:
    return new if old is None else MEMORY * old + (1 - MEMORY) * new
