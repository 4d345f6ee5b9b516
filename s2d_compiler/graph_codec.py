"""torch.fx graphs as plain data, and back.

Operators are stored by name (``operator_names.py``), tensors and modules by where they stand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from s2d_compiler.computed import Value
from s2d_compiler.errors import FormatError
from s2d_compiler.fields import Fields, as_list, as_text, damaged, shown
from s2d_compiler.operator_names import (
    check_arguments,
    is_arithmetic,
    operator_from_name,
    operator_to_name,
)
from s2d_compiler.program import is_plain_name

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
        f"{place}: an argument of type {type(value).__name__} cannot be stored in a dyn.pt; give "
        "the node nodes, numbers, text, and lists of these."
    )


def decode(value: Any, nodes: Mapping[str, Any], place: str) -> Any:
    """The argument that ``encode`` stored.

    Raises:
        FormatError: It is no such data.
    """
    if isinstance(value, _SMALL):
        return value
    if type(value) is not dict or len(value) != 1:
        damaged(place, f"{shown(value)} is not an argument")
    ((kind, content),) = value.items()
    if kind in ("list", "tuple", "slice"):
        items = [decode(v, nodes, place) for v in as_list(content, place)]
        if kind == "slice" and len(items) != 3:
            damaged(place, f"a slice has {len(items)} parts instead of 3")
        return items if kind == "list" else tuple(items) if kind == "tuple" else slice(*items)
    content = as_text(content, place)
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind == "dtype" and content in _DTYPES:
        return _DTYPES[content]
    if kind == "memory_format" and content in _FORMATS:
        return _FORMATS[content]
    if kind == "layout" and content == "strided":
        return torch.strided
    if kind == "device":
        try:
            return torch.device(content)
        except RuntimeError:
            damaged(place, f"{shown(content)} is not a device")
    damaged(place, f"{shown(kind)} {shown(content)} is no argument, or a node that comes later")


def decode_keywords(target: Any, row: Fields, nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments, which end up in generated source: only an operator's own names may."""
    given = row.named("kwargs") if "kwargs" in row.data else {}
    known: set[str] = set()
    if isinstance(target, torch._ops.OpOverload):
        known = {argument.name for argument in target._schema.arguments}
    elif getattr(target, "__module__", "") == "not_allowed":
        known = {k for k in given if is_plain_name(k) and "." not in k}
    for key in given:
        if key not in known:
            damaged(row.at("kwargs"), f"{shown(key)} is no argument of the operator")
    return {k: decode(v, nodes, f"{row.at('kwargs')}.{k}") for k, v in given.items()}


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
#: What is kept of a node's origin.
_ORIGIN = ("origin", "path", "kind")


def decode_graph(rows: list[Fields], operators: Collection[str] | None = ()) -> fx.Graph:
    """The graph that ``encode_graph`` stored; ``operators`` as in ``operator_from_name``.

    Raises:
        FormatError: The rows are no graph.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    inputs: set[str] = set()
    for number, row in enumerate(rows, start=1):
        name, kind = row.text("name"), row.text("op")
        at = Fields(row.data, f"{row.place} (node {shown(name)})")
        if kind not in _OPERATIONS:
            damaged(at.place, f"{shown(kind)} is no kind of node")
        if name in nodes or not is_plain_name(name) or "." in name:
            damaged(at.place, "its name is taken, or is no identifier")
        if (kind == "output") != (number == len(rows)):
            damaged(at.place, "a graph has one output, at its end")
        target = _target(kind, at, operators)
        if kind == "placeholder" and target in inputs:
            damaged(at.place, f"two inputs have the name {target!r}")
        inputs |= {target} if kind == "placeholder" else set()
        args = decode(at.value("args"), nodes, at.at("args"))
        kwargs = decode_keywords(target, at, nodes)
        _check_arguments(kind, target, args, at)
        created = graph.create_node(kind, target, args, kwargs, name=name)
        created.meta = _origin(at)
        nodes[name] = created
    return graph


def _target(kind: str, row: Fields, operators: Collection[str] | None) -> Any:
    target = row.text("target")
    if kind == "call_function":
        return operator_from_name(target, row.at("target"), operators)
    if not is_plain_name(target) or (kind == "placeholder" and "." in target):
        damaged(row.at("target"), f"{shown(target)} is not a name of letters, digits and dots")
    return target


def _check_arguments(kind: str, target: Any, args: Any, row: Fields) -> None:
    if not isinstance(args, tuple):
        damaged(row.at("args"), "they are no tuple")
    if kind in ("placeholder", "get_attr") and args:
        damaged(row.at("args"), f"a {kind} has none")
    if kind == "call_module" and not all(isinstance(a, fx.Node) for a in args):
        damaged(row.at("args"), "a module takes values of the graph")
    check_arguments(target, args, row.at("args"))
    if kind == "call_function" and is_arithmetic(target):
        if not all(isinstance(a, fx.Node | int | float) for a in args):
            damaged(row.at("args"), f"{target.__name__} computes with numbers")
        # What a literal can make of a number has to stay a number that fits into memory.
        if target.__name__ == "pow" and not all(
            isinstance(a, fx.Node) or math.fabs(a) <= _POWER for a in args
        ):
            damaged(row.at("args"), f"a power has a number above {_POWER}")


_POWER = 64


def _origin(row: Fields) -> dict[str, Any]:
    if "meta" not in row.data:
        return {}
    given = row.inner("meta")
    found: dict[str, Any] = {key: given.text(key) for key in _ORIGIN if key in given.data}
    if "macs" in given.data:
        found["macs"] = given.number("macs")
    return found
