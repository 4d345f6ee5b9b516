"""Operators that act on every element alone: activations, arithmetic, casts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import fx

from s2d_compiler.analysis.labels import (
    NOBODY,
    VERSIONED,
    ZERO,
    Labels,
    has_atoms,
    is_versioned,
    uniform,
)
from s2d_compiler.program import is_read_number, is_scalar, shape_of, tensor_value
from s2d_compiler.rules.base import OperatorRule, register

if TYPE_CHECKING:
    from s2d_compiler.analysis.channels import ChannelContext
    from s2d_compiler.layout import Layout
    from s2d_compiler.staging import StageBuilder


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Operands that are tensors, not sizes."""
    return [n for n in node.all_input_nodes if not is_scalar(n)]


def aligned_to(labels: Labels, rank: int) -> Labels:
    """Labels with leading dimensions of size 1 added, as broadcasting does."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


class Elementwise(OperatorRule):
    """Ties equal positions of all operands.

    A size-1 operand broadcast against channels (a spatial gate) is not tied to them: its
    atom belongs to stage 1, and later stages read it.
    """

    family: ClassVar[str] = "elementwise"
    moves_or_maps: ClassVar[bool] = True

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        shape = shape_of(node)
        operands = [
            (shape_of(n), context.labels_of(n))
            for n in tensor_operands(node)
            if tensor_value(n) is not None or is_read_number(n)
        ]
        return combine(context, shape, operands)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        def operand(n: fx.Node) -> fx.Node:
            return (
                builder.scalar(n, stage) if is_scalar(n) else builder.aligned(n, node, where, stage)
            )

        return builder.emit(
            node, fx.map_arg(node.args, operand), fx.map_arg(dict(node.kwargs), operand), stage
        )


def combine(
    context: ChannelContext, shape: tuple[int, ...], operands: list[tuple[tuple[int, ...], Labels]]
) -> Labels:
    """Labels of an elementwise result, tying operands as it goes."""
    rank = len(shape)
    prepared = [((1,) * (rank - len(s)) + s, aligned_to(a, rank)) for s, a in operands]
    frame = np.broadcast_shapes((1,) * rank, *(a.shape for _, a in prepared))
    gates = [_is_gate(k, shape, prepared) for k in range(len(prepared))]
    result = uniform(rank, NOBODY)
    result = np.broadcast_to(result, frame).copy()
    for (_, labels), gate in zip(prepared, gates, strict=True):
        if gate:
            continue
        wide = np.broadcast_to(labels, frame)
        context.ties.tie(result, wide)
        better = (result < 0) & ((wide >= 0) | ((wide == VERSIONED) & (result != VERSIONED)))
        result[better] = wide[better]
    for (_, labels), gate in zip(prepared, gates, strict=True):
        if gate:
            wide = np.broadcast_to(labels, frame)
            context.pin(wide, result)
            free = (result == NOBODY) & (wide >= 0)
            result[free] = wide[free]
    result[result == ZERO] = NOBODY
    return result


def _is_gate(
    k: int, shape: tuple[int, ...], operands: list[tuple[tuple[int, ...], Labels]]
) -> bool:
    """Whether operand ``k`` holds atoms and is one value for several channels of another:
    of size 1 along them (they may be versioned), or expanded from one atom."""
    own, labels = operands[k]
    if not has_atoms(labels):
        return False
    for d, size in enumerate(shape):
        if size == 1 or labels.shape[d] > 1 or not (own[d] == 1 or labels.size == 1):
            continue
        for j, (full, other) in enumerate(operands):
            if j != k and other.shape[d] > 1 and has_atoms(other):
                return True
            versions = is_versioned(other) and not has_atoms(other)
            if j != k and versions and labels.size == 1 and own[d] == 1 and full[d] > 1:
                return True
    return False


class Metadata(OperatorRule):
    """``new_zeros`` and its kin: reads its operand's type and device, never its values."""

    family: ClassVar[str] = "creation"

    def labels(self, context: ChannelContext, node: fx.Node) -> Labels:
        return uniform(len(shape_of(node)), NOBODY)

    def lower(self, builder: StageBuilder, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        reference = builder.any_part(first, stage)
        args = fx.map_arg(node.args[1:], lambda n: builder.scalar(n, stage))
        whole = builder.emit(node, (reference, *args), dict(node.kwargs), stage)
        return builder.cut(whole, node, where, stage)


_POINTWISE = """
relu relu6 sigmoid tanh silu gelu mish hardtanh hardswish hardsigmoid leaky_relu elu selu celu
softplus softsign threshold log_sigmoid hardshrink softshrink tanhshrink logit glu_none
add sub mul div rsub pow neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal abs
sign floor ceil round trunc frac erf sin cos clamp clamp_min clamp_max maximum minimum where
masked_fill lerp addcmul addcdiv floor_divide remainder fmod eq ne lt le gt ge
logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not isnan isinf
nan_to_num
clone contiguous detach alias to _to_copy type_as zeros_like ones_like full_like positive
float half double lift_fresh_copy
""".split()

ELEMENTWISE = register(
    Elementwise(),
    [
        "<pointwise>",
        *(f"aten.{name}" for name in _POINTWISE),
        "Dropout",
        "AlphaDropout",
        "Identity",
    ],
)
register(Metadata(), [f"aten.{n}" for n in ("new_zeros", "new_ones", "new_full", "new_empty")])
