"""The four consequences of docs/semantics.md over random networks and random plans.

``HYPOTHESIS_PROFILE=fuzz pytest tests/test_properties.py`` searches further, with a new seed
each time, and verifies every network as well; ``--hypothesis-seed=N`` repeats one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d_compiler import Plan, verify
from s2d_compiler.errors import PlanError
from tests import assignment, consequences
from tests.networks import BLOCKS, Drawn, networks, seeded, settle
from tests.plans import plans, resolutions_of, seeded_plan
from tests.reference import NoRuleError, Structure

TELLING, TRIES = 4, 10
"""Of so many seeds, so many networks must show something in every stage."""


def check(
    structure: Structure, spec: dict[str, Any], x: Tensor, path: Path, train: bool = False
) -> Any:
    """Every consequence for a settled network; what was measured, or None if refused."""
    model = structure.model
    plan = Plan.from_dict(spec)
    empty = assignment.empty_stages(structure, plan)
    model.train(train)
    if empty:
        with pytest.raises(PlanError, match=f"stage {empty[0]}"):
            consequences.check_all(model, plan, x, structure=structure)
        return None
    measured = consequences.check_all(model, plan, x, path=path, structure=structure)
    assert all(module.training == train for module in model.modules())
    if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz":
        verify(model, measured.dyn, (x,))
    return measured


@settings(max_examples=60)
@given(data=st.data(), drawn=networks(), seed=st.integers(0, 2**16), train=st.booleans())
def test_consequences(
    data: st.DataObject, drawn: Drawn, seed: int, train: bool, tmp_path_factory: Any
) -> None:
    x = drawn.batch(8, seed)
    structure = Structure(settle(drawn.model, x, seed), x)
    spec = data.draw(plans(resolutions_of(structure)), label="plan")
    path = tmp_path_factory.mktemp("dyn") / "dyn.pt"
    try:
        measured = check(structure, spec, x, path, train)
    except NoRuleError as error:  # the design does not say what such a network means
        event(f"no rule: {error}"[:60])
        assume(False)
    if measured is None:
        event("refused: a stage adds nothing")
        return
    event(f"{len(measured.vacuous)} vacuous stages")
    assume(not measured.vacuous)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_consequences_of_every_kind_of_block(kind: str, tmp_path: Path) -> None:
    telling = 0
    for seed in range(TRIES):
        kinds = ["plain", kind] if seed % 2 else [kind, "plain", kind]
        drawn = seeded(seed, kinds)
        x = drawn.batch(8, seed)
        structure = Structure(settle(drawn.model, x, seed), x)
        spec = seeded_plan(seed, resolutions_of(structure))
        measured = check(structure, spec, x, tmp_path / "dyn.pt")
        telling += measured is not None and not measured.vacuous
        if telling == TELLING:
            return
    pytest.fail(f"only {telling} of {TRIES} networks show something in every stage")


@settings(max_examples=200)
@given(plans(["16x16", "8x8", "5x7"]))
def test_plans_round_trip(spec: dict[str, Any]) -> None:
    plan = Plan.from_dict(spec)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_json(plan.to_json()) == plan
    reads = plan.reads("16x16", "conv")
    last = plan.stages - (plan.final == "original")
    assert all(1 <= early < late <= last for late, early in reads)
    cuts = plan.split_for("16x16", ["conv"])
    assert list(cuts) == sorted(set(cuts))
    assert len(cuts) == plan.stages - 1


def test_two_transforms_of_one_network_are_the_same() -> None:
    drawn = seeded(4)
    x = drawn.batch()
    model = settle(drawn.model, x)
    spec = {"stages": 3, "groups": 8, "default": {"split": [3, 5], "concat": "all"}, "order": "l1"}
    one = consequences.check_all(model, Plan.from_dict(spec), x).dyn
    two = consequences.check_all(model, Plan.from_dict(spec), x).dyn
    assert dict(one.provenance) == dict(two.provenance)
    with torch.no_grad():
        assert consequences._identical(one(x), two(x))
