"""What thresholds are chosen for, as counting: who leaves where, what is right, what it costs.

A threshold matters only by which samples it lets leave. The distinct certainties of a stage, from
the most certain on, are its *groups*; a *cut* c lets the first c groups leave there, so that
samples of equal certainty leave together. A NaN is in no group and never leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """n samples, s stages, and what each sample gives and costs at each exit.

    Attributes:
        groups: Per early stage (n,) group of each sample; ``levels[t]`` where it never leaves.
        levels: Number of groups per early stage, so cuts go from 0 to it.
        right: (n, s) what leaving there counts: 1 where the answer is right.
        cost: (n, s) what leaving there costs, not falling along the stages.
        base_right: What samples count that are not in the arrays.
        base_cost: What they cost.
    """

    groups: tuple[Integers, ...]
    levels: tuple[int, ...]
    right: Floats
    cost: Floats
    base_right: float = 0.0
    base_cost: float = 0.0

    @classmethod
    def of(cls, certainty: Floats, right: NDArray[Any], cost: Sequence[float]) -> Instance:
        """From what is recorded.

        Args:
            certainty: (n, s - 1) larger for more certain; NaN never leaves.
            right: (n, s) whether each stage's answer is right.
            cost: Cumulative cost of each stage.
        """
        ranked = [_ranked(certainty[:, t]) for t in range(certainty.shape[1])]
        return cls(
            groups=tuple(groups for groups, _ in ranked),
            levels=tuple(count for _, count in ranked),
            right=np.ascontiguousarray(right, dtype=np.float64),
            cost=np.broadcast_to(np.asarray(cost, dtype=np.float64), right.shape),
        )

    @property
    def samples(self) -> int:
        """Number of samples in the arrays."""
        return len(self.right)

    def exits(self, cuts: Sequence[int]) -> Integers:
        """(n,) the stage where each sample leaves."""
        found = np.full(self.samples, len(cuts), dtype=np.int64)
        for stage in range(len(cuts) - 1, -1, -1):
            found[self.groups[stage] < cuts[stage]] = stage
        return found

    def totals(self, cuts: Sequence[int]) -> tuple[float, float]:
        """How many are right, and what they cost, with these cuts."""
        exits, rows = self.exits(cuts), np.arange(self.samples)
        right = float(self.right[rows, exits].sum()) + self.base_right
        return right, float(self.cost[rows, exits].sum()) + self.base_cost

    def with_fixed(self, cuts: Sequence[int], free: Sequence[int]) -> Instance:
        """The smaller problem in which only some stages' cuts are free.

        Args:
            cuts: A cut for every stage but the last; those of free stages do not matter.
            free: The free stages, ascending.
        """
        last = np.full(self.samples, len(cuts), dtype=np.int64)
        for stage in range(len(cuts) - 1, -1, -1):
            if stage not in free:
                last[self.groups[stage] < cuts[stage]] = stage
        rows = np.arange(self.samples)
        right, cost = self.right[rows, last], self.cost[rows, last]
        kept = last > free[0]
        gone = ~kept
        groups = tuple(
            np.where(last > stage, self.groups[stage], self.levels[stage])[kept] for stage in free
        )
        return Instance(
            groups=groups,
            levels=tuple(self.levels[stage] for stage in free),
            right=np.column_stack([self.right[:, list(free)], right])[kept],
            cost=np.column_stack([self.cost[:, list(free)], cost])[kept],
            base_right=self.base_right + float(right[gone].sum()),
            base_cost=self.base_cost + float(cost[gone].sum()),
        )


def _ranked(values: Floats) -> tuple[Integers, int]:
    """Groups of equal values, the largest first, and their number."""
    known = ~np.isnan(values)
    distinct, inverse = np.unique(values[known], return_inverse=True)
    groups = np.full(len(values), len(distinct), dtype=np.int64)
    groups[known] = len(distinct) - 1 - inverse
    return groups, len(distinct)
