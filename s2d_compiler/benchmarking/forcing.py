"""Exits in given shares: samples really leave, through ``predict``, whatever their outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from s2d_compiler.runtime import Thresholds


class ForcedExits:
    """A measure with which given numbers of samples leave at each stage.

    Samples that leave are spread over the batch at random, the same for every call. In batches of
    one, calls take turns: of 20 calls with shares 60/25/15, 12 leave at stage 1.

    Args:
        shares: Per stage, adding up to 1.
        batch: Samples per call.
    """

    def __init__(self, shares: Sequence[float], batch: int):
        self.shares = shares
        self.batch = batch
        generator = torch.Generator().manual_seed(0)
        self.calls = 20 if batch == 1 else 1
        exits = spread(shares, batch * self.calls)
        order = torch.randperm(len(exits), generator=generator)
        self.exits = torch.tensor(exits)[order].view(self.calls, batch)
        self.call = -1
        self.stage = 0
        self.left = torch.zeros(0, dtype=torch.long)

    @property
    def policy(self) -> Thresholds:
        """The policy to hand to ``predict``; ``begin`` comes before each call."""
        return Thresholds((0.5,) * (len(self.shares) - 1), measure=self)

    def begin(self) -> None:
        """Get ready for the next call."""
        self.call = (self.call + 1) % self.calls
        self.stage = 0
        self.left = self.exits[self.call]

    def __call__(self, output: Any) -> Tensor:
        leaf = next(v for v in pytree.tree_leaves(output) if isinstance(v, Tensor))
        leaves = self.left == self.stage
        self.left = self.left[~leaves]
        self.stage += 1
        return leaves.to(device=leaf.device, dtype=torch.float32)


def spread(shares: Sequence[float], count: int) -> list[int]:
    """Stages (from 0) of so many samples in these shares, rounded by largest remainders."""
    exact = [share * count for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - exact[k])
    for stage in by_remainder[: count - sum(counts)]:
        counts[stage] += 1
    return [stage for stage, number in enumerate(counts) for _ in range(number)]
