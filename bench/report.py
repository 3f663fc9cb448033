"""Turns samples into a table and a plot. Every figure is the median of the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.client import Sample
from bench.workloads import WORKLOADS

COLUMNS = (
    "workload", "parallel", "server", "tokens/s", "to (a)", "TTFT p50", "TTFT p95", "TTFT turn 1", "TTFT turn 2+",
    "TPOT p50", "TPOT p95", "errors", "peak MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One server under one load in one round. Times in seconds; None where nothing was measured."""

    round: str
    server: str
    workload: str
    parallel: int
    tokens_per_s: float
    ttft_p50: float | None
    ttft_p95: float | None
    first_turn: float | None  # median TTFT
    later_turns: float | None
    tpot_p50: float | None
    tpot_p95: float | None
    requests: int
    errors: int
    peak_bytes: int | None


def percentile(values: Iterable[float], share: float) -> float | None:
    """Linear interpolation between the two nearest values; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = share * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarise(
    samples: list[Sample], round_name: str, server: str, workload: str, parallel: int, peak_bytes: int | None
) -> Cell:
    good = [s for s in samples if not s.error]
    wall = max(s.ended for s in samples) - min(s.started for s in samples)
    ttft = [s.ttft_s for s in good]
    tpot = [s.tpot_s for s in good if s.tokens > 1]
    return Cell(
        round=round_name,
        server=server,
        workload=workload,
        parallel=parallel,
        tokens_per_s=sum(s.tokens for s in good) / wall,
        ttft_p50=percentile(ttft, 0.5),
        ttft_p95=percentile(ttft, 0.95),
        first_turn=percentile((s.ttft_s for s in good if s.turn == 1), 0.5),
        later_turns=percentile((s.ttft_s for s in good if s.turn > 1), 0.5),
        tpot_p50=percentile(tpot, 0.5),
        tpot_p95=percentile(tpot, 0.95),
        requests=len(samples),
        errors=len(samples) - len(good),
        peak_bytes=peak_bytes,
    )


class Results:
    def __init__(self, cells: list[Cell], base: str) -> None:
        self._cells, self._base = cells, base
        self.rounds = len({cell.round for cell in cells})
        self.servers = list(dict.fromkeys(cell.server for cell in cells))
        self.loads = sorted({(cell.workload, cell.parallel) for cell in cells})

    def median(self, server: str, workload: str, parallel: int, of: Callable[[Cell], float | None]) -> float | None:
        values = [value for cell in self._at(server, workload, parallel) if (value := of(cell)) is not None]
        return median(values) if values else None

    def ratios(self, server: str, workload: str, parallel: int) -> list[float]:
        """Tokens/s relative to (a) in the same round.

        (a) serves one request at a time, so it is driven with fewer in parallel; its highest load is the base.
        """
        ratios = []
        for cell in self._at(server, workload, parallel):
            bases = [
                c
                for c in self._cells
                if (c.round, c.server, c.workload) == (cell.round, self._base, workload) and c.parallel <= parallel
            ]
            if bases:
                ratios.append(cell.tokens_per_s / max(bases, key=lambda c: c.parallel).tokens_per_s)
        return sorted(ratios)

    def matrix(self, server: str, peer: str) -> str:
        """Markdown: tokens/s of a server relative to a peer at the same load in the same round. A cell in which either had an
        error has none."""
        loads = sorted({parallel for _, parallel in self.loads})
        lines = [_row(["workload", *map(str, loads)]), _row("---" for _ in range(len(loads) + 1))]
        for workload in sorted({workload for workload, _ in self.loads}):
            lines.append(_row([workload, *(self._against(server, peer, workload, parallel) for parallel in loads)]))
        return "\n".join(lines)

    def _against(self, server: str, peer: str, workload: str, parallel: int) -> str:
        theirs = {cell.round: cell for cell in self._at(peer, workload, parallel) if not cell.errors}
        ratios = sorted(
            cell.tokens_per_s / theirs[cell.round].tokens_per_s
            for cell in self._at(server, workload, parallel)
            if cell.round in theirs and not cell.errors
        )
        return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""

    def table(self) -> str:
        """Markdown."""
        lines = [_row(COLUMNS), _row("---" for _ in COLUMNS)]
        for workload, parallel in self.loads:
            lines += [_row(self._line(s, workload, parallel)) for s in self.servers if self._at(s, workload, parallel)]
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = [name for name in WORKLOADS if any(name == workload for workload, _ in self.loads)]
        figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            for server in self.servers:
                points = [
                    (parallel, rate)
                    for workload, parallel in self.loads
                    if workload == name and (rate := self.median(server, name, parallel, lambda c: c.tokens_per_s))
                ]
                axis.plot(*zip(*points, strict=True), marker="o", label=server)
            axis.set(title=f"{name}: {WORKLOADS[name].title}", xlabel="requests in parallel", xscale="log")
            axis.set_xticks(ticks := sorted({p for w, p in self.loads if w == name}), [str(t) for t in ticks])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("tokens per second")
        axes[0][0].legend()
        figure.tight_layout()
        figure.savefig(path, dpi=110)

    def _at(self, server: str, workload: str, parallel: int) -> list[Cell]:
        return [c for c in self._cells if (c.server, c.workload, c.parallel) == (server, workload, parallel)]

    def _line(self, server: str, workload: str, parallel: int) -> list[str]:
        def ms(of: Callable[[Cell], float | None]) -> str:
            value = self.median(server, workload, parallel, of)
            return "" if value is None else f"{value * 1000:.0f} ms"

        cells = self._at(server, workload, parallel)
        ratios = self.ratios(server, workload, parallel)
        peak = max((c.peak_bytes for c in cells if c.peak_bytes), default=0)
        rate = self.median(server, workload, parallel, lambda c: c.tokens_per_s)
        several = WORKLOADS[workload].turns > 1
        return [
            workload,
            str(parallel),
            server,
            f"{rate:.1f}",
            "" if server == self._base or not ratios else f"{median(ratios):.1f}x ({ratios[0]:.1f}-{ratios[-1]:.1f})",
            ms(lambda c: c.ttft_p50),
            ms(lambda c: c.ttft_p95),
            ms(lambda c: c.first_turn) if several else "",
            ms(lambda c: c.later_turns) if several else "",
            ms(lambda c: c.tpot_p50),
            ms(lambda c: c.tpot_p95),
            f"{sum(c.errors for c in cells)}/{sum(c.requests for c in cells)}",
            f"{peak / 2**20:.0f}" if peak else "",
        ]


def _row(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"
