"""Inline the regions that capture leaves as subgraphs: autocast and gradient modes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from s2d_compiler.errors import CaptureError

#: Name of the region operator -> position of the subgraph among its arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def inline_regions(graph_module: fx.GraphModule) -> fx.Graph:
    """The graph with every region replaced by its content.

    Raises:
        CaptureError: A region turns autocast on.
    """
    if not any(_region(node) for node in graph_module.graph.nodes):
        return graph_module.graph
    graph = fx.Graph()
    graph.output(_copy(graph_module, graph, {}))
    output = next(node for node in reversed(graph_module.graph.nodes) if node.op == "output")
    next(node for node in reversed(graph.nodes)).meta = dict(output.meta)
    graph.lint()
    return graph


def _region(node: fx.Node) -> str:
    """The name of the region operator that a node calls, empty for another one."""
    name = str(getattr(node.target, "_name", "")) if node.op == "call_function" else ""
    return name if name in _REGIONS else ""


def _copy(graph_module: fx.GraphModule, graph: fx.Graph, known: dict[fx.Node, Any]) -> Any:
    """Copy the nodes of a graph; ``known`` holds what its placeholders stand for, and gets what
    its nodes became. Returns its output."""
    for node in graph_module.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], known.__getitem__)
        if node in known or isinstance(_held(graph_module, node), fx.GraphModule):
            continue
        if name := _region(node):
            known[node] = _inline(graph_module, graph, node, name, known)
        elif node.target is operator.getitem and isinstance(known[node.args[0]], list | tuple):
            known[node] = known[node.args[0]][node.args[1]]
        else:
            known[node] = graph.node_copy(node, known.__getitem__)
    raise AssertionError("every region of a captured graph has an output")


def _inline(
    graph_module: fx.GraphModule,
    graph: fx.Graph,
    node: fx.Node,
    name: str,
    known: dict[fx.Node, Any],
) -> Any:
    if name == "wrap_with_autocast" and node.args[2]:
        raise CaptureError(
            f"the model turns autocast on inside itself ({node.args[0]}, {node.args[1]}), which a "
            "captured graph cannot keep. Take the autocast region out of the model's forward, and "
            "run the whole network under autocast instead."
        )
    place = _REGIONS[name]
    inner = _held(graph_module, node.args[place])
    assert isinstance(inner, fx.GraphModule)
    inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
    given = fx.map_arg(list(node.args[place + 1 :]), known.__getitem__)
    return _copy(inner, graph, dict(zip(inputs, given, strict=True)))


def _held(graph_module: fx.GraphModule, node: Any) -> Any:
    """What a ``get_attr`` node reads, None for others."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return getattr(graph_module, str(node.target), None)
