"""How far the confidences of an exit can be believed.

Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 2 (reliability
diagrams, expected calibration error).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Reliability", "reliability"]

_BINS = 15


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence beside accuracy, in bins of equal width that hold samples.

    Attributes:
        confidence: Mean confidence of each bin.
        accuracy: Share that is right in it.
        share: Share of all samples that are in it.
        error: Expected calibration error: how far the first two are apart, on average.
        bias: Mean confidence less accuracy: above 0, the exit is too sure of itself.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    share: tuple[float, ...]
    error: float
    bias: float


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> Reliability:
    """Sort samples into bins by confidence; those of NaN are left out.

    Args:
        confidence: (n,) from 0 to 1.
        right: (n,) whether each is right.
    """
    known = ~np.isnan(confidence)
    sure, hits = confidence[known], right[known].astype(np.float64)
    places = np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)
    counts = np.bincount(places, minlength=_BINS)
    held = counts > 0
    means = np.bincount(places, sure, _BINS)[held] / counts[held]
    shares = np.bincount(places, hits, _BINS)[held] / counts[held]
    weights = counts[held] / max(1, len(sure))
    return Reliability(
        tuple(means.tolist()),
        tuple(shares.tolist()),
        tuple(weights.tolist()),
        float((np.abs(means - shares) * weights).sum()),
        float(((means - shares) * weights).sum()),
    )
