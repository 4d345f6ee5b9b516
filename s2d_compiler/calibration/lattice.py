"""Many choices of cuts at once: counts at the points of a grid, and limits between them.

A grid has, per early stage, some of its cuts in ascending order. Where each sample lies among them
is all that its counting takes: one histogram per exit, cumulated along every stage, gives the exact
counts at all points of the grid, however many samples there are.

A point stands for the cell of the cuts from it up to the next point (or for itself alone). In a
cell only the samples in between are open. Those that would be right at an earlier exit and are
wrong where they leave at the point itself bound how many more can be right; the next points, where
more leave early, are cheaper than anything in the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from s2d_compiler.calibration.instances import Floats, Instance, Integers


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """The cuts of one stage on a grid.

    Attributes:
        points: (L,) cuts, ascending.
        single: (L,) whether a point stands for itself alone; the last one does.
    """

    points: Integers
    single: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """What a grid gives.

    Attributes:
        right: How many are right at each point, an axis per early stage.
        cost: What they cost.
        most_right: How many are right at most in each point's cell.
        least_cost: What they cost at least in each cell.
    """

    right: Floats
    cost: Floats
    most_right: Floats
    least_cost: Floats


def count(instance: Instance, axes: Sequence[Axis], *, cells: bool = True) -> Counts:
    """Count at every point of a grid, and bound what lies in its cells.

    Args:
        instance: The samples.
        axes: Per early stage its cuts on the grid.
        cells: Whether to bound the cells; without, their limits are empty.
    """
    dims = len(axes)
    places = [
        np.searchsorted(axis.points, np.arange(levels + 1), side="right")[groups]
        for axis, levels, groups in zip(axes, instance.levels, instance.groups, strict=True)
    ]  # how many of the stage's cuts a sample withstands
    shape = tuple(len(axis) + 1 for axis in axes)
    keys = [places[0]]
    for stage in range(1, dims):
        keys.append(keys[-1] * shape[stage] + places[stage])
    right = np.full(tuple(len(axis) for axis in axes), instance.base_right)
    cost = np.full(right.shape, instance.base_cost)
    for leave in range(dims + 1):
        last = min(leave, dims - 1)
        for total, weights in ((right, instance.right), (cost, instance.cost)):
            found = _histogram(keys[last], shape[: last + 1], weights[:, leave])
            for stage in range(last + 1):
                found = _leaving(found, stage) if stage == leave else _staying(found, stage)
            total += found.reshape(found.shape + (1,) * (dims - 1 - last))
    if not cells:
        return Counts(right, cost, np.empty(0), np.empty(0))
    most = right.copy()
    for instead in range(dims):
        is_open = _open(axes[instead], places[instead], instance.groups[instead])
        for leave in range(instead + 1, dims + 1):
            most += _gains(instance, keys, shape, leave, instead, is_open)
    least = cost
    for stage, axis in enumerate(axes):
        least = np.take(least, np.arange(len(axis)) + ~axis.single, axis=stage)
    return Counts(right, cost, most, least)


def _open(axis: Axis, places: Integers, groups: Integers) -> NDArray[np.bool_]:
    """Samples that some cuts of the cell in which they lie let leave, and others do not."""
    limits = np.append(np.where(axis.single[:-1], axis.points[:-1], axis.points[1:] - 1), -1)
    limits = np.concatenate([[-1], limits])  # per place: groups below it are open
    found: NDArray[np.bool_] = groups < limits[places]
    return found


def _gains(
    instance: Instance,
    keys: list[Integers],
    shape: tuple[int, ...],
    leave: int,
    instead: int,
    is_open: NDArray[np.bool_],
) -> Floats:
    """Per cell: samples that leave at ``leave`` and could be right at ``instead``."""
    dims = len(shape)
    gain = instance.right[:, instead] - instance.right[:, leave]
    rows = np.flatnonzero((gain > 0) & is_open)
    last = min(leave, dims - 1)
    found = _histogram(keys[last][rows], shape[: last + 1], gain[rows])
    for stage in range(last + 1):
        if stage == instead:
            found = found[(slice(None),) * stage + (slice(1, None),)]
        else:
            found = _leaving(found, stage) if stage == leave else _staying(found, stage)
    return found.reshape(found.shape + (1,) * (dims - 1 - last))


def _histogram(keys: Integers, shape: tuple[int, ...], weights: Floats) -> Floats:
    size = int(np.prod(shape))
    found: Floats = np.bincount(keys, weights=weights, minlength=size).astype(
        np.float64, copy=False
    )
    return found.reshape(shape)


def _leaving(found: Floats, axis: int) -> Floats:
    """Those that a cut lets leave."""
    return np.cumsum(found, axis=axis)[(slice(None),) * axis + (slice(None, -1),)]


def _staying(found: Floats, axis: int) -> Floats:
    """Those that it does not."""
    reverse = (slice(None),) * axis + (slice(None, None, -1),)
    return np.cumsum(found[reverse], axis=axis)[reverse][(slice(None),) * axis + (slice(1, None),)]
