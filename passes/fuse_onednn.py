"""Fuse into oneDNN: convolutions and linear layers with packed weights that also activate and add.

An eager convolution reorders its weight in every call, and its activation and the addition behind
it pass over memory again. oneDNN does all three in one, for any batch size, without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from passes.base import Pass, PassResult, remove_unused
from passes.running import module_of, new_name, shape_at

aten = torch.ops.aten

#: Attribute, scalars and algorithm of an activation, from its node; None where it has no like.
Fused = tuple[str, list[Any], str]


def _plain(name: str) -> Callable[[fx.Node], Fused | None]:
    return lambda node: (name, [], "") if len(node.args) == 1 and not node.kwargs else None


def _gelu(node: fx.Node) -> Fused | None:
    algorithm = node.kwargs.get("approximate", "none")
    return ("gelu", [], str(algorithm)) if len(node.args) == 1 else None


def _bounds(node: fx.Node) -> Fused | None:
    bounds = [*node.args[1:], *([-1.0, 1.0][len(node.args) - 1 :])]
    return None if node.kwargs else ("hardtanh", bounds, "")


def _slope(node: fx.Node) -> Fused | None:
    slope = node.args[1] if len(node.args) > 1 else 0.01
    return None if node.kwargs else ("leaky_relu", [slope], "")


_ACTIVATIONS: dict[Any, Callable[[fx.Node], Fused | None]] = {
    aten.relu.default: _plain("relu"),
    aten.sigmoid.default: _plain("sigmoid"),
    aten.tanh.default: _plain("tanh"),
    aten.silu.default: _plain("swish"),
    aten.hardswish.default: _plain("hardswish"),
    aten.hardtanh.default: _bounds,
    aten.leaky_relu.default: _slope,
    aten.gelu.default: _gelu,
}
_NONE: Fused = ("none", [], "")


def is_available() -> bool:
    """Whether this torch has the operators; they are internal to it and may go."""
    return bool(torch._C._has_mkldnn) and all(
        hasattr(torch.ops.mkldnn, name)
        for name in ("_convolution_pointwise", "_convolution_pointwise_", "_linear_pointwise",
                     "_reorder_linear_weight", "_reorder_convolution_weight")
    )  # fmt: skip


@dataclass(frozen=True)
class FuseOneDNN(Pass):
    """Let oneDNN run convolutions and linear layers, fused with what follows them.

    Handles, in float32 on a CPU: two-dimensional convolutions padded with zeros and linear
    layers; the activation behind one; sums of them and of other values of the same shape, each
    convolution adding to what the one before gave. Everything else stays. The order of additions
    changes, hence the last bits. Needs recorded shapes.

    Args:
        batch: Samples that weights are packed for; any number runs.
    """

    name: ClassVar[str] = "fuse-onednn"
    batch: int = 1

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        work = _Fusion(graph_module, self.batch)
        changed = work.run()
        if changed:
            remove_unused(graph_module.graph)
            graph_module.delete_all_unused_submodules()
        return PassResult(graph_module, changed=changed)


@dataclass
class _Fusion:
    graph_module: fx.GraphModule
    batch: int
    #: Results that this pass makes: nobody else holds their memory.
    fresh: set[fx.Node] = field(default_factory=set)

    def run(self) -> bool:
        changed = False
        for node in list(self.graph_module.graph.nodes):
            if node.target is aten.add.Tensor and not self._is_inner(node):
                changed |= self._fuse_sum(node)
        for node in list(self.graph_module.graph.nodes):
            if self._is_layer(node):
                self._fuse_layer(node)
                changed = True
        return changed

    # -- what can be fused -------------------------------------------------------------------------

    def _is_layer(self, node: Any) -> bool:
        return self._is_convolution(node) or self._is_linear(node)

    def _is_convolution(self, node: Any) -> bool:
        layer = module_of(self.graph_module, node)
        if type(layer) is not nn.Conv2d or not _is_float(node, layer):
            return False
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def _is_linear(self, node: Any) -> bool:
        layer = module_of(self.graph_module, node)
        return type(layer) is nn.Linear and _is_float(node, layer)

    def _is_plain_add(self, node: Any) -> bool:
        """An addition of two values of the shape of the result."""
        if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor or node.kwargs:
            return False
        shape = shape_at(node)
        return shape is not None and all(
            shape_at(a) == shape and a.meta.get("dtype") == torch.float32  # type: ignore[union-attr]
            for a in node.args
        )

    def _is_inner(self, node: fx.Node) -> bool:
        """Whether a sum is only a term of another one."""
        if len(node.users) != 1:
            return False
        (user,) = node.users
        return self._is_plain_add(user) and user.args[0] is not user.args[1]

    # -- sums --------------------------------------------------------------------------------------

    def _fuse_sum(self, root: fx.Node) -> bool:
        if not self._is_plain_add(root):
            return False
        terms = self._terms(root)
        layers = [t for t in terms if self._is_convolution(t) and len(t.users) == 1]
        others = [t for t in terms if t not in layers]
        if len(set(terms)) != len(terms) or not layers:
            return False
        activation, fused = self._activation(root)
        graph = self.graph_module.graph
        with graph.inserting_before(root):
            total: fx.Node | None = None
            for other in others:
                total = other if total is None else self._made(
                    root, aten.add.Tensor, (total, other), is_fresh=True
                )  # fmt: skip
            for layer in layers:
                how = fused if layer is layers[-1] else _NONE
                total = self._convolve(root, layer, total, how)
        assert total is not None
        (activation or root).replace_all_uses_with(total)
        for node in [*([activation] if activation else []), root]:
            graph.erase_node(node)
        return True

    def _terms(self, root: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        for term in root.args:
            assert isinstance(term, fx.Node)
            if self._is_plain_add(term) and self._is_inner(term):
                found += self._terms(term)
            else:
                found.append(term)
        return found

    def _convolve(
        self, place: fx.Node, node: fx.Node, total: fx.Node | None, fused: Fused
    ) -> fx.Node:
        """A convolution, added to ``total`` if there is one; written into it where it can be."""
        layer = module_of(self.graph_module, node)
        weight, bias = self._packed_convolution(node, layer)
        settings = ([*layer.padding], [*layer.stride], [*layer.dilation], layer.groups)
        attribute, scalars, algorithm = fused
        operators = torch.ops.mkldnn
        source = node.args[0]
        if total is None:
            return self._made(
                place, operators._convolution_pointwise.default,
                (source, weight, bias, *settings, attribute, scalars, algorithm),
            )  # fmt: skip
        unary = (None if attribute == "none" else attribute, scalars, algorithm or None)
        # The sum's operator knows ReLU alone among activations.
        after = attribute not in ("none", "relu")
        if after:
            unary = (None, [], None)
        rest = (weight, bias, *settings, "add", 1.0, *unary)
        if total in self.fresh and not total.users:
            made = self._made(
                place, operators._convolution_pointwise_.binary, (total, source, *rest)
            )
        else:
            made = self._made(
                place, operators._convolution_pointwise.binary, (source, total, *rest)
            )
        return self._activated(place, made, fused) if after else made

    def _activated(self, place: fx.Node, value: fx.Node, fused: Fused) -> fx.Node:
        target = {"sigmoid": aten.sigmoid_, "tanh": aten.tanh_, "swish": aten.silu_,
                  "hardswish": aten.hardswish_, "hardtanh": aten.hardtanh_,
                  "leaky_relu": aten.leaky_relu_, "gelu": aten.gelu_}[fused[0]]  # fmt: skip
        node = self._made(place, target.default, (value, *fused[1]))
        if fused[2]:
            node.kwargs = {"approximate": fused[2]}
        return node

    # -- single layers -----------------------------------------------------------------------------

    def _fuse_layer(self, node: fx.Node) -> None:
        activation, fused = self._activation(node)
        graph = self.graph_module.graph
        with graph.inserting_before(node):
            if self._is_convolution(node):
                made = self._convolve(node, node, None, fused)
            else:
                layer = module_of(self.graph_module, node)
                weight, bias = self._packed_linear(node, layer)
                made = self._made(
                    node, torch.ops.mkldnn._linear_pointwise.default,
                    (node.args[0], weight, bias, *fused),
                )  # fmt: skip
        (activation or node).replace_all_uses_with(made)
        if activation is not None:
            graph.erase_node(activation)
        graph.erase_node(node)

    def _activation(self, node: fx.Node) -> tuple[fx.Node | None, Fused]:
        user = next(iter(node.users), None)
        if len(node.users) != 1 or user is None or user.target not in _ACTIVATIONS:
            return None, _NONE
        fused = _ACTIVATIONS[user.target](user)
        if fused is None or user.args[0] is not node or user.meta.get("dtype") != torch.float32:
            return None, _NONE
        return user, fused

    # -- nodes and weights -------------------------------------------------------------------------

    def _made(
        self, place: fx.Node, target: Any, arguments: tuple[Any, ...], *, is_fresh: bool = True
    ) -> fx.Node:
        node = self.graph_module.graph.call_function(target, arguments)
        node.meta = dict(place.meta)
        if is_fresh:
            self.fresh.add(node)
        return node

    def _packed_convolution(self, node: fx.Node, layer: Any) -> tuple[fx.Node, fx.Node | None]:
        size = self._size(node)
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            layer.weight.detach(), [*layer.padding], [*layer.stride],
            [*layer.dilation], layer.groups, size,
        )  # fmt: skip
        return self._stored(node, weight, layer.bias)

    def _packed_linear(self, node: fx.Node, layer: Any) -> tuple[fx.Node, fx.Node | None]:
        *outer, _ = self._size(node)
        rows = 1
        for number in outer:
            rows *= number
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        return self._stored(node, weight, layer.bias)

    def _size(self, node: fx.Node) -> Sequence[int]:
        """Shape of a layer's input at the batch that it is packed for."""
        source = node.args[0]
        shape = list(shape_at(source) or ())
        recorded = int(source.meta.get("batch", 1))  # type: ignore[union-attr]
        shape[0] = max(shape[0] * self.batch // recorded, 1)
        return shape

    def _stored(
        self, node: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[fx.Node, fx.Node | None]:
        found: list[fx.Node | None] = []
        for suffix, tensor in (("packed", weight), ("bias", bias)):
            if tensor is None:
                found.append(None)
                continue
            name = new_name(self.graph_module, f"{node.target}_{suffix}".replace(".", "_"))
            self.graph_module.register_buffer(name, tensor.detach(), persistent=False)
            attribute = self.graph_module.graph.get_attr(name)
            found.append(attribute)
        assert found[0] is not None
        return found[0], found[1]


def _is_float(node: fx.Node, layer: Any) -> bool:
    """Whether a layer takes and gives float32 on the CPU, of a known shape, from one argument."""
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return (
        isinstance(source, fx.Node)
        and shape_at(source) is not None
        and source.meta.get("dtype") == torch.float32
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and not layer._forward_hooks
        and len(shape_at(source) or ()) >= (4 if isinstance(layer, nn.Conv2d) else 2)
    )
