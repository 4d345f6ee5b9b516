"""Raise weighted ATen operators back to ``torch.nn`` modules under their original paths.

One entry per operator: which positional arguments are tensors that the module owns, and
how the module is built. A layer whose weight is computed from parameters becomes a
``ComputedLayer``; anything else whose weight is not a parameter or buffer stays an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.attributes import read, with_or_without_bias
from s2d_compiler.computed import ComputedLayer
from s2d_compiler.expressions import find_expression
from s2d_compiler.program import safe_name

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Raise:
    """How one operator becomes a module.

    Attributes:
        owned: Schema argument name -> attribute of the module, for tensors it owns.
        build: Makes the module, on the meta device, from the schema arguments.
        operand: Schema name of the activation.
    """

    owned: Mapping[str, str]
    build: Callable[[Mapping[str, Any]], nn.Module | None]
    operand: str = "input"


def _spatial(value: Any, rank: int) -> Any:
    if isinstance(value, str):
        return value
    values = tuple(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
    return values * rank if len(values) == 1 else values


def _convolution(kind: type[nn.Module], rank: int, transposed: bool) -> Callable[..., nn.Module]:
    def build(a: Mapping[str, Any]) -> nn.Module:
        weight = a["weight"]
        groups = int(a["groups"])
        out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
        in_channels = weight.shape[0] if transposed else weight.shape[1] * groups
        options: dict[str, Any] = {
            "stride": _spatial(a["stride"], rank),
            "padding": _spatial(a["padding"], rank),
            "dilation": _spatial(a["dilation"], rank),
            "groups": groups,
            "bias": a["bias"] is not None,
        }
        if transposed:
            options["output_padding"] = _spatial(a["output_padding"], rank)
        return kind(in_channels, out_channels, tuple(weight.shape[2:]), device="meta", **options)

    return build


def _linear(a: Mapping[str, Any]) -> nn.Module:
    out_features, in_features = a["weight"].shape
    return nn.Linear(in_features, out_features, bias=a["bias"] is not None, device="meta")


def _is_norm(a: Mapping[str, Any]) -> bool:
    """Whether a norm's weight and bias are those of a module: no bias without a weight."""
    return a["weight"] is not None or a["bias"] is None


def _batch_norm(a: Mapping[str, Any]) -> nn.Module | None:
    operand: torch.Tensor = a["input"]
    tracked = a["running_mean"] is not None
    if (a["training"] and tracked) or not _is_norm(a):
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[
        operand.dim()
    ]
    module = kind(
        int(operand.shape[1]),
        eps=a["eps"],
        momentum=a["momentum"],
        affine=a["weight"] is not None,
        track_running_stats=tracked,
        device="meta",
    )
    return with_or_without_bias(module, a["bias"] is not None)


def _instance_norm(a: Mapping[str, Any]) -> nn.Module | None:
    operand: torch.Tensor = a["input"]
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(operand.dim())
    if kind is None or not _is_norm(a):
        return None
    module = kind(
        int(operand.shape[1]),
        eps=a["eps"],
        momentum=a["momentum"],
        affine=a["weight"] is not None,
        track_running_stats=a["running_mean"] is not None,
        device="meta",
    )
    return with_or_without_bias(module, a["bias"] is not None)


def _group_norm(a: Mapping[str, Any]) -> nn.Module | None:
    if not _is_norm(a):
        return None
    channels, groups = int(a["input"].shape[1]), int(a["num_groups"])
    affine = a["weight"] is not None
    module = nn.GroupNorm(groups, channels, eps=a["eps"], affine=affine, device="meta")
    return with_or_without_bias(module, a["bias"] is not None)


def _layer_norm(a: Mapping[str, Any]) -> nn.Module | None:
    shape = [int(n) for n in a["normalized_shape"]]
    affine = a["weight"] is not None
    if not _is_norm(a):
        return None
    bias = a["bias"] is not None
    return nn.LayerNorm(shape, eps=a["eps"], elementwise_affine=affine, bias=bias, device="meta")


def _rms_norm(a: Mapping[str, Any]) -> nn.Module:
    shape = [int(n) for n in a["normalized_shape"]]
    affine = a["weight"] is not None
    return nn.RMSNorm(shape, eps=a["eps"], elementwise_affine=affine, device="meta")


def _prelu(a: Mapping[str, Any]) -> nn.Module:
    return nn.PReLU(a["weight"].numel(), device="meta")


def _dropout(kind: type[nn.Module]) -> Callable[..., nn.Module | None]:
    def build(a: Mapping[str, Any]) -> nn.Module | None:
        return None if a["train"] else kind(p=a["p"])

    return build


_WEIGHTS = {"weight": "weight", "bias": "bias"}
_STATISTICS = _WEIGHTS | {"running_mean": "running_mean", "running_var": "running_var"}

RAISED: dict[torch._ops.OpOverload, Raise] = {
    aten.linear.default: Raise(_WEIGHTS, _linear),
    aten.batch_norm.default: Raise(_STATISTICS, _batch_norm),
    aten.instance_norm.default: Raise(_STATISTICS, _instance_norm),
    aten.group_norm.default: Raise(_WEIGHTS, _group_norm),
    aten.layer_norm.default: Raise(_WEIGHTS, _layer_norm),
    aten.rms_norm.default: Raise({"weight": "weight"}, _rms_norm),
    aten.prelu.default: Raise({"weight": "weight"}, _prelu, operand="self"),
    aten.dropout.default: Raise({}, _dropout(nn.Dropout)),
    aten.feature_dropout.default: Raise({}, _dropout(nn.Dropout2d)),
    aten.alpha_dropout.default: Raise({}, _dropout(nn.AlphaDropout)),
}
for _rank, _name in ((1, "conv1d"), (2, "conv2d"), (3, "conv3d")):
    _packet = getattr(aten, _name)
    for _overload in ("default", "padding"):
        _class = getattr(nn, f"Conv{_rank}d")
        RAISED[getattr(_packet, _overload)] = Raise(_WEIGHTS, _convolution(_class, _rank, False))
for _rank, _name, _overload in (
    (1, "conv_transpose1d", "default"),
    (2, "conv_transpose2d", "input"),
    (3, "conv_transpose3d", "input"),
):
    _class = getattr(nn, f"ConvTranspose{_rank}d")
    RAISED[getattr(getattr(aten, _name), _overload)] = Raise(
        _WEIGHTS, _convolution(_class, _rank, True)
    )

_MAY_BE_COMPUTED = frozenset(
    target for target in RAISED if target._opname in ("linear", "conv1d", "conv2d", "conv3d")
)


def schema_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator by schema name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    for argument in target._schema.arguments:
        if argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
    for argument, value in zip(target._schema.arguments, node.args, strict=False):
        bound[argument.name] = value
    return bound


class Raiser:
    """Replaces weighted operators of a graph module in place.

    Args:
        graph_module: Functional graph whose ``get_attr`` nodes read parameters and buffers.
        sources: Attribute target -> key in the original's state dict; extended for the
            attributes of raised modules.
        original: The model, for buffers that no operator reads (``num_batches_tracked``).
    """

    def __init__(self, graph_module: fx.GraphModule, sources: dict[str, str], original: nn.Module):
        self.graph_module = graph_module
        self.sources = sources
        self.original = original
        self.raised: dict[str, tuple[Any, nn.Module]] = {}
        self.taken: set[str] = set()

    def run(self) -> None:
        graph = self.graph_module.graph
        called = [n for n in graph.nodes if n.op == "call_function" and n.target in RAISED]
        for node in called:  # before the norms that their weights may be computed by
            if node.target in _MAY_BE_COMPUTED:
                self._raise_computed(node, RAISED[node.target])
        graph.eliminate_dead_code()
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in RAISED:
                self._raise(node, RAISED[node.target])
        graph.eliminate_dead_code()

    def _raise_computed(self, node: fx.Node, entry: Raise) -> None:
        """A layer whose weight or bias is an expression of parameters."""
        arguments = schema_arguments(node)
        weight, bias = arguments["weight"], arguments["bias"]
        operands = [n for n in (weight, bias) if isinstance(n, fx.Node)]
        if not isinstance(weight, fx.Node) or all(n.op == "get_attr" for n in operands):
            return
        found = find_expression(weight, bias, self.graph_module, self.sources)
        values = {
            k: v.meta.get("val") if isinstance(v, fx.Node) else v for k, v in arguments.items()
        }
        layer = None if found is None else entry.build(values)
        if found is None or layer is None:
            return
        tensors = {k: read(self.graph_module, target) for k, target in found.targets.items()}
        unsaved = frozenset(k for k, t in found.targets.items() if t not in self.sources)
        module = ComputedLayer(layer, found.expression, tensors, unsaved)
        path = safe_name(self._computed_path(node, found.targets))
        configuration = (module.extra_repr(), found.expression, tuple(found.targets.items()))
        same = [n for n, (c, _) in self.raised.items() if str(c) == str(configuration)]
        name, count = path, 1
        while not same and (
            name in self.raised or self._is_occupied(name, set(found.targets.values()))
        ):
            count += 1
            name = f"{path}_{count}"
        name = same[0] if same else name
        if name not in self.raised:
            for key, target in found.targets.items():
                if target in self.sources:
                    self.sources[f"{name}.{key}"] = self.sources[target]
            module.eval()
            self.graph_module.add_submodule(name, module)
            self.raised[name] = (configuration, module)
        self._replace(node, name, arguments[entry.operand], type(layer).__name__)

    def _computed_path(self, node: fx.Node, targets: Mapping[str, str]) -> str:
        """The path of the module that holds the weight, else of the one that runs."""
        keys = [self.sources[t] for t in targets.values() if t in self.sources]
        weights = [key for key in keys if key.endswith(".weight")]
        if len(weights) == 1:
            return weights[0].removesuffix(".weight")
        return str(node.meta.get("path", "")) or f"_{node.name}"

    def _replace(self, node: fx.Node, target: str, operand: Any, kind: str) -> None:
        with self.graph_module.graph.inserting_before(node):
            call = self.graph_module.graph.call_module(target, (operand,))
        call.meta = dict(node.meta) | {"kind": kind, "operator": str(node.target)}
        node.replace_all_uses_with(call)
        self.graph_module.graph.erase_node(node)

    def _raise(self, node: fx.Node, entry: Raise) -> None:
        arguments = schema_arguments(node)
        owned: dict[str, str] = {}
        values: dict[str, Any] = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, fx.Node):
                values[name] = value.meta.get("val")
        for argument, attribute in entry.owned.items():
            value = arguments.get(argument)
            if value is None:
                continue
            if (
                not isinstance(value, fx.Node)
                or value.op != "get_attr"
                or value.target not in self.sources
            ):
                return
            owned[attribute] = str(value.target)
        module = entry.build(values)
        if module is None:
            return
        path = safe_name(self._path(node, owned))
        configuration = (type(module), module.extra_repr(), tuple(sorted(owned.items())))
        target = self._install(path, configuration, module, owned, node)
        self._replace(node, target, arguments[entry.operand], type(module).__name__)

    def _path(self, node: fx.Node, owned: Mapping[str, str]) -> str:
        """The original module's path if the tensors are that module's, else the weight's."""
        path = str(node.meta.get("path", ""))
        names = [self.sources[target] for target in owned.values()]
        if not names:
            return path or f"_{node.name}"
        expected = {f"{path}.{attribute}" if path else attribute for attribute in owned}
        if path and (expected == set(names) or self._holds(path, owned)):
            return path
        weight = self.sources[owned["weight"]] if "weight" in owned else names[0]
        return weight.removesuffix(".weight").removesuffix("_weight")

    def _holds(self, path: str, owned: Mapping[str, str]) -> bool:
        """Whether the original has a module of its own at ``path`` that holds these tensors,
        some of which another module holds first (tied weights)."""
        modules = dict(self.original.named_modules())
        tensors = {a: read(self.graph_module, target) for a, target in owned.items()}
        found = modules.get(path)
        return found is not None and all(getattr(found, a, None) is t for a, t in tensors.items())

    def _install(
        self,
        path: str,
        configuration: Any,
        module: nn.Module,
        owned: Mapping[str, str],
        node: fx.Node,
    ) -> str:
        name, count = path, 1
        while name in self.raised or self._is_occupied(
            name, set(owned.values()), set(module._buffers)
        ):
            if name in self.raised and self.raised[name][0] == configuration:
                return name
            count += 1
            name = f"{path}_{count}"
        for attribute, target in owned.items():
            tensor = read(self.graph_module, target)
            if isinstance(tensor, nn.Parameter):
                setattr(module, attribute, tensor)
            elif attribute in module._buffers:
                module._buffers[attribute] = tensor
            else:
                setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            self.sources[f"{name}.{attribute}"] = self.sources[target]
        self._copy_counter(name, module, owned)
        module.eval()
        self.graph_module.add_submodule(name, module)
        self.raised[name] = (configuration, module)
        return name

    def _copy_counter(self, name: str, module: nn.Module, owned: Mapping[str, str]) -> None:
        """Give a norm its batch counter, which no operator reads in evaluation mode."""
        if (
            "num_batches_tracked" not in module._buffers
            or module._buffers["num_batches_tracked"] is None
        ):
            return
        prefix = self.sources[owned["running_mean"]].rpartition(".")[0]
        key = f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
        counter = dict(self.original.named_buffers(remove_duplicate=False)).get(key)
        if counter is None:
            module._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long)
            module._non_persistent_buffers_set.add("num_batches_tracked")
            return
        module._buffers["num_batches_tracked"] = counter
        self.sources[f"{name}.num_batches_tracked"] = key

    def _is_occupied(self, name: str, own: Collection[str], buffers: Collection[str] = ()) -> bool:
        """Whether something else than the module's own tensors stands there: a plain tensor of
        that path, or a module with children, or with tensors that this one has no place for."""
        try:
            found = read(self.graph_module, name)
        except AttributeError:
            return False
        if not isinstance(found, nn.Module) or type(found) is not nn.Module:
            return True
        content = {*found._modules, *found._parameters, *found._buffers} - set(buffers)
        return not {f"{name}.{key}" for key in content} <= set(own)
