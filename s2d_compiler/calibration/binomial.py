"""Exact tails of counts, and the intervals that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from s2d_compiler.calibration.instances import Floats


def binomial_tail(count: int, trials: int, share: float) -> float:
    """P(X <= count) of X ~ Binomial(trials, share)."""
    if count >= trials or share <= 0:
        return 1.0
    if count < 0 or share >= 1:
        return 0.0
    logs, k = _log_factorials(trials), np.arange(count + 1)
    terms = logs[trials] - logs[k] - logs[trials - k]
    terms = terms + k * math.log(share) + (trials - k) * math.log1p(-share)
    return min(1.0, float(np.exp(terms).sum()))


def upper_limit(count: int, trials: int, error: float) -> float:
    """The largest share under which so small a count has a probability of ``error`` or more.

    Source: Clopper and Pearson (1934), one side.
    """
    if count >= trials:
        return 1.0
    return _bisect(lambda share: binomial_tail(count, trials, share) >= error)


def interval(count: int, trials: int, confidence: float) -> tuple[float, float]:
    """An interval that holds the share behind a count with at least this confidence.

    Source: Clopper and Pearson (1934), "The use of confidence or fiducial limits illustrated in
    the case of the binomial".
    """
    if trials == 0:
        return 0.0, 1.0
    error = (1 - confidence) / 2
    low = 1 - upper_limit(trials - count, trials, error)
    return low, upper_limit(count, trials, error)


def ternary_tail(total: int, trials: int, plus: float, minus: float) -> float:
    """P(S <= total), S the sum of independent values 1, -1, 0 of probabilities plus, minus, rest.

    All of its probabilities at once, as the transform of a power of the values' transform.
    """
    size = 1 << (2 * trials + 1).bit_length()
    angles = np.arange(size // 2 + 1) * (2 * math.pi / size)
    turn = np.exp(-1j * angles)
    one = (1 - plus - minus) + plus * turn + minus * np.conj(turn)
    probabilities = np.fft.irfft(one**trials, size)
    head = probabilities[: min(total, trials) + 1].sum() if total >= 0 else 0.0
    below = -trials  # values below 0 stand at the end
    tail = probabilities[size + below : size + min(total, -1) + 1].sum() if total >= below else 0.0
    return float(min(1.0, max(0.0, head + tail)))


def _bisect(is_below: Callable[[float], bool]) -> float:
    """The largest number from 0 to 1 that is below; a little more, for rounding."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


@lru_cache(maxsize=8)
def _log_factorials(most: int) -> Floats:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
