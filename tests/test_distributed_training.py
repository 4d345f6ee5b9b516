"""Two processes train what one would with the joint batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from s2d_compiler import load
from tests.distributed_training import main
from tests.training import samples, staged

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
ROOT = Path(__file__).parent.parent


def torchrun(*words: str) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run([*run, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_two_processes_are_one_with_the_joint_batch(tmp_path: Path) -> None:
    torchrun("-m", "tests.distributed_training", str(tmp_path))
    main(tmp_path)
    one, first, second = [
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    ]
    for alone, a, b in zip(one["weights"], first["weights"], second["weights"], strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(alone, a, rtol=0, atol=1e-12)
    assert all(map(torch.equal, first["norms"], second["norms"]))
    for seen, a, b in zip(one["seen"], first["seen"], second["seen"], strict=True):
        assert torch.equal(seen, torch.cat([a, b]))  # disjoint, and together the joint batch
    for key in ("validation", "accuracies"):
        assert first[key] == second[key] == one[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1-0.pt", "2-0.pt", "2-1.pt", "c1", "c2"
    ]  # fmt: skip


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    staged().save(tmp_path / "dyn.pt")
    pixels, labels = samples()
    numpy.savez(tmp_path / "a.npz", images=pixels.numpy(), labels=labels.numpy())
    words: list[Any] = ["dyn.pt", "--data", "a.npz", "-o", "t.pt", "--log-file", "log.jsonl"]
    named = [str(tmp_path / word) if "." in word else word for word in words]
    torchrun("-m", "s2d_compiler", "train", *named, "--epochs", "2", "--batch-size", "8")
    found = load(tmp_path / "t.pt")
    assert not torch.equal(next(found.parameters()), next(staged().parameters()))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.npz", "dyn.pt", "log.jsonl", "t.pt"
    ]  # fmt: skip
