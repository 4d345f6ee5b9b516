"""What a calibration found and promised: stored with the network, read by monitors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from s2d_compiler.fields import Fields, damaged, shown
from s2d_compiler.runtime.measures import MEASURES

#: How sure the intervals of all exit rates together are.
INTERVALS = 0.95
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was asked of thresholds, what they do, and what is promised of them.

    All shares and means are of the samples that did not choose the thresholds where there are
    such (``confidence`` is given), else of all, which chose them.

    Attributes:
        target: What was asked for, in words.
        measure: What thresholds are compared with.
        unit: Of costs: ``"MACs"`` or ``"milliseconds"``, per sample.
        costs: Cumulative cost of each stage.
        samples: How many were recorded.
        chosen_on: How many of them chose the thresholds.
        measured_on: How many of them what follows was counted on.
        exit_rates: Share of samples that leave at each stage.
        exit_intervals: Intervals that hold all of them at once with a probability of 95%
            (Clopper and Pearson 1934; Bonferroni).
        stage_accuracies: Share of all samples that each stage would be right on.
        exit_accuracies: Share of those that leave there; None where nobody does.
        accuracy: Share of samples that are right where they leave.
        drop: How much less that is than the last stage's share.
        mean_cost: Per sample.
        nan_confidences: Per stage, samples whose measure was NaN.
        gap: What better thresholds could gain on the samples that chose, at most, as a share of
            the target's score; None where it is not known.
        confidence: With which probability the target holds on new samples; None: not promised.
        bound: The test behind the promise, with its source; None without one.
        p_value: Of that test.
        temperatures: Per stage temperature, and negative log likelihood and calibration error
            before and after; None where none was fitted.
        data: Where the samples come from.
        network: SHA-256 of the network that was recorded.
    """

    target: str
    measure: str
    unit: str
    costs: tuple[float, ...]
    samples: int
    chosen_on: int
    measured_on: int
    exit_rates: tuple[float, ...]
    exit_intervals: tuple[Pair, ...]
    stage_accuracies: tuple[float, ...]
    exit_accuracies: tuple[float | None, ...]
    accuracy: float
    drop: float
    mean_cost: float
    nan_confidences: tuple[int, ...]
    gap: float | None
    confidence: float | None
    bound: str | None
    p_value: float | None
    temperatures: tuple[Mapping[str, Any], ...] | None
    data: str
    network: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and ``dyn.pt``."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | Fields) -> Calibration:
        """Read what ``to_dict`` wrote.

        Raises:
            FormatError: Something is missing, of another kind, or out of its range.
        """
        row = data if isinstance(data, Fields) else Fields(dict(data), "calibration")
        counts = {key: row.number(key) for key in ("samples", "chosen_on", "measured_on")}
        costs = _numbers(row, "costs", None, 0, math.inf)
        stages = len(costs)
        intervals = tuple(
            (low, high)
            for low, high in (
                _all_numbers(pair, row.at("exit_intervals"), 2, 0, 1)
                for pair in row.items("exit_intervals")
            )
        )
        rates = _numbers(row, "exit_rates", stages, 0, 1)
        temperatures = None
        if row.value("temperatures") is not None:
            temperatures = tuple(_temperature(inner) for inner in row.rows("temperatures"))
        counted = {
            "costs": costs,
            "exit_intervals": intervals,
            "exit_accuracies": row.items("exit_accuracies"),
            "nan_confidences": row.numbers("nan_confidences"),
            "temperatures": temperatures,
        }
        for key, values in counted.items():
            if values is not None and len(values) != max(stages, 1):
                damaged(row.at(key), f"{len(values)} entries for {stages} stages")
        measure, unit = row.text("measure"), row.text("unit")
        if measure not in MEASURES or unit not in ("MACs", "milliseconds"):
            damaged(row.at("measure"), f"{shown(measure)} in {shown(unit)} is not what is measured")
        return cls(
            target=row.text("target"),
            measure=measure,
            unit=unit,
            costs=costs,
            **counts,
            exit_rates=rates,
            exit_intervals=intervals,
            stage_accuracies=_numbers(row, "stage_accuracies", stages, 0, 1),
            exit_accuracies=tuple(
                None if value is None else _number(value, row.at("exit_accuracies"), 0, 1)
                for value in row.items("exit_accuracies")
            ),
            accuracy=_number(row.value("accuracy"), row.at("accuracy"), 0, 1),
            drop=_number(row.value("drop"), row.at("drop"), -1, 1),
            mean_cost=_number(row.value("mean_cost"), row.at("mean_cost"), 0, math.inf),
            nan_confidences=row.numbers("nan_confidences"),
            gap=_optional(row, "gap"),
            confidence=_optional(row, "confidence"),
            bound=None if row.value("bound") is None else row.text("bound"),
            p_value=_optional(row, "p_value"),
            temperatures=temperatures,
            data=row.text("data"),
            network=row.text("network"),
        )


def _temperature(row: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {
        "temperature": _number(row.value("temperature"), row.at("temperature"), 0, math.inf),
        "bounded": row.flag("bounded"),
    }
    for key in ("nll", "ece"):
        pair = row.value(key)
        found[key] = None
        if pair is not None:
            found[key] = list(_all_numbers(pair, row.at(key), 2, 0, math.inf))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _number(value: Any, place: str, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        damaged(place, f"{shown(value)} is no number from {least:g} to {most:g}")
    return float(value)


def _all_numbers(
    values: Any, place: str, count: int | None, least: float, most: float
) -> tuple[float, ...]:
    if type(values) is not list or (count is not None and len(values) != count):
        damaged(place, f"{shown(values)} stands where {count or 'some'} numbers belong")
    return tuple(_number(value, place, least, most) for value in values)


def _numbers(
    row: Fields, key: str, count: int | None, least: float, most: float
) -> tuple[float, ...]:
    return _all_numbers(row.value(key), row.at(key), count, least, most)


def _optional(row: Fields, key: str) -> float | None:
    value = row.value(key)
    return None if value is None else _number(value, row.at(key), 0, 1e300)
