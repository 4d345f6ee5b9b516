"""MACs of operators that multiply matrices, whether or not channels can be followed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from s2d_compiler.program import batch_dimensions, concrete, tensor_value

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")


def product_macs(node: fx.Node) -> int:
    """MACs per sample of one run at full size; 0 for an operator without a product.

    Convolutions, linear layers, attention and ``matmul`` by their shapes; everything else
    that multiplies matrices by torch's own formulas.
    """
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return 0
    given = tree_leaves((node.args, dict(node.kwargs)))  # an operand may stand there twice
    operands = [n for n in given if isinstance(n, fx.Node) and tensor_value(n) is not None]
    shapes = [_single_shape(n) for n in operands]
    sized = [node] if tensor_value(node) is not None else node.all_input_nodes
    free = any(batch_dimensions(n) for n in sized)
    macs = _run_macs(node, target, shapes)
    return macs if free else macs // int(node.meta.get("fixed_batch", 1))


def _single_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor for one sample; some models multiply sample by sample, which
    costs more than in proportion to the batch."""
    value = tensor_value(node)
    return () if value is None else tuple(max(1, concrete(n, batch=1)) for n in value.shape)


def _run_macs(node: fx.Node, target: torch._ops.OpOverload, shapes: list[tuple[int, ...]]) -> int:
    name, out = target._opname, _single_shape(node)
    if name in _CONVOLUTIONS and len(shapes) >= 2 and len(out) == len(shapes[1]):
        return _size(shapes[1]) * _size(out) // out[1]
    if name.startswith("conv_transpose") and len(shapes) >= 2:
        return _size(shapes[1]) * _size(shapes[0]) // shapes[0][1]
    if name == "linear" and len(shapes) >= 2:
        return _size(out) * shapes[1][-1]
    if name == "matmul" and len(shapes) == 2:
        return _size(out) * shapes[0][-1]
    if name == "scaled_dot_product_attention":
        (*outer, length, width), (*_, keys, _), (*_, value_width) = shapes[:3]
        return _size((*outer, length, keys)) * (width + value_width)
    if name == "einsum":
        return _einsum_macs(str(node.args[0]), shapes)
    if target.overloadpacket not in flop_registry and name not in _WITHOUT_PRODUCT:
        return _counted(node, target)
    if target.overloadpacket not in flop_registry or not all(
        isinstance(a, fx.Node) for a in node.args
    ):
        return 0
    meta = [torch.empty(shape, device="meta") for shape in shapes]
    return (
        int(flop_registry[target.overloadpacket](*meta, out_val=torch.empty(out, device="meta")))
        // 2
    )


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """Size of the index space of a product of two operands; more are multiplied one by one."""
    left, arrow, later = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # the result has what stands there once
        later = "".join(k for k in left if left.count(k) == 1)
    if len(terms) < 2 or len(terms) != len(shapes):
        return 0
    total = 0
    held = _named_sizes(terms[0], shapes[0])
    for position, (term, shape) in enumerate(zip(terms[1:], shapes[1:], strict=True), start=2):
        mine = _named_sizes(term, shape)
        both = held | mine
        needed = set("".join(terms[position:])) | set(later)
        summed = [k for k in mine if k in held and k not in needed]
        if any(both[k] > 1 for k in summed):  # torch multiplies elementwise otherwise
            # What only one of them has is summed before it is multiplied.
            shared = {k for k in mine if k in held}
            counted = (n for k, n in both.items() if k in needed | shared or k.startswith("."))
            total += _size(tuple(counted))
        held = {k: n for k, n in both.items() if k in needed or k.startswith(".")}
    return total


def _named_sizes(term: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Size of every index of one operand; those under an ellipsis count from the right."""
    before, dots, after = term.partition("...")
    hidden = shape[len(before) : len(shape) - len(after)] if dots else ()
    sizes = dict(zip(before, shape, strict=False))
    sizes |= {f".{len(hidden) - i}": n for i, n in enumerate(hidden)}
    return sizes | (dict(zip(after, shape[-len(after) :], strict=True)) if after else {})


#: Operators that are common and multiply no matrices; anything else is run to be counted.
_WITHOUT_PRODUCT = (
    "cat",
    "stack",
    "cumsum",
    "sort",
    "topk",
    "layer_norm",
    "group_norm",
    "rms_norm",
)


def _counted(node: fx.Node, target: torch._ops.OpOverload) -> int:
    """What torch's own counter sees when the operator runs on shapes alone."""

    def shaped(n: fx.Node) -> Any:
        value = tensor_value(n)
        if value is None:
            return concrete(n.meta["val"], batch=1)
        return torch.empty(_single_shape(n), dtype=value.dtype, device="meta")

    try:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), shaped)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        return 0
    return int(counter.get_total_flops()) // 2


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
