"""Layers as plain data, and back: the class from a fixed list, and its arguments, each checked
before the class sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s2d_compiler.attributes import with_or_without_bias
from s2d_compiler.computed import (
    SETTINGS,
    ComputedLayer,
    Expression,
    Step,
    Value,
    weight_shape,
)
from s2d_compiler.errors import FormatError
from s2d_compiler.fields import Fields, damaged, shown
from s2d_compiler.graph_codec import decode, decode_keywords, encode
from s2d_compiler.operator_names import WEIGHT_NORMS, operator_from_name, operator_to_name
from s2d_compiler.program import is_plain_name

# -- arguments and what they may be --------------------------------------------------------------

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Rule:
    """What an argument may be."""

    text: str
    holds: Callable[[Any], bool]


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _MOST


def _are_counts(value: Any, least: int, lengths: Collection[int]) -> bool:
    return (
        type(value) in (list, tuple)
        and len(value) in lengths
        and all(_is_count(v, least) for v in value)
    )


def _sizes(rank: int, least: int) -> _Rule:
    return _Rule(f"{rank} whole numbers from {least}", lambda v: _are_counts(v, least, (rank,)))


_CHANNELS = _Rule("a whole number from 0", lambda v: _is_count(v, 0))
_COUNT = _Rule("a whole number from 1", lambda v: _is_count(v, 1))
_FLAG = _Rule("True or False", lambda v: type(v) is bool)
_EPSILON = _Rule("a number from 0", lambda v: _is_number(v, 0, math.inf) and v < math.inf)
_SHARE = _Rule("a number from 0 to 1", lambda v: _is_number(v, 0, 1))
_SHAPE = _Rule("whole numbers", lambda v: _are_counts(v, 0, range(1, 9)))


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.text} or None", lambda v: v is None or rule.holds(v))


def _convolution(rank: int) -> dict[str, _Rule]:
    padding = _sizes(rank, 0)
    return {
        "in_channels": _CHANNELS,
        "out_channels": _CHANNELS,
        "kernel_size": _sizes(rank, 1),
        "stride": _sizes(rank, 1),
        "padding": _Rule(
            f'{padding.text}, "same" or "valid"',
            lambda v: v in ("same", "valid") if type(v) is str else padding.holds(v),
        ),
        "dilation": _sizes(rank, 1),
        "groups": _COUNT,
    }


_BATCH_NORM = {
    "num_features": _CHANNELS,
    "eps": _EPSILON,
    "momentum": _or_none(_SHARE),
    "affine": _FLAG,
    "track_running_stats": _FLAG,
}

_MODULES: dict[str, tuple[type[nn.Module], dict[str, _Rule]]] = {}
for _rank in (1, 2, 3):
    _MODULES[f"Conv{_rank}d"] = (getattr(nn, f"Conv{_rank}d"), _convolution(_rank))
    _MODULES[f"ConvTranspose{_rank}d"] = (
        getattr(nn, f"ConvTranspose{_rank}d"),
        {**_convolution(_rank), "output_padding": _sizes(_rank, 0)},
    )
    _MODULES[f"BatchNorm{_rank}d"] = (getattr(nn, f"BatchNorm{_rank}d"), _BATCH_NORM)
    _MODULES[f"InstanceNorm{_rank}d"] = (getattr(nn, f"InstanceNorm{_rank}d"), _BATCH_NORM)
_MODULES |= {
    "Linear": (nn.Linear, {"in_features": _CHANNELS, "out_features": _CHANNELS}),
    "GroupNorm": (
        nn.GroupNorm,
        {"num_groups": _COUNT, "num_channels": _CHANNELS, "eps": _EPSILON, "affine": _FLAG},
    ),
    "LayerNorm": (
        nn.LayerNorm,
        {"normalized_shape": _SHAPE, "eps": _EPSILON, "elementwise_affine": _FLAG},
    ),
    "RMSNorm": (
        nn.RMSNorm,
        {"normalized_shape": _SHAPE, "eps": _or_none(_EPSILON), "elementwise_affine": _FLAG},
    ),
    "PReLU": (nn.PReLU, {"num_parameters": _COUNT}),
    "Dropout": (nn.Dropout, {"p": _SHARE}),
    "Dropout2d": (nn.Dropout2d, {"p": _SHARE}),
    "AlphaDropout": (nn.AlphaDropout, {"p": _SHARE}),
}
_WITH_BIAS = ("Conv", "Linear", "LayerNorm", "BatchNorm", "InstanceNorm", "GroupNorm")

# -- layers --------------------------------------------------------------------------------------


def encode_module(module: nn.Module, place: str) -> dict[str, Any]:
    """Class name and arguments of a module.

    Raises:
        FormatError: Its class is not one that a file may hold.
    """
    if isinstance(module, ComputedLayer):
        return {"class": COMPUTED, "arguments": _encode_computed(module, place)}
    name = type(module).__name__
    if name not in _MODULES or type(module) is not _MODULES[name][0]:
        raise FormatError(
            f"{place}: modules of class {type(module).__module__}.{name} cannot be stored "
            f"in a dyn.pt, which holds {', '.join(sorted(_MODULES))}; make it of these."
        )
    if problem := _beyond_its_class(module):
        raise FormatError(
            f"{place}: this {name} {problem}, which a dyn.pt cannot hold; take it away before "
            "saving, for instance with prune.remove or remove_weight_norm."
        )
    arguments: dict[str, Any] = {}
    for key in _MODULES[name][1]:
        value = getattr(module, key)
        arguments[key] = list(value) if isinstance(value, tuple) else value
    if name.startswith(_WITH_BIAS):
        arguments["bias"] = module.bias is not None
    return {"class": name, "arguments": arguments}


#: Parameters and buffers of all classes that a file holds.
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def _beyond_its_class(module: nn.Module) -> str:
    """What a layer has besides what its class gives it; empty for nothing."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a hook"
    if "forward" in vars(module):
        return "has a forward of its own"
    more = sorted({*module._parameters, *module._buffers} - _TENSORS)
    return f"holds {more[0]!r} as well" if more else ""


def decode_module(
    row: Fields,
    tensors: Mapping[str, torch.Tensor] | None = None,
    unsaved: frozenset[str] = frozenset(),
    operators: Collection[str] | None = (),
) -> nn.Module:
    """The module that ``encode_module`` stored, on the meta device.

    Args:
        row: What is stored.
        tensors: What the module holds, for layers with computed weights; None to refuse such.
        unsaved: Names of the buffers among them that are not saved.
        operators: What computed weights may use, as in ``operator_from_name``.

    Raises:
        FormatError: The row is no module.
    """
    name = row.text("class")
    if name == COMPUTED and tensors is not None:
        return _decode_computed(row.inner("arguments"), tensors, unsaved, operators)
    if name not in _MODULES:
        damaged(
            row.at("class"),
            f"{shown(name)} is not a module that a dyn.pt may hold, which are "
            f"{', '.join(sorted(_MODULES))}",
        )
    kind, rules = _MODULES[name]
    if name.startswith(_WITH_BIAS):
        rules = {**rules, "bias": _FLAG}
    arguments = row.inner("arguments")
    _require_arguments(arguments, name, rules)
    for key, rule in rules.items():
        if not rule.holds(arguments.data[key]):
            damaged(arguments.at(key), f"{shown(arguments.data[key])} is not {rule.text}")
    values = {k: tuple(v) if type(v) is list else v for k, v in arguments.data.items()}
    if not name.endswith(("Dropout", "Dropout2d")):
        values["device"] = "meta"
    has_bias = bool(values.pop("bias", True)) if "Norm" in name else True
    try:
        return with_or_without_bias(kind(**values), has_bias)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        problem = str(error).partition("\n")[0][:200]
        damaged(row.place, f"a {name} cannot be made with its arguments ({problem})")


# -- layers with computed weights ----------------------------------------------------------------

#: The name under which layers with computed weights are stored.
COMPUTED = "ComputedLayer"


def _encode_computed(module: ComputedLayer, place: str) -> dict[str, Any]:
    expression = module.expression
    return {
        "layer": encode_module(module.layer(), place),
        "weight": expression.weight,
        "bias": expression.bias,
        "steps": [
            {
                "name": step.name,
                "target": operator_to_name(step.target, place),
                "args": encode(step.args, place),
                "kwargs": {k: encode(v, place) for k, v in step.kwargs.items()},
            }
            for step in expression.steps
        ],
    }


def _require_arguments(row: Fields, name: str, expected: Collection[str]) -> None:
    if set(row.data) != set(expected):
        damaged(row.place, f"{name} has not the arguments {', '.join(sorted(expected))}")


def _decode_computed(
    row: Fields,
    tensors: Mapping[str, torch.Tensor],
    unsaved: frozenset[str],
    operators: Collection[str] | None,
) -> nn.Module:
    _require_arguments(row, COMPUTED, ("layer", "weight", "bias", "steps"))
    layer = decode_module(row.inner("layer"))
    if type(layer).__name__ not in SETTINGS:
        damaged(row.place, f"a {type(layer).__name__} has no computed weight")
    for name in tensors:
        if "." in name or not is_plain_name(name) or hasattr(ComputedLayer, name):
            damaged(row.place, f"a tensor has the name {shown(name)}, which is no name or is taken")
    known: dict[str, Any] = {name: Value(name) for name in tensors}
    steps: list[Step] = []
    for step in row.rows("steps"):
        name = step.text("name")
        target = operator_from_name(step.text("target"), step.place, operators)
        args = decode(step.value("args"), known, step.at("args"))
        kwargs = decode_keywords(target, step, known)
        if not isinstance(args, tuple) or name in known:
            damaged(step.place, f"the step {shown(name)} has no arguments, or its name is taken")
        steps.append(Step(name, target, args, kwargs))
        known[name] = Value(name)
    weight = row.text("weight")
    bias = None if row.value("bias") is None else row.text("bias")
    if weight not in known or (bias is not None and bias not in known):
        damaged(row.place, "its weight or bias is none of its values")
    if (layer.bias is not None) != (bias is not None):
        damaged(row.place, "it has a bias that is not computed, or none where one is")
    module = ComputedLayer(layer, Expression(tuple(steps), weight, bias), tensors, unsaved)
    _check_shapes(module, row.place)
    return module


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    sizes, strides = tuple(tensor.shape), tensor.stride()
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype, device=tensor.device)


def _check_shapes(module: ComputedLayer, place: str) -> None:
    """Require that the expression gives a weight and a bias of the layer's shapes.

    Only shapes are computed: whatever the operators are, no numbers are made.
    """
    expression = module.expression
    wanted = [expression.weight] + ([expression.bias] if expression.bias is not None else [])
    try:
        with FakeTensorMode(), torch.no_grad():
            values = expression.values({k: _empty(t) for k, t in module.tensors().items()})
        given = [tuple(values[name].shape) for name in wanted]
        normed = [s for s in expression.steps if s.target in WEIGHT_NORMS]
        empty = [n for step in normed for n in step.operands() if not values[n].numel()]
    except Exception as error:
        problem = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        damaged(place, f"its weight cannot be computed ({problem})")
    expected = [weight_shape(module), weight_shape(module)[:1]][: len(given)]
    if empty:
        damaged(place, f"{shown(empty[0])}, whose norm is taken, has no elements")
    if given != expected:
        damaged(place, f"its weight and bias are {given}, not {expected}")
