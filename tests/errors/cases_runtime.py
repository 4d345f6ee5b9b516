"""Policies, measures, budgets and recorded times; and how they are stored."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler import Deadline, DynamicModel, MacsBudget, Thresholds, transform
from s2d_compiler.errors import InputShapeError, PolicyError, UsageError
from s2d_compiler.format import from_data, to_data
from s2d_compiler.runtime import StageTimings, Timings, measure_values, record_timings
from tests.errors.case import Case
from tests.errors.stored import AGAIN, Data, put, said

BOTH = Thresholds((0.5, 0.5))
TIMES = Timings((1, 4), (StageTimings((1.0, 2.0), (2.0, 3.0)),) * 3, {"device": "cpu"})


@cache
def network(pooled: bool = True) -> DynamicModel:
    layers = [nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)]
    if pooled:
        layers = [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    plan = {"stages": 3, "groups": 8, "default": {"split": [3, 5], "concat": "all"}}
    return transform(nn.Sequential(*layers).eval(), {**plan, "input_shape": [2, 4, 4]})


def predicts(*given: Any, **settings: Any) -> Callable[[Path], object]:
    def trigger(folder: Path) -> object:
        dyn = copy.deepcopy(network())
        dyn.settings = dataclasses.replace(dyn.settings, **settings)
        return dyn.predict(torch.zeros(3, 2, 4, 4), *given)

    return trigger


def policy(make: Callable[[], object], *parts: str) -> Case:
    return Case(lambda folder: make(), PolicyError, *parts)


def predicted(parts: tuple[str, str, str, str], *given: Any, **settings: Any) -> Case:
    return Case(predicts(*given, **settings), PolicyError, *parts)


def in_training(folder: Path) -> object:
    return copy.deepcopy(network()).train().predict(torch.zeros(3, 2, 4, 4), BOTH)


def no_logits(folder: Path) -> object:
    return measure_values("margin", torch.tensor(3.0))


class _TokensFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.transpose(0, 1)).relu())  # type: ignore[no-any-return]


class _Pair(_TokensFirst):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.b(self.a(x) + y)  # type: ignore[no-any-return]


_HALVES = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}


def tokens_first(folder: Path) -> object:
    dyn = transform(_TokensFirst().eval(), _HALVES, (torch.zeros(2, 4, 6),))
    return dyn.predict(torch.zeros(3, 4, 6), Thresholds((0.5,)))


def uneven(folder: Path) -> object:
    dyn = transform(_Pair().eval(), _HALVES, (torch.zeros(2, 6), torch.zeros(2, 8)))
    return dyn.predict((torch.zeros(3, 6), torch.zeros(1, 8)), Thresholds((0.5,)))


def by_function(folder: Path) -> object:
    def certainty(output: Any) -> Tensor:
        return torch.zeros(2)

    return network().predict(torch.zeros(3, 2, 4, 4), Thresholds((1, 1), certainty))


def saved_function(folder: Path) -> object:
    def certainty(output: Any) -> Tensor:
        return output.sum(1)  # type: ignore[no-any-return]

    dyn = copy.deepcopy(network())
    dyn.settings = dataclasses.replace(dyn.settings, policy=Thresholds((1, 1), certainty))
    return dyn.save("dyn.pt")


def of_file(edit: Callable[[Data], object], place: str, value: str, rule: str) -> Case:
    """A stored network with all settings, one of them changed."""

    def trigger(folder: Path) -> object:
        dyn = copy.deepcopy(network())
        dyn.settings = dataclasses.replace(dyn.settings, policy=Deadline(5.0, BOTH), timings=TIMES)
        data = copy.deepcopy(to_data(dyn))
        edit(data)
        return from_data(data, "dyn.pt")

    return said(trigger, f"dyn.pt: {place}", value, rule, AGAIN)


CASES = {
    # measures
    "no measure": policy(
        lambda: measure_values("certainty", torch.zeros(2, 3)),
        "measure",
        "'certainty'",
        "is none",
        "take one of confidence, entropy, margin",
    ),
    "no logits": Case(
        no_logits,
        PolicyError,
        "measure 'margin'",
        "a tensor of shape ()",
        "only logits (N, C) have one",
        "hand in measure=, a function",
    ),
    "an exit that counts something else": Case(
        tokens_first,
        PolicyError,
        "measure 'confidence'",
        "a tensor of shape (4, 3, 5)",
        "does not count the 3 sample(s)",
        "hand in measure=, a function",
    ),
    "inputs of other numbers of samples": Case(
        uneven,
        InputShapeError,
        "the inputs",
        "1 and 3",
        "hold 1 and 3 samples",
        "hand in as many of each",
    ),
    "a function of other numbers": Case(
        by_function,
        PolicyError,
        "measure",
        "a tensor of shape (2,)",
        "for 3 samples",
        "return a tensor of shape (3,)",
    ),
    # thresholds
    "another measure": policy(
        lambda: Thresholds((0.5,), "certainty"),
        "measure",
        "'certainty'",
        "is none",
        "or a function of the stage's output",
    ),
    "a threshold out of range": policy(
        lambda: Thresholds((0.5, 1.5)),
        "thresholds",
        "1.5 at stage 2",
        "is no value of confidence",
        "give from 0 to 1, or inf",
    ),
    "a negative entropy": policy(
        lambda: Thresholds((-0.5,), "entropy"),
        "thresholds",
        "-0.5 at stage 1",
        "is no value of entropy",
        "give from 0 on, or -inf",
    ),
    "a threshold that is none": policy(
        lambda: Thresholds((float("nan"),), torch.sum),
        "thresholds",
        "nan at stage 1",
        "compares with nothing",
        "give numbers",
    ),
    "thresholds of another kind": policy(
        lambda: Thresholds(("high",)),  # type: ignore[arg-type]
        "thresholds",
        "'high'",
        "is no number",
        "give a tuple of plain numbers",
    ),
    "a temperature of 0": policy(
        lambda: Thresholds((0.5,), temperatures=(0, 1)),
        "temperatures",
        "0.0 of stage 1",
        "is not above 0",
        "give positive numbers",
    ),
    "a temperature too few": policy(
        lambda: Thresholds((0.5, 0.5), temperatures=(1, 1)),
        "temperatures",
        "2 for",
        "for 2 thresholds",
        "give one per stage, the last included (3)",
    ),
    "temperatures of a function": policy(
        lambda: Thresholds((0.5,), torch.sum, (1, 1)),
        "temperatures",
        "a measure of one's own",
        "has none",
        "divide by them in the function",
    ),
    # budgets and deadlines
    "no budget": policy(
        lambda: MacsBudget(0), "macs", "0", "is no budget", "give a positive whole number"
    ),
    "a budget of what": policy(
        lambda: MacsBudget(5, "image"), "per", "'image'", "is neither", 'say "sample" or "batch"'
    ),
    "no time": policy(
        lambda: Deadline(-1), "milliseconds", "-1", "is no time", "give a positive number"
    ),
    "thresholds as numbers": policy(
        lambda: MacsBudget(5, thresholds=(0.5, 0.5)),  # type: ignore[arg-type]
        "thresholds",
        "a tuple",
        "is none",
        "give Thresholds(...) or None",
    ),
    # a policy and a network
    "no policy": predicted(
        ("predict", "neither given nor stored", "there is no policy", "let s2d calibrate find one")
    ),
    "numbers as a policy": predicted(
        ("policy", "a tuple", "is none", "such as Thresholds((0.9, 0.8))"), (0.9, 0.8)
    ),
    "in training mode": Case(
        in_training,
        UsageError,
        "predict",
        "in training mode",
        "samples depend on each other",
        "call dyn.eval() first",
    ),
    "thresholds of another network": predicted(
        ("thresholds", "1 for", "a network of 3 stages", "give one per stage but the last (2)"),
        Thresholds((0.5,)),
    ),
    "an entropy of more classes": predicted(
        ("thresholds", "1.5 at stage 1", "above the largest entropy of 3", "give a value up to it"),
        Thresholds((1.5, 0.5), "entropy"),
    ),
    "less than stage 1": predicted(
        ("macs", "the budget of 5", "below what stage 1 costs a sample", "a thinner stage 1"),
        MacsBudget(5),
    ),
    "less than stage 1 of all": predicted(
        ("macs", "the budget of 5", "costs the 3 samples of this batch", "or a smaller batch"),
        MacsBudget(5, "batch"),
    ),
    "no times": predicted(
        ("deadline", "no times are recorded", "nobody knows what fits", "s2d bench --record"),
        Deadline(5),
    ),
    "times of other stages": predicted(
        ("deadline", "recorded for 1 stages", "the network has 3", "s2d bench --record"),
        Deadline(5),
        timings=dataclasses.replace(TIMES, stages=TIMES.stages[:1]),
    ),
    "times of another device": predicted(
        ("deadline", "recorded on cuda", "the inputs are on cpu", "s2d bench --record"),
        Deadline(5),
        timings=dataclasses.replace(TIMES, machine={"device": "cuda"}),
    ),
    # recorded times
    "sizes out of order": policy(
        lambda: Timings((4, 1), TIMES.stages, {}),
        "timings",
        "[4, 1]",
        "are not ascending from 1",
        "record each size once",
    ),
    "a time too few": policy(
        lambda: Timings((1, 4), (StageTimings((1.0,), (1.0,)),), {}),
        "timings: stage 1",
        "[1.0]",
        "for batch sizes [1, 4]",
        "record one time in milliseconds for each",
    ),
    "few runs": Case(
        lambda folder: record_timings(network(), runs=3),
        UsageError,
        "runs",
        "3 are",
        "too few for a p95",
        "measure at least 20",
    ),
    "no sizes": Case(
        lambda folder: record_timings(network(), [0]),
        UsageError,
        "batch sizes",
        "[0]",
        "are none",
        "give sizes from 1",
    ),
    # stored
    "a function in a file": Case(
        saved_function,
        PolicyError,
        "policy",
        "a function (certainty)",
        "no file can hold",
        "hand the policy to predict",
    ),
    "a calibration that is no plain data": of_file(
        put("settings", "calibration", {"accuracy": float("nan")}),
        "settings.calibration",
        "there is more in it",
        "than plain data",
    ),
    "a policy of another kind": of_file(
        put("settings", "policy", "kind", "luck"),
        "settings.policy.kind",
        "'luck'",
        "is no policy",
    ),
    "a stored time that is none": of_file(
        put("settings", "policy", "milliseconds", "soon"),
        "settings.policy",
        "'soon'",
        "is no number",
    ),
    "other things as thresholds": of_file(
        put("settings", "policy", "thresholds", "kind", "deadline"),
        "settings.policy.thresholds.kind",
        "'deadline' stands",
        "where thresholds belong",
    ),
    "a stored threshold out of range": of_file(
        put("settings", "policy", "thresholds", "values", [0.5, 2.5]),
        "settings.policy.thresholds",
        "2.5 at stage 2",
        "is no value of confidence",
    ),
    "stored sizes out of order": of_file(
        put("settings", "timings", "batch_sizes", [4, 1]),
        "settings.timings",
        "[4, 1]",
        "are not ascending",
    ),
    "a stored time as text": of_file(
        put("settings", "timings", "stages", 0, "p50", ["fast", 1.0]),
        "settings.timings.stages[0].p50",
        "'fast'",
        "is no time",
    ),
}
