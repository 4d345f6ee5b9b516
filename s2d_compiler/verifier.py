"""What must be true of a staged graph between passes."""

from __future__ import annotations

import torch
from torch import fx, nn

from s2d_compiler.attributes import find
from s2d_compiler.errors import PassError


def verify_graph(graph_module: fx.GraphModule) -> None:
    """Check the invariants of a staged graph.

    - every node but inputs and the output says which stage computes it;
    - no node reads a later stage, and no exit stands for one (causality); what is nobody's
      counts as the first stage's;
    - every attribute and module that a node names exists;
    - every slice names a tensor that exists, of the shape that the slice has.

    Of a graph that calls extracted stages the last two are checked, and all of every stage.

    Raises:
        PassError: One does not hold; the message names the node.
    """
    for node in graph_module.graph.nodes:
        _require_target(graph_module, node)
    if any("stage" in node.meta for node in graph_module.graph.nodes):
        for node in graph_module.graph.nodes:
            _verify_causality(node)
    else:
        _verify_stages(graph_module)
    _verify_slices(graph_module)


def _verify_causality(node: fx.Node) -> None:
    if node.op == "output":
        return _verify_exits(node)
    if "stage" not in node.meta:
        raise PassError(
            f"node {node.name!r} ({node.op} {node.target}) has no stage; set meta['stage']"
        )
    for operand in node.all_input_nodes:
        if operand.meta.get("stage", 0) > max(node.meta["stage"], 1):
            raise PassError(
                f"node {node.name!r} of stage {node.meta['stage']} reads {operand.name!r} of "
                f"stage {operand.meta['stage']}; a stage reads itself and earlier ones only: "
                "change its meta['stage'], or what it reads"
            )
    return None


def _verify_exits(output: fx.Node) -> None:
    exits = output.args[0]
    if not isinstance(exits, list | tuple):
        return
    for stage, leaves in enumerate(exits, start=1):
        if not isinstance(leaves, list | tuple):
            continue
        for leaf in leaves:
            if isinstance(leaf, fx.Node) and leaf.meta.get("stage", 0) > stage:
                raise PassError(
                    f"the exit of stage {stage} is {leaf.name!r} of stage {leaf.meta['stage']}; "
                    "an exit reads its own stage and earlier ones only: give the output another"
                )


def _verify_stages(graph_module: fx.GraphModule) -> None:
    """Check the subgraphs of a network of extracted stages."""
    for name, module in graph_module.named_modules():
        if not name or not isinstance(module, fx.GraphModule):
            continue
        number = int(name.rpartition(".")[2]) + 1
        for node in module.graph.nodes:
            _require_target(module, node)
            if node.meta.get("stage", 0) > number:
                raise PassError(
                    f"node {node.name!r} of stage {node.meta['stage']} stands in stage {number}; "
                    "extract each stage's own nodes only"
                )


def _require_target(graph_module: fx.GraphModule, node: fx.Node) -> None:
    if node.op not in ("call_module", "get_attr"):
        return
    if find(graph_module, str(node.target)) is None:
        verb = "calls" if node.op == "call_module" else "reads"
        raise PassError(
            f"node {node.name!r} {verb} {node.target!r}, which does not exist; put it into the "
            "graph module before the node"
        )


def _verify_slices(graph_module: fx.GraphModule) -> None:
    path, holder = None, None
    for name, where in graph_module.meta.get("slices", {}).items():
        container, _, last = name.rpartition(".")
        if container != path:  # tensors of one module follow each other
            path, holder = container, find(graph_module, container) if container else graph_module
        tensor = None if holder is None else find(holder, last)
        if not isinstance(tensor, torch.Tensor):
            raise PassError(
                f"meta['slices'] names {name!r}, which does not exist; drop the entry of what a "
                "pass removes"
            )
        shape = tensor.shape
        if len(where.index) != len(shape):
            raise PassError(
                f"{name} has shape {tuple(shape)}, its slice {len(where.index)} dimensions; "
                "change its entry in meta['slices'] with the tensor"
            )
        for size, positions in zip(shape, where.index, strict=True):
            if positions is not None and len(positions) != size:
                raise PassError(
                    f"{name} has shape {tuple(shape)}, its slice {len(positions)} positions along "
                    "one of them; change its entry in meta['slices'] with the tensor"
                )


def unused_modules(graph_module: fx.GraphModule) -> list[str]:
    """Modules with tensors that no node calls or reads."""
    called = {
        str(n.target) for n in graph_module.graph.nodes if n.op in ("call_module", "get_attr")
    }
    return [
        name
        for name, module in graph_module.named_modules()
        if name not in called
        and type(module) is not nn.Module
        and name
        and list(module.parameters(recurse=False))
    ]
