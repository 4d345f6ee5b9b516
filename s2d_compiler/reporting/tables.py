"""Classes, mistakes and thresholds: what a report lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from s2d_compiler.evaluation import Evaluation, Point
from s2d_compiler.reporting.observations import Observations

__all__ = ["ClassRow", "Mistake", "Setting", "class_rows", "mistakes", "name_of", "settings_of"]

#: Accuracy given up, as shares, for which a table names thresholds.
_DROPS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05)
#: Longer names of classes are cut.
_NAME = 60


def name_of(label: int, classes: Sequence[str] | None) -> str:
    """What a class is called."""
    if label < 0:
        return "no class (NaN)"
    if classes is None or label >= len(classes):
        return f"class {label}"
    name = classes[label]
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Where the samples of one class leave.

    Attributes:
        name: Of the class.
        count: How many samples there are.
        shares: Of these, per stage.
        accuracy: Share that is right where it leaves; None without labels.
        taken_for: The class that it is most often taken for, and how often; None if never.
    """

    name: str
    count: int
    shares: tuple[float, ...]
    accuracy: float | None
    taken_for: tuple[str, int] | None


def class_rows(
    seen: Observations, classes: Sequence[str] | None, labelled: bool
) -> tuple[ClassRow, ...]:
    """Every class that occurs, those that leave earliest first.

    Without labels, a class is what the network answers.
    """
    stages = seen.plain.shape[1]
    marks = seen.labels if labelled else seen.answers
    rows = []
    for label in np.unique(marks):
        here = marks == label
        leaving = np.bincount(seen.stage[here], minlength=stages)
        wrong = seen.answers[here & (seen.answers != marks)]
        named = np.unique(wrong, return_counts=True)
        taken = None
        if len(wrong):
            most = int(named[1].argmax())
            taken = (name_of(int(named[0][most]), classes), int(named[1][most]))
        rows.append(
            ClassRow(
                name_of(int(label), classes),
                int(here.sum()),
                tuple((leaving / here.sum()).tolist()),
                float(1 - len(wrong) / here.sum()) if labelled else None,
                taken,
            )
        )
    return tuple(sorted(rows, key=lambda row: float(np.dot(row.shares, range(stages)))))


@dataclass(frozen=True, slots=True)
class Mistake:
    """One class taken for another.

    Attributes:
        wanted: The right class.
        found: What it was taken for.
        count: How often.
        stages: How often at each stage.
    """

    wanted: str
    found: str
    count: int
    stages: tuple[int, ...]


def mistakes(
    seen: Observations, classes: Sequence[str] | None, most: int = 10
) -> tuple[Mistake, ...]:
    """The most frequent confusions where samples leave."""
    wrong = seen.answers != seen.labels
    pairs = np.stack([seen.labels[wrong], seen.answers[wrong]], 1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    stages = seen.plain.shape[1]
    rows = []
    for (wanted, answer), count in zip(found[order].tolist(), counts[order].tolist(), strict=True):
        here = seen.stage[(seen.labels == wanted) & (seen.answers == answer)]
        by_stage = tuple(np.bincount(here, minlength=stages).tolist())
        rows.append(Mistake(name_of(wanted, classes), name_of(answer, classes), count, by_stage))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class Setting:
    """The cheapest thresholds for a drop of accuracy.

    Attributes:
        drop: Given up at most, below the last stage.
        point: What they give.
    """

    drop: float
    point: Point


def settings_of(evaluation: Evaluation) -> tuple[Setting, ...]:
    """For a few drops the cheapest point of the curve; drops that buy nothing more are left out."""
    last = evaluation.stages[-1].accuracy
    rows: list[Setting] = []
    for drop in _DROPS:
        good = [p for p in evaluation.trade_off.frontier if p.accuracy >= last - drop - 1e-9]
        if good and (not rows or good[0].macs < rows[-1].point.macs):
            rows.append(Setting(drop, good[0]))
    return tuple(rows)
