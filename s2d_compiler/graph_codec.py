"""torch.fx graphs as plain data, and back.

Operators are stored by name, modules by class name and arguments. Both come from fixed lists, and
from the operators that the caller allows by name: nothing that a file names is looked up anywhere
else.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

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
from s2d_compiler.program import is_plain_name

_MODULES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {}
_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
for _rank in (1, 2, 3):
    _MODULES[f"Conv{_rank}d"] = (getattr(nn, f"Conv{_rank}d"), _CONVOLUTION)
    _MODULES[f"ConvTranspose{_rank}d"] = (
        getattr(nn, f"ConvTranspose{_rank}d"),
        (*_CONVOLUTION, "output_padding"),
    )
    _MODULES[f"BatchNorm{_rank}d"] = (getattr(nn, f"BatchNorm{_rank}d"), _BATCH_NORM)
    _MODULES[f"InstanceNorm{_rank}d"] = (getattr(nn, f"InstanceNorm{_rank}d"), _BATCH_NORM)
_MODULES |= {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "GroupNorm": (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
    "LayerNorm": (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "RMSNorm": (nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "PReLU": (nn.PReLU, ("num_parameters",)),
    "Dropout": (nn.Dropout, ("p",)),
    "Dropout2d": (nn.Dropout2d, ("p",)),
    "AlphaDropout": (nn.AlphaDropout, ("p",)),
}
_WITH_BIAS = ("Conv", "Linear", "LayerNorm", "BatchNorm", "InstanceNorm", "GroupNorm")

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    **{
        f"operator.{n}": getattr(operator, n)
        for n in ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv")
    },
    "operator.pow": operator.pow,
    **{
        n: getattr(torch, n)
        for n in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")
    },
    "builtins.int": builtins.int,
}
_FUNCTION_NAMES = {v: k for k, v in _FUNCTIONS.items()}
#: Where operators that need no permission are defined.
OWN_NAMESPACES = ("aten", "torchvision")
#: Operators that read files or memory of their own choosing.
_FORBIDDEN = (
    *("from_file", "save", "set_", "record_stream", "resize", "data_ptr", "as_strided"),
    *("_cuda", "_pin_memory", "_resize", "_copy_from"),
)
_DTYPES = {
    str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)
}
_FORMATS = {
    str(v).removeprefix("torch."): v
    for v in (
        torch.contiguous_format,
        torch.channels_last,
        torch.channels_last_3d,
        torch.preserve_format,
    )
}
_SMALL = (str, int, float, bool, type(None))


# -- operators -----------------------------------------------------------------------------------


def operator_to_name(target: Any, place: str) -> str:
    """The name of an operator; any that writes into nothing has one.

    Raises:
        FormatError: It is not one that a file may hold.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._opname}.{target._overloadname}"
        operator_from_name(name, place, (f"{target.namespace}::{target._opname}",))
        return name
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise FormatError(
        f"{place}: {getattr(target, '__name__', target)!r} is a Python function, which a dyn.pt "
        "cannot hold (it holds data, no code); express the node with ATen operators, or make it "
        "an operator with torch.library."
    )


def operator_from_name(name: str, place: str, allowed: Collection[str] | None = ()) -> Any:
    """The operator of a name.

    Args:
        name: ``namespace.operator.overload``, or one of a few Python functions.
        place: Where the name stands, for messages.
        allowed: Operators beside aten's and torchvision's, as ``namespace::operator``. None
            where the graph is only looked at: what is not allowed then stands in for itself and
            refuses to run.

    Raises:
        FormatError: There is none, or it is not one that a file may hold.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(p.isidentifier() and p.isascii() for p in parts):
        raise FormatError(f"{place}: {name[:60]!r} is not the name of an operator.")
    namespace, operator_name, overload = parts
    if namespace not in OWN_NAMESPACES and allowed is None:
        return _stand_in(name)
    listed = f"{namespace}::{operator_name}"
    if namespace not in OWN_NAMESPACES and listed not in (allowed or ()):
        raise FormatError(
            f"{place}: {name!r} is not an operator of aten or torchvision, and a file may not "
            "choose what else is run; if you trust that operator, import what defines it and "
            f'allow it by name: load(path, operators=["{listed}"]).'
        )
    packet = getattr(getattr(torch.ops, namespace), operator_name, None)
    target = getattr(packet, overload, None) if packet is not None else None
    if not isinstance(target, torch._ops.OpOverload):
        where = f"in torch {torch.__version__}"
        if namespace not in OWN_NAMESPACES:
            where = "in this process; import the module that defines it first"
        raise FormatError(f"{place}: operator {name!r} does not exist {where}.")
    if target._schema.is_mutable or any(operator_name.startswith(f) for f in _FORBIDDEN):
        raise FormatError(
            f"{place}: operator {name!r} is not one that a dyn.pt may hold (it is not pure)."
        )
    return target


def _stand_in(name: str) -> Callable[..., Any]:
    """What a graph that is only looked at holds in place of an operator that is not allowed."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise FormatError(f"{name!r} was not allowed when the file was read; it cannot run.")

    # Names in generated source: never those of a module that could be found.
    refused.__module__, refused.__name__ = "not_allowed", name.replace(".", "_")
    return refused


# -- arguments -------------------------------------------------------------------------------------


def encode(value: Any, place: str) -> Any:
    """Plain data for an argument of a node."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Value):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [encode(v, place) for v in value]}
    if isinstance(value, _SMALL):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {"slice": [encode(v, place) for v in (value.start, value.stop, value.step)]}
    raise FormatError(
        f"{place}: an argument of type {type(value).__name__} cannot be stored in a dyn.pt."
    )


def decode(value: Any, nodes: Mapping[str, Any], place: str) -> Any:
    """The argument that ``encode`` stored.

    Raises:
        FormatError: It is no such data.
    """
    if isinstance(value, _SMALL):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise FormatError(f"{place}: {value!r} is not an argument; the file is damaged.")
    ((kind, content),) = value.items()
    if kind in ("list", "tuple", "slice") and isinstance(content, list):
        items = [decode(v, nodes, place) for v in content]
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind == "dtype" and content in _DTYPES:
        return _DTYPES[content]
    if kind == "memory_format" and content in _FORMATS:
        return _FORMATS[content]
    if kind == "layout" and content == "strided":
        return torch.strided
    if kind == "device" and isinstance(content, str):
        try:
            return torch.device(content)
        except RuntimeError as error:
            raise FormatError(f"{place}: {content!r} is not a device.") from error
    raise FormatError(
        f"{place}: {str(value)[:80]} is not an argument, or names a node that comes later."
    )


# -- graphs ----------------------------------------------------------------------------------------


def encode_graph(graph: fx.Graph, place: str) -> list[dict[str, Any]]:
    """Nodes in order, as plain data."""
    rows: list[dict[str, Any]] = []
    for node in graph.nodes:
        at = f"{place}, node {node.name!r}"
        target = (
            operator_to_name(node.target, at) if node.op == "call_function" else str(node.target)
        )
        row = {"name": node.name, "op": node.op, "target": target, "args": encode(node.args, at)}
        if node.kwargs:
            row["kwargs"] = {k: encode(v, at) for k, v in node.kwargs.items()}
        kept = {
            k: node.meta[k]
            for k in ("origin", "path", "kind", "macs")
            if isinstance(node.meta.get(k), str | int)
        }
        if kept:
            row["meta"] = kept
        rows.append(row)
    return rows


_OPERATIONS = ("placeholder", "get_attr", "call_module", "call_function", "output")


def decode_graph(rows: Any, place: str, operators: Collection[str] | None = ()) -> fx.Graph:
    """The graph that ``encode_graph`` stored; ``operators`` as in ``operator_from_name``.

    Raises:
        FormatError: The rows are no graph.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in _list(rows, place):
        name, kind = _string(row, "name", place), _string(row, "op", place)
        at = f"{place}, node {name!r}"
        if kind not in _OPERATIONS:
            raise FormatError(f"{at}: {kind!r} is no kind of node.")
        target: Any = _string(row, "target", at)
        if not is_plain_name(name) or (kind == "placeholder" and "." in target):
            raise FormatError(f"{at}: the name is not an identifier.")
        if kind == "placeholder" and target in (n.target for n in nodes.values()):
            raise FormatError(f"{at}: two inputs have the name {target!r}.")
        if kind == "call_function":
            target = operator_from_name(target, at, operators)
        elif not is_plain_name(target):
            raise FormatError(f"{at}: {target[:60]!r} is not a name of letters, digits and dots.")
        args = decode(row.get("args"), nodes, at)
        kwargs = {k: decode(v, nodes, at) for k, v in dict(row.get("kwargs", {})).items()}
        _check_keywords(target, kwargs, at)
        if not isinstance(args, tuple) or name in nodes:
            raise FormatError(f"{at}: its arguments are no tuple, or its name is taken.")
        created = graph.create_node(kind, target, args, kwargs, name=name)
        created.meta = {
            k: v for k, v in dict(row.get("meta", {})).items() if isinstance(v, str | int)
        }
        nodes[name] = created
    return graph


def _check_keywords(target: Any, kwargs: Mapping[Any, Any], place: str) -> None:
    """Keywords end up in generated source: only an operator's own argument names may."""
    known: set[str] = set()
    if isinstance(target, torch._ops.OpOverload):
        known = {argument.name for argument in target._schema.arguments}
    elif getattr(target, "__module__", "") == "not_allowed":
        known = {k for k in kwargs if isinstance(k, str) and is_plain_name(k) and "." not in k}
    if not set(kwargs) <= known:
        raise FormatError(f"{place}: {str(sorted(map(str, kwargs)))[:60]} are not its arguments.")


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise FormatError(f"{place}: no list of nodes; the file is damaged.")
    return value


def _string(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise FormatError(f"{place}: {key!r} is {value!r}, not text; the file is damaged.")
    return value


# -- modules --------------------------------------------------------------------------------------


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
            f"in a dyn.pt, which holds {', '.join(sorted(_MODULES))}."
        )
    arguments: dict[str, Any] = {}
    for key in _MODULES[name][1]:
        value = getattr(module, key)
        arguments[key] = list(value) if isinstance(value, tuple) else value
    if name.startswith(_WITH_BIAS):
        arguments["bias"] = module.bias is not None
    return {"class": name, "arguments": arguments}


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


def _decode_computed(
    arguments: Any, tensors: Mapping[str, torch.Tensor], unsaved: frozenset[str], place: str
) -> nn.Module:
    if not isinstance(arguments, dict) or set(arguments) != {"layer", "weight", "bias", "steps"}:
        raise FormatError(f"{place}: its arguments are not those of a {COMPUTED}.")
    layer = decode_module(arguments["layer"], place)
    if type(layer).__name__ not in SETTINGS:
        raise FormatError(f"{place}: a {type(layer).__name__} has no computed weight.")
    if not all(is_plain_name(name) and not hasattr(nn.Module, name) for name in tensors):
        raise FormatError(f"{place}: a tensor has a name that is taken.")
    known: dict[str, Any] = {name: Value(name) for name in tensors}
    steps: list[Step] = []
    for row in _list(arguments["steps"], place):
        name, target = _string(row, "name", place), _string(row, "target", place)
        args = decode(row.get("args"), known, place)
        found = operator_from_name(target, place)
        kwargs = {k: decode(v, known, place) for k, v in dict(row.get("kwargs", {})).items()}
        _check_keywords(found, kwargs, place)
        if not isinstance(args, tuple) or name in known:
            raise FormatError(f"{place}: step {name!r} has no arguments, or its name is taken.")
        steps.append(Step(name, found, args, kwargs))
        known[name] = Value(name)
    weight, bias = arguments["weight"], arguments["bias"]
    if weight not in known or (bias is not None and bias not in known):
        raise FormatError(f"{place}: its weight or bias is none of its values.")
    module = ComputedLayer(layer, Expression(tuple(steps), weight, bias), tensors, unsaved)
    _check_shapes(module, place)
    return module


def _check_shapes(module: ComputedLayer, place: str) -> None:
    """Require that the expression gives a weight and a bias of the layer's shapes."""
    shapes = {k: torch.empty_like(t, device="meta") for k, t in module.tensors().items()}
    expression = module.expression
    try:
        values = expression.values(shapes)
        given = [tuple(values[n].shape) for n in (expression.weight, expression.bias) if n]
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise FormatError(f"{place}: its weight cannot be computed: {error}.") from error
    expected = [weight_shape(module), weight_shape(module)[:1]][: len(given)]
    if given != expected:
        raise FormatError(f"{place}: its weight and bias are {given}, not {expected}.")


def decode_module(
    row: Any,
    place: str,
    tensors: Mapping[str, torch.Tensor] | None = None,
    unsaved: frozenset[str] = frozenset(),
) -> nn.Module:
    """The module that ``encode_module`` stored, on the meta device.

    Args:
        row: What is stored.
        place: For messages.
        tensors: What the module holds, for layers with computed weights.
        unsaved: Names of the buffers among them that are not saved.

    Raises:
        FormatError: The row is no module.
    """
    if isinstance(row, dict) and row.get("class") == COMPUTED and tensors is not None:
        return _decode_computed(row.get("arguments"), tensors, unsaved, place)
    if not isinstance(row, dict) or row.get("class") not in _MODULES:
        raise FormatError(f"{place}: {str(row)[:80]} is not a module that a dyn.pt may hold.")
    kind, keys = _MODULES[row["class"]]
    arguments = row.get("arguments")
    allowed = {*keys, "bias"} if row["class"].startswith(_WITH_BIAS) else set(keys)
    if not isinstance(arguments, dict) or set(arguments) != allowed:
        raise FormatError(
            f"{place}: {row['class']} has not the arguments {', '.join(sorted(allowed))}."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    if not all(isinstance(v, (*_SMALL, tuple)) for v in values.values()):
        raise FormatError(
            f"{place}: {row['class']} has an argument that is neither a number nor text."
        )
    if kind is not nn.Dropout and not row["class"].endswith("Dropout") and kind is not nn.Dropout2d:
        values["device"] = "meta"
    has_bias = bool(values.pop("bias", True)) if "Norm" in row["class"] else True
    try:
        return with_or_without_bias(kind(**values), has_bias)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{place}: {row['class']} cannot be made: {error}.") from error
