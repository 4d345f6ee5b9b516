"""The report: one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from s2d_compiler.calibration import Calibration
from s2d_compiler.calibration.records import fingerprint
from s2d_compiler.compiler import versions
from s2d_compiler.data import Data, Preprocessing
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.depth_report import DepthReport
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import FormatError
from s2d_compiler.evaluation import Evaluation, evaluate
from s2d_compiler.evaluation.drawing import policy_text
from s2d_compiler.evaluation.evaluating import accuracy_of, interval
from s2d_compiler.output import atomic_write, check_writable
from s2d_compiler.plots import check_matplotlib
from s2d_compiler.reading import describe_origin
from s2d_compiler.reporting.diagram import depth_segments, width_diagram
from s2d_compiler.reporting.figures import reliability_figure, trade_off_figure
from s2d_compiler.reporting.findings import findings
from s2d_compiler.reporting.gallery import channels_note, gallery
from s2d_compiler.reporting.observations import Observations
from s2d_compiler.reporting.reliability import Reliability, reliability
from s2d_compiler.reporting.samples import Samples, samples_of
from s2d_compiler.reporting.tables import class_rows, mistakes, settings_of
from s2d_compiler.runtime.policies import Policy, Thresholds, thresholds_of
from s2d_compiler.runtime.recording import describe_machine
from s2d_compiler.tracing import evaluation_mode

__all__ = ["write_report"]

#: What is shown of classes: so many that leave first, and so many that leave last.
_CLASSES = 12
#: Where no policy is stored: how much accuracy the threshold that is shown may cost.
_DROP = 0.005
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


def write_report(
    dyn: DynamicModel,
    data: Data | tuple[Any, Any],
    path: str | os.PathLike[str],
    *,
    policy: Policy | None = None,
    preprocessing: Preprocessing | None = None,
    original: nn.Module | None = None,
    file: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    labelled: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Write an HTML page about a staged classifier: structure, cost, exits, accuracy, confidences.

    The page is one file that loads nothing: plots and images are in it. An existing file is
    replaced, whole or not at all.

    Args:
        dyn: The network; it runs in evaluation mode and is left in the mode that it was in.
        data: What ``open_data`` returns, or ``(inputs, labels)``: a tensor or array ``(N, ...)``
            or a tuple of them, and classes ``(N,)`` from 0, or None, which leaves out accuracies.
        path: The file to write.
        policy: Who leaves where; None: what is stored, or else the cheapest threshold for all
            stages that costs at most half a point of accuracy on these samples.
        preprocessing: What is done to images; None: what is stored.
        original: The static network, to compare with.
        file: Where the network was read from, to be named.
        batch_size: Samples at a time.
        labelled: Whether labels are used where there are some; without, accuracies are left out.
        progress: Is given what is gone through, how many there are, and what is being done.

    Returns:
        What was measured under the policy. Its accuracies mean nothing without labels.

    Raises:
        DataError: The data do not fit the network, or it is no classifier.
        PolicyError: The policy does not fit the network.
        UsageError: matplotlib is not installed.
        ModelFileError: There is no such ``file``.
        OutputError: The page cannot be written.
    """
    check_matplotlib("report")
    check_writable(path)
    samples = samples_of(dyn, data, preprocessing, dyn.parts.batch or batch_size)
    samples = replace(samples, labelled=labelled and samples.labelled)
    device = _device(dyn)
    origin = None if file is None else describe_origin(file)

    def batches(what: str) -> Iterable[Any]:
        given = samples.batches(device)
        total = -(-samples.count // samples.batch_size)
        return given if progress is None else progress(given, total, what)

    with evaluation_mode(dyn):
        chosen = policy or dyn.settings.policy
        is_chosen_here = chosen is None
        if chosen is None:
            chosen = _threshold(dyn, samples, lambda: evaluate(dyn, batches("trying thresholds")))
        seen = Observations(chosen)
        found = evaluate(dyn, batches("evaluating"), chosen, samples.check, seen.add)
    accuracy = None
    if original is not None and samples.labelled:
        with evaluation_mode(original):
            accuracy = accuracy_of(original, batches("evaluating the original"))
    context = _context(dyn, samples, found, seen, accuracy, origin)
    content = _environment().get_template("page.html").render(
        is_chosen_here=is_chosen_here, **context
    ).encode()  # fmt: skip
    atomic_write(path, lambda stream: stream.write(content))
    return found


def _threshold(
    dyn: DynamicModel, samples: Samples, measure: Callable[[], Evaluation]
) -> Thresholds:
    """One threshold for all stages, where nobody chose any."""
    exits = len(dyn.stages) - 1
    if not exits or not samples.labelled:
        return Thresholds((0.9,) * exits)
    found = measure()
    least = found.stages[-1].accuracy - _DROP - 1e-9
    good = [point for point in found.trade_off.single if point.accuracy >= least]
    return Thresholds(min(good, key=lambda point: point.macs).thresholds)


def _context(
    dyn: DynamicModel,
    samples: Samples,
    found: Evaluation,
    seen: Observations,
    static_accuracy: float | None,
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the template shows."""
    labelled = samples.labelled
    plain, scaled = _reliabilities(seen) if labelled else ([], None)
    stored = dyn.settings
    calibration = _calibration(stored.calibration)
    is_outdated = calibration is not None and calibration.network != fingerprint(dyn)
    rows = class_rows(seen, samples.classes, labelled)
    shape = samples.input_shape or dyn.parts.input_shapes[0]
    assert found.policy is not None
    return {
        "name": origin["file"] if origin else "",
        "file": origin,
        "dyn": dyn,
        "is_depth": isinstance(dyn.plan, DepthPlan),
        "plan": dyn.plan.to_json(),
        "diagram": None if isinstance(dyn.plan, DepthPlan) else width_diagram(dyn),
        "segments": depth_segments(dyn.parts.report, dyn.cost)
        if isinstance(dyn.parts.report, DepthReport) else (),
        "made_by": dict(_flat(dyn.parts.made_by)),
        "machine": {**versions(), **describe_machine(_device(dyn), "eager")},
        "samples": samples,
        "labelled": labelled,
        "found": found,
        "policy": policy_text(found.policy),
        "thresholds": thresholds_of(found.policy),
        "bounds": interval(found.accuracy, found.samples) if found.accuracy is not None else None,
        "static_accuracy": static_accuracy,
        "trade_off": trade_off_figure(found, static_accuracy) if labelled else None,
        "settings": settings_of(found) if labelled else (),
        "plain": plain,
        "scaled": scaled,
        "reliability": [
            reliability_figure(number, one, None if scaled is None else scaled[number - 1],
                               _confidence_threshold(found.policy, number))
            for number, one in enumerate(plain, start=1)
        ],
        "findings": findings(found, scaled or plain, calibration, samples.name,
                             labelled=labelled, is_outdated=is_outdated),
        "classes": rows if len(rows) <= 2 * _CLASSES else rows[:_CLASSES],
        "late_classes": () if len(rows) <= 2 * _CLASSES else rows[-_CLASSES:],
        "class_count": len(rows),
        "mistakes": mistakes(seen, samples.classes) if labelled else (),
        "gallery": gallery(seen, samples),
        "channels": channels_note(shape[0]) if shape else "",
        "settings_stored": stored,
        "calibration": calibration,
        "is_outdated": is_outdated,
    }  # fmt: skip


def _reliabilities(seen: Observations) -> tuple[list[Reliability], list[Reliability] | None]:
    """Per exit, without and with the temperatures that are stored."""
    stages = range(seen.plain.shape[1])
    right = seen.right
    plain = [reliability(seen.plain[:, t], right[:, t]) for t in stages]
    if seen.scaled is None:
        return plain, None
    return plain, [reliability(seen.scaled[:, t], right[:, t]) for t in stages]


def _confidence_threshold(policy: Policy, stage: int) -> float | None:
    found = thresholds_of(policy)
    if found is None or found.measure != "confidence" or stage > len(found.values):
        return None
    value = found.values[stage - 1]
    return value if math.isfinite(value) else None


def _calibration(stored: Mapping[str, Any] | None) -> Calibration | None:
    """What calibration stored, if this package wrote it."""
    try:
        return None if stored is None else Calibration.from_dict(stored)
    except FormatError:
        return None


def _flat(made_by: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in made_by.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}: {inner}", str(item)) for inner, item in value.items())
        else:
            yield key, str(value)


def _device(dyn: DynamicModel) -> torch.device:
    return next((p.device for p in dyn.parameters()), torch.device("cpu"))


@cache
def _environment() -> Environment:
    """Templates that escape whatever they are given."""
    environment = Environment(
        loader=PackageLoader("s2d_compiler.reporting"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=lambda value, digits=1: f"{100 * value:.{digits}f}%",
        count=lambda value: f"{value:,.0f}",
        short=_short,
        decimals=lambda value, digits=3: f"{value:.{digits}f}",
        threshold=lambda value: f"{value:.4g}" if math.isfinite(value) else "never",
    )
    return environment


def _short(value: float) -> str:
    """A count in millions or the like."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.0f}"
