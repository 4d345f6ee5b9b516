"""The best cuts: branch and bound over boxes of cuts, and exact steps along one or two stages.

A box is refined into a grid (``lattice``). Cells that cannot hold anything better are dropped; the
others are the next boxes, the most promising first. With two early stages this ends with the
optimum, usually after a few grids. With more the number of cells grows too fast, so first a coarse
grid gives starting points, each improved along one and two stages at a time, exactly, until no pair
of thresholds can be improved while the others stay; branch and bound then goes on as far as the
work allowed takes it, and what is left open is the gap.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2d_compiler.calibration.instances import Floats, Instance, Integers
from s2d_compiler.calibration.lattice import Axis, count

#: How good it is to have so many right at such a cost, for arrays of both: never falling with the
#: first, never rising with the second, -inf where it is not allowed.
Score = Callable[[Any, Any], Any]

#: Points of one grid.
_POINTS = {1: 20_000, 2: 12_000}
_MANY_POINTS = 40_000
#: With more early stages no grid is fine enough to be of use.
_MOST_STAGES = 5
#: Boxes whose cells that are left fill less than this share of them are taken apart.
_FILL = 0.25
#: Smaller boxes are left together.
_SMALL = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """The best cuts that were found.

    Attributes:
        cuts: Per early stage; None where no cuts are allowed at all.
        score: Theirs; -inf where there are none.
        bound: No cuts score more than this.
        grids: How many grids were counted.
    """

    cuts: tuple[int, ...] | None
    score: float
    bound: float
    grids: int


def best_cuts(instance: Instance, score: Score, *, effort: int, tolerance: float) -> Found:
    """Find the cuts of the highest score.

    Args:
        instance: The samples.
        score: What to maximise.
        effort: Grids that branch and bound may count.
        tolerance: Relative gap at which to stop.
    """
    if not instance.levels:
        right, cost = instance.totals(())
        value = float(score(right, cost))
        return Found(None if value == -np.inf else (), value, value, 0)
    if len(instance.levels) <= 2:
        return _branch_and_bound(instance, score, effort, tolerance, None)
    if len(instance.levels) > _MOST_STAGES:
        return _from_plain_starts(instance, score, effort, tolerance)
    start = _improved_starts(instance, score, effort, tolerance)
    found = _branch_and_bound(instance, score, max(effort // 8, 2), tolerance, start)
    if found.cuts is None or (start.cuts == found.cuts):
        return found
    better = _improved(instance, score, found.cuts, effort, tolerance)
    return Found(better.cuts, better.score, max(found.bound, better.score), found.grids)


def improved_cuts(
    instance: Instance, score: Score, start: Sequence[int], tolerance: float
) -> Found:
    """Improve cuts until no pair of stages gives more while the others stay."""
    return _improved(instance, score, start, 8, tolerance)


# -- branch and bound ------------------------------------------------------------------------------


@dataclass(order=True, slots=True)
class _Box:
    """Spans of cuts per stage; ordered by what it can hold, best first."""

    worst: float
    number: int
    spans: tuple[Integers, ...] = field(compare=False)


def _branch_and_bound(
    instance: Instance, score: Score, effort: int, tolerance: float, start: Found | None
) -> Found:
    best = -np.inf if start is None else start.score
    cuts = None if start is None else start.cuts
    numbers = itertools.count()
    whole = tuple(np.array([[0, levels]], dtype=np.int64) for levels in instance.levels)
    queue = [_Box(-np.inf, next(numbers), whole)]
    grids = 0

    def is_open(value: Any) -> Any:
        return value > best + tolerance * abs(best) if np.isfinite(best) else value > best

    while queue and is_open(-queue[0].worst) and grids < effort:
        box = heapq.heappop(queue)
        axes = _refined(box.spans)
        if axes is None:
            for half in _halves(box.spans):
                heapq.heappush(queue, _Box(box.worst, next(numbers), half))
            continue
        grids += 1
        counts = count(instance, axes)
        values = np.asarray(score(counts.right, counts.cost))
        place = int(np.argmax(values))
        if values.flat[place] > best:
            best = float(values.flat[place])
            cuts = _cuts_at(axes, np.unravel_index(place, values.shape))
        limits = np.asarray(score(counts.most_right, counts.least_cost))
        keep = is_open(limits)
        if keep.any():
            for spans, limit in _boxes(axes, keep, limits):
                heapq.heappush(queue, _Box(-limit, next(numbers), spans))
    bound = max(best, -queue[0].worst) if queue and is_open(-queue[0].worst) else best
    return Found(cuts, best, float(bound), grids)


def _cuts_at(axes: Sequence[Axis], place: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(axis.points[i]) for axis, i in zip(axes, place, strict=True))


def _refined(spans: tuple[Integers, ...]) -> list[Axis] | None:
    """A grid over a box; None if it has too many spans for one."""
    dims = len(spans)
    left = float(_POINTS.get(dims, _MANY_POINTS))
    order = sorted(range(dims), key=lambda t: int((spans[t][:, 1] - spans[t][:, 0]).sum()))
    axes: dict[int, Axis] = {}
    for position, stage in enumerate(order):
        share = int(left ** (1 / (dims - position)))
        span = spans[stage]
        widths = span[:, 1] - span[:, 0]
        total = int(widths.sum())
        if len(span) > max(share // 2 if total else share, 1):
            return None
        pieces = np.minimum(widths, np.maximum(1, (share - len(span)) * widths // max(total, 1)))
        axes[stage] = _subdivided(span, pieces)
        left /= len(axes[stage])
    return [axes[t] for t in range(dims)]


def _subdivided(span: Integers, pieces: Integers) -> Axis:
    """Cut every span, of its first and last cut, into equal pieces."""
    which = np.repeat(np.arange(len(span)), pieces + 1)
    step = np.arange(len(which)) - np.repeat(np.cumsum(pieces + 1) - (pieces + 1), pieces + 1)
    low, high = span[which, 0], span[which, 1]
    points = low + (high - low) * step // np.maximum(pieces[which], 1)
    single = np.ones(len(points), dtype=bool)
    single[:-1] = (which[1:] != which[:-1]) | (np.diff(points) == 1)
    return Axis(points, single)


def _halves(spans: tuple[Integers, ...]) -> Iterator[tuple[Integers, ...]]:
    """A box in two, along the stage that has most spans."""
    axis = max(range(len(spans)), key=lambda t: len(spans[t]))
    middle = len(spans[axis]) // 2
    for part in (spans[axis][:middle], spans[axis][middle:]):
        yield (*spans[:axis], part, *spans[axis + 1 :])


def _boxes(
    axes: Sequence[Axis], keep: NDArray[np.bool_], limits: Floats
) -> Iterator[tuple[tuple[Integers, ...], float]]:
    """Boxes that hold the cells that are left, and what each can hold at most."""
    cells = np.argwhere(keep)
    values = limits[keep]
    ends = [np.where(axis.single, axis.points, np.append(axis.points[1:], 0) - 1) for axis in axes]
    stack = [np.arange(len(cells))]
    while stack:
        rows = stack.pop()
        inside = cells[rows]
        used = [np.unique(inside[:, t]) for t in range(inside.shape[1])]
        volume = int(np.prod([len(u) for u in used]))
        if len(rows) < _FILL * volume and volume > _SMALL:
            axis = max(range(len(used)), key=lambda t: len(used[t]))
            below = inside[:, axis] < used[axis][len(used[axis]) // 2]
            stack += [rows[below], rows[~below]]
            continue
        spans = tuple(
            np.column_stack([a.points[u], end[u]])
            for a, end, u in zip(axes, ends, used, strict=True)
        )
        yield spans, float(values[rows].max())


# -- one and two stages at a time ------------------------------------------------------------------


def _improved_starts(instance: Instance, score: Score, effort: int, tolerance: float) -> Found:
    """The best of some points of a coarse grid, each improved."""
    whole = tuple(np.array([[0, levels]], dtype=np.int64) for levels in instance.levels)
    axes = _refined(whole)
    assert axes is not None
    counts = count(instance, axes, cells=False)
    values = np.asarray(score(counts.right, counts.cost))
    best = Found(None, -np.inf, np.inf, 0)
    for place in _apart(values, 3):
        cuts = _cuts_at(axes, place)
        found = _improved(instance, score, cuts, effort, tolerance)
        if found.score > best.score:
            best = found
    return best


def _from_plain_starts(instance: Instance, score: Score, effort: int, tolerance: float) -> Found:
    """The best of some simple choices: equal shares everywhere, or all at one stage."""
    levels = instance.levels
    starts = [tuple(count * part // 4 for count in levels) for part in range(5)]
    for stage in range(len(levels)):
        starts.append(tuple(count if t == stage else 0 for t, count in enumerate(levels)))
    best = Found(None, -np.inf, np.inf, 0)
    for cuts in starts:
        found = _improved(instance, score, cuts, effort, tolerance, together=1)
        if found.score > best.score:
            best = found
    if best.cuts is None:
        return best
    return _improved(instance, score, best.cuts, effort, tolerance)


def _apart(values: Floats, wanted: int) -> list[tuple[int, ...]]:
    """Good points of a grid that are no neighbours."""
    order = np.argsort(values, axis=None)[::-1][:2000]
    chosen: list[NDArray[np.int64]] = []
    for flat in order:
        if values.flat[flat] == -np.inf or len(chosen) == wanted:
            break
        place = np.array(np.unravel_index(flat, values.shape))
        if all(np.abs(place - other).max() > 1 for other in chosen):
            chosen.append(place)
    return [tuple(int(i) for i in place) for place in chosen]


def _improved(
    instance: Instance,
    score: Score,
    cuts: Sequence[int],
    effort: int,
    tolerance: float,
    *,
    together: int = 2,
) -> Found:
    """Improve cuts along every stage, then every pair of stages, until none gives more."""
    best = list(cuts)
    value = float(score(*instance.totals(best)))
    dims = len(best)
    steps = [
        free for many in range(together) for free in itertools.combinations(range(dims), many + 1)
    ]
    since = 0
    for free in itertools.islice(itertools.cycle(steps), 6 * len(steps)):
        if since == len(steps):
            break
        since += 1
        smaller = instance.with_fixed(best, free)
        start = Found(tuple(best[t] for t in free), value, np.inf, 0)
        found = _branch_and_bound(smaller, score, max(effort // 8, 4), tolerance, start)
        assert found.cuts is not None
        if found.score > value:
            for stage, cut in zip(free, found.cuts, strict=True):
                best[stage] = cut
            value = found.score
            since = 0
    return Found(None if value == -np.inf else tuple(best), value, np.inf, 0)
