"""Every odd model, in several plans: identity, the masked form, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from s2d_compiler import DynamicModel, Plan, load
from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.checking import check
from s2d_compiler.compiler import compile_program
from s2d_compiler.tracing import capture
from tests.odd_models import MODELS

PLANS: list[dict[str, Any]] = [
    {"stages": 3, "default": {"split": [4, 6], "concat": "none"}},
    {"stages": 3, "default": {"split": [4, 6], "concat": "all"}, "order": "l1"},
    {"stages": 4, "default": {"split": [1, 3, 7], "concat": [[3, 1], [4, 2]]}},
    {"stages": 3, "default": {"split": [2, 5], "concat": "all"}, "final": "original"},
]
ONE_STAGE = {"stages": 1, "default": {"split": [], "concat": "none"}}
#: What the compiler has no rule for yet; everything else must be cut without a fallback.
UNKNOWN = {
    "LocalResponse": {"aten.avg_pool3d"},
    "RunningSum": {"aten.cumsum"},
    "Einsum": {"aten.einsum"},
    "GatedVersions": {"aten.cumsum"},
    "ReadNumbers": {"aten.argmax", "aten.item", "aten.select"},
    "VectorQuantised": {"aten.argmin", "aten.index"},
    "TiedDecoder": {"ConvTranspose2d"},
    "WrittenByIndex": {"aten.index_put"},
    "Recurrent": {"aten.lstm"},
}


#: What torch's counter sees nothing of on a CPU.
UNCOUNTED = {"aten.lstm"}


def plan_of(data: dict[str, Any]) -> Plan:
    return Plan.from_dict({"groups": 8, **data})


def _require_counted(dyn: DynamicModel, x: torch.Tensor) -> None:
    """Every stage costs what torch's own counter sees it run."""
    exits = dyn.exits(x)
    for stage in dyn.cost.stages:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next(exits)
        if UNCOUNTED.isdisjoint(u.operator for u in dyn.report.unknown):
            assert counter.get_total_flops() == 2 * stage.macs * len(x)


def _require_stored_once(dyn: DynamicModel) -> None:
    """A slice outside heads and a last original stage is one tensor, however often it is named."""
    if dyn.plan.final == "original":
        return
    heads = {row.layer.rstrip("_") for row in dyn.report.layers if row.status == "prediction"}
    seen: dict[object, int] = {}
    for name, parameter in dyn.named_parameters(remove_duplicate=False):
        where = dyn.provenance[name]
        if not any(where.source.startswith(f"{head}.") for head in heads):
            assert seen.setdefault(where, id(parameter)) == id(parameter), name


@pytest.mark.parametrize("name", MODELS)
def test_odd_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    program = capture(model, input_shape=(3, 8, 8))
    channels = analyse_channels(program)
    assert {u.operator for u in channels.unknown} == UNKNOWN.get(name, set())
    x = torch.randn(program.batch or 3, 3, 8, 8, dtype=torch.float64)

    plan = plan_of(ONE_STAGE)
    whole = compile_program(program, plan, assignment=assign(program, channels, plan))
    (found,) = whole(x)
    expected = model(x)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        close = torch.allclose(a, b, rtol=1e-12, atol=1e-12) if torch.is_tensor(b) else a == b
        assert close

    for data in PLANS:
        plan = plan_of(data)
        assignment = assign(program, channels, plan)
        dyn = compile_program(program, plan, assignment=assignment)
        proof = check(dyn, assignment)
        assert not proof.is_vacuous
        assert max(proof.errors) < 1e-9
        _require_stored_once(dyn)
        _require_counted(dyn, x)
        dyn.save(tmp_path / "dyn.pt")
        again = load(tmp_path / "dyn.pt")
        for a, b in zip(pytree.tree_leaves(dyn(x)), pytree.tree_leaves(again(x)), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
