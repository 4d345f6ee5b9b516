"""Timing several candidates in turn, so that what else the machine does strikes them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy
import torch

#: Runs once and returns the seconds that it took until each of its marks.
Run = Callable[[], Sequence[float]]


class Clock:
    """Seconds since it was made, after waiting for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.began = self._now()

    def __call__(self) -> float:
        return self._now() - self.began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def interleaved(
    runs: Mapping[str, Run],
    rounds: int,
    seconds: float,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[list[tuple[float, ...]]]]:
    """Let each candidate run in turn, round after round.

    Args:
        runs: The candidates, which have run before.
        rounds: How many rounds.
        seconds: How long a turn lasts; at least one run.
        progress: Called after each turn.

    Returns:
        Per candidate and round, the marks of every run.
    """
    found: dict[str, list[list[tuple[float, ...]]]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            stop = time.perf_counter() + seconds
            turn = [tuple(runs[name]())]
            while time.perf_counter() < stop:
                turn.append(tuple(runs[name]()))
            found[name].append(turn)
            progress()
    return found


def percentile(turns: Sequence[Sequence[tuple[float, ...]]], mark: int, q: float) -> float:
    """Milliseconds until a mark, over the runs of all rounds."""
    times = [run[mark] for turn in turns for run in turn]
    return float(numpy.percentile(times, q)) * 1000


def typical(turns: Sequence[Sequence[tuple[float, ...]]], mark: int) -> float:
    """Milliseconds until a mark: the median over rounds of each round's median.

    Every round counts the same, however many runs fitted into it.
    """
    medians = [float(numpy.median([run[mark] for run in turn])) for turn in turns]
    return float(numpy.median(medians)) * 1000
