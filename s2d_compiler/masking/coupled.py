"""Operators that mix channels without weights, for all stages in one go.

Which stage owns which channel is a matrix of zeros and ones: multiplied with it, channels become
one number per stage, and that becomes one per channel again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class StageNorm(nn.Module):
    """Layer, RMS or group norm, every stage's channels by their own statistics.

    Args:
        norm: The norm, whose settings and tensors it takes over.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        super().__init__()
        self.description = f"{type(norm).__name__}({norm.extra_repr()})"
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else None
        self.centred = not isinstance(norm, nn.RMSNorm)
        self.eps = norm.eps
        self.register_parameter("weight", norm._parameters["weight"])
        self.register_parameter("bias", norm._parameters.get("bias"))

    def forward(self, x: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """Normalise.

        Args:
            x: Channels in the last dimension, (N, C, ...) for a group norm.
            member: (stages, channels), of one group for a group norm.
        """
        result = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype in (torch.bfloat16, torch.float16):
                x = x.float()
            if self.groups is None:
                x = self._scaled(x, self._normalised(x.unsqueeze(-1), member).squeeze(-1), -1)
            else:
                grouped = x.reshape(x.shape[0], self.groups, member.shape[1], -1)
                x = self._scaled(x, self._normalised(grouped, member).reshape(x.shape), 1)
        return x if torch.is_autocast_enabled(x.device.type) else x.to(result)

    def _normalised(self, x: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
        """Of (..., channels, positions)."""
        member = member.to(x.dtype)
        average = member / member.sum(1, keepdim=True).clamp(min=1)
        if self.centred:
            x = x - (functional.linear(x.mean(-1), average) @ member).unsqueeze(-1)
        variance = functional.linear(x.square().mean(-1), average)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return x * ((variance + eps).rsqrt() @ member).unsqueeze(-1)

    def _scaled(self, x: torch.Tensor, normal: torch.Tensor, dimension: int) -> torch.Tensor:
        shape = [1] * x.dim()
        shape[dimension] = -1
        if self.weight is not None:
            normal = normal * self.weight.reshape(shape)
        return normal if self.bias is None else normal + self.bias.reshape(shape)

    def extra_repr(self) -> str:
        return self.description


def stage_softmax(softmax: Any, x: torch.Tensor, own: Any, *rest: Any, **keywords: Any) -> Any:
    """A softmax in which every stage's channels sum to one.

    Args:
        softmax: The operator, a softmax or its logarithm.
        x: The numbers.
        own: Per stage, which positions are its own; broadcasts against ``x``.
        rest: Further arguments of the operator, the dimension first.
        keywords: Likewise.
    """
    low = torch.finfo(x.dtype).min
    result = torch.zeros_like(x)
    for mine in own:
        part = softmax(torch.where(mine, x, low), *rest, **keywords)
        result = torch.where(mine, part, result)
    return result


def stage_reduction(
    reduction: Any, x: torch.Tensor, own: Any, later: torch.Tensor, *rest: Any, **keywords: Any
) -> tuple[torch.Tensor, ...]:
    """A reduction of every stage's channels.

    Args:
        reduction: The operator.
        x: The numbers.
        own: Per stage, which positions are its own; broadcasts against ``x``.
        later: Which positions are later stages' than the first, likewise.
        rest: Further arguments of the operator.
        keywords: Likewise.

    Returns:
        One result per stage; a stage without channels has the one before.
    """
    found: list[torch.Tensor] = []
    before = reduction(x.masked_fill(later, 0), *rest, **keywords)
    for mine in own:
        part = _reduced(reduction, x, mine, rest, keywords)
        before = torch.where(mine.any(), part, before)
        found.append(before)
    return tuple(found)


def _reduced(
    reduction: Any, x: torch.Tensor, own: torch.Tensor, rest: Any, keywords: Any
) -> torch.Tensor:
    """Of some positions; any finite numbers where there are none."""
    name = reduction._opname
    if name == "mean":
        result = reduction(x.masked_fill(~own, 0), *rest, **keywords)
        return torch.as_tensor(result * (own.numel() / own.sum().clamp(min=1).to(result.dtype)))
    if name in ("var", "std"):
        return _spread(reduction, x, own, rest, keywords)
    fill: Any = {"sum": 0, "prod": 1, "any": False, "all": True, "norm": 0}.get(name, 0)
    if name in ("amax", "logsumexp"):
        fill = _lowest(x)
    elif name == "amin":
        fill = -_lowest(x) if x.is_floating_point() else torch.iinfo(x.dtype).max
    result = reduction(x.masked_fill(~own, fill), *rest, **keywords)
    return torch.as_tensor(result)


def _lowest(x: torch.Tensor) -> float | int:
    return torch.finfo(x.dtype).min if x.is_floating_point() else torch.iinfo(x.dtype).min


def _spread(
    reduction: Any, x: torch.Tensor, own: torch.Tensor, rest: Any, keywords: Any
) -> torch.Tensor:
    """Variance or standard deviation."""
    names = [argument.name for argument in reduction._schema.arguments[1:]]
    given = dict(zip(names, rest, strict=False)) | keywords
    correction = given.get("correction", int(given.get("unbiased", True)))
    correction = 1 if correction is None else correction
    dims = given.get("dim")
    dims = list(range(x.dim())) if dims is None or dims == [] else dims
    dims = [d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    keep = bool(given.get("keepdim", False))
    positions = math.prod(x.shape[d] for d in dims if own.shape[d] == 1)
    count = own.sum() * positions
    mean = x.masked_fill(~own, 0).sum(dims, keepdim=True) / count.clamp(min=1)
    squares = (x - mean).masked_fill(~own, 0).square().sum(dims, keepdim=keep)
    variance = squares / torch.where(own.any(), count - correction, 1)
    if reduction._opname == "std":  # whose gradient is none where all numbers are equal
        equal = variance == 0
        variance = torch.where(equal, 0, torch.where(equal, 1, variance).sqrt())
    return torch.as_tensor(variance)
