"""Every classifier of torchvision, cut in three with and without reuse.

Run with several processes (``-n 2``): one test per model. The whole zoo takes long, so a plain
run tries an eighth of it, another one every day; ``S2D_ZOO=all`` (``make zoo``) tries all.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.init
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import s2d_compiler  # makes torchvision importable  # noqa: F401

import torchvision  # isort: skip
from s2d_compiler import Plan, verify
from tests import assignment, consequences
from tests.networks import settle
from tests.plans import plans, resolutions_of
from tests.reference import Structure

MODELS = list(torchvision.models.list_models(module=torchvision.models))
SIZES = {
    "inception_v3": 75,
    "maxvit_t": 224,  # its windows of 7 by 7 pixels must fit 32 times
    "vit_b_16": 48,
    "vit_b_32": 96,
    "vit_h_14": 42,
    "vit_l_16": 48,
    "vit_l_32": 96,
}
"""Height and width of the images, where 64 is too little or not needed. A vision transformer
gets nine patches: only its position embedding is smaller than at 224."""
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{name: {"image_size": size} for name, size in SIZES.items() if name.startswith("vit")},
}
"""What the constructors are told; all others are built as they are."""
DAY = datetime.datetime.now(datetime.UTC).toordinal()
PARTS = 8
WHOLE = os.environ.get("S2D_ZOO") == "all"
LARGE = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")
"""They take 8 GB and more in float64; only the whole zoo tries them."""
TRIED = MODELS if WHOLE else [name for name in MODELS[DAY % PARTS :: PARTS] if name not in LARGE]
PLANS: dict[str, dict[str, Any]] = {
    concat: {
        "stages": 3,
        "groups": 8,
        "default": {"split": [4, 6], "concat": concat},
        "order": order,
    }
    for concat, order in (("none", "index"), ("all", "l1"))
}
CHEAP_FIRST_STAGE = 0.35
"""Largest share of the original's MACs that stage 1 may take in the plan without reuse."""
SAVED_UP_TO = 30_000_000
"""Networks of more parameters are not written to disk here."""


DRAWN_FROM = (
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "resnet18",
    "regnet_y_400mf",
    "googlenet",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "swin_v2_t",
)
"""Small ones, one of each design, for random plans."""


def build(name: str) -> nn.Module:
    """A model in float64 whose weights are whatever memory held; ``settle`` sets them."""
    with contextlib.ExitStack() as stack:
        for function in dir(torch.nn.init):
            if function.endswith("_") and not function.startswith("_"):
                nothing = mock.patch.object(torch.nn.init, function, lambda t, *_, **__: t)
                stack.enter_context(nothing)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        model: nn.Module = torchvision.models.get_model(name, **OPTIONS.get(name, {}))
    return model


def images(name: str) -> Tensor:
    size = SIZES.get(name, 64)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64)


def test_the_zoo_is_whole() -> None:
    assert len(MODELS) >= 80


@pytest.mark.parametrize("name", TRIED)
def test_consequences(name: str, tmp_path: Path) -> None:
    x = images(name)
    model = settle(build(name), x)
    x = x[:2]
    small = sum(p.numel() for p in model.parameters()) <= SAVED_UP_TO
    path = tmp_path / "dyn.pt" if small else None
    structure = Structure(model, x)
    for concat, spec in PLANS.items():
        measured = consequences.check_all(
            model, Plan.from_dict(spec), x, path=path, structure=structure, thorough=small
        )
        assert not measured.vacuous
        dyn = measured.dyn
        share = dyn.cost.stages[0].macs / dyn.cost.original_macs
        if concat == "none" and share > CHEAP_FIRST_STAGE:
            assert dyn.report.stage_one, f"stage 1 costs {share:.3f}, unexplained"
        if small and concat == "all":
            assert not verify(model, dyn, (x,)).weights.changed
        del measured, dyn


@pytest.mark.parametrize("name", DRAWN_FROM if WHOLE else DRAWN_FROM[DAY % 3 :: 3])
@settings(max_examples=2)
@given(data=st.data())
def test_random_plans(name: str, data: st.DataObject) -> None:
    x = images(name)
    model = settle(build(name), x)
    x = x[:2]
    structure = Structure(model, x)
    spec = data.draw(plans(resolutions_of(structure)), label="plan")
    plan = Plan.from_dict(spec)
    assume(not assignment.empty_stages(structure, plan))
    measured = consequences.check_all(model, plan, x, structure=structure, thorough=False)
    assume(not measured.vacuous)
