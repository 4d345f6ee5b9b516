"""Evaluating, drawing, and watching networks that run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from s2d_compiler.commands.policy_options import FORMS, read_policy
from s2d_compiler.commands.reporting import report_network
from s2d_compiler.errors import CheckError, DataError, UsageError
from s2d_compiler.evaluation import evaluate
from s2d_compiler.evaluation.evaluating import _require_agreement, require_logits
from s2d_compiler.monitoring import Monitor
from s2d_compiler.plots import check_plot
from s2d_compiler.reporting.samples import samples_of
from s2d_compiler.runtime import RunSettings
from tests.errors.case import Case


def disagreeing(folder: Path) -> object:
    outputs = [torch.zeros(2, 3), torch.ones(2, 3)]
    return _require_agreement(torch.zeros(2, 3), outputs, torch.tensor([0, 1]))


def without_matplotlib(folder: Path) -> object:
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
        return check_plot(Path("a.png"))


def reported(data: Any) -> Any:
    """What a report refuses to be about."""
    inputs = mock.Mock(settings=RunSettings())
    return lambda folder: samples_of(inputs, data, None, 1)


CASES: dict[str, Any] = {
    "no policy": Case(
        lambda folder: read_policy("often", None), UsageError, "--policy", '"often"',
        "is no policy", f"write {FORMS}",
    ),
    "policy out of range": Case(
        lambda folder: read_policy("0.9,1.5", None), UsageError, "--policy: thresholds",
        "1.5 at stage 2", "is no value of confidence", "give from 0 to 1",
    ),
    "no samples": Case(
        lambda folder: evaluate(mock.Mock(stages=[0]), []), DataError, "the data", "0 samples",
        "at least 1 is needed", "name other data",
    ),
    "no classifier": Case(
        lambda folder: require_logits({"out": 1}, 2), DataError, "the network's exits", "a dict",
        "accuracy is that of a classifier with logits", "run such a network from Python",
    ),
    "disagreement": Case(
        disagreeing, CheckError, "sample 1 of a batch left at stage 2", "differ by 1",
        "they must agree", "please report the model and the plan",
    ),
    "plot format": Case(
        lambda folder: check_plot(Path("a.gif")), UsageError, "--plot", "a.gif",
        "no format that plots are written in", "end it with .png, .svg or .pdf",
    ),
    "matplotlib": Case(
        without_matplotlib, UsageError, "--plot", "import of matplotlib halted",
        "cannot be imported", "pip install 's2d-compiler[plots]'",
    ),
    "no calibration": Case(
        lambda folder: Monitor(mock.Mock(settings=RunSettings())), UsageError, "the network",
        "has no calibration", "a monitor compares with it", "run s2d calibrate first",
    ),
    "no exit rates": Case(
        lambda folder: Monitor({"exit_rates": [2.0]}), UsageError, "calibration",
        "{'exit_rates': [2.0]}", "does not say how many samples left",
        "calibrate the network again",
    ),
    "level": Case(
        lambda folder: Monitor([1, 1], level=1.0), UsageError, "level", "1.0", "is no probability",
        "give one such as 0.01",
    ),
    "another network": Case(
        lambda folder: Monitor([1, 1]).count([1, 1, 1]), UsageError, "the predictions",
        "left at stage 3", "calibration knows 2 stages", "make a monitor of their own network",
    ),
    "report without data": Case(
        reported("cifar"), DataError, "data", "a str", "neither what open_data returns nor a pair",
        "give one of these",
    ),
    "report of other counts": Case(
        reported((torch.rand(3, 2), torch.zeros(2, dtype=torch.long))), DataError, "data",
        "2, 3 samples", "each must have as many", "hand in as many of the one as of the other",
    ),
    "report of no classes": Case(
        reported((torch.rand(3, 2), torch.tensor([0, -1, 0]))), DataError, "data: labels",
        "the least -1", "labels are class numbers from 0", "or None; give these",
    ),
    "report without a policy": Case(
        lambda folder: report_network(Path("d.pt"), output=Path("r.html"), policy="none"),
        UsageError, "--policy", "none lets nobody leave", "a report is about who leaves where",
        "write thresholds, such as 0.9,0.8",
    ),
    "report of no tensors": Case(
        reported(({1: 2}, None)), DataError, "among the inputs", "a dict",
        "which are tensors or arrays of numbers", "convert it",
    ),
}  # fmt: skip
