"""A tiny network, data that it can learn, and what the tests of training share."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler import DynamicModel, Recipe, fit, transform

CLASSES = 4
PLAN = {"stages": 3, "groups": 8, "default": {"split": [3, 5], "concat": "all"}}
SHORT = Recipe(
    epochs=2, batch_size=16, optimizer="sgd", lr=0.05, schedule="step", crop_padding=1, flip=True
)


def network(seed: int = 1, *, norms: bool = True, dropout: float = 0.0) -> nn.Module:
    """A network for images of 3x8x8."""
    torch.manual_seed(seed)

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if norms else nn.Identity()

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, CLASSES),
    ).eval()  # fmt: skip


def staged(model: nn.Module | None = None, **changes: Any) -> DynamicModel:
    """The network in three stages."""
    model = model or network()
    first = next(model.parameters())
    return transform(model, {**PLAN, **changes}, (torch.zeros(1, 3, 8, 8, dtype=first.dtype),))


@cache
def compiled() -> DynamicModel:
    """The network in three stages, made once; to be copied before it is changed."""
    return staged()


@cache
def samples(count: int = 96, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Images of bytes whose brightness is their class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    noise = torch.rand(count, 3, 8, 8, generator=generator) * 100
    return (noise + labels[:, None, None, None] * 35).to(torch.uint8), labels


def weights(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers, copied."""
    return [t.detach().clone() for t in [*network.parameters(), *network.buffers()]]


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same bits."""
    return all(map(torch.equal, weights(first), weights(second)))


def trained(model: nn.Module, recipe: Recipe = SHORT, data: Any = None, **given: Any) -> nn.Module:
    """A trained copy."""
    model = copy.deepcopy(model)
    fit(model, data or samples(), recipe, **given)
    return model


class Stop(Exception):
    """Raised by a callback in the middle of a training."""


def stopping(after: int) -> Any:
    """A callback that stops a training after so many steps."""
    seen = 0

    def callback(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise Stop

    return callback
