"""Operators that treat every channel alone but look along other dimensions, and the
operators that look along channels: reductions, softmax, pooling, padding, interpolation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import fx

from s2d_compiler.analysis.labels import NOBODY, VERSIONED, ZERO, Labels, has_atoms, uniform
from s2d_compiler.layout import Layout, box_positions, channel_dimensions, coordinates, layout
from s2d_compiler.program import shape_of
from s2d_compiler.raising import schema_arguments
from s2d_compiler.rules.base import NoRule, OperatorRule, register

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder


def operand_of(node: fx.Node) -> fx.Node:
    """The tensor that an operator works on: its first argument."""
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise NoRule("its first operand is not a tensor")
    return first


def is_coupling(labels: Labels, dimensions: set[int]) -> bool:
    """Whether looking along ``dimensions`` mixes atoms across every channel dimension."""
    carrying = {d for d in range(labels.ndim) if labels.shape[d] > 1}
    return bool(carrying & dimensions) and carrying <= dimensions and has_atoms(labels)


def tie_along(context: ChannelContext, labels: Labels, dimensions: set[int]) -> None:
    """Tie every position to the first one along ``dimensions``."""
    for d in dimensions:
        if labels.shape[d] > 1:
            first = np.take(labels, [0], axis=d)
            anchor = np.where(
                (labels >= 0).any(axis=d, keepdims=True), labels.max(axis=d, keepdims=True), first
            )
            context.ties.tie(anchor, labels)


def gathered(context: ChannelContext, labels: Labels, dimension: int, reason: str) -> Labels:
    """Labels along one dimension alone: where others carry channels besides (what is behind a
    pixel shuffle), these are tied.

    Raises:
        NoRule: Channels lie along other dimensions only.
    """
    others = {d for d in range(labels.ndim) if labels.shape[d] > 1} - {dimension % labels.ndim}
    if not others:
        return labels
    if labels.shape[dimension] == 1:
        raise NoRule(reason)
    tie_along(context, labels, others)
    for d in others:
        labels = labels.max(axis=d, keepdims=True)
    return labels


class Window(OperatorRule):
    """Pooling, interpolation and resampling over the trailing dimensions."""

    family: ClassVar[str] = "pooling"

    def __init__(self, rank: int | None = None):
        self.rank = rank

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        rank = self.rank if self.rank is not None else labels.ndim - 2
        if any(labels.shape[d] > 1 for d in range(labels.ndim - rank, labels.ndim)):
            labels = gathered(context, labels, labels.ndim - rank - 1, "it pools over channels")
        return marked(labels)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = builder.read(operand_of(node), where, stage)
        rest = fx.map_arg(node.args[1:], lambda n: builder.scalar(n, stage))
        return builder.emit(node, (source, *rest), dict(node.kwargs), stage)


class WindowPair(Window):
    """Pooling that returns values and where they were found; both follow their channel."""

    family: ClassVar[str] = "pooling with indices"


def marked(labels: Labels) -> Labels:
    """Labels after an operator that need not keep zeros zero."""
    return np.where(labels == ZERO, NOBODY, labels)


class Reduction(OperatorRule):
    """mean, sum, max... over dimensions.

    Over dimensions without channels: per channel. Over one of several channel dimensions:
    ties along it. Over the only one: a versioned value, each stage reducing its own channels
    with their own count.
    """

    family: ClassVar[str] = "reduction"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        dimensions = reduced(node, labels.ndim)
        rank = len(shape_of(node))
        if is_coupling(labels, dimensions):
            if (labels == VERSIONED).any():
                raise NoRule("it reduces over channels and versioned values together")
            context.couple(node)
            return uniform(rank, VERSIONED)
        tie_along(context, labels, dimensions)
        for d in dimensions:
            axis = np.take(labels, [0], axis=d)
            if labels.shape[d] > 1:
                axis = labels.max(axis=d, keepdims=True)
            labels = axis
        if rank == labels.ndim:
            return marked(labels)
        kept = [labels.shape[d] for d in range(labels.ndim) if d not in dimensions]
        return marked(labels.reshape(kept))

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        labels = builder.labels(source)
        dimensions = reduced(node, labels.ndim)
        if is_coupling(labels, dimensions):
            return self._coupled(builder, node, stage)
        inner = source_layout(labels, dimensions, where, keep=len(where.frame) == labels.ndim)
        if not inner.is_box and any(labels.shape[d] > 1 for d in dimensions):
            whole = builder.full(source, stage)
            result = builder.emit(node, (whole, *node.args[1:]), dict(node.kwargs), stage)
            return builder.cut(result, node, where, stage)
        return builder.emit(
            node, (builder.read(source, inner, stage), *node.args[1:]), dict(node.kwargs), stage
        )

    def _coupled(self, builder: StageBuilder, node: fx.Node, stage: int) -> fx.Node:
        source = operand_of(node)
        own = builder.part(source, stage)
        if own is None:
            if stage <= 1:
                return builder.emit(
                    node, (builder.full(source, stage), *node.args[1:]), dict(node.kwargs), stage
                )
            return builder.version(node, stage - 1)
        return builder.emit(node, (own, *node.args[1:]), dict(node.kwargs), stage)


def source_layout(labels: Labels, dimensions: set[int], where: Layout, keep: bool) -> Layout:
    """Positions of a reduction's operand that the result's positions are made of."""
    frame = labels.shape
    outer = [d for d in range(labels.ndim) if keep or d not in dimensions]
    if where.lists is not None:
        chosen = {outer[d]: values for d, values in zip(where.dimensions, where.lists, strict=True)}
        lists = tuple(chosen.get(d, tuple(range(frame[d]))) for d in channel_dimensions(frame))
        return layout(frame, box_positions(frame, lists))
    coords = coordinates(where.frame, where.array)
    full = [np.zeros(len(where.positions), dtype=np.int64) for _ in frame]
    for d, values in zip(outer, coords, strict=True):
        full[d] = values
    return layout(frame, np.ravel_multi_index(tuple(full), frame).astype(np.int64), packed=True)


def reduced(node: fx.Node, rank: int) -> set[int]:
    """The dimensions that a reduction reduces."""
    arguments = schema_arguments(node)
    dimensions: Any = arguments.get("dim")
    if dimensions is None or dimensions == []:
        return set(range(rank))
    values = dimensions if isinstance(dimensions, list | tuple) else [dimensions]
    return {int(d) % rank for d in values}


class Softmax(OperatorRule):
    """Normalisation along one dimension; coupled when that is the only channel dimension."""

    family: ClassVar[str] = "softmax"
    is_coupled: ClassVar[bool] = True

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        dimension = int(schema_arguments(node)["dim"]) % labels.ndim
        if is_coupling(labels, {dimension}):
            if (labels < 0).any():
                raise NoRule("it normalises over channels and constants together")
            context.couple(node)
        elif labels.shape[dimension] > 1:
            tie_along(context, labels, {dimension})
        return marked(labels)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        labels = builder.labels(source)
        dimension = int(schema_arguments(node)["dim"]) % labels.ndim
        if labels.shape[dimension] > 1 and not where.is_box:
            whole = builder.full(source, stage)
            result = builder.emit(node, (whole, *node.args[1:]), dict(node.kwargs), stage)
            return builder.cut(result, node, where, stage)
        if labels.shape[dimension] > 1 and is_coupling(labels, {dimension}):
            own = builder.own_layout(source, stage)
            result = builder.emit(
                node, (builder.read(source, own, stage), *node.args[1:]), dict(node.kwargs), stage
            )
            return builder.choose(result, own, where, stage)
        source_part = builder.read(source, where, stage)
        return builder.emit(node, (source_part, *node.args[1:]), dict(node.kwargs), stage)


class Pad(OperatorRule):
    """Padding: channels that it adds are nobody's; other dimensions are padded per channel."""

    family: ClassVar[str] = "padding"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        shape = shape_of(operand_of(node))
        pads, value = self._pads(node, labels.ndim)
        if any(not isinstance(p, int) for pair in pads for p in pair):
            raise NoRule("it pads by an amount that depends on the input")
        result = labels if all(p == (0, 0) for p in pads) else marked(labels)
        mark = ZERO if value == 0 else NOBODY
        for d, (before, after) in enumerate(pads):
            if (before, after) == (0, 0) or (
                result.shape[d] == 1 and not self._adds_channels(labels, d, shape)
            ):
                continue
            if value is None and labels.shape[d] > 1:
                raise NoRule("it repeats channels at the border")
            if value is None:
                continue
            full = np.broadcast_to(result, [*result.shape[:d], shape[d], *result.shape[d + 1 :]])
            full = full[
                tuple(
                    slice(max(0, -before), shape[d] - max(0, -after)) if i == d else slice(None)
                    for i in range(full.ndim)
                )
            ]
            widths = [
                (max(0, before), max(0, after)) if i == d else (0, 0) for i in range(full.ndim)
            ]
            result = np.pad(full, widths, constant_values=mark)
        return result

    @staticmethod
    def _adds_channels(labels: Labels, dimension: int, shape: tuple[int, ...]) -> bool:
        """Dimension 1 of a value whose other dimensions carry no channels is its channels."""
        return dimension == 1 and labels.ndim >= 3 and all(s == 1 for s in labels.shape)

    @staticmethod
    def _pads(node: fx.Node, rank: int) -> tuple[list[tuple[Any, Any]], float | None]:
        """Padding before and after, per dimension; the constant, None for other modes."""
        arguments = schema_arguments(node)
        flat = list(arguments.get("pad", arguments.get("padding", [])))
        mode = arguments.get("mode", "constant")
        if "reflection" in str(node.target) or "replication" in str(node.target):
            mode = "border"
        pads: list[tuple[Any, Any]] = [(0, 0)] * rank
        for k in range(len(flat) // 2):
            pads[rank - 1 - k] = (flat[2 * k], flat[2 * k + 1])
        value = float(arguments.get("value") or 0) if mode == "constant" else None
        return pads, value

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        labels, rank = builder.labels(source), len(where.frame)
        result = builder.labels(node)
        pads, value = self._pads(node, rank)
        touched = [
            d
            for d in range(rank)
            if pads[d] != (0, 0) and result.shape[d] > 1 and value is not None
        ]
        if not touched:
            part = builder.read(source, where, stage)
            return builder.emit(node, (part, *node.args[1:]), dict(node.kwargs), stage)
        inner = self._inner(labels, shape_of(source), pads, touched, where)
        if inner is None:
            whole = builder.emit(
                node, (builder.full(source, stage), *node.args[1:]), dict(node.kwargs), stage
            )
            return builder.cut(whole, node, where, stage)
        part = builder.read(source, inner, stage)
        spatial = [p for d in reversed(range(rank)) for p in ((0, 0) if d in touched else pads[d])]
        if not any(spatial):
            return part
        return builder.emit(node, (part, spatial, *node.args[2:]), dict(node.kwargs), stage)

    @staticmethod
    def _inner(
        labels: Labels,
        shape: tuple[int, ...],
        pads: list[tuple[Any, Any]],
        touched: list[int],
        where: Layout,
    ) -> Layout | None:
        """Operand positions of result positions; None if one of them is padding."""
        coords = list(coordinates(where.frame, where.array))
        frame = list(labels.shape)
        for d in touched:
            coords[d] = coords[d] - pads[d][0]
            frame[d] = shape[d]
            if ((coords[d] < 0) | (coords[d] >= shape[d])).any():
                return None
        flat = np.ravel_multi_index(tuple(coords), tuple(frame))
        return layout(tuple(frame), np.asarray(flat, dtype=np.int64), packed=not where.is_box)


register(
    Window(),
    [
        f"aten.{name}"
        for name in """
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
        adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d
        upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa
        """.split()
    ],
)
register(
    WindowPair(),
    [
        f"aten.{name}"
        for name in """
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
        max_pool2d_with_indices max_pool3d_with_indices
        """.split()
    ],
)
register(Window(), ["Dropout2d"])
_REDUCTIONS = "mean sum amax amin prod any all var std logsumexp norm linalg_vector_norm"
register(Reduction(), [f"aten.{name}" for name in _REDUCTIONS.split()])
register(Softmax(), ["aten.softmax", "aten._softmax", "aten.log_softmax"])
register(
    Pad(),
    [
        f"aten.{name}"
        for name in """
        constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d
        """.split()
    ],
)
