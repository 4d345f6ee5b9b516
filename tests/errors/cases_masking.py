"""The masked form: plans that it cannot take, and staged networks that are another's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler import DepthPlan, DynamicModel, MaskedModel, Plan, masked, transform
from s2d_compiler.errors import PlanError, UsageError
from tests.errors.case import Case

PLAN: dict[str, Any] = {
    "stages": 2,
    "groups": 8,
    "default": {"split": [4], "concat": "all"},
    "input_shape": [3, 6, 6],
}


class Small(nn.Module):
    """A convolution and a linear layer; ``twice``: whose weight is used by itself as well."""

    def __init__(self, width: int = 16, *, name: str = "conv", twice: bool = False) -> None:
        super().__init__()
        self.name, self.twice = name, twice
        self.add_module(name, nn.Conv2d(3, width, 3))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.get_submodule(self.name)
        x = self.fc(conv(x).mean((2, 3)))
        assert isinstance(conv, nn.Conv2d)
        return x * conv.weight.mean() if self.twice else x


@cache
def net() -> MaskedModel:
    return masked(Small(), PLAN)


def of(plan: dict[str, Any] = PLAN, **options: Any) -> DynamicModel:
    return transform(Small(**options), plan)


def apart() -> object:
    dyn = of(twice=True)
    with torch.no_grad():
        for parameter in dyn.parameters():
            parameter.add_(torch.randn_like(parameter))
    return masked(Small(twice=True), PLAN).load_dynamic(dyn)


CASES = {
    "exits along depth": Case(
        lambda folder: masked(Small(), DepthPlan.from_dict({"version": 1, "exits": [0.5]})),  # type: ignore[arg-type]
        PlanError,
        "masked",
        "DepthPlan",
        "no plan that cuts channels",
        "give a Plan or a SearchSpace",
    ),
    "more stages": Case(
        lambda folder: net().set_plan(Plan.uniform(3, 8)),
        PlanError,
        "plan: stages",
        "3",
        "made for 2 for good",
        "make another form with masked()",
    ),
    "no staged network": Case(
        lambda folder: net().load_dynamic(Small()),  # type: ignore[arg-type]
        UsageError,
        "a Small",
        "Small",
        "is no DynamicModel",
        "give what transform(), load() or extract() return",
    ),
    "another plan": Case(
        lambda folder: net().write_to(of(PLAN | {"default": {"split": [5], "concat": "all"}})),
        UsageError,
        "the staged network has the plan's 'default'",
        "[5]",
        "must be the same",
        "call set_plan()",
    ),
    "other channels": Case(
        lambda folder: net().load_dynamic(of(width=24)),
        UsageError,
        "the staged network",
        "to other stages",
        "was made from another model",
        "make the masked form from the model",
    ),
    "other names": Case(
        lambda folder: net().load_dynamic(of(name="first")),
        UsageError,
        "stages.0.first.weight",
        "'first.weight'",
        "the masked form does not have",
        "make the masked form from the model",
    ),
    "other shapes": Case(
        lambda folder: net().load_dynamic(_other_kernel()),
        UsageError,
        "stages.0.conv.weight",
        "(8, 3, 1, 1)",
        "no such slice of",
        "make the masked form from the model",
    ),
    "copies that differ": Case(
        lambda folder: apart(),
        UsageError,
        "stages.0.conv.weight",
        "'conv.weight'",
        "no longer the same",
        "train this network in its staged form",
    ),
}  # fmt: skip


def _other_kernel() -> DynamicModel:
    model = Small()
    model.conv = nn.Conv2d(3, 16, 1)
    return transform(model, PLAN)
