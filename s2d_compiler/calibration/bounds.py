"""How surprising what was counted would be if a promise were false: p-values for any distribution.

Each function gives a number that is at most a, with probability at most a, whenever the promise is
false, for samples that are independent and of one distribution, whatever that is.
"""

from __future__ import annotations

import math

import numpy as np

from s2d_compiler.calibration.binomial import binomial_tail, ternary_tail, upper_limit
from s2d_compiler.calibration.instances import Floats

#: What part of the error goes into the limit on how many samples change at all.
NUISANCE = 0.1
#: What part of its largest value a bet may have.
_BOLDEST = 0.9
#: For how many samples an expected mean and variance stand.
_PRIOR = 20


def drop_p_value(worse: int, better: int, samples: int, limit: float, error: float) -> float:
    """Against "the accuracy drops by ``limit`` or more".

    A sample counts 1 where only the last stage was right, -1 where only the exit was, else 0; the
    drop is the mean of these, S their sum. With q the share of samples that do not count 0, and of
    all distributions with a mean of ``limit`` or more, P(S <= what was counted) is largest at mean
    ``limit``, and grows with q while q <= 1/2 and S lies below its mean: then S is, but for a
    shift, a sum of independent 0-1 variables (its polynomial has real roots), whose probabilities
    rise up to the mean (Darroch, 1964, "On the distribution of the number of successes in
    independent trials"). So the exact tail at an upper limit on q is a p-value, after adding the
    error of that limit (Berger and Boos, 1994, "P values maximized over a confidence set for the
    nuisance parameter"), which is a tenth of ``error``. Where more than half may differ,
    Hoeffding's bound takes the tail's place: both refute for small S only, so that their errors do
    not add up.

    Args:
        worse: Samples on which only the last stage is right.
        better: Samples on which only the exit is right.
        samples: All of them.
        limit: The drop that is to be excluded, above 0.
        error: The error for which it is to be most powerful.
    """
    apart = NUISANCE * error
    most = upper_limit(worse + better, samples, apart)
    if most < limit:  # so few differ that the mean cannot be so large
        return apart
    total = worse - better
    if most > 0.5 or total > math.floor((samples - 1) * limit) - 1:
        return min(1.0, _hoeffding(total / samples, limit, samples) + apart)
    tail = ternary_tail(total, samples, (most + limit) / 2, (most - limit) / 2)
    return min(1.0, tail + apart)


def loss_p_value(worse: int, samples: int, limit: float) -> float:
    """The same from the losses alone: their share is at least the drop. Exact binomial tail."""
    return binomial_tail(worse, samples, limit)


def _hoeffding(mean: float, limit: float, samples: int) -> float:
    """Hoeffding (1963) for values from -1 to 1."""
    return math.exp(-samples * (limit - mean) ** 2 / 2) if mean < limit else 1.0


def accuracy_p_value(right: int, samples: int, accuracy: float) -> float:
    """Against "the accuracy is at most ``accuracy``". Exact binomial tail."""
    return binomial_tail(samples - right, samples, 1 - accuracy)


def mean_p_value(
    values: Floats, limit: float, error: float, expected: tuple[float, float] = (0.5, 0.25)
) -> float:
    """Against "the mean is ``limit`` or more", of values from 0 to 1 in random order.

    The capital of a bet against it, whose stake follows the variance seen so far, and before that
    the one that is expected. Source:
    Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting",
    section 4 (predictable plug-in), with Ville's inequality: one over the largest capital.

    Args:
        values: (n,) numbers from 0 to 1.
        limit: The mean that is to be excluded.
        error: The error for which it is to be most powerful.
        expected: Mean and variance, known from other samples.
    """
    if limit >= 1:  # no mean is above it
        return 0.0
    if not len(values):
        return 1.0
    counts = np.arange(1, len(values) + 1)
    mean, variance = expected[0], max(expected[1], 1 / (4 * len(values)))
    means = (_PRIOR * mean + np.cumsum(values)) / (counts + _PRIOR)
    spread = (_PRIOR * variance + np.cumsum((values - means) ** 2)) / (counts + _PRIOR)
    before = np.concatenate([[variance], spread[:-1]])
    stakes = np.sqrt(2 * math.log(1 / error) / (len(values) * before))
    stakes = np.minimum(stakes, _BOLDEST / (1 - limit))
    capital = np.cumsum(np.log1p(stakes * (limit - values)))
    return float(min(1.0, math.exp(-max(0.0, capital.max()))))


# -- how many samples it takes ---------------------------------------------------------------------


def samples_for_drop(limit: float, error: float) -> float:
    """Samples that exclude a drop if none of them changes."""
    return math.log(error) / math.log1p(-limit) if limit > 0 else math.inf


def samples_for_accuracy(accuracy: float, error: float) -> float:
    """Samples that show an accuracy if all are right."""
    if accuracy <= 0:
        return 0.0
    return math.log(error) / math.log(accuracy) if accuracy < 1 else math.inf


def samples_for_mean(limit: float, error: float) -> float:
    """Samples that exclude a mean if all are 0."""
    if limit <= 0:
        return math.inf
    stake = _BOLDEST / (1 - limit) if limit < 1 else math.inf
    return -math.log(error) / math.log1p(stake * limit) if limit < 1 else 0.0
