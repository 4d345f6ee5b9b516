"""What passes over graphs that only run have in common: modules, new modules, terms of sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.attributes import find, is_taken, put

aten = torch.ops.aten

#: Where an analysis puts the shape of a node's value, the batch as it ran included.
SHAPE = "shape"


def module_of(graph_module: fx.GraphModule, node: Any) -> Any:
    """The module that a node calls, None where it calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return find(graph_module, str(node.target))


def new_name(graph_module: fx.GraphModule, name: str) -> str:
    """A dotted name that is free."""
    candidate, count = name, 1
    while is_taken(graph_module, candidate) or find(graph_module, candidate) is not None:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def call_new_module(
    graph_module: fx.GraphModule, node: fx.Node, module: nn.Module, suffix: str
) -> None:
    """Let a node call another module, under its own path with a suffix."""
    name = new_name(graph_module, f"{node.target}_{suffix}")
    put(graph_module, name, module)
    node.target = name


def shape_at(node: Any) -> tuple[int, ...] | None:
    """The recorded shape of a node's value, None where it is not known."""
    return node.meta.get(SHAPE) if isinstance(node, fx.Node) else None
