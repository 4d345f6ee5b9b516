"""Sum parts: layers read the parts of a concatenation one by one and add up what they give."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from passes.base import Pass, PassResult, remove_unused
from passes.running import module_of, new_name, shape_at
from s2d_compiler.attributes import put

aten = torch.ops.aten

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ShareConcatenations(Pass):
    """Concatenate equal parts once, for all their readers."""

    name: ClassVar[str] = "share-concatenations"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        known: dict[tuple[Any, ...], fx.Node] = {}
        changed = False
        for node in list(graph_module.graph.nodes):
            if node.target is not aten.cat.default or node.kwargs:
                continue
            parts = node.args[0]
            if not isinstance(parts, list | tuple) or _is_mutated(node, *parts):
                continue
            first = known.setdefault((tuple(parts), *node.args[1:]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph_module.graph.erase_node(node)
                changed = True
        return PassResult(graph_module, changed=changed)


@dataclass(frozen=True)
class SumParts(Pass):
    """Replace a layer over a concatenation of channels by the sum of one layer per part.

    The weight is cut along its input channels; the first layer has the bias. A concatenation is
    taken out where all its readers are convolutions of one group or linear layers along its
    dimension, and where it pays: it copies, the sum runs more layers. Needs recorded shapes.

    Args:
        least_bytes: A concatenation stays when it copies fewer bytes than this for each layer
            that would be added.
        batch: Samples to reckon with.
    """

    name: ClassVar[str] = "sum-parts"
    least_bytes: int = 0
    batch: int = 1

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = False
        for node in list(graph_module.graph.nodes):
            if node.target is aten.cat.default and self._pays(graph_module, node):
                for reader in list(node.users):
                    _sum(graph_module, reader, node.args[0])
                changed = True
        if changed:
            remove_unused(graph_module.graph)
            graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, changed=changed)

    def _pays(self, graph_module: fx.GraphModule, node: fx.Node) -> bool:
        parts = node.args[0]
        shape = shape_at(node)
        if shape is None or not isinstance(parts, list | tuple) or len(parts) < 2:
            return False
        if any(shape_at(part) is None for part in parts) or _is_mutated(node, *parts):
            return False
        dimension: Any = node.args[1] if len(node.args) > 1 else 0
        dimension %= len(shape)
        if not node.users or not all(
            _reads_along(graph_module, reader, node, dimension, len(shape)) for reader in node.users
        ):
            return False
        size = node.meta.get("itemsize", 4)
        copied = math.prod(shape[1:]) * shape[0] * size * self.batch / node.meta.get("batch", 1)
        return bool(copied >= self.least_bytes * (len(parts) - 1) * len(node.users))


def _reads_along(
    graph_module: fx.GraphModule, reader: fx.Node, node: fx.Node, dimension: int, rank: int
) -> bool:
    layer = module_of(graph_module, reader)
    if reader.args != (node,) or reader.kwargs or layer is None or layer._forward_hooks:
        return False
    if type(layer) is nn.Linear:
        return dimension == rank - 1
    return type(layer) in _CONVOLUTIONS and layer.groups == 1 and dimension == 1


def _is_mutated(*nodes: Any) -> bool:
    """Whether an operator writes to one of these values: then reading it later is another read."""
    return any(
        isinstance(user.target, torch._ops.OpOverload) and user.target._schema.is_mutable
        for node in nodes
        if isinstance(node, fx.Node)
        for user in node.users
    )


def _sum(graph_module: fx.GraphModule, reader: fx.Node, parts: Sequence[fx.Node]) -> None:
    layer = module_of(graph_module, reader)
    dimension = -1 if isinstance(layer, nn.Linear) else 1
    sizes = [(shape_at(part) or ())[dimension] for part in parts]
    total: fx.Node | None = None
    graph = graph_module.graph
    with graph.inserting_before(reader):
        for number, (part, weight) in enumerate(
            zip(parts, layer.weight.detach().split(sizes, 1), strict=True)
        ):
            name = new_name(graph_module, f"{reader.target}_part{number + 1}")
            put(graph_module, name, _part_of(layer, weight, first=number == 0))
            node = graph.call_module(name, (part,))
            node.meta = dict(reader.meta)
            if total is not None:
                node = graph.call_function(aten.add.Tensor, (total, node))
                node.meta = dict(reader.meta)
            total = node
    assert total is not None
    reader.replace_all_uses_with(total)
    graph.erase_node(reader)


def _part_of(layer: Any, weight: torch.Tensor, *, first: bool) -> nn.Module:
    """The layer for some of its input channels."""
    part: nn.Module = copy.copy(layer)
    own = nn.Parameter(weight.clone(), requires_grad=False)
    part._parameters = {"weight": own, "bias": layer.bias if first else None}
    size = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    part.__dict__[size] = weight.shape[1]
    return part
