"""Remove identities: what gives back its input unchanged when a network only runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from passes.base import Pass, PassResult, remove_unused
from s2d_compiler.attributes import read

aten = torch.ops.aten

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_ALIASES = {aten.alias.default, aten.detach.default}


@dataclass(frozen=True)
class RemoveIdentities(Pass):
    """Take out dropout, identities and results that nobody reads, from a graph that only runs."""

    name: ClassVar[str] = "remove-identities"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        before = len(graph.nodes)
        for node in list(graph.nodes):
            if _is_identity(graph_module, node) and isinstance(node.args[0], fx.Node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        remove_unused(graph)
        return PassResult(graph_module, changed=len(graph.nodes) != before)


def _is_identity(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ALIASES
    if node.op != "call_module":
        return False
    module = read(graph_module, str(node.target))
    return isinstance(module, (nn.Identity, *_DROPOUTS)) and not module._forward_hooks
