"""What time goes to: operators by kind, from torch's profiler."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says nothing by itself

#: Kind -> words of operator names; the first that fits counts.
_KINDS = {
    "convolution": ("conv",),
    "matrix product": ("addmm", "linear", "bmm", "matmul", "::mm", "attention", "einsum"),
    "concatenation": ("::cat", "::stack"),
    "norm": ("norm",),
    "pooling": ("pool", "::mean", "::sum"),
    "copy": ("copy_", "clone", "contiguous", "::to", "index_select", "gather", "reorder"),
}
_REST = "elementwise and others"
#: Outside of operators: Python, dispatch, waiting for the second thread.
OUTSIDE = "between operators"


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Milliseconds of one run by kind of operator, and how many operators ran."""

    milliseconds: dict[str, float]
    calls: dict[str, float]

    @property
    def total(self) -> float:
        """Milliseconds of one run."""
        return sum(self.milliseconds.values())


def break_down(run: Callable[[], object], runs: int = 5) -> Breakdown:
    """Where the time of a run goes, on the CPU.

    The profiler slows runs down by a little per operator; kinds are scaled to add up, with what
    lies between operators, to the time without it.
    """
    run()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    wall = sorted(times)[len(times) // 2] * 1000
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        for _ in range(runs):
            run()
        profiled = (time.perf_counter() - began) * 1000 / runs
    spent: dict[str, float] = {}
    calls: dict[str, float] = {}
    for event in recorded.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1000 / runs
        calls[kind] = calls.get(kind, 0.0) + event.count / runs
    spent[OUTSIDE] = max(profiled - sum(spent.values()), 0.0)
    scale = wall / max(sum(spent.values()), 1e-9)
    return Breakdown({k: v * scale for k, v in spent.items()}, calls)


def kind_of(operator: str) -> str:
    """The kind of an operator, from its name in a profile such as ``aten::cat``."""
    name = operator.lower()
    return next((kind for kind, words in _KINDS.items() if any(w in name for w in words)), _REST)


def excess(dynamic: Breakdown, static: Breakdown, macs: float) -> list[tuple[str, float]]:
    """Milliseconds per kind above the static network's times the share of MACs, largest first."""
    kinds = [*dict.fromkeys([*dynamic.milliseconds, *static.milliseconds])]
    found = [
        (k, dynamic.milliseconds.get(k, 0.0) - macs * static.milliseconds.get(k, 0.0))
        for k in kinds
    ]
    return sorted(found, key=lambda item: -item[1])
