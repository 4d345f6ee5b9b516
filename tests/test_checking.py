"""The self-check bites: wrong weights, graphs and outputs are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from s2d_compiler import DynamicModel, Plan, checking
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.checking import check, compare
from s2d_compiler.compiler import compile_program
from s2d_compiler.errors import CheckError
from s2d_compiler.tracing import capture
from tests.odd_models import ConstantOutput, Ghost

PLAN = Plan.from_dict({"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}})


def made(kind: type[torch.nn.Module]) -> tuple[DynamicModel, StageAssignment]:
    torch.manual_seed(0)
    program = capture(kind().eval(), input_shape=(3, 8, 8))
    assignment = assign(program, analyse_channels(program), PLAN)
    return compile_program(program, PLAN, assignment=assignment), assignment


def test_a_sound_result_passes() -> None:
    proof = check(*made(Ghost))
    assert max(proof.errors) < 1e-9
    assert not proof.is_vacuous
    assert proof.tensors == len(made(Ghost)[0].provenance)


def test_a_changed_weight_is_found() -> None:
    dyn, assignment = made(Ghost)
    with torch.no_grad():
        next(dyn.stages[1].parameters()).flatten()[0] += 1e-6
    with pytest.raises(CheckError, match="is not the slice"):
        check(dyn, assignment)


@pytest.mark.parametrize("kind", [Ghost, ConstantOutput])
def test_a_wrong_output_is_found(kind: type[torch.nn.Module]) -> None:
    dyn, assignment = made(kind)
    right = checking.masked_outputs

    def wrong(*args: Any) -> list[tuple[Any, ...]]:
        return [(3 * leaves[0] + 1, *leaves[1:]) for leaves in right(*args)]

    with (
        mock.patch.object(checking, "masked_outputs", wrong),
        pytest.raises(CheckError, match="differs"),
    ):
        check(dyn, assignment)


def test_a_changed_graph_is_found() -> None:
    dyn, assignment = made(Ghost)
    graph = dyn.stages[0].graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    node.target = torch.ops.aten.neg.default
    with pytest.raises(CheckError, match="built differently"):
        check(dyn, assignment)


def test_leaves_are_judged_one_by_one() -> None:
    torch.manual_seed(0)
    a, constant = torch.randn(4, 10), torch.ones(4, 1)

    def error(found: Sequence[Any], expected: Sequence[Any]) -> float:
        return compare(found, expected)[0]

    assert error([a, constant], [a, constant]) == 0
    assert error([a + 5, constant], [a, constant]) > 1
    assert error([a, constant + 1e-3], [a, constant]) > 1e-4
    assert error([a, 3], [a, 4]) == float("inf")
    assert error([a[:, :3]], [a]) == float("inf")
    assert error([torch.full_like(a, float("nan"))], [a]) == float("inf")
    assert compare([constant], [constant])[1] < checking.VACUOUS
