"""The token budget: how many prompt tokens a step may hold so that decoding requests keep their pace.

Learns the cost of a forward pass on this machine from measured steps: a constant for the weights and a slope for the
rows. A prompt chunk or a slice of the vision encoder delays every decoding request; while none decodes, a step is only
kept short enough for an abort to be noticed. Knows seconds and counts, no tensors. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Longest step with prompt tokens or an image in it, as a multiple of one with the decoding requests alone.
MAX_STEP_STRETCH = 3.0
# Longest step while no request decodes: short enough to notice aborts and new requests.
IDLE_STEP_S = 0.6
# Prompts must not starve: a step without an image computes at least this many of their tokens.
MIN_CHUNK_TOKENS = 16
# Up to this many rows a pass takes about as long as for one on a CPU: it is bound by reading the weights.
FREE_ROWS = 12
# A step counts as stuck when it takes this many times longer than expected, and at least MIN_DEADLINE_S.
STUCK_FACTOR = 20.0
MIN_DEADLINE_S = 30.0
SMOOTHING = 0.95  # weight of the past in the running means
MIN_RELATIVE_VARIANCE = 0.2  # passes of similar size do not show the cost of a row
MAX_OUTLIER_FACTOR = 2.0  # a step slower than this multiple of the expected time was disturbed; it is clipped


@dataclass
class PassCost:
    """Seconds of a forward pass as base + slope * rows: least squares with exponentially decaying weights."""

    base_s: float = 0.0
    slope_s: float = 0.0
    passes: int = 0
    _rows: float = 0.0  # running means
    _seconds: float = 0.0
    _rows_rows: float = 0.0
    _rows_seconds: float = 0.0

    def at(self, rows: int) -> float:
        return self.base_s + self.slope_s * rows

    def record(self, rows: int, took_s: float) -> None:
        self.passes += 1
        if self.passes > 2:
            took_s = min(took_s, MAX_OUTLIER_FACTOR * self.at(rows))
        new = max(1 / self.passes, 1 - SMOOTHING)
        self._rows += new * (rows - self._rows)
        self._seconds += new * (took_s - self._seconds)
        self._rows_rows += new * (rows * rows - self._rows_rows)
        self._rows_seconds += new * (rows * took_s - self._rows_seconds)
        spread = self._rows_rows - self._rows**2
        if spread > MIN_RELATIVE_VARIANCE * self._rows_rows:
            self.slope_s = max((self._rows_seconds - self._rows * self._seconds) / spread, 0.0)
        self.slope_s = min(self.slope_s or self._seconds / self._rows, self._seconds / self._rows)
        self.base_s = self._seconds - self.slope_s * self._rows


@dataclass
class TokenBudget:
    max_chunk_tokens: int = 512
    free_rows: int = FREE_ROWS  # up to so many a pass takes about as long as for one
    max_rows: float = float("inf")  # sequences in one forward pass
    _pass: PassCost = field(default_factory=PassCost)
    _slice_s: float = 0.0  # decaying maximum of the vision encoder's slices

    def chunk_tokens(self, decoding: int, spent_s: float = 0.0) -> int:
        """Prompt tokens for the next batch of a step that has already spent `spent_s` on an image."""
        if not self._pass.passes:
            return self.max_chunk_tokens
        left_s = max(self._new_work_s(decoding) - spent_s - (0 if decoding else self._pass.base_s), 0.0)
        free = self._free_tokens(decoding)
        tokens = free + int(left_s / self._pass.slope_s) if self._pass.slope_s else self.max_chunk_tokens
        least = 0 if spent_s else MIN_CHUNK_TOKENS
        return min(max(least, tokens), self.max_chunk_tokens)

    def slice_s(self, decoding: int) -> float:
        """Seconds that the vision encoder may take in the next step."""
        return self._new_work_s(decoding)

    def deadline_s(self, decoding: int, tokens: int) -> float:
        """Seconds after which a batch counts as stuck."""
        return max(MIN_DEADLINE_S, STUCK_FACTOR * self._pass.at(self._rows(decoding, tokens)))

    def encode_deadline_s(self) -> float:
        return max(MIN_DEADLINE_S, STUCK_FACTOR * (self._slice_s + IDLE_STEP_S))

    def ran_out_of_memory(self, rows: int, tokens: int) -> None:
        """Halve the limits for good: the memory does not grow while the server runs."""
        if tokens > MIN_CHUNK_TOKENS:
            self.max_chunk_tokens = min(self.max_chunk_tokens, tokens // 2)
        elif rows > 1:
            self.max_rows = min(self.max_rows, rows // 2)

    def record_batch(self, decoding: int, tokens: int, took_s: float) -> None:
        self._pass.record(self._rows(decoding, tokens), took_s)

    def record_slice(self, took_s: float) -> None:
        self._slice_s = max(took_s, 0.8 * self._slice_s)

    def _new_work_s(self, decoding: int) -> float:
        if not decoding:
            return IDLE_STEP_S
        alone = self._pass.at(decoding)
        # Relative to the pace of a single request, so that the limit does not grow with the batch.
        return max(MAX_STEP_STRETCH * self._pass.at(1) - alone, (MAX_STEP_STRETCH - 1) * alone / 2)

    def _free_tokens(self, decoding: int) -> int:
        return max(self.free_rows - decoding, 0)

    def _rows(self, decoding: int, tokens: int) -> int:
        """Rows that add to the time of a pass."""
        return max(decoding + max(tokens - self._free_tokens(decoding), 0), 1)
