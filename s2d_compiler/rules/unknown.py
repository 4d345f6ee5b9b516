"""The honest fallback: an operator without a rule is versioned."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import fx

from s2d_compiler.analysis.labels import NOBODY, VERSIONED, Labels, uniform
from s2d_compiler.layout import Layout
from s2d_compiler.program import is_scalar, shape_of
from s2d_compiler.rules.base import OperatorRule
from s2d_compiler.rules.products import product_macs

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.staging import StageBuilder


class Unknown(OperatorRule):
    """Stage i runs the operator at full size with the channels of later stages zero.

    No ties, no owner: the result is one value per stage. Correct and causal for any
    operator, at the price of running it once per stage.
    """

    family: ClassVar[str] = "unknown"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        operands = [context.labels_of(n) for n in node.all_input_nodes if not is_scalar(n)]
        mark = (
            NOBODY
            if all((a < 0).all() and not (a == VERSIONED).any() for a in operands)
            else VERSIONED
        )
        return uniform(len(shape_of(node)), mark)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        def operand(n: fx.Node) -> fx.Node:
            return builder.scalar(n, stage) if is_scalar(n) else builder.full(n, stage)

        args = fx.map_arg(node.args, operand)
        kwargs = fx.map_arg(dict(node.kwargs), operand)
        if node.op == "call_module":
            result = builder.whole_module(node, args, stage)
        else:
            result = builder.emit(node, args, kwargs, stage)
        return builder.cut(result, node, where, stage)

    def macs(self, node: fx.Node) -> int:
        """MACs of a matrix product at full size, per sample."""
        return product_macs(node)


UNKNOWN = Unknown()
