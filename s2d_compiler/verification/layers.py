"""What weighted layers and norms do to terms.

A layer's output is a sum over its columns. Its term says which rows of which weight were applied
to which columns, and what these columns hold, in any order; columns that hold zeros add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from s2d_compiler.computed import ComputedLayer
from s2d_compiler.computed import Value as Named
from s2d_compiler.provenance import Slice
from s2d_compiler.verification.arguments import Value
from s2d_compiler.verification.operators import Operators
from s2d_compiler.verification.terms import Keys, Terms, chosen, mixed, scrambled

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class UnknownModuleError(Exception):
    """A module of a class whose meaning is not known."""


@dataclass(frozen=True)
class Held:
    """A module's settings, and which slice of which tensor of the original each of its
    parameters and buffers is.

    Attributes:
        module: The module, for its settings alone.
        slices: Parameter or buffer name -> the slice.
        alive: Which columns of a layer's weight are not masked; None for all.
    """

    module: Any
    slices: Mapping[str, Slice]
    alive: torch.Tensor | None = None


def apply_module(operators: Operators, held: Held, x: Terms) -> Terms:
    """Terms of what a module makes of ``x``.

    Raises:
        UnknownModuleError: Its class is none that a staged network may hold.
    """
    module, keys = held.module, operators.keys
    if isinstance(module, _DROPOUTS):
        return x
    if isinstance(module, ComputedLayer):
        return _computed(operators, held, x)
    if isinstance(module, nn.Linear):
        weight = held.slices["weight"]
        columns = _positions(keys, weight, 1, module.in_features)
        rows = _rows(keys, weight, 0, module.out_features)
        return _linear(keys, x, columns, rows, _bias(keys, held, module.out_features), held.alive)
    if isinstance(module, _CONVOLUTIONS):
        return _convolution(keys, held, x)
    if isinstance(module, nn.PReLU):
        slopes = keys.elements(held.slices["weight"], (module.num_parameters,))
        return mixed(keys.of("prelu"), x, _along(slopes, 1, x.dim()))
    if isinstance(module, (*_BATCH_NORMS, *_INSTANCE_NORMS)):
        return _per_channel_norm(keys, held, x)
    if isinstance(module, nn.GroupNorm):
        return group_norm(keys, x, module.num_groups, module.eps, *_affine(keys, held, x.shape[1]))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        size = tuple(module.normalized_shape)
        name = (type(module).__name__, module.eps)
        return last_norm(keys, x, len(size), name, *_affine(keys, held, *size))
    raise UnknownModuleError(
        f"modules of class {type(module).__module__}.{type(module).__name__} have no known meaning"
    )


# -- layers ----------------------------------------------------------------------------------------


def _positions(keys: Keys, held: Slice, dimension: int, size: int) -> Terms:
    """Numbers of the columns that a slice holds."""
    return mixed(keys.of("column of", held.source, dimension), chosen(held, dimension, size))


def _rows(keys: Keys, held: Slice, dimension: int, size: int) -> Terms:
    name = keys.of("row of", held.source, dimension, held.index[2:])
    return mixed(name, chosen(held, dimension, size))


def _bias(keys: Keys, held: Held, size: int) -> Terms:
    if "bias" not in held.slices:
        return torch.full((size,), keys.of("no bias"))
    return keys.elements(held.slices["bias"], (size,))


def _along(values: Terms, dimension: int, rank: int) -> Terms:
    form = [1] * rank
    form[dimension] = -1
    return values.reshape(form)


def _summands(x: Terms, columns: Terms, dimension: int, alive: torch.Tensor | None) -> Terms:
    """Terms to be summed along a dimension: nothing for zeros and dead columns."""
    found = scrambled(x + _along(columns, dimension, x.dim()))
    found = torch.where(x == 0, torch.zeros((), dtype=torch.int64), found)
    if alive is not None:
        mask = _along(alive, dimension, x.dim())
        found = torch.where(mask, found, torch.zeros((), dtype=torch.int64))
    return found


def _linear(
    keys: Keys, x: Terms, columns: Terms, rows: Terms, bias: Terms, alive: torch.Tensor | None
) -> Terms:
    total = _summands(x, columns, x.dim() - 1, alive).sum(-1, keepdim=True)
    return mixed(keys.of("linear"), total, rows, bias)


def _convolution(keys: Keys, held: Held, x: Terms) -> Terms:
    module, weight = held.module, held.slices["weight"]
    groups, transposed = int(module.groups), bool(module.transposed)
    in_dimension, out_dimension = (0, 1) if transposed else (1, 0)
    per_group = module.in_channels // groups
    columns = _positions(
        keys, weight, in_dimension, module.in_channels if transposed else per_group
    )
    outputs = module.out_channels // groups if transposed else module.out_channels
    rows = _rows(keys, weight, out_dimension, outputs)
    if transposed:
        rows = rows.repeat(groups)
    else:
        columns = columns.repeat(groups)
    settings = tuple(
        getattr(module, k, None)
        for k in ("kernel_size", "stride", "padding", "dilation", "output_padding", "padding_mode")
    )
    name = keys.of(type(module).__name__, settings)
    bias = _bias(keys, held, module.out_channels)
    return _convolved(keys, module, name, x, columns, rows, bias, held.alive)


def _convolved(
    keys: Keys,
    module: Any,
    name: int,
    x: Terms,
    columns: Terms,
    rows: Terms,
    bias: Terms,
    alive: torch.Tensor | None,
) -> Terms:
    if x.dim() != len(module.kernel_size) + 2:
        raise UnknownModuleError("a convolution without a batch dimension has no known meaning")
    groups = int(module.groups)
    wide = [d + 2 for d in range(len(module.kernel_size)) if not _is_single(module, d)]
    whole = keys.gathered(x, wide)
    if wide:
        empty = (x == 0).all(dim=wide[0], keepdim=True)
        for d in wide[1:]:
            empty = empty.all(dim=d, keepdim=True)
        whole = torch.where(empty, torch.zeros_like(whole), whole)
    parts = _summands(whole, columns, 1, alive)
    size = (x.shape[0], groups, x.shape[1] // groups, *parts.shape[2:])
    total = parts.reshape(size).sum(2).repeat_interleave(len(rows) // groups, dim=1)
    result = mixed(name, total, _along(rows, 1, x.dim()), _along(bias, 1, x.dim()))
    return keys.spread(result, _convolved_shape(module, tuple(x.shape)))


def _is_single(module: Any, dimension: int) -> bool:
    """Whether a convolution looks at one position at a time along a spatial dimension."""
    padding = module.padding
    padded = padding == "same" if isinstance(padding, str) else padding[dimension] != 0
    return (
        module.kernel_size[dimension] == 1
        and module.stride[dimension] == 1
        and not padded
        and not getattr(module, "transposed", False)
    )


def layer_shape(module: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a layer's output from that of its input."""
    if hasattr(module, "kernel_size"):
        return _convolved_shape(module, shape)
    return (*shape[:-1], module.out_features)


def _convolved_shape(module: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes: list[int] = []
    for d, size in enumerate(shape[2:]):
        kernel, stride, dilation = (
            module.kernel_size[d], module.stride[d], module.dilation[d],
        )  # fmt: skip
        reach = dilation * (kernel - 1)
        if isinstance(module.padding, str):
            sizes.append(size if module.padding == "same" else size - reach)
        elif getattr(module, "transposed", False):
            both = 2 * module.padding[d] - module.output_padding[d]
            sizes.append((size - 1) * stride - both + reach + 1)
        else:
            sizes.append((size + 2 * module.padding[d] - reach - 1) // stride + 1)
    return (shape[0], module.out_channels, *sizes)


class _Settings:
    """The settings of a layer with a computed weight, as attributes."""

    transposed = False
    padding_mode = "zeros"

    def __init__(self, settings: Mapping[str, Any]):
        self.__dict__.update(settings)


def _computed(operators: Operators, held: Held, x: Terms) -> Terms:
    """A layer whose weight is an expression of slices; ``held.slices`` names its tensors, and
    the module's constants are known numbers."""
    module: ComputedLayer = held.module
    keys = operators.keys
    known: dict[str, Any] = {}
    for key, tensor in module.tensors().items():
        if key in held.slices:
            known[key] = Value(keys.elements(held.slices[key], tuple(tensor.shape)))
        else:
            known[key] = operators.value(tensor)
    for step in module.expression.steps:
        args, kwargs = tree_map_only(Named, lambda v: known[v.name], (step.args, dict(step.kwargs)))
        known[step.name] = operators.apply(step.target, args, kwargs)
    weight = known[module.expression.weight].terms
    inner = keys.gathered(weight, range(2, weight.dim())).reshape(weight.shape[:2])
    columns = keys.gathered(inner, [0])
    rows = keys.collected(mixed(inner, columns), [1]).reshape(-1)
    columns = columns.reshape(-1).repeat(module.groups)
    if module.expression.bias is None:
        bias = torch.full((len(rows),), keys.of("no bias"))
    else:
        bias = known[module.expression.bias].terms
    if module.layer_class == "Linear":
        return _linear(keys, x, columns, rows, bias, None)
    settings = _Settings(module.settings)
    name = keys.of(module.layer_class, tuple(
        getattr(settings, k, None) for k in ("kernel_size", "stride", "padding", "dilation")
    ))  # fmt: skip
    return _convolved(keys, settings, name, x, columns, rows, bias, None)


# -- norms -----------------------------------------------------------------------------------------


def _affine(keys: Keys, held: Held, *size: int) -> tuple[Terms, Terms]:
    """Terms of a norm's weight and bias, of names that say so where it has none."""
    found = []
    for name in ("weight", "bias"):
        if name in held.slices:
            found.append(keys.elements(held.slices[name], size))
        else:
            found.append(torch.full(size, keys.of("no", name)))
    return found[0], found[1]


def _per_channel_norm(keys: Keys, held: Held, x: Terms) -> Terms:
    module, channels = held.module, x.shape[1]
    weight, bias = (_along(t, 1, x.dim()) for t in _affine(keys, held, channels))
    name = keys.of(
        "norm per channel", module.eps, module.momentum, isinstance(module, _INSTANCE_NORMS)
    )
    if isinstance(module, _INSTANCE_NORMS):
        uses_statistics = bool(module.track_running_stats)
    else:  # in evaluation mode
        uses_statistics = "running_mean" in held.slices
    if uses_statistics:
        mean, variance = (
            _along(keys.elements(held.slices[k], (channels,)), 1, x.dim())
            for k in ("running_mean", "running_var")
        )
        return mixed(name, x, mean, variance, weight, bias)
    own = range(2, x.dim())
    seen = keys.collected(x, own if isinstance(module, _INSTANCE_NORMS) else (0, *own))
    return mixed(name, x, seen, weight, bias)


def group_norm(keys: Keys, x: Terms, groups: int, eps: float, weight: Terms, bias: Terms) -> Terms:
    """Terms of a group norm."""
    shape = tuple(x.shape)
    by_group = x.reshape(shape[0], groups, math.prod(shape[1:]) // groups)
    seen = keys.collected(by_group, [2]).expand(by_group.shape).reshape(shape)
    affine = (_along(t, 1, x.dim()) for t in (weight, bias))
    return mixed(keys.of("group norm", eps), x, seen, *affine)


def last_norm(keys: Keys, x: Terms, count: int, name: Any, weight: Terms, bias: Terms) -> Terms:
    """Terms of a norm over the last dimensions."""
    seen = keys.collected(x, range(x.dim() - count, x.dim()))
    return mixed(keys.of("norm over the last", name), x, seen, weight, bias)
