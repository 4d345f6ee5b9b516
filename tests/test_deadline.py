"""Deadlines: stage 1 always answers; no later stage starts that would not fit."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from s2d_compiler import Deadline, DynamicModel, Thresholds
from s2d_compiler.runtime import StageTimings, Timings, record_timings
from tests.test_predict import compiled, images


class Slow(nn.Module):
    """A stage that takes so many milliseconds longer."""

    def __init__(self, stage: nn.Module, milliseconds: float) -> None:
        super().__init__()
        self.stage, self.milliseconds = stage, milliseconds

    def forward(self, *arguments: Tensor) -> Any:
        time.sleep(self.milliseconds / 1000)
        return self.stage(*arguments)


def timed(*p95: float, sizes: tuple[int, ...] = (1, 8)) -> Timings:
    return Timings(
        sizes, tuple(StageTimings((t / 2,) * len(sizes), (t,) * len(sizes)) for t in p95), {}
    )


def slowed(*milliseconds: float) -> DynamicModel:
    dyn = compiled()
    for number, value in enumerate(milliseconds):
        dyn.stages[number] = Slow(dyn.stages[number], value)
    dyn.eval()
    dyn.predict(images(2), Thresholds((0.0, 0.0)))
    return dyn


def answers(dyn: DynamicModel, timings: Timings, policy: Deadline, count: int = 3) -> list[int]:
    dyn.settings = dataclasses.replace(dyn.settings, timings=timings)
    found: list[int] = dyn.predict(images(count), policy).stage.tolist()
    return found


def test_stages_start_while_they_fit() -> None:
    dyn = slowed(20, 20, 20)
    recorded = timed(25, 25, 25)
    assert answers(dyn, recorded, Deadline(1)) == [0] * 3, "stage 1 always runs"
    assert answers(dyn, recorded, Deadline(40)) == [0] * 3, "20 ms are left, and stage 2 takes 25"
    assert answers(dyn, recorded, Deadline(60)) == [1] * 3
    assert answers(dyn, recorded, Deadline(5000)) == [2] * 3
    assert answers(dyn, timed(25, 25, 5000), Deadline(1000)) == [1] * 3


def test_what_only_the_first_call_does_counts_too() -> None:
    dyn = slowed(40, 0, 0)
    dyn.engine._knows_axes = False  # it looks for samples again, by running stages
    assert answers(dyn, timed(45, 1, 1), Deadline(200)) == [0] * 3, "late before the first stage"
    assert answers(dyn, timed(45, 1, 1), Deadline(200)) == [2] * 3


def test_a_busy_machine_stretches_what_was_recorded() -> None:
    dyn = slowed(40, 20, 20)
    assert answers(dyn, timed(10, 10, 10), Deadline(70)) == [0] * 3, "four times slower: 40 + 40"
    assert answers(dyn, timed(45, 10, 10), Deadline(70)) == [1] * 3, "as recorded: 40 + 10"


def test_one_sample_and_many_are_treated_alike() -> None:
    dyn = slowed(20, 20, 20)
    for count in (1, 4):
        assert answers(dyn, timed(25, 25, 25), Deadline(60), count) == [1] * count


def test_the_time_of_as_many_samples_counts() -> None:
    recorded = Timings((1, 4), (StageTimings((1.0, 1.0), (1.0, 500.0)),) * 3, {})
    dyn = compiled()
    assert answers(dyn, recorded, Deadline(400), 1) == [2]
    assert answers(dyn, recorded, Deadline(400), 2) == [0, 0], "between two sizes, the larger one's"
    outputs = dyn(images(4))[0].detach().softmax(1).amax(1)
    three_leave = Thresholds((float(outputs.sort().values[:2].mean()), math.inf))
    found = answers(dyn, recorded, Deadline(400, three_leave), 4)
    assert sorted(found) == [0, 0, 0, 2], "the one that is left has time"


def test_more_samples_than_recorded_take_several_runs() -> None:
    recorded = Timings((2, 4), (StageTimings((1.0, 2.0), (3.0, 5.0)),), {})
    assert [recorded.p95(0, n) for n in (1, 2, 3, 4, 5, 9)] == [3.0, 3.0, 5.0, 5.0, 10.0, 15.0]


@pytest.mark.parametrize("sizes", [(3, 1), (2,)])
def test_recording(sizes: tuple[int, ...]) -> None:
    dyn = slowed(0, 4, 0)
    recorded = record_timings(dyn, sizes, runs=20)
    assert recorded.batch_sizes == tuple(sorted(sizes))
    for stage in recorded.stages:
        assert all(0 < low <= high for low, high in zip(stage.p50, stage.p95, strict=True))
    assert min(recorded.stages[1].p50) >= 4
    assert max(recorded.stages[0].p50) < 4
    assert recorded.machine["device"] == "cpu"
    assert recorded.machine["threads"] == torch.get_num_threads()
