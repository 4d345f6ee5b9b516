"""Accuracy against cost over all thresholds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2d_compiler.runtime.measures import LARGER_IS_CERTAIN

__all__ = ["Point", "TradeOff", "trade_off"]

#: How many combinations of thresholds are looked at, about.
_COMBINATIONS = 2_000_000
#: A point more for every so much less of the range is no use to anybody.
_POINTS = 400


@dataclass(frozen=True, slots=True)
class Point:
    """What one setting of the thresholds gives.

    Attributes:
        macs: Mean MACs per sample.
        accuracy: Share of the samples that are right, from 0 to 1.
        thresholds: The setting; infinite (entropy: negative and so) where nobody leaves.
    """

    macs: float
    accuracy: float
    thresholds: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; thresholds that nobody passes are None."""
        thresholds = [None if math.isinf(value) else value for value in self.thresholds]
        return {"macs": self.macs, "accuracy": self.accuracy, "thresholds": thresholds}


@dataclass(frozen=True, slots=True)
class TradeOff:
    """Accuracy against mean MACs per sample, on the samples that were seen.

    Thresholds chosen by it look better than they are: they fit these samples. ``s2d calibrate``
    finds some that keep a promise.

    Attributes:
        frontier: The most accurate setting for every cost, each with an own threshold per stage;
            cost and accuracy ascend.
        single: One threshold for all stages, from none leaves late to none leaves early.
        is_exhaustive: Whether the frontier is over all thresholds, or over quantiles of them.
    """

    frontier: tuple[Point, ...]
    single: tuple[Point, ...]
    is_exhaustive: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "frontier": [point.to_dict() for point in self.frontier],
            "single_threshold": [point.to_dict() for point in self.single],
            "is_exhaustive": self.is_exhaustive,
        }


def trade_off(
    values: Tensor, correct: Tensor, macs: Sequence[int], measure: str = "confidence"
) -> TradeOff:
    """Trace accuracy against cost over thresholds.

    Every combination of thresholds is evaluated at once, from the numbers of samples (and of right
    ones) in each cell of a grid: thresholds that are met are upper parts of it, thresholds that are
    not are lower parts, so sums over both are cumulative sums. Where all values would make too
    many cells, quantiles of them are taken.

    Source: S2DNAS, section 4.3, "Trade-off of accuracy and computational cost", and its figure 6.

    Args:
        values: ``(N, s)`` the measure at each of s exits; NaN never leaves.
        correct: ``(N, s)`` whether each exit is right.
        macs: Cumulative MACs per sample of each stage.
        measure: Its name, which says whether larger values are more certain.
    """
    sign = 1.0 if LARGER_IS_CERTAIN.get(measure, True) else -1.0
    certainty = values.detach().cpu().double() * sign
    right = correct.cpu().double()
    cost = torch.tensor([float(m) for m in macs], dtype=torch.float64)
    exits = certainty.shape[1] - 1
    if exits == 0:
        only = Point(float(cost[0]), float(right[:, 0].mean()), ())
        return TradeOff((only,), (only,), True)
    grids, exhaustive = _grids(certainty[:, :exits])
    accuracy, mean = _evaluate(certainty, right, cost, grids)
    frontier = _frontier(accuracy, mean, grids, sign)
    return TradeOff(frontier, _single(certainty, right, cost, sign), exhaustive)


def _grids(certainty: Tensor) -> tuple[list[Tensor], bool]:
    """Per stage ascending thresholds, the last of them met by nobody."""
    exits = certainty.shape[1]
    most = max(2, int(_COMBINATIONS ** (1 / exits)))
    grids, exhaustive = [], True
    for column in certainty.unbind(1):
        known = _distinct(column[~column.isnan()])
        if len(known) > most:
            exhaustive = False
            ranked = column[~column.isnan()].sort().values
            places = torch.linspace(0, len(ranked) - 1, most - 1).round().long()
            known = _distinct(ranked[places])
        grids.append(torch.cat([known, torch.tensor([torch.inf], dtype=torch.float64)]))
    return grids, exhaustive


def _distinct(values: Tensor) -> Tensor:
    """Each value once, ascending."""
    ranked = values.sort().values
    return ranked[torch.cat([torch.ones(len(ranked[:1]), dtype=torch.bool), ranked.diff() > 0])]


def _evaluate(
    certainty: Tensor, right: Tensor, cost: Tensor, grids: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cost of every combination, a dimension per stage."""
    samples, stages = certainty.shape
    cells = [  # number of thresholds that a sample meets, from 0 to all but the last
        torch.searchsorted(grid, column.nan_to_num(nan=-torch.inf).contiguous(), right=True)
        .clamp_max(len(grid) - 1)
        .where(~column.isnan(), torch.zeros((), dtype=torch.long))
        for grid, column in zip(grids, certainty.unbind(1), strict=False)
    ]
    shape = [len(grid) for grid in grids]
    accuracy = torch.zeros(shape, dtype=torch.float64)
    mean = torch.zeros(shape, dtype=torch.float64)
    for stage in range(stages):
        depth = min(stage + 1, stages - 1)
        for total, weight in ((accuracy, right[:, stage]), (mean, cost[stage].expand(samples))):
            counts = _histogram(cells[:depth], shape[:depth], weight)
            for dimension in range(depth):
                leaves = dimension == stage
                counts = _above(counts, dimension) if leaves else counts.cumsum(dimension)
            total += counts.reshape(counts.shape + (1,) * (len(shape) - depth))
    return accuracy / samples, mean / samples


def _histogram(cells: Sequence[Tensor], shape: Sequence[int], weight: Tensor) -> Tensor:
    flat = torch.zeros(len(weight), dtype=torch.long)
    for cell, size in zip(cells, shape, strict=True):
        flat = flat * size + cell
    return torch.bincount(flat, weight, math.prod(shape)).reshape(tuple(shape))


def _above(counts: Tensor, dimension: int) -> Tensor:
    """Sums over the cells above each: a sample in cell c meets the thresholds below number c."""
    total = counts.sum(dimension, keepdim=True)
    return total - counts.cumsum(dimension)


def _frontier(
    accuracy: Tensor, mean: Tensor, grids: Sequence[Tensor], sign: float
) -> tuple[Point, ...]:
    flat, cost = accuracy.flatten(), mean.flatten()
    by_accuracy = torch.argsort(-flat, stable=True)
    order = by_accuracy[torch.argsort(cost[by_accuracy], stable=True)]
    best = flat[order].cummax(0).values
    better = torch.cat([torch.ones(1, dtype=torch.bool), best[1:] > best[:-1] + 1e-12])
    chosen = order[better]
    if len(chosen) > _POINTS:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, _POINTS).round().long()]
    places = torch.unravel_index(chosen, accuracy.shape)
    columns = [(grid[place] * sign).tolist() for grid, place in zip(grids, places, strict=True)]
    rows = zip(cost[chosen].tolist(), flat[chosen].tolist(), zip(*columns, strict=True),
               strict=True)  # fmt: skip
    return tuple(itertools.starmap(Point, rows))


def _single(certainty: Tensor, right: Tensor, cost: Tensor, sign: float) -> tuple[Point, ...]:
    """One threshold for all stages, from the one that everybody meets to the one that nobody does.

    A sample has left by stage t once the threshold is at most the largest of its values up to t.
    """
    samples, stages = certainty.shape
    early = certainty[:, :-1].nan_to_num(nan=-torch.inf)
    known = _distinct(early[early.isfinite()])
    if len(known) > _POINTS:
        known = known[torch.linspace(0, len(known) - 1, _POINTS).round().long()]
    grid = torch.cat([known, torch.tensor([torch.inf], dtype=torch.float64)])
    largest = early.cummax(1).values
    left_before = torch.zeros(len(grid), samples, dtype=torch.bool)
    accuracy = torch.zeros(len(grid), dtype=torch.float64)
    mean = torch.zeros(len(grid), dtype=torch.float64)
    for stage in range(stages):
        left = torch.ones_like(left_before)
        if stage < stages - 1:
            left = largest[:, stage][None] >= grid[:, None]
        here = (left & ~left_before).double()
        accuracy += here @ right[:, stage]
        mean += here.sum(1) * cost[stage]
        left_before = left
    rows = zip((mean / samples).tolist(), (accuracy / samples).tolist(), (grid * sign).tolist(),
               strict=True)  # fmt: skip
    return tuple(Point(cost_, share, (value,) * (stages - 1)) for cost_, share, value in rows)
