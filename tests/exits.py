"""A small staged classifier and samples of it, for calibration."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from s2d_compiler import DynamicModel, transform
from s2d_compiler.calibration import Records, record

PLAN = {
    "stages": 3,
    "groups": 4,
    "default": {"split": [1, 2], "concat": "all"},
    "input_shape": [1, 6, 6],
}


def classifier(classes: int = 4, *, stages: int = 3, softmax: bool = False) -> DynamicModel:
    """An untrained network of a few channels, the same every time."""
    return copy.deepcopy(_compiled(classes, stages, softmax))


@cache
def _compiled(classes: int, stages: int, softmax: bool) -> DynamicModel:
    torch.manual_seed(1)
    layers: list[nn.Module] = [
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, classes),
    ]  # fmt: skip
    if softmax:
        layers.append(nn.Softmax(1))
    plan = dict(PLAN)
    if stages == 1:
        plan |= {"stages": 1, "default": {"split": [], "concat": "all"}}
    return transform(nn.Sequential(*layers).eval(), plan)


def samples(dyn: DynamicModel, count: int = 300, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images, and labels that the last stage mostly agrees with."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 1, 6, 6, generator=generator) * 3
    with torch.no_grad():
        output = dyn(images)[-1]
    labels = output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()
    wrong = torch.rand(count, generator=generator) < 0.1
    labels[wrong] = torch.randint(max(classes, 2), (int(wrong.sum()),), generator=generator)
    return images, labels


def records_of(dyn: DynamicModel, *, logits: bool = True) -> Records:
    """What it says of its samples."""
    return record(dyn, [samples(dyn)], data="drawn", logits=logits)


def with_measures(records: Records, **changed: np.ndarray) -> Records:
    """Other values of some measures."""
    return replace(records, measures={**records.measures, **changed})


def files(folder: Path) -> DynamicModel:
    """dyn.pt and data.npz in a folder."""
    dyn = classifier()
    images, labels = samples(dyn)
    dyn.save(folder / "dyn.pt")
    np.savez(folder / "data.npz", images=images.numpy(), labels=labels.numpy())
    return dyn
