"""Exits and accuracy from what the exits said when they were recorded; the network does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2d_compiler.calibration.records import Records, signed
from s2d_compiler.calibration.solver import exits_of
from s2d_compiler.errors import CalibrationError
from s2d_compiler.evaluation.evaluating import Evaluation, StageResult
from s2d_compiler.evaluation.trade_off import trade_off
from s2d_compiler.runtime.measures import measure_values
from s2d_compiler.runtime.policies import Policy, Thresholds

if TYPE_CHECKING:
    from s2d_compiler.calibration.instances import Floats, Integers
    from s2d_compiler.dynamic import DynamicModel

__all__ = ["evaluate_records"]


def evaluate_records(
    network: DynamicModel, records: Records, policy: Policy | None = None
) -> Evaluation:
    """What ``evaluate`` finds, from records of the samples in place of the samples.

    Where a measure is within rounding of a threshold, ``predict`` may decide otherwise, as kernels
    round differently for the few samples that are left. Samples of a network that takes batches of
    one size only are taken to come in the order of the records.

    Args:
        network: The network that was recorded.
        records: What its exits said.
        policy: Thresholds, by a measure that records hold; None: only the exits by themselves.

    Raises:
        CalibrationError: The records are of another network, or do not say what the policy asks
            for.
    """
    records.require_network(network)
    if policy is not None and not isinstance(policy, Thresholds):
        raise CalibrationError(
            f"records of {records.data}: under a {type(policy).__name__} who leaves depends on "
            "more than what exits said; evaluate it on the samples themselves, or give thresholds."
        )
    found = policy or Thresholds((1.0,) * (records.stages - 1))
    found.require_stages(records.stages)
    values = _values(records, found)
    macs = [stage.cumulative_macs for stage in network.cost.stages]
    right = records.right
    stages = [StageResult(m, float(share)) for m, share in zip(macs, right.mean(0), strict=True)]
    accuracy = cost = None
    undefined = 0
    if policy is not None:
        measure = str(found.measure)
        sign = 1.0 if found.larger_is_certain else -1.0
        exits = exits_of(signed(measure, values[:, :-1]), [sign * v for v in found.values])
        for stage in range(min(int(exits.max()) + 1, len(found.values))):  # what ran
            found.require_classes(stage, records.classes)
        answers = right[np.arange(len(exits)), exits]
        stages = [
            StageResult(
                stage.macs, stage.accuracy, int((exits == t).sum()), int(answers[exits == t].sum())
            )
            for t, stage in enumerate(stages)
        ]
        accuracy, cost = (
            float(answers.mean()),
            float(np.asarray(macs)[_paid(exits, network.parts.batch)].mean()),
        )
        asked = np.arange(values.shape[1]) <= exits[:, None]  # later exits do not run
        undefined = int((np.isnan(values) & asked).sum())
    return Evaluation(
        samples=len(records),
        stages=tuple(stages),
        original_macs=network.cost.original_macs,
        policy=policy,
        accuracy=accuracy,
        macs=cost,
        nan_confidences=undefined,
        trade_off=trade_off(
            torch.from_numpy(values), torch.from_numpy(right), macs, str(found.measure)
        ),
    )


def _paid(exits: Integers, batch: int | None) -> Integers:
    """(n,) up to which stage each sample is computed; a batch of fixed size as a whole."""
    if batch is None:
        return exits
    deepest = np.maximum.reduceat(exits, np.arange(0, len(exits), batch))
    return np.repeat(deepest, batch)[: len(exits)]


def _values(records: Records, policy: Thresholds) -> Floats:
    """(n, s) what the policy measures at each exit.

    Raises:
        CalibrationError: That is not in the records.
    """
    if not isinstance(policy.measure, str):
        raise CalibrationError(
            f"records of {records.data}: they hold no measure of one's own; evaluate the policy on "
            "the samples themselves."
        )
    if policy.temperatures is None:
        return records.measures[policy.measure]
    if records.logits is None:
        raise CalibrationError(
            f"records of {records.data}: they hold no logits, which the policy's temperatures are "
            "for; record again with logits (s2d calibrate --temperature --records), or evaluate "
            "the samples themselves."
        )
    columns = [
        measure_values(policy.measure, torch.from_numpy(logits), temperature).double().numpy()
        for logits, temperature in zip(records.logits, policy.temperatures, strict=True)
    ]
    return np.stack(columns, axis=1)
