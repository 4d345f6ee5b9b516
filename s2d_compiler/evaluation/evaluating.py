"""Exits and accuracy per stage, under a policy."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s2d_compiler.errors import CheckError, DataError
from s2d_compiler.evaluation.trade_off import TradeOff, trade_off
from s2d_compiler.runtime.measures import (
    PROBABILITIES,
    are_probabilities,
    function_values,
    measure_values,
)
from s2d_compiler.runtime.policies import Policy, Thresholds, policy_to_dict, thresholds_of
from s2d_compiler.runtime.predictions import Predictions

if TYPE_CHECKING:
    from s2d_compiler.dynamic import StagedNetwork

log = logging.getLogger(__name__)

__all__ = [
    "Evaluation",
    "Observer",
    "StageResult",
    "accuracy_of",
    "evaluate",
    "interval",
    "require_logits",
    "right_of",
]

#: Is given the labels (n,) of a batch, the logits (n, C) of every exit, and what predict found.
Observer = Callable[[Tensor, list[Tensor], Predictions | None], None]


@dataclass(frozen=True, slots=True)
class StageResult:
    """One exit.

    Attributes:
        macs: Cumulative MACs per sample.
        accuracy: Share of *all* samples that it has right.
        leaving: How many samples leave here; None without a policy.
        right: How many of these it has right.
    """

    macs: int
    accuracy: float
    leaving: int | None = None
    right: int | None = None

    @property
    def accuracy_leaving(self) -> float | None:
        """Share of those who leave here that are right; None if nobody does."""
        return self.right / self.leaving if self.leaving and self.right is not None else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a staged network does with labelled samples.

    Source: S2DNAS, Table 2 (accuracy and fractions of samples that leave at each stage).

    Attributes:
        samples: How many.
        stages: Each exit.
        original_macs: What the original costs per sample.
        policy: Who leaves where; None: only the exits by themselves.
        accuracy: Of ``predict`` under the policy.
        macs: Its mean MACs per sample.
        nan_confidences: How often an exit's measure was NaN in ``predict``.
        trade_off: Accuracy against MACs over all thresholds.
    """

    samples: int
    stages: tuple[StageResult, ...]
    original_macs: int
    policy: Policy | None
    accuracy: float | None
    macs: float | None
    nan_confidences: int
    trade_off: TradeOff

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        low, high = (None, None)
        if self.accuracy is not None:
            low, high = interval(self.accuracy, self.samples)
        policy = self.policy
        named = policy is not None and isinstance(_measure_of(policy), str)
        return {
            "samples": self.samples,
            "policy": policy_to_dict(policy) if policy is not None and named else None,
            "accuracy": self.accuracy,
            "accuracy_interval": None if low is None else [low, high],
            "mean_macs": self.macs,
            "original_macs": self.original_macs,
            "nan_confidences": self.nan_confidences,
            "stages": [
                {
                    "macs": stage.macs,
                    "accuracy": stage.accuracy,
                    "leaving": stage.leaving,
                    "share": None if stage.leaving is None else stage.leaving / self.samples,
                    "accuracy_leaving": stage.accuracy_leaving,
                }
                for stage in self.stages
            ],
            "trade_off": self.trade_off.to_dict(),
        }


def evaluate(
    network: StagedNetwork,
    batches: Iterable[tuple[Any, Tensor]],
    policy: Policy | None = None,
    check_labels: Callable[[Tensor, int], None] | None = None,
    observe: Observer | None = None,
) -> Evaluation:
    """Run a staged classifier on labelled samples.

    Every stage is run on every sample, for the exits by themselves, and ``predict`` under the
    policy. What the two say of a sample must agree.

    Args:
        network: In evaluation mode.
        batches: Inputs, a tuple where there are several, and labels ``(n,)``, on the network's
            device.
        policy: Who leaves where; None: only the exits by themselves.
        check_labels: Called with labels and the number of classes; refuses what does not fit.
        observe: Called with every batch, by those who keep more of it than sums.

    Raises:
        DataError: There are no samples, or the outputs are no logits ``(N, C)``.
        CheckError: ``predict`` and the stages by themselves disagree.
    """
    measured = _Measured(network, policy)
    with torch.no_grad():
        for inputs, labels in batches:
            measured.add(inputs, labels, check_labels, observe)
    return measured.result()


def accuracy_of(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> float:
    """Share of the samples that a static network, in evaluation mode, has right.

    Raises:
        DataError: Its outputs are no logits ``(N, C)``.
    """
    right = total = 0
    with torch.no_grad():
        for inputs, labels in batches:
            output = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
            right += int(right_of(require_logits(output, len(labels)), labels).sum())
            total += len(labels)
    return right / total


class _Measured:
    """Sums over batches."""

    def __init__(self, network: StagedNetwork, policy: Policy | None) -> None:
        self.network = network
        self.policy = policy
        count = len(network.stages)
        self.values: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.leaving = torch.zeros(count, dtype=torch.long)
        self.right = torch.zeros(count, dtype=torch.long)
        self.macs = 0
        self.undefined = 0
        self.samples = 0
        self.are_probabilities = True

    def add(
        self,
        inputs: Any,
        labels: Tensor,
        check: Callable[[Tensor, int], None] | None,
        observe: Observer | None,
    ) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        outputs = [require_logits(output, len(labels)) for output in self.network(*given)]
        if check is not None:
            check(labels, max(2, outputs[0].shape[1]))
        self.samples += len(labels)
        self.are_probabilities &= all(are_probabilities(output) for output in outputs)
        self.values.append(_values(outputs, self.policy))
        self.correct.append(torch.stack([right_of(o, labels) for o in outputs], 1).cpu())
        found = None if self.policy is None else self.network.predict(inputs, self.policy)
        if observe is not None:
            observe(labels, outputs, found)
        if found is None:
            return
        output = require_logits(found.output, len(labels))
        _require_agreement(output, outputs, found.stage)
        count = len(outputs)
        right = right_of(output, labels)
        self.leaving += torch.bincount(found.stage, minlength=count).cpu()
        self.right += torch.bincount(found.stage[right], minlength=count).cpu()
        self.macs += int(found.macs.sum())
        self.undefined += found.nan_confidences

    def result(self) -> Evaluation:
        if not self.samples:
            raise DataError("the data have 0 samples, and at least 1 is needed; name other data")
        if self.are_probabilities:
            log.warning(PROBABILITIES)
        correct = torch.cat(self.correct)
        has_policy = self.policy is not None
        stages = tuple(
            StageResult(
                cost.cumulative_macs,
                float(column.double().mean()),
                int(leaving) if has_policy else None,
                int(right) if has_policy else None,
            )
            for cost, column, leaving, right in zip(
                self.network.cost.stages, correct.unbind(1), self.leaving, self.right, strict=True
            )
        )
        measure = "confidence" if self.policy is None else _measure_of(self.policy)
        return Evaluation(
            self.samples,
            stages,
            self.network.cost.original_macs,
            self.policy,
            int(self.right.sum()) / self.samples if has_policy else None,
            self.macs / self.samples if has_policy else None,
            self.undefined,
            trade_off(
                torch.cat(self.values),
                correct,
                [stage.macs for stage in stages],
                measure if isinstance(measure, str) else "confidence",
            ),
        )


def require_logits(output: Any, samples: int) -> Tensor:
    """A classifier's output (N, C) for so many samples; of single logits (N,) as (N, 1).

    Raises:
        DataError: It is something else.
    """
    what = f"a {type(output).__name__}"
    if isinstance(output, Tensor) and output.ndim == 1:
        output = output.unsqueeze(1)
    if isinstance(output, Tensor):
        shape = tuple(output.shape)
        if output.is_floating_point() and len(shape) == 2 and shape[0] == samples and shape[1]:
            return output
        what = f"a tensor of shape {shape} and type {output.dtype}"
    raise DataError(
        f"the network's exits return {what} for {samples} samples, and accuracy is that of a "
        f"classifier with logits (N, C); run such a network from Python, with dyn.predict"
    )


def right_of(logits: Tensor, labels: Tensor) -> Tensor:
    """``(N,)`` whether the largest logit is the label's; of a single logit, whether its sign is.

    A sample with a NaN among its logits is never right.
    """
    predicted = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    return (predicted == labels) & ~logits.isnan().any(1)


def interval(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Between which two numbers a share lies, with 95% confidence, if so many samples show it.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    spread = 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / spread
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2)) / spread
    return max(0.0, middle - half), min(1.0, middle + half)


def _measure_of(policy: Policy) -> Any:
    thresholds = thresholds_of(policy)
    return "confidence" if thresholds is None else thresholds.measure


def _values(outputs: list[Tensor], policy: Policy | None) -> Tensor:
    """``(n, s)`` what the policy measures at each exit."""
    thresholds = None if policy is None else thresholds_of(policy)
    found = thresholds or Thresholds((1.0,) * (len(outputs) - 1))
    temperatures = found.temperatures or (1.0,) * len(outputs)
    columns = []
    for output, temperature in zip(outputs, temperatures, strict=True):
        if isinstance(found.measure, str):
            columns.append(measure_values(found.measure, output, temperature))
        else:
            columns.append(function_values(found.measure, output, len(output)))
    return torch.stack(columns, 1).double().cpu()


def _require_agreement(found: Any, outputs: list[Tensor], stage: Tensor) -> None:
    """Require that each sample has the output of the exit where it left.

    Kernels for other batch sizes round differently, on GPUs by as much as half precision does
    (TF32).
    """
    stacked = torch.stack(outputs)
    expected = stacked[stage, torch.arange(len(stage), device=stage.device)]
    size = float(expected.abs().nan_to_num(0, 0, 0).amax()) if len(stage) else 0.0
    is_coarse = expected.dtype in (torch.float16, torch.bfloat16) or expected.device.type != "cpu"
    tolerance = size * (1e-2 if is_coarse else 1e-4)
    same = torch.isclose(found, expected, rtol=0, atol=tolerance, equal_nan=True).all(1)
    if bool(same.all()):
        return
    number = int((~same).nonzero()[0])
    at, off = int(stage[number]) + 1, float((found - expected)[number].abs().max())
    raise CheckError(
        f"sample {number} of a batch left at stage {at}, where predict and the stages by "
        f"themselves differ by {off:.3g}, and they must agree. If samples of this network "
        "depend on each other, evaluate it with --batch-size 1; otherwise this is a defect of the "
        "compiler: please report the model and the plan."
    )
