"""What is worth a second look before a network is deployed, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from s2d_compiler.calibration import Calibration
from s2d_compiler.evaluation import Evaluation
from s2d_compiler.reporting.reliability import Reliability

__all__ = ["findings"]

#: Fewer samples than this leave intervals too wide to decide by.
_FEW = 1000
#: From this share on, the first stage is what the network mostly is.
_MANY = 0.9
#: How much accuracy early exits may cost without a word.
_DROP = 0.01
#: How far confidences may be off on average.
_FAR = 0.05


def findings(
    found: Evaluation,
    trust: Sequence[Reliability],
    calibration: Calibration | None,
    data: str,
    *,
    labelled: bool,
    is_outdated: bool,
) -> tuple[str, ...]:
    """Everything, the gravest first.

    Args:
        found: Under a policy.
        trust: Confidences of each exit, as the policy has them; none without labels.
        calibration: What is stored.
        data: What the samples are called.
        labelled: Whether accuracies are known.
        is_outdated: Whether the weights are others than those that were calibrated.
    """
    return (
        *_of_calibration(found, calibration, data, is_outdated),
        *_of_exits(found),
        *(_of_accuracy(found, trust) if labelled else ()),
    )


def _of_calibration(
    found: Evaluation, calibration: Calibration | None, data: str, is_outdated: bool
) -> Iterator[str]:
    if calibration is None:
        return
    if is_outdated:
        yield (
            "The weights are not those that the thresholds were calibrated with: what was "
            "promised does not hold for them. Calibrate again (s2d calibrate)."
        )
    if calibration.data == data:
        yield (
            "The thresholds were chosen on these same samples, so the figures look better than on "
            "new ones."
        )
    for number, (stage, (low, high)) in enumerate(
        zip(found.stages, calibration.exit_intervals, strict=False), start=1
    ):
        share = (stage.leaving or 0) / found.samples
        if not low <= share <= high:
            yield (
                f"At stage {number} {share:.1%} of the samples leave; on those of the calibration "
                f"it was {low:.1%} to {high:.1%} (interval). The samples differ, or the policy "
                "does."
            )


def _of_exits(found: Evaluation) -> Iterator[str]:
    last = len(found.stages)
    if found.nan_confidences:
        yield (
            f"{found.nan_confidences:,} times the measure of an exit was NaN; such samples never "
            "leave early."
        )
    if last > 1:
        leaving = [stage.leaving or 0 for stage in found.stages]
        if not any(leaving[:-1]):
            yield "Nobody leaves early: under this policy the stages only add to the cost."
        if _MANY * found.samples <= leaving[0] < found.samples:
            yield (
                f"{leaving[0] / found.samples:.1%} of the samples leave at stage 1: compare with a "
                "plain static network that costs as much as this stage, which may do as well."
            )
        alone = next((t for t, n in enumerate(leaving, 1) if n == found.samples and t < last), None)
        if alone is not None:
            yield (
                f"All samples leave at stage {alone}: the network is used as a smaller static one."
            )
    if found.macs is not None and found.original_macs and found.macs >= found.original_macs:
        yield "On average a sample costs as much as in the original network, or more."


def _of_accuracy(found: Evaluation, trust: Sequence[Reliability]) -> Iterator[str]:
    last = found.stages[-1].accuracy
    if found.accuracy is not None and found.accuracy < last - _DROP:
        yield (
            f"Leaving early costs {100 * (last - found.accuracy):.2f} points of accuracy here: "
            f"{found.accuracy:.2%}, and {last:.2%} at the last stage."
        )
    best = 0
    for number, stage in enumerate(found.stages[1:], start=1):
        if stage.accuracy <= found.stages[best].accuracy:
            yield (
                f"Stage {number + 1} is right for {stage.accuracy:.2%} of all samples, no more "
                f"than stage {best + 1} ({found.stages[best].accuracy:.2%}): what it costs on top "
                "buys nothing here."
            )
        else:
            best = number
    far = [(number, exit_) for number, exit_ in enumerate(trust, 1) if exit_.error > _FAR]
    if far:
        each = ", ".join(
            f"stage {number} by {exit_.error:.1%} ({'too' if exit_.bias > 0 else 'not'} sure"
            f"{'' if exit_.bias > 0 else ' enough'})"
            for number, exit_ in far
        )
        yield (
            f"Confidences are off on average (ECE): {each}. Do not read them as probabilities "
            "(s2d calibrate --temperature)."
        )
    if found.samples < _FEW:
        yield (
            f"There are only {found.samples:,} samples: shares and accuracies have wide intervals."
        )
