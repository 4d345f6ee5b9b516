"""Verification of networks as they come out of the compiler, and what it says of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler import DynamicModel, Plan, load, transform, verify
from s2d_compiler.cli import main
from s2d_compiler.compiler import compile_program
from s2d_compiler.errors import VerifyError
from s2d_compiler.tracing import capture
from s2d_compiler.verification.verify import verify_captured
from tests.networks import BLOCKS, seeded, settle
from tests.odd_models import MODELS
from tests.plans import seeded_plan

PLANS: list[dict[str, Any]] = [
    {"stages": 3, "default": {"split": [4, 6], "concat": "none"}},
    {"stages": 4, "default": {"split": [1, 3, 7], "concat": [[3, 1], [4, 2]]}, "order": "l1"},
    {"stages": 3, "default": {"split": [2, 5], "concat": "all"}, "final": "original"},
]


class Small(nn.Module):
    """A few layers with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1),
            nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def compiled(model: nn.Module, **changes: Any) -> DynamicModel:
    spec = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}, **changes}
    return transform(model, Plan.from_dict(spec), (torch.randn(2, 3, 8, 8),))


@pytest.mark.parametrize("name", MODELS)
def test_odd_models_are_verified(name: str) -> None:
    torch.manual_seed(0)
    program = capture(MODELS[name]().double().eval(), input_shape=(3, 8, 8))
    data = PLANS[list(MODELS).index(name) % len(PLANS)]
    dyn = compile_program(program, Plan.from_dict({"groups": 8, **data}))
    verification = verify_captured(program, dyn)
    assert verification.stages == data["stages"]
    assert not verification.weights.changed


@pytest.mark.parametrize("kind", BLOCKS)
def test_random_networks_are_verified(kind: str) -> None:
    seed = len(kind)
    drawn = seeded(seed, ["plain", kind])
    x = drawn.batch(3, seed)
    program = capture(settle(drawn.model, x, seed).eval(), (x,))
    dyn = compile_program(program, Plan.from_dict(seeded_plan(seed)))
    assert verify_captured(program, dyn).terms > 0


def test_a_file_is_verified(tmp_path: Path) -> None:
    model = Small()
    compiled(model).save(tmp_path / "dyn.pt")
    verification = verify(model, load(tmp_path / "dyn.pt"))
    assert verification.stages == 3
    assert verification.weights.equal == len(load(tmp_path / "dyn.pt").state_dict())


def test_trained_weights_are_told_apart_from_structure() -> None:
    model = Small()
    dyn = compiled(model)
    loss = sum(out.square().mean() for out in dyn.train()(torch.randn(4, 3, 8, 8)))
    loss.backward()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in dyn.parameters():
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
    dyn.eval()
    with pytest.raises(VerifyError, match=r"numbers.*stages\.0\.body\.0\.weight first.*--trained"):
        verify(model, dyn)
    verification = verify(model, dyn, trained=True)
    assert "stages.0.body.1.running_mean" in verification.weights.changed
    dyn.stages[0].get_submodule("body.1").eps = 0.1  # type: ignore[union-attr]
    with pytest.raises(VerifyError, match=r"stage 1, node 'stages_0_body_1' \(body\.1\): none of"):
        verify(model, dyn, trained=True)


def _another_model(dyn: DynamicModel) -> nn.Module:
    wider = Small()
    wider.head = nn.Linear(16, 6)
    return wider


def _another_plan(dyn: DynamicModel) -> DynamicModel:
    plan = Plan.from_dict({"stages": 3, "groups": 8, "default": {"split": [3, 6], "concat": "all"}})
    dyn.parts = replace(dyn.parts, plan=plan)
    return dyn


def _one_stage_less(dyn: DynamicModel) -> DynamicModel:
    return DynamicModel(list(dyn.stages)[:2], dyn.parts)  # type: ignore[arg-type]


def _another_type(dyn: DynamicModel) -> DynamicModel:
    return dyn.double()


def _no_provenance(dyn: DynamicModel) -> DynamicModel:
    rest = {k: v for k, v in dyn.parts.provenance.items() if k != "stages.1.body.4.weight"}
    dyn.parts = replace(dyn.parts, provenance=rest)
    return dyn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_plan, r"a channel of body\.0 is in stage 1, by the plan .* in stage 2; it was"),
        (_one_stage_less, r"the network has 2 stages, its plan 3"),
        (_no_provenance, r"stage 2: parameter 'body\.4\.weight' is no slice of the original's"),
        (_another_type, r"\d+ of \d+ tensors hold other numbers"),
    ],
)
def test_what_differs_is_named(
    change: Callable[[DynamicModel], DynamicModel], message: str
) -> None:
    model = Small()
    with pytest.raises(VerifyError, match=message):
        verify(model, change(compiled(model)))


def test_another_model_is_refused() -> None:
    dyn = compiled(Small())
    with pytest.raises(VerifyError, match=r"tensors hold other numbers"):
        verify(Small(), dyn)
    with pytest.raises(VerifyError, match=r"output 1 has shape \(2, 5\), the plan gives \(2, 6\)"):
        verify(_another_model(dyn), dyn, trained=True)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Small()
    torch.save(model, tmp_path / "model.pt")
    dyn = compiled(model)
    dyn.save(tmp_path / "dyn.pt")
    words = ["verify", str(tmp_path / "model.pt"), str(tmp_path / "dyn.pt"), "--trust"]
    assert main(words) == 0
    assert "verified: 3 stages" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"] == 3
    assert document["changed"] == []
    with torch.no_grad():
        next(dyn.parameters()).mul_(2)
    dyn.save(tmp_path / "dyn.pt")
    assert main(words) == 2
    assert "--trained" in capsys.readouterr().err
    assert main([*words, "--trained"]) == 0
    assert "1 of" in capsys.readouterr().out


# -- batches ---------------------------------------------------------------------------------------


def _put_before_head(dyn: DynamicModel, target: Any, *args: Any) -> None:
    """Insert an operator before the head of the first stage."""
    stage: Any = dyn.stages[0]
    head = next(n for n in stage.graph.nodes if n.target == "head")
    operand = head.args[0]
    with stage.graph.inserting_before(head):
        head.args = (stage.graph.call_function(target, (operand, *args)),)
    stage.recompile()


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (torch.ops.aten.roll.default, ([2], [0])),  # nothing for a batch of 2
        (torch.ops.aten.roll.default, ([3], [0])),
        (torch.ops.aten.slice.Tensor, (0, 0, 1000)),  # nothing for a small batch
        (torch.ops.aten.expand.default, ([2, -1],)),
    ],
)
def test_what_is_right_for_some_batches_only_is_refused(target: Any, args: tuple[Any, ...]) -> None:
    model = Small()
    dyn = compiled(model)
    _put_before_head(dyn, target, *args)
    with pytest.raises(VerifyError, match=r"stage 1|a batch of 1000003"):
        verify(model, dyn)


def test_a_half_model_is_verified_as_it_was_compiled() -> None:
    model = Small().bfloat16()
    plan = Plan.from_dict(
        {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"},
         "input_shape": [3, 8, 8]}
    )  # fmt: skip
    assert verify(model, transform(model, plan)).stages == 2


class PartlyFixedBias(Small):
    """The bias of a layer is put together from parameters and a constant that is not saved, as
    that of queries, keys and values in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.register_buffer("key", torch.zeros(8), persistent=False)
        self.mix = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        y = torch.cat([y, y, y], 1)[:, :8].relu()
        bias = torch.cat([self.query, self.key, self.value])
        mixed = nn.functional.linear(y, self.mix.weight, bias)
        return self.out(mixed.relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "plan",
    [
        {"exits": ["mix"]},
        {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}},
        {
            "stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"},
            "final": "original",
        },
    ],
    ids=["depth", "cut", "original"],
)  # fmt: skip
def test_constants_inside_computed_weights(plan: dict[str, Any]) -> None:
    model = PartlyFixedBias().eval()
    plan = {"input_shape": [3, 8, 8], **plan}
    if "exits" in plan:
        plan["exits"] = [0.2]
    assert verify(model, transform(model, plan)).stages == 2
