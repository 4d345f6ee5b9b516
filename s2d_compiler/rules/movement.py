"""Data movement: operators that only say where elements go.

What they do to channels is found by running the operator itself on integer tensors: labels
for the analysis, element numbers for a stage's part. A way to compute the part is accepted
only if it moves the element numbers exactly as the whole operator does.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import fx

from s2d_compiler.analysis.labels import NOBODY, VERSIONED, ZERO, Labels, compress, expand, uniform
from s2d_compiler.layout import Layout, layout, packing, take
from s2d_compiler.memory import let_through
from s2d_compiler.program import batch_dimensions, concrete, is_scalar, shape_of, tensor_value
from s2d_compiler.rules.base import NoRule, OperatorRule, register
from s2d_compiler.rules.channelwise import operand_of
from s2d_compiler.rules.sampling import SIZED, Sample, sample_of

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder

aten = torch.ops.aten

#: Elements above which a proof on element numbers would need too much memory.
_LARGEST_PROOF = 400_000_000


def move(node: fx.Node, source: torch.Tensor, constants: Any, sample: Sample) -> torch.Tensor:
    """Run a movement operator on a tensor of the operand's sample shape, or a part of one."""

    def value(n: fx.Node) -> Any:
        if n is node.args[0]:
            return source
        if is_scalar(n):
            return concrete(n.meta["val"])
        found = constants(n)
        if found is None:
            raise NoRule("its index is not a constant")
        return found

    args = fx.map_arg(node.args, value)
    kwargs = fx.map_arg(dict(node.kwargs), value)
    target = node.target
    if target in SIZED:
        target = aten.reshape.default
        args = (args[0], sample.sizes(args[1]))  # type: ignore[arg-type]
    with torch.no_grad():
        result = target(*args, **kwargs)  # type: ignore[operator]
    assert isinstance(result, torch.Tensor)
    return result


class Movement(OperatorRule):
    """view, permute, slice, flip, pixel shuffle, indexing by constants..."""

    family: ClassVar[str] = "data movement"
    moves_or_maps: ClassVar[bool] = True

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        source = operand_of(node)
        shape = shape_of(source)
        labels = context.labels_of(source)
        for operand in node.all_input_nodes:
            if operand is source or is_scalar(operand):
                continue
            if context.constant(operand) is None:
                raise NoRule("its index is not a constant")
        if labels.size == 1 and tensor_value(node) is not None:
            return uniform(len(shape_of(node)), int(labels.reshape(-1)[0]))
        _require_affordable(shape)
        try:
            sample = sample_of(node, source, labels.shape)
            moved = compress(move(node, expand(labels, sample.shape), context.constant, sample))
        except (RuntimeError, IndexError, ValueError) as error:
            let_through(error)
            raise NoRule(f"it cannot be followed: {str(error).splitlines()[0]}") from error
        for d in batch_dimensions(node):
            if moved.shape[d] > 1:
                raise NoRule("it mixes channels with the batch")
        return moved

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        shape = shape_of(source)
        frame = builder.labels(source).shape
        if not where.dimensions and len(frame) and max(frame) == 1:
            return self._as_it_is(
                builder, node, builder.read(source, layout(frame, _ALL), stage), stage
            )
        _require_affordable(shape)
        sample = Sample(shape)
        if builder.is_weight_expression(source):
            frame = tuple(1 if d in batch_dimensions(source) else n for d, n in enumerate(shape))
        else:
            sample = sample_of(node, source, frame, where.frame)
        numbers, moved = builder.moved_numbers(node, sample, self._numbers)
        wanted = take(moved, where)
        inner = self._operand_positions(frame, sample.shape, wanted)
        held = take(numbers, inner)
        target = where.shape(shape_of(node))
        symbolic = batch_dimensions(node)
        if held.numel() == wanted.numel() and torch.equal(held.reshape(-1), wanted.reshape(-1)):
            part = builder.read(source, inner, stage)
            return builder.reshape(part, inner.shape(shape), target, symbolic, node, stage)
        if self._moves_alike(node, held, wanted, builder, sample):
            return self._as_it_is(builder, node, builder.read(source, inner, stage), stage)
        if inner.dimensions and (order := _channel_order(held, inner, wanted)) is not None:
            part = builder.read_packed(source, inner, stage)
            part = builder.select(part, inner.dimensions[0], order, node, stage)
            return builder.reshape(part, None, target, symbolic, node, stage)
        whole = self._as_it_is(builder, node, builder.full(source, stage), stage)
        return builder.cut(whole, node, where, stage)

    @staticmethod
    def _numbers(
        builder: StageBuilder, node: fx.Node, sample: Sample
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Element numbers of the operand, and where the operator puts them."""
        count = int(np.prod(sample.shape, dtype=np.int64))
        numbers = torch.arange(count, dtype=torch.int32).reshape(sample.shape)
        return numbers, move(node, numbers, builder.constant, sample)

    @staticmethod
    def _operand_positions(
        frame: tuple[int, ...], shape: tuple[int, ...], wanted: torch.Tensor
    ) -> Layout:
        """The operand's positions that the wanted elements come from, in order."""
        needed = np.zeros(int(np.prod(shape, dtype=np.int64)), dtype=np.bool_)
        needed[wanted.reshape(-1).numpy()] = True
        others = tuple(d for d, n in enumerate(frame) if n == 1 and shape[d] > 1)
        inside = np.any(needed.reshape(shape), axis=others, keepdims=True)
        return layout(frame, np.flatnonzero(np.broadcast_to(inside, frame)))

    def _moves_alike(
        self,
        node: fx.Node,
        held: torch.Tensor,
        wanted: torch.Tensor,
        builder: StageBuilder,
        sample: Sample,
    ) -> bool:
        """Whether the operator, as it is, does to the part what it does to the whole."""
        try:
            result = move(node, held, builder.constant, sample)
        except (RuntimeError, IndexError, ValueError) as error:
            let_through(error)
            return False
        return result.shape == wanted.shape and torch.equal(result, wanted)

    @staticmethod
    def _as_it_is(builder: StageBuilder, node: fx.Node, source: fx.Node, stage: int) -> fx.Node:
        def operand(n: fx.Node) -> fx.Node:
            if n is node.args[0]:
                return source
            return builder.scalar(n, stage) if is_scalar(n) else builder.constant_node(n)

        symbolic = batch_dimensions(node)
        if node.target in SIZED and len(symbolic) == 1:
            sizes = [-1 if d in symbolic else n for d, n in enumerate(shape_of(node))]
            return builder.call(aten.reshape.default, (source, sizes), node, stage)
        args = fx.map_arg(node.args, operand)
        return builder.emit(node, args, fx.map_arg(dict(node.kwargs), operand), stage)


_ALL = np.zeros(1, dtype=np.int64)


def _require_affordable(shape: tuple[int, ...]) -> None:
    if np.prod(shape, dtype=np.int64) > _LARGEST_PROOF:
        raise NoRule("its operand is too large to follow element by element")


def _channel_order(held: torch.Tensor, inner: Layout, wanted: torch.Tensor) -> list[int] | None:
    """A permutation of the packed channels of a part after which a reshape gives the result."""
    first = inner.dimensions[0]
    packed = held
    if inner.is_box and len(inner.dimensions) > 1:
        order, _, final = packing(tuple(held.shape), inner.dimensions)
        packed = held.permute(order).reshape(final)
    if packed.numel() == 0 or wanted.numel() % max(1, packed.numel() // packed.shape[first]):
        return None
    inside = int(np.prod(packed.shape[first + 1 :], dtype=np.int64))
    before = int(np.prod(packed.shape[:first], dtype=np.int64))
    count = wanted.numel() // (inside * before)
    rows = packed.reshape(before, packed.shape[first], inside)
    goal = wanted.reshape(before, count, inside)
    where = {int(v): i for i, v in enumerate(rows[0, :, 0].tolist())}
    chosen = [where.get(int(v), -1) for v in goal[0, :, 0].tolist()]
    if -1 in chosen or not torch.equal(rows[:, chosen], goal):
        return None
    return chosen


class Concatenation(OperatorRule):
    """cat and stack. Along channels positions pass through; along another dimension they tie."""

    family: ClassVar[str] = "concatenation"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        operands, dimension = self._operands(node)
        shapes = [shape_of(n) for n in operands]
        labels = [context.labels_of(n) for n in operands]
        if any(a.ndim != labels[0].ndim for a in labels):
            raise NoRule("its operands differ in rank")
        rank = labels[0].ndim
        frame = [max(a.shape[d] for a in labels) for d in range(rank)]
        along = frame[dimension] > 1 or self._differ(labels, dimension, rank)
        wide = []
        for a, shape in zip(labels, shapes, strict=True):
            sizes = list(frame)
            sizes[dimension] = shape[dimension] if along else 1
            wide.append(np.broadcast_to(a, sizes))
        if along:
            return np.concatenate(wide, axis=dimension)
        result = wide[0].copy()
        for a in wide[1:]:
            context.ties.tie(result, a)
            better = ((result < 0) & (a >= 0)) | (
                (result != VERSIONED) & (result < 0) & (a == VERSIONED)
            )
            result = np.where(better, a, result)
        return np.where(result == ZERO, NOBODY, result)

    @staticmethod
    def _differ(labels: list[Labels], dimension: int, rank: int) -> bool:
        """Operands of one atom each, put side by side along the dimension of channels."""
        if dimension != 1 or any(a.shape[d] > 1 for a in labels for d in range(rank) if d != 1):
            return False
        marks = {int(a.reshape(-1)[0]) for a in labels}
        return len(marks) > 1 and max(marks) >= 0

    @staticmethod
    def _operands(node: fx.Node) -> tuple[list[fx.Node], int]:
        values = node.args[0]
        if not isinstance(values, list | tuple) or not all(isinstance(v, fx.Node) for v in values):
            raise NoRule("its operands are not a list of tensors")
        operands = [v for v in values if isinstance(v, fx.Node)]
        dimension = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        assert isinstance(dimension, int)
        keep = [n for n in operands if shape_of(n) != (0,)]
        dimension %= len(shape_of(keep[0]))
        return [n for n in keep if shape_of(n)[dimension]] or keep, dimension

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        operands, dimension = self._operands(node)
        if where.frame[dimension] == 1:
            parts = [builder.aligned(n, node, where, stage, broadcast=False) for n in operands]
            return builder.call(aten.cat.default, (parts, dimension), node, stage)
        return builder.concatenated(operands, dimension, node, where, stage)


class GetItem(OperatorRule):
    """Picks one result of an operator with several."""

    family: ClassVar[str] = "data movement"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        if labels.ndim and labels.ndim == len(shape_of(node)):
            return labels
        return uniform(len(shape_of(node)), int(labels.reshape(-1)[0]))

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        if builder.labels(operand_of(node)).ndim:
            source = builder.read(operand_of(node), where, stage)
        else:
            source = builder.full(operand_of(node), stage)
        return builder.call(operator.getitem, (source, node.args[1]), node, stage)


register(
    Movement(),
    [
        f"aten.{name}"
        for name in """
        view reshape _unsafe_view flatten unflatten unsqueeze squeeze permute transpose t
        slice select narrow expand repeat flip roll rot90 movedim moveaxis swapaxes swapdims
        pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle index_select index
        repeat_interleave tile unfold diagonal numpy_T mT adjoint
        """.split()
    ],
)
register(Concatenation(), ["aten.cat", "aten.concat"])
register(GetItem(), ["getitem"])
