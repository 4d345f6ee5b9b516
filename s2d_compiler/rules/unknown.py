"""The honest fallback: an operator without a rule is versioned."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import fx

from s2d_compiler.analysis.labels import NOBODY, VERSIONED, Labels, uniform
from s2d_compiler.layout import Layout
from s2d_compiler.program import concrete, is_scalar, shape_of, tensor_value
from s2d_compiler.rules.base import OperatorRule

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


def product_macs(node: fx.Node) -> int:
    """MACs per sample of an operator that multiplies matrices, counted by torch's formulas."""
    from torch.utils.flop_counter import flop_registry

    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return 0
    shapes = [shape_of(n) for n in node.all_input_nodes if tensor_value(n) is not None]
    batch = _batch(node)
    if target.overloadpacket in flop_registry and all(isinstance(a, fx.Node) for a in node.args):
        formula = flop_registry[target.overloadpacket]
        values = [n.meta["val"] for n in node.args if isinstance(n, fx.Node)]
        sample = [
            tuple(concrete(s) for s in v.shape) for v in values if isinstance(v, torch.Tensor)
        ]
        outs = shape_of(node)
        try:
            return (
                int(
                    formula(
                        *(torch.empty(s, device="meta") for s in sample),
                        out_val=torch.empty(outs, device="meta"),
                    )
                )
                // 2
                // batch
            )
        except (TypeError, AssertionError, RuntimeError):
            return 0
    name = target._opname
    if name == "matmul" and len(shapes) == 2:
        return int(np.prod(shape_of(node), dtype=np.int64)) * shapes[0][-1] // batch
    return 0


def _batch(node: fx.Node) -> int:
    from s2d_compiler.program import SAMPLE_BATCH, batch_dimensions

    return SAMPLE_BATCH if batch_dimensions(node) else 1


UNKNOWN = Unknown()
