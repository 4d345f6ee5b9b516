"""Compiles several networks and prints what their files are: ``python -m tests.compiled THREADS``.

Run as a process of its own, with a hash seed of its own, by ``test_determinism.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from s2d_compiler import transform
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.threads import one_thread
from tests import odd_models
from tests.networks import seeded


class WideResidual(nn.Module):
    """Layers that are large enough for torch to use several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 128, 3, padding=1)
        self.norm = nn.BatchNorm2d(128)
        self.body = nn.Conv2d(128, 128, 3, padding=1)
        self.up = nn.ConvTranspose2d(128, 64, 2, stride=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.up((x + self.body(x)).relu()).relu()
        result: torch.Tensor = self.fc(x.mean((2, 3)))
        return result


class WideStandardised(nn.Module):
    """Large weights that are computed: several threads add up their means."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 3, 7, 7))
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(128, 128, 5))
        self.fc = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / w.std((1, 2, 3), keepdim=True)
        x = nn.functional.conv2d(x, w, padding=3).relu()
        result: torch.Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return result


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks, with weights that depend on nothing, and their input shapes."""
    with one_thread():  # some weights start as the norm of others
        torch.manual_seed(0)
        return _models()


def _models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    kinds = {
        "residual": ("residual", "shuffle"),
        "computed": ("computed", "channels_last"),
    }
    image = (3, 8, 8)
    made: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "wide residual": (WideResidual(), image),
        "wide standardised": (WideStandardised(), image),
        "standardised": (odd_models.StandardizedConvolution(), image),
        "heads": (odd_models.Attention(), image),
        "odd names": (odd_models.OddNames(), image),
        "no rule": (odd_models.RunningSum(), image),
        "several outputs": (odd_models.SeveralOutputs(), image),
        "by number": (
            nn.Sequential(*[nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(12)]),
            image,
        ),
    }
    for name, blocks in kinds.items():
        drawn = seeded(3, blocks)
        made[name] = (drawn.model, drawn.input_shape)
    return {name: (model.eval(), shape) for name, (model, shape) in made.items()}


def compile_all(names: Collection[str] = ()) -> dict[str, DynamicModel]:
    """Every network, or those of these names, compiled with its channels ordered by weight."""
    plan = {"stages": 3, "groups": 8, "default": {"split": [3, 6], "concat": "all"}, "order": "l1"}
    return {
        name: transform(model, plan | {"input_shape": list(shape)})
        for name, (model, shape) in models().items()
        if not names or name in names
    }


def file_of(dyn: DynamicModel) -> bytes:
    """What ``save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        dyn.save(Path(folder, "dyn.pt"))
        return Path(folder, "dyn.pt").read_bytes()


def digests(compiled: dict[str, DynamicModel]) -> dict[str, str]:
    """SHA-256 of every network's file."""
    return {name: hashlib.sha256(file_of(dyn)).hexdigest() for name, dyn in compiled.items()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(digests(compile_all())))
