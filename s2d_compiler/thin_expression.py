"""Slices of computed weights: the expression of a few rows and columns of a weight.

Which elements of every tensor lead to which row and column of the weight is found by going
backwards through the expression with integer tensors. A stage keeps the elements that lead to
its rows and columns and computes its weight from these alone, so that means and norms are
taken over what is alive.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from s2d_compiler.computed import INDEX, ComputedLayer, Expression, Step, Value, weight_shape
from s2d_compiler.memory import let_through

aten = torch.ops.aten
Numbers = torch.Tensor

#: Leads to several rows (columns), or to none: kept by every stage; leads nowhere: never kept.
ANY, UNUSED = -1, -2


class NotSliceable(Exception):
    """An expression of which rows and columns cannot be computed apart; the text says why."""


@dataclass(frozen=True)
class ThinExpression:
    """A slice of a computed layer.

    Attributes:
        expression: Of the slice.
        index: Tensor name -> per dimension the positions kept.
        constants: Index tensors that the expression uses besides.
    """

    expression: Expression
    index: dict[str, tuple[tuple[int, ...], ...]]
    constants: dict[str, torch.Tensor]


def slice_expression(
    layer: ComputedLayer, rows: Sequence[int], columns: Sequence[int]
) -> ThinExpression:
    """The expression of some rows and columns (within a group) of a computed layer.

    Raises:
        NotSliceable: They cannot be computed without the others.
    """
    return _Slicer(_trace(layer), list(rows), list(columns)).run()


_TRACES: WeakKeyDictionary[ComputedLayer, _Trace] = WeakKeyDictionary()
_REASONS: WeakKeyDictionary[ComputedLayer, str] = WeakKeyDictionary()


def _trace(layer: ComputedLayer) -> _Trace:
    if layer not in _TRACES:
        _TRACES[layer] = _Trace(layer)
    return _TRACES[layer]


def why_not_sliceable(layer: ComputedLayer) -> str:
    """Why rows and columns of a layer cannot be computed apart; empty if they can."""
    if layer not in _REASONS:
        rows, columns, *_ = weight_shape(layer)
        _REASONS[layer] = ""
        for step in (1, 2):
            try:
                slice_expression(layer, range(0, rows, step), range(0, columns, step))
            except NotSliceable as error:
                _REASONS[layer] = str(error)
    return _REASONS[layer]


def _movement(target: Any) -> bool:
    name = getattr(target, "_opname", "")
    return name in _MOVES


def _creation(target: Any) -> bool:
    return getattr(target, "_opname", "") in _CREATIONS


_MOVES = frozenset(
    """view reshape _unsafe_view flatten unflatten unsqueeze squeeze permute transpose t slice
    select narrow expand repeat flip roll movedim moveaxis swapaxes index_select reshape_as
    view_as expand_as contiguous clone detach alias lift_fresh_copy numpy_T mT""".split()
)
_PER_ELEMENT = frozenset(
    """add sub mul div rsub pow neg exp log sqrt rsqrt square reciprocal abs sign tanh sigmoid relu
    clamp clamp_min clamp_max maximum minimum where to _to_copy softplus round
    floor ceil trunc sin cos erf gelu silu leaky_relu lerp masked_fill eq ne lt le gt ge
    logical_and logical_or logical_not""".split()
)
#: Of the shape of their first operand, along whose dimensions they look.
_SAME_SHAPE = frozenset("batch_norm softmax _softmax _weight_norm".split())
_REDUCTIONS = frozenset(
    """mean sum var std amax amin linalg_vector_norm norm var_mean std_mean norm_except_dim
    prod""".split()
)
#: Say nothing of their operand but its shape and type -> the same of a shape that is given.
_CREATIONS: dict[str, Any] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), aten.new_zeros.default),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), aten.new_ones.default),
    **dict.fromkeys(("full", "full_like", "new_full"), aten.new_full.default),
}


@dataclass
class _Labels:
    """Row and column of the weight that each element of a value leads to."""

    rows: Numbers
    columns: Numbers

    def compressed(self) -> _Labels:
        """The same labels with size 1 along dimensions that they do not vary along."""
        return _Labels(_compressed(self.rows), _compressed(self.columns))

    def merge(self, other: _Labels) -> _Labels:
        return _Labels(_merged(self.rows, other.rows), _merged(self.columns, other.columns))


def _compressed(labels: Numbers) -> Numbers:
    for d in range(labels.dim()):
        first = labels.narrow(d, 0, 1) if labels.shape[d] > 1 else labels
        if first is not labels and bool((labels == first).all()):
            labels = first
    return labels.clone()


def _merged(a: Numbers, b: Numbers) -> Numbers:
    if bool(((a >= 0) & (b >= 0) & (a != b)).any()):
        raise NotSliceable("an element of it leads to several rows by different ways")
    return torch.maximum(a, b)


@dataclass
class _Trace:
    """What every element of every value of an expression leads to; the same for all slices."""

    layer: ComputedLayer
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, torch.dtype] = field(default_factory=dict)
    labels: dict[str, _Labels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = self.layer.tensors()
        meta = {k: torch.empty_like(t, device="meta") for k, t in tensors.items()}
        for name, value in self.layer.expression.values(meta).items():
            first = value[0] if isinstance(value, tuple | list) else value
            self.shapes[name], self.types[name] = tuple(first.shape), first.dtype
        self._backward()
        self.labels = {name: found.compressed() for name, found in self.labels.items()}

    # -- backwards: what leads where ---------------------------------------------------------------

    def _backward(self) -> None:
        expression = self.layer.expression
        shape = weight_shape(self.layer)
        if self.shapes[expression.weight] != shape:
            raise NotSliceable("its weight has another shape than the layer")
        rows = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        columns = torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        self._lead(expression.weight, _Labels(rows, columns))
        if expression.bias is not None:
            if self.shapes[expression.bias] != shape[:1]:
                raise NotSliceable("its bias has another shape than its rows")
            every = torch.arange(shape[0])
            self._lead(expression.bias, _Labels(every, torch.full_like(every, ANY)))
        for step in reversed(expression.steps):
            if step.name in self.labels:
                self._pull(step, self.labels[step.name])
        for step in expression.steps:
            if step.name in self.labels:
                self._push(step)

    def _lead(self, name: str, labels: _Labels) -> None:
        self.labels[name] = self.labels[name].merge(labels) if name in self.labels else labels

    def _pull(self, step: Step, labels: _Labels) -> None:
        if _creation(step.target):
            return
        for position, operand in enumerate(step.operands()):
            ids = self.ids(step, position, operand)
            shape = self.shapes[operand]
            if ids is not None and _is_order(ids, shape):
                rows, columns = labels.rows.reshape(shape), labels.columns.reshape(shape)
            elif ids is None:  # a reduction: every element leads where its result leads
                to = self.reduced_ids(step, operand)
                rows, columns = (x.reshape(-1)[to] for x in (labels.rows, labels.columns))
            else:
                rows, columns = (_scatter(x, ids, shape) for x in (labels.rows, labels.columns))
            self._lead(operand, _Labels(rows, columns))

    def _push(self, step: Step) -> None:
        """What is absent of an operand is absent of what it is moved or mapped to."""
        if _creation(step.target):
            return
        for position, operand in enumerate(step.operands()):
            ids = self.ids(step, position, operand)
            if ids is None or operand not in self.labels:
                continue
            known = self.labels[operand]
            if bool((ids < 0).any()):
                continue
            rows, columns = (x.reshape(-1)[ids] for x in (known.rows, known.columns))
            mine = self.labels[step.name]
            unused = mine.rows == UNUSED
            rows, columns = (x.masked_fill(unused, UNUSED) for x in (rows, columns))
            self.labels[step.name] = mine.merge(_Labels(rows, columns))

    def ids(self, step: Step, position: int, operand: str) -> Numbers | None:
        """Per element of the result, the element of an operand that it comes from (-1: from
        another operand); None for reductions."""
        name, shape = getattr(step.target, "_opname", ""), self.shapes[step.name]
        numbers = _arange(self.shapes[operand])
        if step.target is _GETITEM:
            return numbers
        if _movement(step.target):
            if position:
                raise NotSliceable(f"{name} moves by another tensor")
            args, kwargs = _with_first(step, numbers)
            moved: Numbers = step.target(*args, **kwargs)
            return moved
        if name in ("cat", "concat"):
            return self.concatenated_ids(step, position)
        if name in _PER_ELEMENT:
            return numbers.expand(shape) if numbers.dim() <= len(shape) else None
        if name in _SAME_SHAPE:
            if not position:
                return numbers
            if name == "batch_norm":
                return numbers.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
            return numbers.expand(shape)
        if name in _REDUCTIONS:
            return None
        raise NotSliceable(f"{name} is in the way")

    def concatenated_ids(self, step: Step, position: int) -> Numbers:
        dimension = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
        pieces = [
            _arange(self.shapes[n])
            if k == position
            else torch.full(self.shapes[n], -1, dtype=torch.long)
            for k, n in enumerate(step.operands())
        ]
        return torch.cat(pieces, dimension)

    def reduced_ids(self, step: Step, operand: str) -> Numbers:
        """Per element of a reduction's operand, the element of its result."""
        shape, target = self.shapes[operand], self.shapes[step.name]
        result = _arange(target)
        if len(target) != len(shape):
            result = result.reshape(self.with_kept(step, shape, target))
        if any(n not in (1, m) for n, m in zip(result.shape, shape, strict=True)):
            raise NotSliceable("a reduction of it cannot be followed")
        return result.expand(shape)

    def with_kept(
        self, step: Step, shape: tuple[int, ...], target: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The result's shape with the reduced dimensions of size 1."""
        reduced = reduced_dimensions(step, len(shape))
        kept = tuple(1 if d in reduced else n for d, n in enumerate(shape))
        if math.prod(kept) != math.prod(target):
            raise NotSliceable("a reduction of it cannot be followed")
        return kept


def reduced_dimensions(step: Step, rank: int) -> set[int]:
    """The dimensions that a reduction reduces."""
    schema = [a.name for a in step.target._schema.arguments]
    given = dict(zip(schema, step.args, strict=False)) | dict(step.kwargs)
    dims = given.get("dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


@dataclass
class _Slicer:
    """Builds the expression of some rows and columns."""

    trace: _Trace
    rows: list[int]
    columns: list[int]
    numbers: dict[str, Numbers] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> ThinExpression:
        layer, shapes = self.trace.layer, self.trace.shapes
        expression, labels = layer.expression, self.trace.labels
        index: dict[str, tuple[tuple[int, ...], ...]] = {}
        for name in layer.tensors():
            if name in labels:
                index[name] = self._kept(name)
                self.numbers[name] = _take(_arange(shapes[name]), index[name])
            else:
                index[name] = tuple((0,) * 0 for _ in shapes[name])
        for step in expression.steps:
            if step.name in labels:
                self._forward(step)
        weight = self._final(expression.weight, (self.rows, self.columns))
        bias = None
        if expression.bias is not None:
            bias = self._final(expression.bias, (self.rows,))
        used = {n for step in self.steps for n in step.operands()} | {weight, bias}
        return ThinExpression(
            Expression(tuple(self.steps), weight, bias),
            {name: where for name, where in index.items() if name in used},
            self.constants,
        )

    # -- forwards: the same operators on what is kept ----------------------------------------------

    def _kept(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Positions that a stage keeps, per dimension, in the order of its rows and columns."""
        labels, shape = self.trace.labels[name], self.trace.shapes[name]
        size = weight_shape(self.trace.layer)
        rows = _ranks(self.rows, size[0])[labels.rows + 2]
        columns = _ranks(self.columns, size[1])[labels.columns + 2]
        if (direct := _direct_lists(rows, columns, shape)) is not None:
            return direct
        frame = np.broadcast_shapes(tuple(rows.shape), tuple(columns.shape))
        rows, columns = rows.expand(frame), columns.expand(frame)
        keep = (rows >= 0) & (columns >= 0)
        far = torch.iinfo(torch.long).max
        lists: list[tuple[int, ...]] = []
        for d in range(keep.dim()):
            if keep.shape[d] == 1:
                lists.append(tuple(range(shape[d])) if bool(keep.any()) else ())
                continue
            others = [e for e in range(keep.dim()) if e != d]
            some = keep.amax(others) if others else keep
            found = torch.nonzero(some).flatten().tolist()
            first_row = torch.where(keep, rows, far).amin(others) if others else rows
            first_column = torch.where(keep, columns, far).amin(others) if others else columns
            keys = list(zip(first_row.tolist(), first_column.tolist(), strict=True))
            lists.append(tuple(sorted(found, key=lambda p, k=keys: (*k[p], p))))  # type: ignore[misc]
        varying = [len(lists[d]) for d in range(keep.dim()) if keep.shape[d] > 1]
        if math.prod(varying) != int(keep.sum()) and keep.numel() > 1:
            raise NotSliceable("what leads to some rows and columns of it is no box")
        return tuple(lists)

    def _forward(self, step: Step) -> None:
        name = getattr(step.target, "_opname", "")
        operands = step.operands()
        if _movement(step.target):
            self._move(step, operands[0])
            return
        if _creation(step.target):
            self._create(step, name)
            return
        self.steps.append(step)
        if step.target is _GETITEM:
            self.numbers[step.name] = self.numbers[operands[0]]
        elif name in ("cat", "concat"):
            self._concatenate(step)
        elif name in _REDUCTIONS:
            self._reduce(step, operands[0])
        else:
            self._map(step, operands)

    def _move(self, step: Step, operand: str) -> None:
        ids = self.trace.ids(step, 0, operand)
        assert ids is not None
        where = self._kept(step.name)
        wanted = _take(_arange(self.trace.shapes[step.name]), where)
        source, held = ids.reshape(-1)[wanted], self.numbers[operand]
        self.numbers[step.name] = wanted
        if source.numel() == held.numel() and torch.equal(source.reshape(-1), held.reshape(-1)):
            self._reshape(operand, list(wanted.shape), step.name)
            return
        args, kwargs = _with_first(step, held)
        try:
            moved = step.target(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            let_through(error)
            moved = held
        if moved.shape == source.shape and torch.equal(moved, source):
            self.steps.append(step)
        else:
            self._gather(operand, held, source, step.name)

    def _create(self, step: Step, name: str) -> None:
        """Created at the size of what is kept, from any tensor of its type."""
        dtype = self.trace.types[step.name]
        alike = [n for n in self.trace.layer.tensors() if self.trace.types[n] == dtype]
        if not alike:
            raise NotSliceable(f"{name} is of another type than its parameters")
        wanted = _take(_arange(self.trace.shapes[step.name]), self._kept(step.name))
        fill = step.args[2:] if name == "new_full" else step.args[1:] if "full" in name else ()
        args = (Value(alike[0]), list(wanted.shape), *fill)
        self.steps.append(Step(step.name, _CREATIONS[name], args, {}))
        self.numbers[step.name] = wanted

    def _reshape(self, operand: str, shape: list[int], name: str) -> None:
        self.steps.append(Step(name, aten.reshape.default, (Value(operand), shape), {}))

    def _gather(self, operand: str, held: Numbers, source: Numbers, name: str) -> None:
        """Pick elements one by one: always right, never fast."""
        order = torch.argsort(held.reshape(-1))
        in_order, wanted = held.reshape(-1)[order], source.reshape(-1)
        at = torch.searchsorted(in_order, wanted).clamp(max=max(0, len(in_order) - 1))
        if not len(in_order) or not torch.equal(in_order[at], wanted):
            raise NotSliceable("some rows of it need others")
        index = order[at]
        constant = f"{INDEX}{len(self.constants)}"
        self.constants[constant] = index.long()
        self._reshape(operand, [-1], f"{name}_flat")
        picked = (Value(f"{name}_flat"), 0, Value(constant))
        self.steps.append(Step(f"{name}_picked", aten.index_select.default, picked, {}))
        self._reshape(f"{name}_picked", list(source.shape), name)

    def _concatenate(self, step: Step) -> None:
        dimension = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
        pieces = []
        for position, operand in enumerate(step.operands()):
            ids = self.trace.concatenated_ids(step, position).reshape(-1)
            inside = torch.nonzero(ids >= 0).flatten()
            to = torch.empty_like(inside)
            to[ids[inside]] = inside
            pieces.append(to[self.numbers[operand]])
        self.numbers[step.name] = torch.cat(pieces, dimension)

    def _reduce(self, step: Step, operand: str) -> None:
        to = self.trace.reduced_ids(step, operand)
        held = to.reshape(-1)[self.numbers[operand]]
        reduced = sorted(reduced_dimensions(step, held.dim()), reverse=True)
        for d in reduced:
            held = held.narrow(d, 0, 1) if held.shape[d] > 1 else held
        if len(self.trace.shapes[step.name]) != held.dim():
            for d in reduced:
                held = held.squeeze(d)
        self.numbers[step.name] = held

    def _map(self, step: Step, operands: list[str]) -> None:
        shape = self.trace.shapes[step.name]
        full = [n for n in operands if self.trace.shapes[n] == shape]
        if not full:
            raise NotSliceable("it is an outer product")
        held = self.numbers[full[0]]
        for position, operand in enumerate(operands):
            ids = self.trace.ids(step, position, operand)
            assert ids is not None
            mine = self.numbers[operand]
            if getattr(step.target, "_opname", "") == "batch_norm" and position:
                mine = mine.reshape(1, -1, *[1] * (held.dim() - 2))
            try:
                same = torch.equal(mine.expand(held.shape), ids.reshape(-1)[held])
            except RuntimeError as error:
                let_through(error)
                same = False
            if not same:
                raise NotSliceable("its operands are sliced in different orders")
        self.numbers[step.name] = held

    def _final(self, name: str, order: tuple[list[int], ...]) -> str:
        """The name of a result in the order that the layer needs."""
        shape = self.trace.shapes[name]
        lists = [*order, *(range(n) for n in shape[len(order) :])]
        wanted = _take(_arange(shape), tuple(tuple(chosen) for chosen in lists))
        held = self.numbers[name]
        if held.shape == wanted.shape and torch.equal(held, wanted):
            return name
        self._gather(name, held, wanted, f"{name}_ordered")
        return f"{name}_ordered"


_GETITEM: Any = operator.getitem


def _arange(shape: tuple[int, ...]) -> Numbers:
    return torch.arange(math.prod(shape)).reshape(shape)


def _take(numbers: Numbers, lists: Sequence[Sequence[int]]) -> Numbers:
    for d, chosen in enumerate(lists):
        if len(chosen) != numbers.shape[d] or list(chosen) != list(range(len(chosen))):
            numbers = numbers.index_select(d, torch.tensor(list(chosen), dtype=torch.long))
    return numbers


def _with_first(step: Step, first: Any) -> tuple[Any, Any]:
    """A step's arguments with its only tensor replaced."""
    return tree_map_only(Value, lambda _: first, (step.args, dict(step.kwargs)))  # type: ignore[no-any-return]


def _scatter(labels: Numbers, ids: Numbers, shape: tuple[int, ...]) -> Numbers:
    """Per element of an operand, the label of the results that it leads to."""
    flat, values = ids.reshape(-1), labels.reshape(-1)
    inside = flat >= 0
    flat, values = flat[inside], values[inside]
    used = values > UNUSED
    flat, values = flat[used], values[used]
    count = math.prod(shape)
    high = torch.full((count,), UNUSED).scatter_reduce(0, flat, values, "amax")
    far = torch.iinfo(torch.long).max
    low = torch.full((count,), far).scatter_reduce(0, flat, values, "amin")
    several = (high != low) & (high > UNUSED)
    return torch.where(several, ANY, high).reshape(shape)


def _direct_lists(
    rows: Numbers, columns: Numbers, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Positions kept where rows lie along one dimension and columns along another."""
    along = [[d for d in range(x.dim()) if x.shape[d] > 1] for x in (rows, columns)]
    if any(len(dims) > 1 for dims in along) or (along[0] and along[0] == along[1]):
        return None
    lists = [tuple(range(n)) for n in shape]
    for ranks, dims in zip((rows, columns), along, strict=True):
        flat = ranks.reshape(-1)
        if not dims:
            if flat.numel() and int(flat[0]) < 0:
                return tuple(() for _ in shape)
            continue
        order = torch.argsort(flat, stable=True)
        lists[dims[0]] = tuple(order[flat[order] >= 0].tolist())
    return tuple(lists)


def _is_order(ids: Numbers, shape: tuple[int, ...]) -> bool:
    """Whether a result holds the elements of its operand one by one in their order."""
    if ids.numel() != math.prod(shape):
        return False
    return torch.equal(ids.reshape(-1), torch.arange(ids.numel()))


def _ranks(chosen: list[int], size: int) -> Numbers:
    """Rank of every row (shifted by two: unused, any); -1 for what is not kept."""
    ranks = torch.full((size + 2,), -1)
    ranks[ANY + 2] = 0
    ranks[torch.tensor(chosen, dtype=torch.long) + 2] = torch.arange(len(chosen))
    return ranks
