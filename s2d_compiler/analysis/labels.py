"""Label arrays: which atom each channel position of a value belongs to.

A label array has the rank of its value and broadcasts against it: an atom's number along
dimensions that carry channels, size 1 along the others. Positions that belong to no atom
carry one of the negative marks below.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

Labels = npt.NDArray[np.int64]

#: Belongs to no stage: inputs and constants. Readable by all, computed once.
NOBODY = -1
#: One value per stage.
VERSIONED = -2
#: Nobody's, and zero: padded channels.
ZERO = -3


def uniform(rank: int, mark: int) -> Labels:
    """A label array that says the same of every position."""
    return np.full((1,) * rank, mark, dtype=np.int64)


def has_atoms(labels: Labels) -> bool:
    """Whether any position belongs to an atom."""
    return bool((labels >= 0).any())


def is_versioned(labels: Labels) -> bool:
    """Whether any position is one value per stage."""
    return bool((labels == VERSIONED).any())


def expand(labels: Labels, shape: tuple[int, ...]) -> torch.Tensor:
    """Labels at the full shape of their value, as an integer tensor."""
    return torch.from_numpy(np.ascontiguousarray(labels)).expand(shape)


def compress(full: torch.Tensor, keep: Iterable[int] = ()) -> Labels:
    """Drop every dimension along which labels do not vary."""
    kept = set(keep)
    for d in range(full.dim()):
        if d in kept or full.shape[d] <= 1:
            continue
        first = full.narrow(d, 0, 1)
        if bool((full == first).all()):
            full = first
    return full.contiguous().numpy().astype(np.int64)


class Ties:
    """Pairs of labels that must share an owner, gathered first and resolved once."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[npt.NDArray[np.int64]] = []

    def fresh(self, count: int) -> Labels:
        """``count`` new labels."""
        first = self.count
        self.count += count
        return np.arange(first, self.count, dtype=np.int64)

    def tie(self, a: Labels, b: Labels) -> None:
        """Tie labels position by position; marks are neutral."""
        a, b = np.broadcast_arrays(a, b)
        mask = (a >= 0) & (b >= 0) & (a != b)
        if mask.any():
            self.pairs.append(np.unique(np.stack([a[mask], b[mask]], axis=1), axis=0))

    def components(self) -> npt.NDArray[np.int64]:
        """Atom number of every label; atoms are numbered by their first label."""
        atom = np.arange(self.count, dtype=np.int64)
        if self.pairs:
            pairs = np.concatenate(self.pairs)
            while True:
                smallest = np.minimum(atom[pairs[:, 0]], atom[pairs[:, 1]])
                before = atom.copy()
                np.minimum.at(atom, pairs[:, 0], smallest)
                np.minimum.at(atom, pairs[:, 1], smallest)
                np.minimum.at(atom, before, atom)
                atom = atom[atom]
                if np.array_equal(before, atom):
                    break
        return np.unique(atom, return_inverse=True)[1].astype(np.int64)
