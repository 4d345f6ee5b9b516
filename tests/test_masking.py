"""The masked form: one dense run that gives what the staged form's stages give."""

from __future__ import annotations

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from s2d_compiler import transform
from s2d_compiler.errors import PlanError
from tests import masking
from tests.networks import BLOCKS, Drawn, DrawnPick, networks, seeded, settle
from tests.plans import plan_dict, seeded_plan

TELLING, TRIES = 3, 8


@settings(max_examples=40)
@given(data=st.data(), drawn=networks(), seed=st.integers(0, 2**16))
def test_equals_the_staged_form(data: st.DataObject, drawn: Drawn, seed: int) -> None:
    x = drawn.batch(8, seed)
    model = settle(drawn.model, x, seed)
    spec = plan_dict(DrawnPick(data.draw))
    try:
        result, net = masking.both_ways(model, spec, x)
    except PlanError:
        event("refused: a stage adds nothing")
        assume(False)
    assert masking.compared(net(x), transform(model, spec, (x,))(x)).error <= masking.LARGEST
    masking.trained_alike(net, (x,))
    event(f"{result.telling} telling outputs")
    assume(result.telling)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_equals_the_staged_form_in_every_kind_of_block(kind: str) -> None:
    telling = 0
    for seed in range(TRIES):
        drawn = seeded(seed, ["plain", kind] if seed % 2 else [kind, "plain", kind])
        x = drawn.batch(8, seed)
        model = settle(drawn.model, x, seed)
        try:
            result, net = masking.both_ways(model, seeded_plan(seed), x)
        except PlanError:
            continue
        masking.trained_alike(net, (x,))
        telling += result.telling > 0
        if telling == TELLING:
            return
    pytest.fail(f"only {telling} of {TRIES} networks show something")
