"""Proofs about data movement on fewer elements.

A movement operator treats dimensions that carry no channels apart from those that do: a
reshape within groups of dimensions, a permutation dimension by dimension. Two positions of
such a dimension are moved as all of them are, so a proof needs no more; and no less, since with
one an order of dimensions could not be told from another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2d_compiler.program import shape_of

aten = torch.ops.aten

#: Reshapes whose arguments are the sizes of the result.
SIZED = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
#: Reshapes whose arguments name dimensions.
_RESHAPES = frozenset(
    {
        aten.flatten.using_ints,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
_PERMUTATIONS = frozenset(
    {aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default}
)
#: Operators that look along the dimensions that they name, and at where those go.
_ALONG = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.index_select.default,
        aten.flip.default,
        aten.roll.default,
    }
)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """The size at which a movement operator is followed.

    Attributes:
        shape: Of its operand.
        result: Of its result, for an operator that is told it; else None.
    """

    shape: Shape
    result: Shape | None = None

    def sizes(self, given: Sequence[int]) -> list[int]:
        """The sizes that a reshape is told, at this size."""
        if self.result is None:
            return list(given)
        return [n if n == -1 else size for n, size in zip(given, self.result, strict=True)]


def sample_of(node: fx.Node, source: fx.Node, frame: Shape, result: Shape | None = None) -> Sample:
    """The smallest size at which a movement operator can be followed.

    Args:
        node: The operator.
        source: Its operand.
        frame: The operand's shape with 1 for dimensions without channels.
        result: The same of its result, where it is known.
    """
    shape, target = shape_of(source), node.target
    kept = {d for d, n in enumerate(frame) if n > 1}
    if target in SIZED or target in _RESHAPES:
        held = {d for d, n in enumerate(result or ()) if n > 1}
        found = _reshaped(shape, shape_of(node), kept, held)
        if found is not None:
            return Sample(found[0], found[1] if target in SIZED else None)
    elif target in _PERMUTATIONS:
        return Sample(_small(shape, kept))
    elif target in _ALONG and (named := _named_dimensions(node, len(shape))):
        return Sample(_small(shape, kept | named))
    return Sample(shape)


def _small(shape: Shape, kept: set[int]) -> Shape:
    return tuple(n if d in kept else min(n, 2) for d, n in enumerate(shape))


def _named_dimensions(node: fx.Node, rank: int) -> set[int]:
    """Dimensions that an operator names; empty where it takes all without a name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    dims = given.get("dim", given.get("dims", 0 if "dim" in names else []))
    return {int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


def _reshaped(
    shape: Shape, result: Shape, kept: set[int], held: set[int]
) -> tuple[Shape, Shape] | None:
    """Small shapes before and after a reshape; None where it cannot be taken apart."""
    if 0 in shape or math.prod(shape) != math.prod(result):
        return None
    before, after = list(shape), list(result)
    i = j = 0
    while i < len(shape) or j < len(result):
        mine, others = [i] if i < len(shape) else [], [j] if j < len(result) else []
        i, j = i + len(mine), j + len(others)
        while (a := math.prod(shape[d] for d in mine)) != (
            b := math.prod(result[d] for d in others)
        ):
            if a < b:
                mine.append(i)
                i += 1
            else:
                others.append(j)
                j += 1
        if kept.isdisjoint(mine) and held.isdisjoint(others):
            _shrink(before, mine, after, others)
    return tuple(before), tuple(after)


def _shrink(before: list[int], mine: list[int], after: list[int], others: list[int]) -> None:
    """Shrink dimensions that are merged to one or split from one."""
    wide = [d for d in mine if before[d] > 1], [d for d in others if after[d] > 1]
    if min(len(dims) for dims in wide) != 1:
        return
    for sizes, dims, opposite in ((before, wide[0], wide[1]), (after, wide[1], wide[0])):
        for d in dims:
            sizes[d] = 2 if len(dims) > 1 else 2 ** len(opposite)
