"""The plot of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from s2d_compiler.benchmarking.measuring import Benchmark
from s2d_compiler.plots import COLORS, write_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_benchmark(found: Benchmark, path: Path, title: str) -> None:
    """Draw time against MACs at every exit, of the fastest form at each batch size.

    Times are shares of the fastest static form's, or milliseconds per sample without one. On the
    diagonal, time falls as MACs do.

    Raises:
        UsageError, OutputError: As ``plots.check_plot``.
    """

    def draw(axes: Axes) -> None:
        has_static = any(batch.static for batch in found.batches)
        for batch, color in zip(found.batches, _colors(len(found.batches)), strict=True):
            if not batch.dynamic:
                continue
            exits = batch.dynamic[0].exits
            times = [e.time if e.time is not None else e.typical / batch.batch for e in exits]
            label = f"batch {batch.batch} ({batch.dynamic[0].form})"
            axes.plot([e.macs for e in exits], times, "o-", color=color, label=label)
        if has_static:
            axes.plot([0, 1], [0, 1], "--", color="grey", label="time falls as MACs do")
            axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("MACs up to the exit, of the original's")
        axes.set_ylabel(
            "time, of the fastest static form's" if has_static else "milliseconds per sample"
        )
        axes.set_title(title)
        axes.legend()

    write_plot(path, draw)


def _colors(count: int) -> list[str]:
    return [COLORS[k % len(COLORS)] for k in range(count)]
