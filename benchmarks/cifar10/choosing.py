"""Thresholds chosen on one half of the held-out images and measured on the other, both ways.

Thresholds that are measured on the images that chose them look better than they are, most of all
where many were tried. So the held-out images are parted in two halves, each chooses for the
other, and figures are over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from s2d_compiler.calibration import Records
from s2d_compiler.calibration.solver import exits_of
from s2d_compiler.evaluation import Point, trade_off

__all__ = ["Chosen", "Halves", "budgets", "reward", "within"]

#: Of S2DNAS's reward, accuracy times cost to this power.
OMEGA = -0.06

Choice = Callable[[Sequence[Point]], Point]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What chosen thresholds give on images that did not choose them.

    Attributes:
        accuracy: Share of all that are right.
        macs: Mean MACs per image.
        left: Share that leaves at each exit.
        right: Share of these that are right, None where nobody leaves.
        answers: (n,) whether each image is right, in the order of the records.
    """

    accuracy: float
    macs: float
    left: tuple[float, ...]
    right: tuple[float | None, ...]
    answers: NDArray[np.bool_]


class Halves:
    """A network's records in two halves, and the best thresholds of each.

    Args:
        records: What the exits say.
        macs: Cumulative MACs of each stage.
        seed: Of the halves.
    """

    def __init__(self, records: Records, macs: Sequence[int], seed: int = 0) -> None:
        self.macs = np.asarray(macs, dtype=np.float64)
        self.right = records.right
        self.certainty = records.certainty("confidence")
        order = np.random.default_rng(seed).permutation(len(records))
        self.halves = (np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :]))
        self.frontiers = [self._frontier(half, macs) for half in self.halves]

    def _frontier(self, rows: NDArray[np.int64], macs: Sequence[int]) -> Sequence[Point]:
        values = np.concatenate([self.certainty[rows], np.ones((len(rows), 1))], axis=1)
        found = trade_off(torch.from_numpy(values), torch.from_numpy(self.right[rows]), macs)
        return found.frontier

    def chosen(self, choice: Choice | Sequence[Choice]) -> Chosen:
        """Choose on each half, measure on the other.

        Args:
            choice: Takes a half's best settings, from the cheapest on, and returns one; or two
                such functions, one for each half.
        """
        exits = np.zeros(len(self.right), dtype=np.int64)
        choices = choice if isinstance(choice, Sequence) else (choice, choice)
        for half, other in ((0, 1), (1, 0)):
            rows, best = self.halves[other], choices[half](self.frontiers[half])
            exits[rows] = exits_of(self.certainty[rows], best.thresholds)
        answers: NDArray[np.bool_] = self.right[np.arange(len(exits)), exits]
        stages = len(self.macs)
        left = np.bincount(exits, minlength=stages)
        return Chosen(
            accuracy=float(answers.mean()),
            macs=float(self.macs[exits].mean()),
            left=tuple(float(n) / len(exits) for n in left),
            right=tuple(
                float(answers[exits == s].mean()) if left[s] else None for s in range(stages)
            ),
            answers=answers,
        )

    def as_accurate_as(self, other: NDArray[np.bool_]) -> Chosen | None:
        """The cheapest thresholds that are as accurate as another network on the half that chooses.

        Args:
            other: (n,) whether the other network is right.

        Returns:
            None where no thresholds are, on at least one of the halves.
        """
        needed = [float(other[rows].mean()) for rows in self.halves]
        if any(f[-1].accuracy < least for f, least in zip(self.frontiers, needed, strict=True)):
            return None

        def cheapest(least: float) -> Choice:
            return lambda points: next(point for point in points if point.accuracy >= least)

        return self.chosen([cheapest(least) for least in needed])


def reward(points: Sequence[Point]) -> Point:
    """The setting of the highest reward (S2DNAS, equation 2)."""
    return max(points, key=lambda point: point.accuracy * point.macs**OMEGA)


def budgets(halves: Halves, count: int = 40) -> list[Chosen]:
    """Accuracy against cost: the best setting within each of many mean costs."""
    lowest, highest = float(halves.macs[0]), float(halves.macs[-1])
    return [halves.chosen(within(b)) for b in np.linspace(lowest, highest, count)]


def within(budget: float) -> Choice:
    """The most accurate setting whose mean cost is at most so many MACs."""

    def choice(points: Sequence[Point]) -> Point:
        return [point for point in points if point.macs <= budget * (1 + 1e-12)][-1]

    return choice
