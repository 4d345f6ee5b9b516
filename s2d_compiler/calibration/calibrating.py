"""From a staged network and labelled samples to thresholds that serve a target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from s2d_compiler.calibration.binomial import interval
from s2d_compiler.calibration.instances import Floats, Integers
from s2d_compiler.calibration.promises import Part, Promise, promise, require_samples, split
from s2d_compiler.calibration.recording import record
from s2d_compiler.calibration.records import Records, signed
from s2d_compiler.calibration.results import INTERVALS, Calibration
from s2d_compiler.calibration.solver import Solution, Solver, exits_of
from s2d_compiler.calibration.targets import (
    Enas4dMetric,
    MaxDrop,
    MeanBudget,
    Target,
    parse_target,
    wants_milliseconds,
)
from s2d_compiler.calibration.temperature import Temperature, fit_temperature
from s2d_compiler.errors import CalibrationError
from s2d_compiler.runtime.measures import (
    LARGER_IS_CERTAIN,
    MEASURES,
    largest_value,
    measure_values,
)
from s2d_compiler.runtime.policies import Thresholds

if TYPE_CHECKING:
    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.runtime.timings import Timings

#: Entropies of equal probabilities may lie above the largest one by rounding.
_ROUNDING = 1 + 5e-7


def calibrate(
    dyn: DynamicModel,
    samples: Records | Iterable[tuple[Tensor, Tensor]],
    target: Target | str,
    *,
    measure: str = "confidence",
    confidence: float | None = None,
    temperature: bool = False,
    milliseconds: Sequence[float] | None = None,
    timing_batch: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Find thresholds for a target, and store them with the network.

    ``dyn.settings.policy`` becomes the thresholds and ``dyn.settings.calibration`` what was found,
    or nothing changes.

    Args:
        dyn: The staged network, a classifier.
        samples: Records, or batches of inputs and labels that it was not trained on.
        target: What the thresholds are to achieve, or its text such as ``"drop=0.5%"``.
        measure: ``"confidence"``, ``"entropy"`` or ``"margin"``.
        confidence: Promise a drop or a mean budget on new samples of the same distribution, with
            this probability: part of the samples chooses, the rest tests.
        temperature: Fit a temperature per exit first, on the samples that choose.
        milliseconds: Cumulative milliseconds per sample of each stage; without them, the medians
            of ``dyn.settings.timings``. The costs of every target but those in MACs.
        timing_batch: Whose batch size's times are meant; the smallest recorded when None.
        seed: Of the order in which samples are parted.

    Returns:
        What was found.

    Raises:
        CalibrationError: The target cannot be met or promised, or the samples do not fit.
    """
    target = parse_target(target) if isinstance(target, str) else target
    _require_arguments(dyn, target, measure, confidence)
    costs, unit = costs_of(dyn, target, milliseconds, timing_batch)
    _require_budget(target, costs, unit)
    if not isinstance(samples, Records):
        samples = record(dyn, samples, logits=temperature)
    samples.require_network(dyn)
    policy, found = solve_records(
        samples, target, costs, unit, measure, confidence, temperature=temperature, seed=seed
    )
    dyn.settings = replace(dyn.settings, policy=policy, calibration=found.to_dict())
    return found


def solve_records(
    records: Records,
    target: Target,
    costs: tuple[float, ...],
    unit: str,
    measure: str = "confidence",
    confidence: float | None = None,
    *,
    temperature: bool = False,
    seed: int = 0,
) -> tuple[Thresholds, Calibration]:
    """Thresholds from records alone; arguments as of ``calibrate``.

    Raises:
        CalibrationError: The target cannot be met or promised.
    """
    count = len(records)
    if confidence is not None:
        assert isinstance(target, MaxDrop | MeanBudget)
        require_samples(target, costs, count, confidence)
        choosing, testing = split(count, seed)
    else:
        choosing = testing = np.arange(count)
    fitted = _temperatures(records, choosing) if temperature else None
    certainty = _certainty(records, measure, fitted)
    most = largest_value(measure, records.classes) * _ROUNDING
    lowest = 0.0 if LARGER_IS_CERTAIN[measure] else -most
    chosen: Part = certainty[choosing], records.right[choosing]
    tested: Part = certainty[testing], records.right[testing]
    kept: Promise | None = None
    solution: Solution | None
    if confidence is None:
        solution = Solver(*chosen, costs, lowest).solve(target)
    else:
        assert isinstance(target, MaxDrop | MeanBudget)
        kept = promise(chosen, tested, costs, target, confidence, lowest)
        solution = None if kept is None else kept.solution
    if solution is None:
        _refuse(target, chosen, costs, unit, confidence, len(testing))
    bounds = solution.thresholds
    if not LARGER_IS_CERTAIN[measure]:
        bounds = tuple(min(0.0 - value, most) for value in bounds)
    values = None if fitted is None else tuple(t.value for t in fitted)
    policy = Thresholds(bounds, measure, values)
    found = _described(records, target, costs, unit, measure, solution, kept, fitted, tested)
    return policy, replace(found, chosen_on=len(choosing))


# -- what is asked for -----------------------------------------------------------------------------


def _require_arguments(
    dyn: DynamicModel, target: Target, measure: str, confidence: float | None
) -> None:
    if not isinstance(target, Target):
        raise CalibrationError(
            f"target: a {type(target).__name__} is none; give MaxDrop, MeanBudget, Reward or "
            "Enas4dMetric, or a text such as drop=0.5%."
        )
    if measure not in MEASURES:
        raise CalibrationError(
            f"measure: {measure!r} is none that can be recorded; take one of {', '.join(MEASURES)}."
        )
    if len(dyn.stages) < 2:
        raise CalibrationError(
            "the network has one stage, where every sample leaves, and thresholds are for more; "
            "compile with more stages."
        )
    if confidence is None:
        return
    if type(confidence) is not float or not 0.5 <= confidence <= 0.9999:
        raise CalibrationError(
            f"confidence: {confidence!r} is no probability from 0.5 to 0.9999; give one such as "
            "0.95, or none for a fit without a promise."
        )
    if not isinstance(target, MaxDrop | MeanBudget):
        raise CalibrationError(
            f"target: {target}, has nothing that holds or not, and a promise (confidence) is of a "
            "drop or a mean budget; give such a target, or no confidence."
        )


def costs_of(
    dyn: DynamicModel,
    target: Target,
    milliseconds: Sequence[float] | None = None,
    timing_batch: int | None = None,
) -> tuple[tuple[float, ...], str]:
    """Cumulative cost per sample of each stage, and its unit.

    Raises:
        CalibrationError: Times are asked for, and there are none, or none that rise.
    """
    stages = len(dyn.stages)
    if timing_batch is not None and (milliseconds is not None or not wants_milliseconds(target)):
        raise CalibrationError(
            f"timing batch: {timing_batch} says which stored times are meant, and "
            + (
                "others are given"
                if milliseconds is not None
                else f"the target ({target}) has none"
            )
            + "; leave it out."
        )
    if milliseconds is None and not wants_milliseconds(target):
        return tuple(float(s.cumulative_macs) for s in dyn.cost.stages), "MACs"
    if milliseconds is None:
        if dyn.settings.timings is None:
            raise CalibrationError(
                f"target: {target}, and no times are stored with the network; give --milliseconds, "
                "a time per stage, or let s2d bench --record measure them."
            )
        milliseconds = _recorded(dyn.settings.timings, timing_batch)
    times = tuple(float(t) for t in milliseconds)
    rising = all(a <= b for a, b in itertools.pairwise(times))
    if len(times) != stages or not rising or not times[0] > 0 or not math.isfinite(times[-1]):
        raise CalibrationError(
            f"milliseconds: {', '.join(f'{t:g}' for t in times)[:80]} are not what a sample costs "
            f"up to each of {stages} stages; give {stages} positive numbers that do not fall."
        )
    if not wants_milliseconds(target) and isinstance(target, MeanBudget | Enas4dMetric):
        raise CalibrationError(
            f"target: {target}, and costs are given in milliseconds; write ms=, or leave "
            "--milliseconds out."
        )
    return times, "milliseconds"


def _recorded(timings: Timings, batch: int | None) -> tuple[float, ...]:
    sizes = timings.batch_sizes
    if batch is not None and batch not in sizes:
        raise CalibrationError(
            f"timing batch: no times are recorded for a batch of {batch}; take one of "
            f"{', '.join(map(str, sizes))}."
        )
    place = 0 if batch is None else sizes.index(batch)
    each = [stage.p50[place] / sizes[place] for stage in timings.stages]
    return tuple(float(t) for t in np.cumsum(each))


def _require_budget(target: Target, costs: tuple[float, ...], unit: str) -> None:
    if isinstance(target, MeanBudget) and target.value(costs) < costs[0]:
        raise CalibrationError(
            f"target: a mean budget of {target.value(costs):,.6g} {unit} per sample is below what "
            f"stage 1 costs every sample ({costs[0]:,.6g} {unit}); give at least that, or compile "
            "with a thinner stage 1."
        )


# -- measures --------------------------------------------------------------------------------------


def _temperatures(records: Records, rows: Integers) -> tuple[Temperature, ...]:
    if records.logits is None:
        raise CalibrationError(
            f"records of {records.data}: they hold no logits, which temperatures are fitted on; "
            "record again with --temperature, into another file."
        )
    return tuple(fit_temperature(exit[rows], records.labels[rows]) for exit in records.logits)


def _certainty(records: Records, measure: str, fitted: Sequence[Temperature] | None) -> Floats:
    if fitted is None:
        return records.certainty(measure)
    assert records.logits is not None
    early = zip(records.logits[:-1], fitted[:-1], strict=True)
    values = np.stack(
        [
            measure_values(measure, torch.from_numpy(exit), t.value).double().numpy()
            for exit, t in early
        ],
        axis=1,
    )
    return signed(measure, values)


# -- what was found --------------------------------------------------------------------------------


def _refuse(
    target: Target,
    chosen: Part,
    costs: tuple[float, ...],
    unit: str,
    confidence: float | None,
    tests: int,
) -> NoReturn:
    """Say why there are no thresholds.

    Raises:
        CalibrationError: Always.
    """
    if confidence is not None:
        raise CalibrationError(
            f"target: {target}, with a confidence of {confidence:.0%}: not even cautious "
            f"thresholds passed the test on {tests:,} samples; allow more, give more samples, or "
            "train the early exits further."
        )
    if isinstance(target, MaxDrop):
        best = Solver(*chosen, costs).solve(MeanBudget(macs=costs[-1]))
        reached = 0.0 if best is None else best.right / len(chosen[0])
        raise CalibrationError(
            f"target: {target}: no thresholds reach that on these {len(chosen[0]):,} samples, the "
            f"best accuracy of all is {reached:.2%}; allow a larger drop."
        )
    nans = int(np.isnan(chosen[0]).any(1).sum())
    raise CalibrationError(
        f"target: {target}: no thresholds keep that, for {nans:,} samples have NaN confidences and "
        f"go on to the last stage ({costs[-1]:,.6g} {unit}); give a larger budget, or mend the "
        "network."
    )


def _described(
    records: Records,
    target: Target,
    costs: tuple[float, ...],
    unit: str,
    measure: str,
    solution: Solution,
    kept: Promise | None,
    fitted: Sequence[Temperature] | None,
    tested: Part,
) -> Calibration:
    certainty, right = tested
    count, stages = right.shape
    exits = exits_of(certainty, solution.thresholds)
    answers = right[np.arange(count), exits]
    left = np.bincount(exits, minlength=stages)
    each = 1 - (1 - INTERVALS) / stages
    gap = solution.gap
    return Calibration(
        target=str(target),
        measure=measure,
        unit=unit,
        costs=costs,
        samples=len(records),
        chosen_on=count,
        measured_on=count,
        exit_rates=tuple(float(n) / count for n in left),
        exit_intervals=tuple(interval(int(n), count, each) for n in left),
        stage_accuracies=tuple(float(a) for a in right.mean(0)),
        exit_accuracies=tuple(
            float(answers[exits == stage].mean()) if left[stage] else None
            for stage in range(stages)
        ),
        accuracy=float(answers.mean()),
        drop=(int(right[:, -1].sum()) - int(answers.sum())) / count,
        mean_cost=float(np.asarray(costs)[exits].mean()),
        nan_confidences=records.nan_confidences,
        gap=gap if math.isfinite(gap) else None,
        confidence=None if kept is None else kept.confidence,
        bound=None if kept is None else kept.bound,
        p_value=None if kept is None else kept.p_value,
        temperatures=None if fitted is None else tuple(_as_dict(t) for t in fitted),
        data=records.data,
        network=records.network,
    )


def _as_dict(fitted: Temperature) -> dict[str, Any]:
    def known(values: tuple[float, float]) -> list[float] | None:
        return None if any(map(math.isnan, values)) else list(values)

    return {
        "temperature": fitted.value,
        "bounded": fitted.is_bounded,
        "nll": known(fitted.nll),
        "ece": known(fitted.ece),
    }
