"""One temperature per exit: what its logits are divided by, so that confidences mean what they say.

Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2 (temperature
scaling) and section 2 (expected calibration error).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2d_compiler.calibration.instances import Floats, Integers

#: Temperatures outside are not taken: of perfectly separated classes, the best one is 0.
LOWEST, HIGHEST = 0.05, 20.0
_BINS = 15


@dataclass(frozen=True, slots=True)
class Temperature:
    """A fitted temperature, and what it changes on the samples it was fitted on.

    Attributes:
        value: What logits are divided by.
        nll: Mean negative log likelihood in nats, before and after.
        ece: Expected calibration error (15 bins of equal width), before and after.
    """

    value: float
    nll: tuple[float, float]
    ece: tuple[float, float]

    @property
    def is_bounded(self) -> bool:
        """Whether a bound stopped it, as where no sample is wrong."""
        return self.value in (LOWEST, HIGHEST)


def fit_temperature(logits: NDArray[Any], labels: Integers) -> Temperature:
    """The temperature of the least negative log likelihood.

    In the inverse temperature b the likelihood of logits b * z is concave: its slope, the mean of
    z at the label less the mean of z under the probabilities, falls with b. Its zero is found by
    bisection of log b, within ``LOWEST`` and ``HIGHEST``.

    Args:
        logits: (n, C), or (n, 1) for two classes; rows that are not finite are left out.
        labels: (n,) classes from 0.
    """
    kept = np.isfinite(logits).all(1)
    z, y = logits[kept].astype(np.float64), labels[kept]
    if z.shape[1] == 1:
        z = np.column_stack([np.zeros(len(z)), z[:, 0]])
    if not len(z):
        return Temperature(1.0, (np.nan, np.nan), (np.nan, np.nan))
    z -= z.max(1, keepdims=True)
    at_label = z[np.arange(len(z)), y].mean()

    def rises(b: float) -> bool:
        """Whether the likelihood rises with b."""
        weights = np.exp(z * b)
        return bool(at_label > ((weights * z).sum(1) / weights.sum(1)).mean())

    low, high = np.log(1 / HIGHEST), np.log(1 / LOWEST)
    if not rises(np.exp(low)):
        value = HIGHEST
    elif rises(np.exp(high)):
        value = LOWEST
    else:
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if rises(np.exp(middle)) else (low, middle)
        value = float(np.exp(-(low + high) / 2))
    before, after = _quality(z, y, 1.0), _quality(z, y, value)
    return Temperature(value, (before[0], after[0]), (before[1], after[1]))


def _quality(z: Floats, labels: Integers, temperature: float) -> tuple[float, float]:
    """Mean negative log likelihood, and expected calibration error."""
    weights = np.exp(z / temperature)
    sums = weights.sum(1)
    nll = np.log(sums) - z[np.arange(len(z)), labels] / temperature
    confidence = weights.max(1) / sums
    right = z.argmax(1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    off = np.bincount(bins, weights=confidence - right, minlength=_BINS)
    return float(nll.mean()), float(np.abs(off).sum() / len(z))
