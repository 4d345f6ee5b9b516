"""Weighted layers: convolutions and linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import fx, nn

from s2d_compiler.analysis.labels import NOBODY, VERSIONED, Labels, has_atoms, uniform
from s2d_compiler.computed import ComputedLayer, weight_shape
from s2d_compiler.layout import Layout, box_positions, channel_dimensions, layout
from s2d_compiler.program import shape_of
from s2d_compiler.raising import schema_arguments
from s2d_compiler.rules.base import NoRule, OperatorRule, register
from s2d_compiler.rules.channelwise import gathered, marked, operand_of, tie_along
from s2d_compiler.rules.products import product_macs
from s2d_compiler.thin_expression import why_not_sliceable

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder

#: A grouped convolution with at least this many groups is cut between them.
GROUPS_TO_CUT_BETWEEN = 8


class WeightedLayer(OperatorRule):
    """Common to layers with a weight that mixes input channels into output channels."""

    #: Dimension of the operand that holds the input channels.
    channel_dimension: ClassVar[int]

    def columns(self, context: ChannelContext, node: fx.Node) -> Labels:
        """Label of every input channel."""
        labels, shape = context.labels_of(operand_of(node)), shape_of(operand_of(node))
        d = self.channel_dimension % len(shape)
        reason = "channels lie along a dimension that the layer does not contract"
        labels = gathered(context, labels, d, reason)
        return np.broadcast_to(labels.reshape(-1), (shape[d],)).copy()

    def result(self, node: fx.Node, rows: Labels) -> Labels:
        """Labels of the result from the labels of its output channels."""
        rank = len(shape_of(node))
        sizes = [1] * rank
        sizes[self.channel_dimension % rank] = len(rows)
        return rows.reshape(sizes)


def require_sliceable(module: nn.Module) -> None:
    """Require that rows and columns of a computed weight can be computed apart."""
    if isinstance(module, ComputedLayer) and (reason := why_not_sliceable(module)):
        raise NoRule(f"its weight is computed from others in a way that cannot be cut: {reason}")


class Convolution(WeightedLayer):
    """Dense, grouped, depthwise and transposed convolutions.

    Source of the two ways to cut groups: between them from 8 groups on (and depthwise), else
    inside, position i of every group tied.
    """

    family: ClassVar[str] = "convolution"
    channel_dimension = 1

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        module = context.program.module(node)
        if module.padding_mode != "zeros":
            raise NoRule("its padding mode is not zeros")
        operand = operand_of(node)
        if len(shape_of(operand)) != len(weight_shape(module)):
            raise NoRule("its operand has no batch dimension")
        require_sliceable(module)
        if (along := self._along_channels(context, node)) is not None:
            return along
        columns = self.columns(context, node)
        if context.is_prediction(node):
            context.read_layer(node, columns)
            _tie_columns(context, columns.reshape(module.groups, -1))
            return uniform(len(shape_of(node)), VERSIONED)
        rows = context.write_layer(node, module.out_channels)
        context.read_layer(node, columns)
        groups = module.groups
        if groups > 1:
            by_in = columns.reshape(groups, -1)
            by_out = rows.reshape(groups, -1)
            if is_cut_between(module):
                anchor = by_out[:, :1]
                context.ties.tie(anchor, by_out)
                context.ties.tie(anchor, by_in)
            else:
                context.ties.tie(by_out[:1], by_out)
                _tie_columns(context, by_in)
        return self.result(node, rows)

    def _along_channels(self, context: ChannelContext, node: fx.Node) -> Labels | None:
        """Labels of a convolution that moves along channels; None for any other."""
        labels, module = context.labels_of(operand_of(node)), context.program.module(node)
        if not _moves_along(labels):
            return None
        dimensions = channel_dimensions(labels.shape)
        if all(_is_single(module, d - 2) for d in dimensions):
            return marked(labels)
        if (
            not has_atoms(labels)
            or (labels < 0).any()
            or len(dimensions) > 1
            or module.in_channels != 1
            or module.out_channels != 1
            or module.stride[dimensions[0] - 2] != 1
            or shape_of(node)[dimensions[0]] != shape_of(operand_of(node))[dimensions[0]]
        ):
            raise NoRule("channels lie along a dimension that it moves along")
        context.couple(node)
        return labels

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        if builder.is_prediction(node):
            return builder.head(node, stage)
        labels = builder.labels(source)
        if not _moves_along(labels):
            return builder.thin_layer(node, where, stage)
        module = builder.program.module(node)
        if all(_is_single(module, d - 2) for d in channel_dimensions(labels.shape)):
            return with_share(whole_along(builder, node, {1}, where, stage), where)
        own = builder.own_layout(source, stage)
        part = builder.whole_module(node, (builder.read(source, own, stage),), stage)
        return builder.choose(with_share(part, own), own, where, stage)


def _moves_along(labels: Labels) -> bool:
    """Whether channels lie along the positions of a convolution's operand alone."""
    return labels.shape[1] == 1 and any(size > 1 for size in labels.shape[2:])


def _is_single(module: Any, dimension: int) -> bool:
    """Whether a convolution looks at one position at a time along a spatial dimension."""
    one = module.kernel_size[dimension] == 1 and module.stride[dimension] == 1
    padded = module.padding not in ("same", "valid") and module.padding[dimension] != 0
    return one and not padded and not module.transposed


def _tie_columns(context: ChannelContext, by_group: Labels) -> None:
    """Tie position i of every group, constants being neutral."""
    anchor = by_group.max(axis=0, keepdims=True)
    context.ties.tie(anchor, by_group)


def is_cut_between(module: nn.Module) -> bool:
    """Whether a grouped convolution is cut between its groups."""
    groups = int(getattr(module, "groups", 1))
    return groups > 1 and (groups >= GROUPS_TO_CUT_BETWEEN or groups == module.in_channels)


class Linear(WeightedLayer):
    """``y = x W^T + b`` over the last dimension.

    Where another dimension carries channels (token mixing, a table that heads share), the
    weight is one parameter that the stages share, and what it sums over is tied.
    """

    family: ClassVar[str] = "linear"
    channel_dimension = -1

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        if any(size > 1 for size in labels.shape[:-1]):
            tie_along(context, labels, {labels.ndim - 1})
            return marked(labels.max(axis=-1, keepdims=True))
        require_sliceable(context.program.module(node))
        columns = self.columns(context, node)
        if context.is_prediction(node):
            context.read_layer(node, columns)
            return uniform(len(shape_of(node)), VERSIONED)
        rows = context.write_layer(node, context.program.module(node).out_features)
        context.read_layer(node, columns)
        return self.result(node, rows)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        labels = builder.labels(operand_of(node))
        if any(size > 1 for size in labels.shape[:-1]):
            created = whole_along(builder, node, {labels.ndim - 1}, where, stage)
            return with_share(created, where)
        if builder.is_prediction(node):
            return builder.head(node, stage)
        return builder.thin_layer(node, where, stage)


def whole_along(
    builder: StageBuilder, node: fx.Node, dimensions: set[int], where: Layout, stage: int
) -> fx.Node:
    """A module that the stages share, at some positions of the dimensions that it does not look
    along."""
    source = operand_of(node)
    labels, rank = builder.labels(source), len(where.frame)
    if not where.is_box or any(where.frame[d] > 1 for d in dimensions):
        result = builder.whole_module(node, (builder.full(source, stage),), stage)
        return builder.cut(result, node, where, stage)
    assert where.lists is not None
    chosen = dict(zip(where.dimensions, where.lists, strict=True))
    frame = tuple(labels.shape[d] if d in dimensions else where.frame[d] for d in range(rank))
    lists = tuple(chosen.get(d, tuple(range(frame[d]))) for d in channel_dimensions(frame))
    part = builder.read(source, layout(frame, box_positions(frame, lists)), stage)
    return builder.whole_module(node, (part,), stage)


def with_share(created: fx.Node, where: Layout) -> fx.Node:
    """Say that a node computes only these of its operator's channel positions, for the cost."""
    total = int(np.prod(where.frame, dtype=np.int64))
    if len(where.positions) != total:
        created.meta["share"] = (len(where.positions), total)
    return created


class FixedFilter(OperatorRule):
    """A depthwise convolution whose filter is a constant (blurred pooling): per channel."""

    family: ClassVar[str] = "fixed filter"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        arguments = schema_arguments(node)
        weight, labels = arguments["weight"], context.labels_of(operand_of(node))
        channels = shape_of(operand_of(node))[1]
        if not isinstance(weight, fx.Node) or (context.labels_of(weight) != NOBODY).any():
            raise NoRule("its weight depends on the input")
        if arguments["groups"] != channels or shape_of(weight)[0] != channels:
            raise NoRule("its weight is computed from other weights")
        if arguments["bias"] is not None or labels.ndim != len(shape_of(weight)):
            raise NoRule("its weight is computed from other weights")
        if any(size > 1 for d, size in enumerate(labels.shape) if d != 1):
            raise NoRule("channels lie along a dimension that it looks along")
        return marked(labels)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        arguments = schema_arguments(node)
        weight = arguments["weight"]
        source = builder.read(operand_of(node), where, stage)
        if where.dimensions:
            positions = where.array
            frame = tuple(n if d == 0 else 1 for d, n in enumerate(shape_of(weight)))
            kernel = builder.read(weight, layout(frame, positions), stage)
            arguments["groups"] = len(positions)
        else:
            kernel = builder.read(weight, layout((1,) * len(where.frame), _WHOLE), stage)
        arguments |= {"input": source, "weight": kernel}
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        created = builder.emit(node, tuple(arguments[n] for n in names), {}, stage)
        return with_share(created, where)

    def macs(self, node: fx.Node) -> int:
        return product_macs(node)


_WHOLE = np.zeros(1, dtype=np.int64)

CONVOLUTION_CLASSES = (
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
)
LAYER_CLASSES = (*CONVOLUTION_CLASSES, "Linear")

register(Convolution(), CONVOLUTION_CLASSES)
register(Linear(), ["Linear"])
register(FixedFilter(), ["aten.conv1d", "aten.conv2d", "aten.conv3d"])


def is_layer(node: fx.Node) -> bool:
    """Whether a node calls a weighted layer."""
    return node.op == "call_module" and node.meta.get("kind") in LAYER_CLASSES
