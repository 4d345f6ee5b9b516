"""Layers whose weight is computed from parameters: standardised convolutions, weight norm,
biases put together from parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the layer, or the result of an earlier step, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of an expression; arguments name tensors by ``Value``."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def operands(self) -> list[str]:
        """Names of the tensors that it takes, in order."""
        found: list[str] = []
        tree_map_only(Value, lambda v: found.append(v.name), (self.args, dict(self.kwargs)))
        return found

    def __reduce__(self) -> Any:
        target = self.target
        if isinstance(target, torch._ops.OpOverload):  # which cannot be pickled but by name
            names = (target.namespace, target._opname, target._overloadname)
            return _step_of_operator, (self.name, *names, self.args, dict(self.kwargs))
        return Step, (self.name, target, self.args, dict(self.kwargs))


def _step_of_operator(
    name: str, namespace: str, operator: str, overload: str, args: Any, kwargs: Any
) -> Step:
    target = getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    return Step(name, target, args, kwargs)


@dataclass(frozen=True, slots=True)
class Expression:
    """How a weight and a bias follow from tensors: operators in order.

    Attributes:
        steps: The operators.
        weight: Name of the weight.
        bias: Name of the bias, None for none.
    """

    steps: tuple[Step, ...]
    weight: str
    bias: str | None

    def values(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Every tensor and result by name."""
        known: dict[str, Any] = dict(tensors)
        for step in self.steps:
            args, kwargs = tree_map_only(
                Value, lambda v: known[v.name], (step.args, dict(step.kwargs))
            )
            known[step.name] = step.target(*args, **kwargs)
        return known


#: How the names of index tensors begin that a slice of an expression needs.
INDEX = "_index"

#: What a layer of each class is configured by.
SETTINGS = {
    "Linear": ("in_features", "out_features"),
    **dict.fromkeys(
        ("Conv1d", "Conv2d", "Conv3d"),
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    ),
}


class ComputedLayer(nn.Module):
    """A convolution or linear layer whose weight is an expression of its parameters.

    Args:
        layer: The layer without weights (on the meta device): class and settings.
        expression: Weight and bias in terms of ``tensors``.
        tensors: Parameters, and buffers, by name.
        unsaved: Names of buffers that do not belong to the state dict (constants).
    """

    def __init__(
        self,
        layer: nn.Module,
        expression: Expression,
        tensors: Mapping[str, torch.Tensor],
        unsaved: frozenset[str] = frozenset(),
    ):
        super().__init__()
        self.layer_class = type(layer).__name__
        self.settings = {key: getattr(layer, key) for key in SETTINGS[self.layer_class]}
        self.expression = expression
        for key, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(key, tensor)
            else:
                self.register_buffer(key, tensor, persistent=key not in unsaved)

    @property
    def groups(self) -> int:
        return int(self.settings.get("groups", 1))

    @property
    def in_channels(self) -> int:
        return int(self.settings.get("in_channels", self.settings.get("in_features", 0)))

    @property
    def out_channels(self) -> int:
        return int(self.settings.get("out_channels", self.settings.get("out_features", 0)))

    in_features = in_channels
    out_features = out_channels

    @property
    def padding_mode(self) -> str:
        return "zeros"

    def layer(self) -> nn.Module:
        """The layer without its weight, on the meta device."""
        made: nn.Module = getattr(nn, self.layer_class)(
            **self.settings, bias=self.expression.bias is not None, device="meta"
        )
        return made

    def constants(self) -> set[str]:
        """Names of index tensors that belong to this slice of the layer alone."""
        return {key for key in self._non_persistent_buffers_set if key.startswith(INDEX)}

    def computes_like(self, other: ComputedLayer) -> bool:
        """Whether another layer has the same settings, operators and index tensors."""
        mine, others = self.tensors(), other.tensors()
        return (
            (self.layer_class, self.settings) == (other.layer_class, other.settings)
            and self.expression == other.expression
            and self.constants() == other.constants()
            and all(torch.equal(mine[key], others[key]) for key in self.constants())
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        held = [*self._parameters.items(), *self._buffers.items()]
        return {key: tensor for key, tensor in held if tensor is not None}

    def weight_and_bias(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and the bias that the layer applies."""
        known = self.expression.values(self.tensors())
        bias = self.expression.bias
        return known[self.expression.weight], None if bias is None else known[bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight_and_bias()
        return self.apply_with(x, weight, bias)

    def apply_with(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The layer with another weight."""
        functional: Any = nn.functional
        if self.layer_class == "Linear":
            result: torch.Tensor = functional.linear(x, weight, bias)
            return result
        options = {k: self.settings[k] for k in ("stride", "padding", "dilation", "groups")}
        result = getattr(functional, self.layer_class.lower())(x, weight, bias, **options)
        return result

    def extra_repr(self) -> str:
        operators = ", ".join(str(step.target) for step in self.expression.steps)
        return f"{self.layer_class}, {self.settings}, weight by {operators}"


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight that a layer applies, computed or its own."""
    if isinstance(module, ComputedLayer):
        return module.weight_and_bias()[0]
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the weight that a layer applies."""
    if not isinstance(module, ComputedLayer):
        return tuple(weight_of(module).shape)
    kernel = module.settings.get("kernel_size", ())
    return (module.out_channels, module.in_channels // module.groups, *kernel)


_PRODUCTS = ("mm", "matmul", "einsum", "linear", "conv", "bmm", "tensordot", "mv", "dot")


def weight_macs(module: nn.Module) -> int:
    """MACs of the matrix products in a layer's computed weight, spent once in every run."""
    if not isinstance(module, ComputedLayer):
        return 0
    steps = module.expression.steps
    if not any(word in str(step.target) for step in steps for word in _PRODUCTS):
        return 0
    tensors = module.tensors()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        try:
            module.expression.values({k: t.to("meta") for k, t in tensors.items()})
        except (RuntimeError, NotImplementedError):  # an operator without shapes of its own
            counter.flop_counts.clear()
            module.expression.values({k: t.detach() for k, t in tensors.items()})
    return int(counter.get_total_flops()) // 2


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """The bias that a layer adds, None for none."""
    if isinstance(module, ComputedLayer):
        return module.weight_and_bias()[1]
    bias = getattr(module, "bias", None)
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias
