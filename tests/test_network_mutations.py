"""Does verification bite? Networks and files are changed at random; every one that computes
something else must be refused, and none that is the same by construction.

``S2D_MUTANTS=N pytest -s tests/test_network_mutations.py`` tries N changes of each kind on each
model, and prints how many computed something else.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from s2d_compiler import DynamicModel
from s2d_compiler.compiler import compile_program
from s2d_compiler.errors import FormatError, PlanError, VerifyError
from s2d_compiler.format import from_data, to_data
from s2d_compiler.plans import plan_from_dict
from s2d_compiler.program import Program
from s2d_compiler.tracing import capture
from s2d_compiler.verification.verify import Expectation, verify_captured
from tests.network_mutations import BENIGN, CLAIMS, MUTATIONS, Mutation, copied
from tests.networks import Drawn, seeded, settle
from tests.odd_models import MODELS

TRIES = int(os.environ.get("S2D_MUTANTS", "1"))
ODD = (
    "Attention", "BlurredPooling", "ChannelsLastNorm", "SplitAttention", "StandardizedConvolution",
    "Ghost", "GroupNorms", "SeveralOutputs", "TokenMixing", "MixedParameters",
)  # fmt: skip
KINDS = (["residual", "squeeze"], ["dense", "shuffle"], ["transformer"], ["windows"],
         ["computed", "branches"])  # fmt: skip
PLANS: list[dict[str, Any]] = [
    {"stages": 3, "groups": 8, "default": {"split": [3, 6], "concat": "all"}},
    {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": [[3, 1]]}, "order": "l1"},
    {"stages": 3, "groups": 8, "default": {"split": [2, 5], "concat": "all"}, "final": "original"},
]
#: Exits along depth, of networks of these blocks.
DEPTHS: dict[str, dict[str, Any]] = {
    "residual+dense": {"exits": [0.3, 0.7], "head": ["branchynet", "linear"], "width": 3},
    "transformer+transformer": {"exits": [0.4], "head": "branchynet-2"},
}


@dataclass
class Subject:
    """A model with its staged network, which verification accepts."""

    program: Program
    data: dict[str, Any]
    expectations: list[Expectation]
    inputs: tuple[torch.Tensor, ...]
    outputs: list[torch.Tensor]


def _outputs(dyn: DynamicModel, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [v for v in pytree.tree_leaves(list(dyn.exits(*inputs)))
                if isinstance(v, torch.Tensor)]  # fmt: skip


def _drawn(name: str) -> Drawn:
    """A network of these blocks; for exits along depth a classifier."""
    drawn = (seeded(seed, ["plain", *name.split("+")]) for seed in itertools.count(len(name)))
    if name not in DEPTHS:
        return next(drawn)
    return next(d for d in drawn if _is_classifier(d))


def _is_classifier(drawn: Drawn) -> bool:
    with torch.no_grad():
        output = drawn.model.eval()(drawn.batch(2).float())
    return isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[1] > 1


@cache
def subject(name: str) -> Subject:
    if name in MODELS:
        torch.manual_seed(0)
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        model = settle(MODELS[name]().double(), x).eval()
    else:
        drawn = _drawn(name)
        x = drawn.batch(3, 0).double()
        model = settle(drawn.model.double(), x).eval()
    program = capture(model, (x,))
    plan = DEPTHS.get(name) or PLANS[SUBJECTS.index(name) % len(PLANS)]
    dyn = compile_program(program, plan_from_dict(plan))
    verify_captured(program, dyn)
    expectations = Expectation.all_of(program, dyn.plan)
    return Subject(program, to_data(dyn), expectations, (x,), _outputs(dyn, (x,)))


def accepted(subject: Subject, data: dict[str, Any]) -> str | None:
    """Why verification refuses a file, or None."""
    try:
        dyn = from_data(data, "dyn.pt")
        verify_captured(subject.program, dyn, expectations=subject.expectations)
    except (FormatError, VerifyError, PlanError) as error:
        return str(error)
    return None


def computes_the_same(subject: Subject, data: dict[str, Any]) -> bool:
    try:
        found = _outputs(from_data(data, "dyn.pt").eval(), subject.inputs)
    except Exception:  # whatever a network does that cannot run
        return False
    if len(found) != len(subject.outputs):
        return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        for a, b in zip(found, subject.outputs, strict=True)
    )


def mutants(subject: Subject, mutation: Mutation, seed: int) -> Any:
    for k in range(TRIES):
        data = copied(subject.data)
        what = mutation(data, random.Random(f"{mutation.__name__} {seed} {k}"))
        if what is not None:
            yield what, data


SUBJECTS = [*ODD, *("+".join(kinds) for kinds in KINDS), *DEPTHS]


@pytest.mark.parametrize("name", SUBJECTS)
def test_networks_that_compute_something_else_are_refused(name: str) -> None:
    found = subject(name)
    tried = refused = different = 0
    for mutation in MUTATIONS:
        for what, data in mutants(found, mutation, 0):
            why = accepted(found, data)
            tried += 1
            refused += why is not None
            if why is None:
                assert computes_the_same(found, data), f"{mutation.__name__}, {what}: accepted"
            elif TRIES > 1:
                different += not computes_the_same(found, data)
    print(f"\n{name}: {tried} changed, {different} compute something else, {refused} refused")
    assert refused > len(MUTATIONS) * TRIES // 2, "too few changes to say anything"


@pytest.mark.parametrize("name", SUBJECTS)
def test_wrong_claims_are_refused(name: str) -> None:
    found = subject(name)
    for mutation in CLAIMS:
        for what, data in mutants(found, mutation, 0):
            assert accepted(found, data) is not None, f"{mutation.__name__}, {what}: accepted"


@pytest.mark.parametrize("name", SUBJECTS)
def test_networks_that_are_the_same_by_construction_are_accepted(name: str) -> None:
    found = subject(name)
    for mutation in BENIGN:
        for what, data in mutants(found, mutation, 0):
            why = accepted(found, data)
            assert why is None, f"{mutation.__name__}, {what}: {why}"
            assert computes_the_same(found, data)
