"""What the report says of operators without a rule: where, why, and at which price."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler import inspect_model, transform
from s2d_compiler.report import Report


@torch.library.custom_op("report_test::mixed", mutates_args=())
def mixed(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix product that the compiler knows nothing of."""
    return x.transpose(1, -1).matmul(weight).transpose(1, -1).contiguous()


@mixed.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.utils.flop_counter.register_flop_formula(torch.ops.report_test.mixed)
def _flops(x: Any, weight: Any, *, out_shape: Any = None, **kwargs: Any) -> int:
    count = 2 * x[0] * weight[0] * weight[1]
    for size in x[2:]:
        count *= size
    return int(count)


class Block(nn.Module):
    """A convolution and two operators without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self.conv(x), self.weight).cumsum(1)


class Net(nn.Module):
    """Blocks that repeat."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


PLAN = {
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "input_shape": [3, 8, 8],
}
ONE_RUN = 8 * 8 * 16 * 16


def test_the_costliest_fallback_comes_first_with_places_grouped() -> None:
    report = transform(Net(), PLAN).report
    first, second = report.fallbacks
    assert (first.operator, first.path, len(first.uses)) == ("report_test.mixed", "blocks.*", 3)
    assert (first.macs, first.extra_macs) == (3 * ONE_RUN, 2 * 3 * ONE_RUN)
    assert all((use.macs, use.runs) == (ONE_RUN, 3) for use in first.uses)
    assert (second.operator, second.macs, second.extra_macs) == ("aten.cumsum", 0, 0)
    share = first.extra_macs / report.original_macs
    line = (
        "report_test.mixed in blocks.* (3 places): the operator has no rule; 49,152 MACs a run, "
        f"98,304 more than the original over all stages ({share:.1%} of it)"
    )
    assert line in str(report)
    assert "aten.cumsum in blocks.* (3 places)" in str(report)
    assert str(report).index("report_test.mixed in") < str(report).index("aten.cumsum in")
    assert "no MACs, run 3 times" in str(report)


def test_what_a_fallback_costs_is_part_of_what_the_stages_cost() -> None:
    dyn = transform(Net(), PLAN)
    spent = [
        row.macs for stage in dyn.cost.stages for row in stage.layers if "mixed" in row.operator
    ]
    uses = [use for use in dyn.report.unknown if use.macs]
    assert sum(spent) == sum(use.macs + use.extra_macs for use in uses)


def test_one_place_keeps_its_whole_path() -> None:
    report = transform(Net(blocks=1), PLAN).report
    assert [group.path for group in report.fallbacks] == ["blocks.0", "blocks.0"]
    assert "places" not in str(report)


def test_with_one_stage_a_fallback_costs_nothing_more() -> None:
    plan = {**PLAN, "stages": 1, "default": {"split": [], "concat": "none"}}
    assert [use.extra_macs for use in transform(Net(), plan).report.unknown] == [0] * 6


def test_an_untouched_last_stage_counts_as_a_run() -> None:
    report = transform(Net(), {**PLAN, "final": "original"}).report
    assert {use.runs for use in report.unknown} == {3}


def test_inspect_gives_the_price_before_a_plan_is_chosen() -> None:
    text = inspect_model(Net(), input_shape=(3, 8, 8)).remarks()
    assert "report_test.mixed in blocks.* (3 places)" in text
    assert "98,304 more than the original over all stages" in text


def test_reports_survive_a_round_trip() -> None:
    report = transform(Net(), PLAN).report
    assert Report.from_dict(report.to_dict()) == report


class OneHead(nn.Module):
    """Attention with a single head beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.conv(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        weights = (q @ k.transpose(1, 2)).softmax(-1)
        return self.head((weights @ v).mean(1))


def test_a_product_that_not_every_stage_runs_on_channels_of_its_own_is_whole() -> None:
    plan = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "none"}}
    report = transform(OneHead(), plan, (torch.randn(2, 3, 8, 8),)).report
    layers = ("conv", "qkv", "head")
    scores, mixed = (r for r in report.layers if r.layer not in layers)
    assert mixed.status == "cut"
    assert all(mixed.channels)
    assert scores.status == "whole"
    assert "owns none" in scores.reason
    whole = sum(r.macs for r in report.layers if r.status == "whole")
    assert scores.macs <= whole
    assert report.cut_share == 1 - whole / report.original_macs
