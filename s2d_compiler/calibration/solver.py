"""From what was recorded to thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2d_compiler.calibration.instances import Floats, Instance, Integers
from s2d_compiler.calibration.search import best_cuts, improved_cuts
from s2d_compiler.calibration.targets import Target

#: Relative gap to the optimum at which the search ends.
TOLERANCE = 1e-4
#: Grids that branch and bound may count with up to three stages, and with more.
_EFFORT, _EFFORT_MANY = 24, 400


@dataclass(frozen=True, slots=True)
class Solution:
    """The thresholds that serve a target best on some samples.

    Attributes:
        cuts: Per early stage how many groups of equal certainty leave there.
        thresholds: Per early stage the least certainty that leaves; inf where nobody does.
        right: How many samples are right.
        cost: Mean cost per sample.
        score: What the target makes of it.
        gap: By how much of ``score`` the best thresholds there are could be better, at most;
            ``inf`` where it is not known.
    """

    cuts: tuple[int, ...]
    thresholds: tuple[float, ...]
    right: float
    cost: float
    score: float
    gap: float


def solve(
    certainty: Floats,
    right: NDArray[Any],
    costs: Sequence[float],
    target: Target,
    *,
    lowest: float = -math.inf,
) -> Solution | None:
    """The thresholds that serve a target best, None where none can.

    All recorded values are candidates. With up to three stages the result is within 0.1% of the
    best there is (its ``gap`` says so); with more, no pair of thresholds can be improved while the
    others stay.

    Args:
        certainty: (n, s - 1) of every early exit, larger for more; NaN never leaves.
        right: (n, s) whether each exit's answer is right.
        costs: (s,) cumulative cost per sample.
        target: What is asked for.
        lowest: The threshold that lets everybody leave.
    """
    return Solver(certainty, right, costs, lowest).solve(target)


class Solver:
    """Solves for several targets on the same samples; arguments as of ``solve``."""

    def __init__(
        self,
        certainty: Floats,
        right: NDArray[Any],
        costs: Sequence[float],
        lowest: float = -math.inf,
    ):
        self.certainty, self.lowest = certainty, lowest
        self.costs = tuple(float(c) for c in costs)
        self.scale = self.costs[-1] or 1.0
        self.instance = Instance.of(certainty, right, self.costs)
        self.last_right = float(right[:, -1].sum())

    def solve(self, target: Target, near: Solution | None = None) -> Solution | None:
        """The best thresholds, None where the target cannot be met.

        Args:
            target: What is asked for.
            near: With more than three stages, a solution of a similar target to start from; much
                faster, and without a gap.
        """
        samples = self.instance.samples
        score = target.score(samples, self.last_right, self.costs)
        many = len(self.costs) > 3
        if many and near is not None:
            found = improved_cuts(self.instance, score, near.cuts, TOLERANCE)
        else:
            effort = _EFFORT_MANY if many else _EFFORT
            found = best_cuts(self.instance, score, effort=effort, tolerance=TOLERANCE)
        if found.cuts is None:
            return None
        gap = (found.bound - found.score) / abs(found.score) if found.score else 0.0
        return replace(self.at(found.cuts), score=found.score, gap=gap)

    def at(self, cuts: Sequence[int]) -> Solution:
        """What some cuts give, whatever the target."""
        right, cost = self.instance.totals(cuts)
        exits = self.instance.exits(cuts)
        thresholds = tuple(
            _threshold(self.certainty[:, stage], exits, stage, self.lowest)
            for stage in range(len(cuts))
        )
        samples = self.instance.samples
        return Solution(tuple(cuts), thresholds, right, cost / samples, math.nan, math.inf)


def _threshold(values: Floats, exits: Integers, stage: int, lowest: float) -> float:
    """Halfway between those that leave a stage and those that go on, of those that come there.

    Where nobody of them leaves, nobody shall; where all do, all shall.
    """
    leaving = values[exits == stage]
    staying = values[(exits > stage) & ~np.isnan(values)]
    if not len(leaving):
        return math.inf
    if not len(staying):
        return lowest
    return between(float(staying.max()), float(leaving.min()))


def between(lower: float, upper: float) -> float:
    """A number above ``lower`` and at most ``upper``, far from both.

    One that single precision has, where there is one: networks compare in theirs.
    """
    middle = lower + (upper - lower) / 2
    for value in (float(np.float32(middle)), middle):
        if lower < value <= upper:
            return value
    return upper


def exits_of(certainty: Floats, thresholds: Sequence[float]) -> Integers:
    """(n,) the stage where each sample leaves with these thresholds, as an index."""
    found = np.full(len(certainty), len(thresholds), dtype=np.int64)
    for stage in range(len(thresholds) - 1, -1, -1):
        found[certainty[:, stage] >= thresholds[stage]] = stage  # of NaN, this is false
    return found
