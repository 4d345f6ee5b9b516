"""Patches as channels, and back: ``unfold`` (im2col) and ``fold`` (col2im)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import fx

from s2d_compiler.analysis.labels import Labels
from s2d_compiler.layout import Layout, layout
from s2d_compiler.program import shape_of
from s2d_compiler.raising import schema_arguments
from s2d_compiler.rules.base import NoRule, OperatorRule, register
from s2d_compiler.rules.channelwise import marked, operand_of

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder


def _kernel(node: fx.Node) -> int:
    """Positions of a patch."""
    return math.prod(schema_arguments(node)["kernel_size"])


class Unfold(OperatorRule):
    """Every channel becomes as many as a patch has positions, side by side."""

    family: ClassVar[str] = "patches"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        if labels.ndim != 4 or any(labels.shape[d] > 1 for d in (0, 2, 3)):
            raise NoRule("channels lie along a dimension that it takes patches of")
        if labels.shape[1] == 1:
            return marked(labels.reshape(1, 1, 1))
        return marked(labels.reshape(1, -1, 1).repeat(_kernel(node), axis=1))

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source, kernel = operand_of(node), _kernel(node)
        positions = where.array
        if not where.dimensions:
            frame = builder.labels(source).shape
            part = builder.read(source, layout(frame, np.zeros(1, dtype=np.int64)), stage)
            return builder.emit(node, (part, *node.args[1:]), dict(node.kwargs), stage)
        channels = np.unique(positions // kernel)
        inner = layout((1, shape_of(source)[1], 1, 1), channels)
        part = builder.read(source, inner, stage)
        result = builder.emit(node, (part, *node.args[1:]), dict(node.kwargs), stage)
        held = (channels[:, None] * kernel + np.arange(kernel)[None, :]).reshape(-1)
        return builder.choose(result, layout(where.frame, held), where, stage)


class Fold(OperatorRule):
    """Patches are summed up: the positions of a channel's patch are tied."""

    family: ClassVar[str] = "patches"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        if labels.ndim != 3 or any(labels.shape[d] > 1 for d in (0, 2)):
            raise NoRule("channels lie along a dimension that it takes patches of")
        if labels.shape[1] == 1:
            return marked(labels.reshape(1, 1, 1, 1))
        by_channel = labels.reshape(-1, _kernel(node))
        anchor = by_channel.max(axis=1, keepdims=True)
        context.ties.tie(anchor, by_channel)
        return marked(anchor.reshape(1, -1, 1, 1))

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source, kernel = operand_of(node), _kernel(node)
        frame = builder.labels(source).shape
        inner = layout(frame, np.zeros(1, dtype=np.int64))
        if where.dimensions:
            channels = where.array
            patches = (channels[:, None] * kernel + np.arange(kernel)[None, :]).reshape(-1)
            inner = layout((1, shape_of(source)[1], 1), patches)
        part = builder.read(source, inner, stage)
        rest = fx.map_arg(node.args[1:], lambda n: builder.scalar(n, stage))
        return builder.emit(node, (part, *rest), dict(node.kwargs), stage)


register(Unfold(), ["aten.im2col"])
register(Fold(), ["aten.col2im"])
