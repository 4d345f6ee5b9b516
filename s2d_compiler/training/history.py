"""What a training was like: epoch by epoch, and while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from s2d_compiler.training.recipe import Recipe

__all__ = ["EpochResult", "History", "Progress"]


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One epoch.

    Attributes:
        epoch: Which one, from 1.
        loss: The joint loss, the mean of all steps.
        stage_losses: That of each stage by itself; None for one that is frozen.
        accuracies: Share of the (augmented) training images that each stage had right while it
            was trained; None for a frozen stage, and empty without labels.
        validation: Share of the validation images that each stage has right; empty without them.
        lr: The learning rate of the last step.
        seconds: How long it took, validation included.
    """

    epoch: int
    loss: float
    stage_losses: tuple[float | None, ...]
    accuracies: tuple[float | None, ...]
    validation: tuple[float, ...]
    lr: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def columns(stages: int) -> list[tuple[str, int | None]]:
        """Which numbers a row has: of a field, or of one stage in it."""
        several = ("stage_losses", "accuracies", "validation")
        return [
            *((name, None) for name in ("epoch", "loss", "lr", "seconds")),
            *((name, stage) for name in several for stage in range(stages)),
        ]

    def to_row(self, stages: int) -> list[float]:
        """As numbers, NaN where there is none."""
        row = []
        for name, stage in self.columns(stages):
            value = getattr(self, name)
            if stage is not None:
                value = value[stage] if value else None
            row.append(math.nan if value is None else float(value))
        return row

    @classmethod
    def from_row(cls, row: Sequence[float], stages: int) -> EpochResult:
        """From what ``to_row`` returned."""
        found: dict[str, Any] = {}
        for (name, stage), number in zip(cls.columns(stages), row, strict=True):
            value = None if math.isnan(number) else number
            found[name] = value if stage is None else (*found.get(name, ()), value)
        for name in ("accuracies", "validation"):
            if all(value is None for value in found[name]):
                found[name] = ()
        return cls(**{**found, "epoch": int(found["epoch"] or 0)})


@dataclass(frozen=True, slots=True)
class History:
    """A whole training.

    Attributes:
        recipe: How it was trained.
        form: ``"static"``, ``"staged"`` or ``"masked"``.
        distill: The share of distillation that the recipe came to.
        epochs: Each epoch.
        kept: The epoch whose weights the network has, from 1.
        resumed: Epochs that were done before this call, from a checkpoint.
        teacher: Share of the validation images that the teacher has right, or of up to 1,000
            training images where there are none; None without a teacher, and without labels.
    """

    recipe: Recipe
    form: str
    distill: float
    epochs: tuple[EpochResult, ...] = field(default=())
    kept: int = 0
    resumed: int = 0
    teacher: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "form": self.form,
            "distill": self.distill,
            "epochs": [epoch.to_dict() for epoch in self.epochs],
            "kept": self.kept,
            "resumed": self.resumed,
            "teacher": self.teacher,
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is, after a step.

    Attributes:
        epoch: Which epoch, from 1.
        step: Steps of this epoch that are done.
        steps: Steps of an epoch.
        epochs: How many epochs there will be.
        loss: The mean joint loss of this epoch so far.
        accuracies: Share of this epoch's images so far that each stage had right; None for a
            frozen stage, and empty without labels.
        lr: The learning rate of the step.
        images_per_second: Over this call so far.
        seconds_left: About, until the end.
        result: The epoch's result, once it is over.
        history: The results of all epochs that are over.
    """

    epoch: int
    step: int
    steps: int
    epochs: int
    loss: float
    accuracies: tuple[float | None, ...]
    lr: float
    images_per_second: float
    seconds_left: float
    result: EpochResult | None = None
    history: tuple[EpochResult, ...] = ()
