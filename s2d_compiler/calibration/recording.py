"""Running a network over labelled samples, once, and keeping what every exit says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from s2d_compiler.calibration.records import Records, fingerprint
from s2d_compiler.errors import CalibrationError
from s2d_compiler.runtime.measures import (
    MEASURES,
    PROBABILITIES,
    are_probabilities,
    measure_values,
)

if TYPE_CHECKING:
    from s2d_compiler.dynamic import DynamicModel

log = logging.getLogger(__name__)


def record(
    dyn: DynamicModel,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    data: str = "the given batches",
    preprocessing: Mapping[str, Any] | None = None,
    logits: bool = False,
) -> Records:
    """Run every stage over labelled samples and keep measures, predictions and labels.

    The network runs in evaluation mode, and is left in the mode that it was in.

    Args:
        dyn: The staged network, a classifier.
        batches: Inputs (n, ...) as the network takes them, a tuple where there are several, and
            labels (n,) from 0.
        data: Where they come from, for messages and to be stored.
        preprocessing: What was done to them, to be stored.
        logits: Keep the logits, which fitting temperatures takes; N * C * s * 4 bytes, 8 of
            a network in double precision.

    Raises:
        CalibrationError: An exit returns no logits (N, C), a label is no class of the network, or
            there are no samples.
    """
    parts: list[_Part] = []
    was_training = dyn.training
    dyn.eval()
    try:
        with torch.no_grad():
            for inputs, labels in batches:
                if len(labels):
                    given = inputs if isinstance(inputs, tuple) else (inputs,)
                    parts.append(_Part(dyn(*given), labels, data, keep=logits))
    finally:
        dyn.train(was_training)
    if not parts:
        raise CalibrationError(f"{data}: there are no samples; give some to calibrate with.")
    if all(part.are_probabilities for part in parts):
        log.warning(PROBABILITIES)
    return Records(
        labels=np.concatenate([part.labels for part in parts]),
        predictions=np.concatenate([part.predictions for part in parts]),
        measures={
            name: np.concatenate([part.measures[name] for part in parts]) for name in MEASURES
        },
        classes=parts[0].classes,
        network=fingerprint(dyn),
        data=data,
        preprocessing=preprocessing,
        logits=np.concatenate([p.logits for p in parts], axis=1) if logits else None,
    )


class _Part:
    """What is kept of one batch."""

    def __init__(self, outputs: tuple[Any, ...], labels: Tensor, data: str, *, keep: bool):
        exits = [_logits(output, stage, labels) for stage, output in enumerate(outputs, start=1)]
        self.classes = max(exits[0].shape[1], 2)
        self.labels = _labels(labels, self.classes, data)
        self.measures = {
            name: _columns([measure_values(name, logits) for logits in exits]) for name in MEASURES
        }
        self.predictions = _columns([_classes(e) for e in exits]).astype(np.int64)
        self.logits = np.stack([_kept(e) for e in exits]) if keep else np.empty(0)
        self.are_probabilities = all(are_probabilities(e) for e in exits)


def _logits(output: Any, stage: int, labels: Tensor) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 1 and len(labels) == len(output):
        output = output.unsqueeze(1)
    if (
        not isinstance(output, Tensor)
        or output.ndim != 2
        or len(output) != len(labels)
        or not output.is_floating_point()
    ):
        what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else (
            f"a {type(output).__name__}"
        )  # fmt: skip
        raise CalibrationError(
            f"stage {stage} returns {what} for {len(labels)} labels, and calibration is for "
            "classifiers, whose exits return logits (N, C) and whose samples have one label each; "
            "give thresholds by hand."
        )
    return output


def _labels(labels: Tensor, classes: int, data: str) -> Any:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise CalibrationError(
            f"{data}: labels of shape {tuple(labels.shape)} and type {labels.dtype} are no "
            "classes; give (n,) whole numbers from 0."
        )
    worst = int(labels.max()) if int(labels.min()) >= 0 else int(labels.min())
    if not 0 <= worst < classes:
        raise CalibrationError(
            f"{data}: label {worst}, and the network tells {classes} classes apart, 0 to "
            f"{classes - 1}; give data of the classes that it was trained on."
        )
    return labels.cpu().numpy().astype(np.int64)


def _columns(values: list[Tensor]) -> Any:
    return np.stack([v.cpu().double().numpy() for v in values], axis=1)


def _classes(logits: Tensor) -> Tensor:
    found = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    return found.masked_fill(logits.isnan().any(1), -1)


def _kept(logits: Tensor) -> Any:
    """As measures see them: half precision becomes single."""
    kind = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return logits.to(kind).cpu().numpy()
