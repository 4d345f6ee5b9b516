"""What must be true of a staged graph between passes."""

from __future__ import annotations

import torch
from torch import fx, nn

from s2d_compiler.errors import PassError


def verify_graph(graph_module: fx.GraphModule) -> None:
    """Check the invariants of a staged graph.

    - every node but inputs and the output says which stage computes it;
    - no node reads a later stage (causality);
    - every attribute and module that a node names exists;
    - every slice names a tensor that exists, of the shape that the slice has.

    Raises:
        PassError: One does not hold; the message names the node.
    """
    if not any("stage" in node.meta for node in graph_module.graph.nodes):
        return _verify_stages(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "output":
            continue
        if "stage" not in node.meta:
            raise PassError(
                f"node {node.name!r} ({node.op} {node.target}) has no stage; set meta['stage']"
            )
        for operand in node.all_input_nodes:
            if operand.meta.get("stage", 0) > node.meta["stage"] > 0:
                raise PassError(
                    f"node {node.name!r} of stage {node.meta['stage']} reads {operand.name!r} of "
                    f"stage {operand.meta['stage']}; a stage reads itself and earlier ones only"
                )
        if node.op == "call_module":
            _require_module(graph_module, node)
    _verify_slices(graph_module)


def _verify_stages(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            _require_module(graph_module, node)


def _require_module(graph_module: fx.GraphModule, node: fx.Node) -> None:
    try:
        graph_module.get_submodule(str(node.target))
    except AttributeError as error:
        raise PassError(
            f"node {node.name!r} calls {node.target!r}, which does not exist"
        ) from error


def _verify_slices(graph_module: fx.GraphModule) -> None:
    tensors: dict[str, torch.Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    tensors |= dict(graph_module.named_buffers(remove_duplicate=False))
    for name, where in graph_module.meta.get("slices", {}).items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        for size, positions in zip(tensor.shape, where.index, strict=True):
            if positions is not None and len(positions) != size:
                raise PassError(
                    f"{name} has shape {tuple(tensor.shape)}, its slice {len(positions)} positions"
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
