"""A trained row as files of ``examples/``, to compile, calibrate, evaluate and benchmark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from benchmarks.cifar10.rows import rows_of
from benchmarks.cifar10.training import Work, static_model
from s2d_compiler import load
from s2d_compiler.output import atomic_write

__all__ = ["export"]


def export(row: str, work: Work, folder: Path) -> list[Path]:
    """Write the static network, the row's plan, its staged network, and what its exits say.

    Args:
        row: Name of a staged row that is trained.
        work: Where it was trained.
        folder: Where to.

    Returns:
        The files: weights, plan, staged network, records of the held-out images.
    """
    for needed in (work.trained("static"), work.trained(row), work.results / f"{row}.npz"):
        if not needed.exists():
            raise SystemExit(f"{needed}: not there; train the row {row} before it is an example")
    plan = next(r.plan for r in rows_of(work.network) if r.name == row)
    start = f"{work.network}-cifar10"
    files = [folder / f"{start}{end}" for end in (".pt", ".json", "-dyn.pt", "-held-out.npz")]
    weights = static_model(work).state_dict()
    atomic_write(files[0], lambda stream: torch.save(weights, stream))
    text = json.dumps({"version": 1, **plan}, indent=2) + "\n"
    atomic_write(files[1], lambda stream: stream.write(text.encode()))
    load(work.trained(row)).save(files[2])
    shutil.copyfile(work.results / f"{row}.npz", files[3])
    return files
