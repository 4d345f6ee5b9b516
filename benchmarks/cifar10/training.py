"""One row of the table: trained with checkpoints, then run once over the held-out images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.cifar10.rows import Row, rows_of
from s2d_compiler import DynamicModel, Recipe, fit, load, transform
from s2d_compiler.calibration import record
from s2d_compiler.data import Preprocessing, batches, open_data
from s2d_compiler.output import atomic_write
from s2d_compiler.training import History, Progress

__all__ = ["Work", "static_model", "train"]

#: Mean and standard deviation of the training images' colours.
PREPROCESSING = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
HELD_OUT = "5,000 held-out training images of CIFAR-10"


@dataclass(frozen=True, slots=True)
class Work:
    """Where rows are made and what all of them share.

    Attributes:
        network: Name of the network.
        data: What ``open_data`` takes: the training images of CIFAR-10.
        folder: For checkpoints and trained networks.
        results: For what is kept.
        recipe: How every row is trained.
        start_lr: Learning rate of rows that start from trained weights.
        device: Where to train.
    """

    network: str
    data: str
    folder: Path
    results: Path
    recipe: Recipe
    start_lr: float
    device: str

    def trained(self, row: str) -> Path:
        """The trained network of a row."""
        return self.folder / f"{row}.pt"


def train(row: Row, work: Work, console: Console) -> None:
    """Train a row, unless that is done, and keep what its exits say of the held-out images."""
    if row.needs_static and not work.trained("static").exists():
        raise SystemExit(f"{row.name}: it starts from the row static; train that first")
    teacher = static_model(work) if row.needs_static else None
    torch.manual_seed(work.recipe.seed)
    start = teacher if row.starts_static else row.build()
    assert start is not None
    dyn = transform(start, row.plan)
    recipe = _recipe(row, work, len(dyn.stages))
    about = work.results / f"{row.name}.json"
    if about.exists():  # what is kept is not replaced by other figures, wherever it was made
        if _settings(json.loads(about.read_text())["recipe"]) != _settings(recipe.to_dict()):
            raise SystemExit(
                f"{about}: the row was made by another recipe; remove it to make it anew"
            )
        if work.trained(row.name).exists() and about.with_suffix(".npz").exists():
            return
    holds_teacher = row.plan.get("final") == "original"  # the last stage is the static network
    training, held_out = _open(work)
    history = fit(
        dyn,
        training,
        recipe,
        validation=held_out,
        preprocessing=PREPROCESSING,
        teacher=teacher if row.has_teacher and not holds_teacher else None,
        original=start if row.group == "staged" else None,
        checkpoint=work.folder / f"{row.name}.checkpoint",
        on_progress=_Printed(row.name, console),
        device=work.device,
    )
    if len(history.epochs) < recipe.epochs:
        raise SystemExit(f"{row.name}: interrupted; run again to go on")
    dyn.save(work.trained(row.name))
    _keep(row, work, dyn, recipe, history)


def _recipe(row: Row, work: Work, stages: int) -> Recipe:
    settings: dict[str, Any] = dict(row.recipe or {})
    if row.starts_static:
        settings.setdefault("lr", work.start_lr)
    if not row.has_teacher:
        settings["distill"] = 0.0
    original_last = row.plan.get("final") == "original"
    # The original is only run; in the masked form it would be a part of every step.
    settings["form"] = "masked" if row.group == "staged" and not original_last else "staged"
    settings["epochs"] = max(1, round(work.recipe.epochs * row.times))
    if not original_last:
        settings.setdefault("stage_weights", (*[0.5] * (stages - 1), 2.0) if stages > 1 else ())
    return replace(work.recipe, **settings)


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a difference: all but the form, in which weights are the same but for rounding."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(recipe)))
    return {key: value for key, value in plain.items() if key != "form"}


def _open(work: Work) -> tuple[Any, Any]:
    part = "train" if work.data.startswith("cifar10:") else ""
    return open_data(work.data, f"{part}[:45000]"), open_data(work.data, f"{part}[45000:]")


def static_model(work: Work) -> nn.Module:
    """The trained static network."""
    row = next(row for row in rows_of(work.network) if row.name == "static")
    model = row.build()
    stages = load(work.trained("static")).state_dict()
    model.load_state_dict({key.removeprefix("stages.0."): value for key, value in stages.items()})
    return model.eval()


def _keep(row: Row, work: Work, dyn: DynamicModel, recipe: Recipe, history: History) -> None:
    dyn.eval().to("cpu")
    _, held_out = _open(work)
    records = record(
        dyn,
        batches(held_out, PREPROCESSING, 250),
        data=HELD_OUT,
        preprocessing=PREPROCESSING.to_dict(),
    )
    records.save(work.results / f"{row.name}.npz")
    about: Mapping[str, Any] = {
        "row": row.name,
        "plan": dict(row.plan),
        "macs": [stage.cumulative_macs for stage in dyn.cost.stages],
        "parameters": sum(p.numel() for p in dyn.parameters()),
        "recipe": recipe.to_dict(),
        "form": history.form,
        "torch": str(torch.__version__),
        "device": work.device,
    }
    text = json.dumps(about, indent=1) + "\n"
    atomic_write(work.results / f"{row.name}.json", lambda stream: stream.write(text.encode()))


class _Printed:
    """One line per epoch."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console

    def __call__(self, progress: Progress) -> None:
        if progress.result is None:
            return
        result = progress.result
        accuracies = ", ".join(f"{100 * a:.2f}" for a in result.validation)
        self.console.print(
            f"{self.name}: epoch {result.epoch} of {progress.epochs}, loss {result.loss:.3f}, "
            f"validation {accuracies}%, {result.seconds:.0f} s",
            highlight=False,
        )
