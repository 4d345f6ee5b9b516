"""Who leaves after a stage: policies at work."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from s2d_compiler.errors import PolicyError
from s2d_compiler.runtime.policies import Deadline, MacsBudget, Policy, Thresholds, thresholds_of
from s2d_compiler.runtime.timings import Timings


class Decider:
    """Decides for one batch, stage after stage, who goes on.

    Args:
        policy: The policy; it fits the network.
        macs: MACs per sample of each stage alone.
        samples: Samples of the batch.
        timings: Recorded times, for a deadline.
        is_whole: Whether a stage runs for all samples whoever is left.
        began: When ``predict`` was called, by ``time.perf_counter``; now when None.
    """

    def __init__(
        self,
        policy: Policy,
        macs: Sequence[int],
        samples: int,
        timings: Timings | None,
        is_whole: bool,
        began: float | None = None,
    ):
        self.began = time.perf_counter() if began is None else began
        self.policy = policy
        self.thresholds = thresholds_of(policy)
        self.macs = macs
        self.samples = samples
        self.timings = timings
        self.is_whole = is_whole
        self.spent = samples * macs[0]
        self.expected = 0.0
        if isinstance(policy, MacsBudget):
            _require_first_stage(policy, macs[0], samples)

    def one_stays(self, stage: int, value: float) -> bool:
        """``staying`` for a batch of which one sample is left, without looking at the device."""
        if self.thresholds is not None:
            bound = self.thresholds.values[stage]
            if value >= bound if self.thresholds.larger_is_certain else value <= bound:
                return False
        if isinstance(self.policy, Deadline):
            return self._fits(self.policy, stage, before=1, going=1)
        if isinstance(self.policy, MacsBudget):
            if self.policy.per == "sample":
                return sum(self.macs[: stage + 2]) <= self.policy.macs
            price = self.macs[stage + 1] * (self.samples if self.is_whole else 1)
            if price > self.policy.macs - self.spent:
                return False
            self.spent += price
        return True

    def staying(self, stage: int, values: Tensor | None) -> Tensor | None:
        """Which samples go on to the next stage.

        Args:
            stage: The stage that has run, an index; not the last.
            values: (n,) its certainty of the samples that are left, as the policy measures it.

        Returns:
            (n,) True for those that go on; None when all do.
        """
        stay = None
        if self.thresholds is not None:
            assert values is not None
            bound = self.thresholds.values[stage]
            exact = values.double()  # or the threshold is rounded to their kind of numbers
            certain = exact >= bound if self.thresholds.larger_is_certain else exact <= bound
            stay = ~certain
        if isinstance(self.policy, Deadline):
            return self._in_time(stage, stay, values)
        if isinstance(self.policy, MacsBudget):
            return self._paid(self.policy, stage, stay, values)
        return stay

    def _in_time(self, stage: int, stay: Tensor | None, values: Tensor | None) -> Tensor | None:
        assert isinstance(self.policy, Deadline)
        assert values is not None
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
        going = len(values) if stay is None else int(stay.sum())
        if going == 0:
            return stay
        if not self._fits(self.policy, stage, len(values), going):
            return torch.zeros(len(values), dtype=torch.bool, device=values.device)
        return stay

    def _fits(self, policy: Deadline, stage: int, before: int, going: int) -> bool:
        """Whether the next stage's recorded time fits into what is left.

        Where the stages so far took longer than was recorded, because the machine is busy with
        something else, the next one is taken to be slower by as much.
        """
        assert self.timings is not None
        if self.is_whole:
            before = going = self.samples
        elapsed = (time.perf_counter() - self.began) * 1000
        self.expected += self.timings.p95(stage, before)
        slowdown = max(1.0, elapsed / self.expected) if self.expected else 1.0
        return elapsed + slowdown * self.timings.p95(stage + 1, going) <= policy.milliseconds

    def _paid(
        self, policy: MacsBudget, stage: int, stay: Tensor | None, values: Tensor | None
    ) -> Tensor | None:
        assert values is not None
        none = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        price = self.macs[stage + 1]
        if policy.per == "sample":
            return none if sum(self.macs[: stage + 2]) > policy.macs else stay
        going = len(values) if stay is None else int(stay.sum())
        left = policy.macs - self.spent
        if self.is_whole:
            if going == 0 or price * self.samples > left:
                return none
            self.spent += price * self.samples
            return stay
        can = going if price == 0 else min(going, left // price)
        self.spent += can * price
        if can == going:
            return stay
        stay = ~none if stay is None else stay
        return _least_certain(values, stay, can, self.thresholds)


def _least_certain(
    values: Tensor, stay: Tensor, count: int, thresholds: Thresholds | None
) -> Tensor:
    """Of the samples that would stay, the least certain ones; NaN first, then by position."""
    larger = thresholds is None or thresholds.larger_is_certain
    doubt = (-values if larger else values).double().nan_to_num(nan=torch.inf)
    order = torch.argsort(doubt, descending=True, stable=True)
    order = order[stay[order]][:count]
    found = torch.zeros_like(stay)
    found[order] = True
    return found


def _require_first_stage(policy: MacsBudget, macs: int, samples: int) -> None:
    needed = macs if policy.per == "sample" else macs * samples
    if policy.macs < needed:
        whose = "a sample" if policy.per == "sample" else f"the {samples} samples of this batch"
        raise PolicyError(
            f"macs: the budget of {policy.macs:,} is below what stage 1 costs {whose} "
            f"({needed:,} MACs); give at least that, or a smaller batch."
            if policy.per == "batch"
            else f"macs: the budget of {policy.macs:,} is below what stage 1 costs {whose} "
            f"({needed:,} MACs); give at least that, or compile with a thinner stage 1."
        )
