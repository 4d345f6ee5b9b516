"""Early exits the slow way: every stage for every sample alone, then the policy by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from s2d_compiler import DynamicModel, MacsBudget, Predictions, Thresholds
from s2d_compiler.runtime import Policy


@dataclass(frozen=True)
class Slow:
    """What every stage says of every sample."""

    outputs: list[list[Any]]  # by sample, by stage: leaves
    certainty: list[list[float]]  # by sample, by stage
    cumulative: list[int]


def first_leaf_certainty(output: Any) -> Tensor:
    """A measure of any output: where its first tensor lies between its least and its most."""
    leaf = next(v for v in pytree.tree_leaves(output) if isinstance(v, Tensor))
    return torch.sigmoid(leaf.flatten(1).sum(1))


def by_hand(measure: Any, output: Any) -> float:
    """A measure of one sample's output, from the definitions."""
    if callable(measure):
        return float(measure(output))
    positions = output[0].flatten(1) if output.ndim > 2 else output[0][:, None]
    found = []
    for logits in positions.T.tolist():
        if len(logits) == 1:
            logits = [logits[0], 0.0]
        most = max(logits)
        powers = [math.exp(v - most) for v in logits]
        p = sorted((v / sum(powers) for v in powers), reverse=True)
        found.append(
            {
                "confidence": p[0],
                "margin": p[0] - p[1],
                "entropy": -sum(v * math.log(v) for v in p if v > 0),
            }[measure]
        )
    return sum(found) / len(found)


def evaluate(dyn: DynamicModel, x: Tensor, measure: Any) -> Slow:
    with torch.no_grad():
        rows = [dyn(x[i : i + 1]) for i in range(len(x))]
    return Slow(
        [[pytree.tree_leaves(output) for output in row] for row in rows],
        [[by_hand(measure, output) for output in row] for row in rows],
        [stage.cumulative_macs for stage in dyn.cost.stages],
    )


def exits(slow: Slow, policy: Policy) -> list[int]:
    """The stage where each sample leaves."""
    count, stages = len(slow.certainty), len(slow.cumulative)
    thresholds = policy if isinstance(policy, Thresholds) else policy.thresholds
    entropy = thresholds is not None and thresholds.measure == "entropy"

    def certain(sample: int, stage: int) -> bool:
        if thresholds is None:
            return False
        value, bound = slow.certainty[sample][stage], thresholds.values[stage]
        return value <= bound if entropy else value >= bound

    found = [0] * count
    alive = list(range(count))
    spent = count * slow.cumulative[0]
    for stage in range(stages - 1):
        going = [i for i in alive if not certain(i, stage)]
        if isinstance(policy, MacsBudget) and policy.per == "sample":
            going = going if slow.cumulative[stage + 1] <= policy.macs else []
        elif isinstance(policy, MacsBudget):
            price = slow.cumulative[stage + 1] - slow.cumulative[stage]
            sign = -1 if entropy else 1
            going.sort(key=lambda i: sign * slow.certainty[i][stage])
            while going and len(going) * price > policy.macs - spent:
                going.pop()
            spent += len(going) * price
        for i in going:
            found[i] = stage + 1
        alive = sorted(going)
    return found


def assert_same(predictions: Predictions, slow: Slow, policy: Policy, rtol: float) -> None:
    """Exits, outputs and costs are those of every sample alone."""
    wanted = exits(slow, policy)
    assert predictions.stage.tolist() == wanted
    assert predictions.macs.tolist() == [slow.cumulative[stage] for stage in wanted]
    leaves = pytree.tree_leaves(predictions.output)
    for k, leaf in enumerate(leaves):
        rows = [slow.outputs[i][stage][k] for i, stage in enumerate(wanted)]
        if not isinstance(leaf, Tensor) or not rows:
            continue
        alone = torch.cat(rows)
        scale = max(float(alone.abs().max()), 1e-30)
        assert leaf.shape == alone.shape
        assert float((leaf - alone).abs().max()) <= rtol * scale
