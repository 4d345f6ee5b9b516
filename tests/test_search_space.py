"""The search space: groups, sizes by the formula, plans that fit, and what cannot be cut."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch
from torch import Tensor, nn

from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import analyse_channels, cut_resolutions
from s2d_compiler.analysis.cost import static_macs
from s2d_compiler.compiler import compile_program
from s2d_compiler.errors import PlanError
from s2d_compiler.inspecting import inspect_model
from s2d_compiler.plan import Plan, Setting
from s2d_compiler.program import Program
from s2d_compiler.search_space import SearchSpace, starter_split
from s2d_compiler.tracing import capture

SHAPE = (3, 8, 8)


class Small(nn.Module):
    """Three resolutions: one only split, one only read, the rest both; a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.a = nn.Conv2d(8, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.pool(self.stem(x)).relu())
        x = self.down((x + self.b(x)).relu())
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Small(), None, SHAPE)


@pytest.fixture(scope="module")
def space(program: Program) -> SearchSpace:
    return inspect_model(program)


def test_groups_are_the_resolutions_that_a_plan_may_name(program: Program, space: SearchSpace):
    assert space.resolutions == cut_resolutions(analyse_channels(program)) == ("8x8", "4x4", "2x2")


def test_each_group_says_what_its_setting_is_about(space: SearchSpace):
    stem, middle, last = space.groups_by_resolution
    assert (stem.layers, stem.readers, stem.channels, stem.atoms) == (("stem",), (), 8, 8)
    assert stem.has_split
    assert not stem.has_concat
    assert (middle.layers, middle.readers) == (("a", "b"), ("a", "b", "down"))
    assert (middle.channels, middle.atoms, middle.families) == (32, 16, 1)
    assert (last.layers, last.readers) == (("down",), ())
    assert middle.has_split
    assert middle.has_concat
    assert not last.has_concat


def test_macs_by_group_and_of_prediction_layers_are_the_originals(
    program: Program, space: SearchSpace
):
    total = sum(
        static_macs(program, n) for n in program.nodes if n.op in ("call_module", "call_function")
    )
    assert space.macs == total
    assert [group.macs for group in space.groups_by_resolution] == [
        3 * 8 * 9 * 64,
        (8 + 16) * 16 * 9 * 16,
        16 * 16 * 9 * 4,
    ]
    assert [(layer.name, layer.macs) for layer in space.predictions] == [("fc", 80)]
    assert space.cut_share == 1.0


@pytest.mark.parametrize(("stages", "groups"), [(1, 8), (2, 4), (3, 8), (5, 5), (6, 64)])
def test_size_is_the_papers_formula(program: Program, stages: int, groups: int):
    space = inspect_model(program, stages=stages, groups=groups)
    split, concat = math.comb(groups - 1, stages - 1), 2 ** (stages * (stages - 1) // 2)
    assert space.size == (split * concat) ** 3
    assert space.distinct_size == split**3 * concat
    assert isinstance(space.size, int)


def test_a_size_that_python_does_not_write_out_has_its_logarithm(program: Program):
    space = inspect_model(program, stages=120, groups=1024)
    assert space.size > 10**4300
    document = json.loads(json.dumps(space.to_dict()))
    assert document["size"] is None
    assert document["size_log10"] == pytest.approx(math.log10(space.size))
    assert "plans" in str(space)


def test_settings_enumerate_the_choices_of_one_group(space: SearchSpace):
    middle = list(space.settings("4x4"))
    assert len(middle) == len(set(middle)) == space.choices == 21 * 8
    assert Setting((4, 6), "all") in middle
    assert Setting((1, 7), ((3, 1),)) in middle
    assert list(space.settings("8x8")) == [Setting(split) for split in space.splits()]
    product = math.prod(len(list(space.settings(name))) for name in space.resolutions)
    assert product == space.distinct_size


def test_settings_are_not_made_before_they_are_asked_for(program: Program):
    space = inspect_model(program, stages=40, groups=1000)
    assert len(list(itertools.islice(space.settings("4x4"), 3))) == 3


def test_every_setting_of_a_small_space_is_a_legal_plan(program: Program):
    space = inspect_model(program, stages=3, groups=4)
    plans = {space.plan({"4x4": setting}) for setting in space.settings("4x4")}
    assert len(plans) == space.choices


@pytest.mark.parametrize(
    ("stages", "groups", "split"),
    [
        (1, 8, ()),
        (1, 1, ()),
        (2, 8, (4,)),
        (3, 8, (4, 6)),
        (3, 3, (1, 2)),
        (4, 16, (8, 10, 13)),
        (5, 8, (4, 5, 6, 7)),
        (6, 8, (3, 4, 5, 6, 7)),
    ],
)
def test_starter_split_gives_half_and_then_evenly(stages: int, groups: int, split: tuple[int, ...]):
    assert starter_split(stages, groups) == split


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("groups", [1, 2, 5, 8, 13])
def test_starter_split_is_always_legal(stages: int, groups: int):
    if stages <= groups:
        Plan(stages, groups, Setting(starter_split(stages, groups), "none"))


def test_starter_plan_lists_every_resolution_and_compiles(program: Program, space: SearchSpace):
    plan = space.starter_plan()
    assert plan.to_dict() == {
        "version": 1,
        "stages": 3,
        "groups": 8,
        "default": {"split": [4, 6], "concat": "all"},
        "resolutions": {
            "8x8": {"split": [4, 6]},
            "4x4": {"split": [4, 6], "concat": "all"},
            "2x2": {"split": [4, 6]},
        },
        "order": "index",
        "input_shape": list(SHAPE),
        "final": "cut",
    }
    assert space.misfit == ""
    assert len(compile_program(program, plan).stages) == 3


def test_settings_in_plan_out(space: SearchSpace):
    plan = space.plan({"4x4": Setting((3, 5), "none"), "8x8": ((2, 7), "all")})
    assert plan.resolutions["4x4"] == Setting((3, 5), "none")
    assert plan.resolutions["8x8"] == Setting((2, 7), "all")
    assert plan.resolutions["2x2"] == Setting((4, 6))
    assert space.plan({"4x4": Setting(concat="none")}).resolutions["4x4"].split == (4, 6)


def test_plans_refuse_what_the_space_does_not_have(space: SearchSpace):
    with pytest.raises(PlanError, match=r"resolutions.5x5: .* it has 8x8, 4x4, 2x2"):
        space.plan({"5x5": Setting((3, 5))})
    with pytest.raises(PlanError, match=r"resolutions.4x4.split: .* 3 stages need 2"):
        space.plan({"4x4": Setting((3,))})
    with pytest.raises(PlanError, match=r"resolutions.4x4: 7 is neither a Setting nor"):
        space.plan({"4x4": 7})  # type: ignore[dict-item]


def test_random_plans_fit_differ_and_repeat(program: Program, space: SearchSpace):
    channels = analyse_channels(program)
    drawn = [space.random_plan(random.Random(seed)) for seed in range(20)]
    for plan in drawn:
        assign(program, channels, plan)
    assert len(set(drawn)) > 15
    assert drawn[3] == space.random_plan(random.Random(3))


def test_random_plans_draw_every_plan_alike(program: Program):
    space = inspect_model(program, stages=2, groups=3)
    generator = random.Random(0)
    drawn = [space.random_plan(generator) for _ in range(1600)]
    counts = {plan: drawn.count(plan) for plan in set(drawn)}
    assert len(counts) == space.distinct_size == 16
    assert min(counts.values()) > 60


class Awkward(nn.Module):
    """An operator without a rule, a layer of too few channels, and a dropped branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.mask = nn.Conv2d(8, 1, 1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)
        self.aux = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        x = self.mix(torch.cumsum(x, 1) * self.mask(x).sigmoid())
        if self.training:
            return self.aux(x.mean((2, 3)))
        return self.fc(x.mean((2, 3)))


def test_what_cannot_be_cut_is_named_with_reason_and_price():
    space = inspect_model(Awkward(), input_shape=SHAPE)
    whole = {layer.name: layer for layer in space.whole}
    assert whole["mask"].macs == 8 * 64
    assert "1 of its 1 channels can be told apart" in whole["mask"].reason
    assert [use.operator for use in space.unknown] == ["aten.cumsum"]
    assert space.dropped.unused == ("aux",)
    text = str(space)
    assert "mask: 1 of its 1 channels" in text
    assert "aten.cumsum at the top level" in text
    assert "aux" in text
    assert 0.9 < space.cut_share < 1.0


def test_a_model_without_channels_to_cut_has_one_plan():
    space = inspect_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), input_shape=(3, 2, 2))
    assert space.size == space.distinct_size == 1
    assert space.resolutions == ()
    assert "no layer whose channels can be cut" in space.misfit
    assert "1 plan" in str(space)
    assert space.random_plan(random.Random(0)) == space.starter_plan()


def test_counts_out_of_range_are_refused_before_the_capture():
    with pytest.raises(PlanError, match=r"groups: 2 is fewer than stages \(3\)"):
        inspect_model(nn.Identity(), stages=3, groups=2)


def test_it_prints_and_converts(space: SearchSpace):
    text = str(space)
    for part in ("4x4", "split, concat", "prediction", "exit heads from: fc", "74,088 of them"):
        assert part in text
    document = json.loads(json.dumps(space.to_dict()))
    assert Plan.from_dict(document["starter_plan"]) == space.starter_plan()
    assert [row["resolution"] for row in document["resolutions"]] == list(space.resolutions)
    assert sum(row["share"] for row in document["resolutions"]) == pytest.approx(
        1 - 80 / space.macs
    )
