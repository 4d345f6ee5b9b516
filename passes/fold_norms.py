"""Fold norms: batch norms become part of the convolution or linear layer before them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from passes.base import Pass, PassResult
from passes.running import call_new_module, module_of, shape_at
from s2d_compiler.computed import ComputedLayer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d, nn.ConvTranspose1d),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
    nn.BatchNorm3d: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Scale and shift weights as the batch norm behind them would scale and shift their result.

    For a graph that only runs: norms with running statistics whose input is a layer that nobody
    else reads. A norm behind anything else (a concatenation, an activation, a transposed
    convolution of several groups) stays, as does one behind a linear layer without recorded
    shapes. Weights that are computed from others are computed
    once. Layers are copied, not changed.
    """

    name: ClassVar[str] = "fold-norms"

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = False
        for node in list(graph_module.graph.nodes):
            changed |= _settle(graph_module, node) or _fold(graph_module, node)
        if changed:
            graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, changed=changed)


def _settle(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Compute a computed weight once."""
    module = module_of(graph_module, node)
    if not isinstance(module, ComputedLayer):
        return False
    with torch.no_grad():
        weight, bias = module.weight_and_bias()
    layer: Any = module.layer()
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    call_new_module(graph_module, node, layer.eval(), "settled")
    return True


def _fold(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    norm = module_of(graph_module, node)
    layers = _NORMS.get(type(norm))
    if layers is None or norm.running_mean is None or norm.running_var is None:
        return False
    before = node.args[0]
    if not isinstance(before, fx.Node) or len(before.users) != 1:
        return False
    layer = module_of(graph_module, before)
    if type(layer) not in layers or not _is_foldable(layer, norm):
        return False
    if isinstance(layer, nn.Linear) and len(shape_at(before) or ()) != 2:
        return False  # of tokens, such a norm takes the second dimension for channels
    with torch.no_grad():
        folded = _folded(layer, norm)
    call_new_module(graph_module, before, folded, "folded")
    node.replace_all_uses_with(before)
    graph_module.graph.erase_node(node)
    return True


def _is_foldable(layer: Any, norm: Any) -> bool:
    if layer._forward_hooks or norm._forward_hooks:
        return False
    return not (isinstance(layer, _TRANSPOSED) and layer.groups != 1)


def _folded(layer: Any, norm: Any) -> nn.Module:
    """A copy of the layer that does what the layer and the norm do."""
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        is_transposed = isinstance(layer, _TRANSPOSED)
        weight, bias = fuse_conv_bn_weights(
            layer.weight, layer.bias, *statistics, transpose=is_transposed
        )
    folded: nn.Module = copy.copy(layer)
    folded._parameters = {
        "weight": nn.Parameter(weight.detach(), requires_grad=False),
        "bias": nn.Parameter(bias.detach(), requires_grad=False),
    }
    return folded
