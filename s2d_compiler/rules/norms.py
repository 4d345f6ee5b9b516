"""Weights and statistics per channel: batch, instance, group and layer norm, PReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from s2d_compiler.analysis.labels import Labels, has_atoms
from s2d_compiler.layout import Layout
from s2d_compiler.program import shape_of
from s2d_compiler.rules.base import NoRule, OperatorRule, register
from s2d_compiler.rules.channelwise import gathered, is_coupling, marked, operand_of, tie_along
from s2d_compiler.rules.layers import GROUPS_TO_CUT_BETWEEN, whole_along

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder


_ELSEWHERE = "channels lie along other dimensions than 1"


class PerChannel(OperatorRule):
    """Batch norm, instance norm, PReLU: parameters follow their channel.

    A PReLU with one slope for all channels is one module that the stages share.
    """

    family: ClassVar[str] = "norm per channel"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = gathered(context, context.labels_of(operand_of(node)), 1, _ELSEWHERE)
        return marked(labels)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = builder.read(operand_of(node), where, stage)
        if getattr(builder.program.module(node), "num_parameters", 0) == 1:
            return builder.whole_module(node, (source,), stage)
        return builder.thin_per_channel(node, source, where, stage)


class GroupNorm(OperatorRule):
    """Group norm: from 8 groups on every group is one atom; below, each stage normalises its
    own channels of every group (position i of every group tied)."""

    family: ClassVar[str] = "group norm"
    is_coupled: ClassVar[bool] = True

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = gathered(context, context.labels_of(operand_of(node)), 1, _ELSEWHERE)
        if labels.shape[1] == 1:
            return marked(labels)
        if has_atoms(labels) and (labels < 0).any():
            raise NoRule("it normalises channels and constants together")
        by_group = labels.reshape(self._groups(context.program.module(node)), -1)
        if by_group.shape[0] >= GROUPS_TO_CUT_BETWEEN:
            context.ties.tie(by_group[:, :1], by_group)
        else:
            context.ties.tie(by_group[:1], by_group)
            context.couple(node)
        return marked(labels)

    @staticmethod
    def _groups(module: object) -> int:
        return int(module.num_groups)  # type: ignore[attr-defined]

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        if builder.labels(source).shape[1] == 1:
            return builder.whole_module(node, (builder.read(source, where, stage),), stage)
        groups = self._groups(builder.program.module(node))
        channels = shape_of(source)[1]
        own = builder.own_layout(source, stage)
        if groups >= GROUPS_TO_CUT_BETWEEN:
            groups = len({p // (channels // groups) for p in own.positions})
        part = builder.thin_per_channel(
            node, builder.read(source, own, stage), own, stage, groups=groups
        )
        return builder.choose(part, own, where, stage)


class LayerNorm(OperatorRule):
    """Layer and RMS norm over the last dimension: coupled, each stage over its own channels.

    Where another dimension carries channels too (heads), each of its positions is normalised
    whole by one module that the stages share.
    """

    family: ClassVar[str] = "layer norm"
    is_coupled: ClassVar[bool] = True

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        labels = context.labels_of(operand_of(node))
        dimensions = self._dimensions(context.program.module(node), labels)
        if not any(labels.shape[d] > 1 for d in dimensions):
            return marked(labels)
        if not is_coupling(labels, dimensions):
            tie_along(context, labels, dimensions)
            for d in dimensions:
                labels = labels.max(axis=d, keepdims=True)
            return marked(labels)
        if len(dimensions) > 1 or (labels < 0).any():
            raise NoRule("it normalises over more than the channels")
        context.couple(node)
        return labels

    @staticmethod
    def _dimensions(module: Any, labels: Labels) -> set[int]:
        return set(range(labels.ndim - len(module.normalized_shape), labels.ndim))

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        source = operand_of(node)
        labels = builder.labels(source)
        dimensions = self._dimensions(builder.program.module(node), labels)
        if not is_coupling(labels, dimensions):
            return whole_along(builder, node, dimensions, where, stage)
        own = builder.own_layout(source, stage)
        part = builder.thin_per_channel(node, builder.read(source, own, stage), own, stage)
        return builder.choose(part, own, where, stage)


_BATCH = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
_INSTANCE = ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
register(PerChannel(), [*_BATCH, *_INSTANCE, "PReLU"])
register(GroupNorm(), ["GroupNorm"])
register(LayerNorm(), ["LayerNorm", "RMSNorm"])
