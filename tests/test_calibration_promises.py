"""Promises hold: exact sums over small cases, and draws of samples whose true risk is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.calibration import COSTS, simulated
from s2d_compiler.calibration.binomial import binomial_tail, interval, ternary_tail, upper_limit
from s2d_compiler.calibration.bounds import (
    accuracy_p_value,
    drop_p_value,
    loss_p_value,
    mean_p_value,
)
from s2d_compiler.calibration.promises import promise, require_samples, split
from s2d_compiler.calibration.solver import exits_of
from s2d_compiler.calibration.targets import MaxDrop, MeanBudget
from s2d_compiler.errors import CalibrationError


def test_tails_and_intervals_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count, trials, share in itertools.product((0, 1, 7, 40), (40, 500), (1e-3, 0.02, 0.5)):
        tail = stats.binom.cdf(count, trials, share)
        assert binomial_tail(count, trials, share) == pytest.approx(tail, abs=1e-12)
        exact = stats.binomtest(count, trials).proportion_ci(0.95)
        assert interval(count, trials, 0.95) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert upper_limit(3, 3, 0.05) == 1.0
    assert interval(0, 0, 0.95) == (0.0, 1.0)


def test_the_tail_of_a_ternary_sum() -> None:
    plus, minus, trials = 0.2, 0.1, 9
    sums = np.ones(1)
    for _ in range(trials):
        sums = np.convolve(sums, [minus, 1 - plus - minus, plus])
    for total in range(-trials - 2, trials + 3):
        exact = sums[: max(0, total + trials + 1)].sum()
        assert ternary_tail(total, trials, plus, minus) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_a_drop_is_wrongly_excluded_with_at_most_the_error(error: float) -> None:
    """Over every outcome, for distributions at the limit and beyond: the exact probability."""
    samples, limit = 40, 0.12
    counts = [(w, b) for w in range(samples + 1) for b in range(samples + 1 - w)]
    passing = [c for c in counts if drop_p_value(*c, samples, limit, error) <= error]
    alone = [c for c in counts if loss_p_value(c[0], samples, limit) <= error]
    assert len(passing) > len(alone) > 0
    logs = [math.lgamma(k + 1) for k in range(samples + 1)]
    largest = 0.0
    for better, extra in itertools.product((0.0, 0.01, 0.05, 0.2, 0.4), (0.0, 0.05)):
        worse = better + limit + extra
        for accepted in (passing, alone):
            total = 0.0
            for w, b in accepted:
                rest = samples - w - b
                term = logs[samples] - logs[w] - logs[b] - logs[rest]
                term += w * math.log(worse) + rest * math.log(1 - worse - better)
                if better or not b:
                    total += math.exp(term + (b * math.log(better) if b else 0.0))
            assert total <= error + 1e-9
            largest = max(largest, total)
    assert largest > error / 2  # and the bound is not much larger than need be


def test_a_mean_is_wrongly_excluded_with_at_most_the_error() -> None:
    """Over every sequence of a few values: the exact probability."""
    samples, limit, error = 12, 0.4, 0.2
    for weights in ((0.6, 0.0, 0.4), (0.4, 0.4, 0.2), (0.2, 0.8, 0.0), (0.5, 0.1, 0.4)):
        assert weights[1] * 0.5 + weights[2] >= limit - 1e-12
        kinds = [k for k in range(3) if weights[k]]
        total = 0.0
        for sequence in itertools.product(kinds, repeat=samples if len(kinds) < 3 else 8):
            values = np.array(sequence) / 2
            if mean_p_value(values, limit, error) <= error:
                total += math.prod(weights[k] for k in sequence)
        assert total <= error
    assert mean_p_value(np.zeros(40), limit, 0.05) < 0.05
    assert mean_p_value(np.full(1000, 0.35), limit, 0.05) < 0.05
    assert mean_p_value(np.full(1000, 0.41), limit, 0.05) == 1.0


def test_an_accuracy_is_shown_by_the_exact_tail() -> None:
    assert accuracy_p_value(60, 60, 0.95) == pytest.approx(0.95**60)
    assert accuracy_p_value(0, 60, 0.95) == 1.0


@pytest.mark.parametrize(
    ("target", "most_slack"),
    [
        (MaxDrop(0.02), 0.014),
        (MeanBudget(macs=0.3), 0.05),
        (MaxDrop(0.02, against=0.94), 0.02),
    ],
    ids=str,
)
def test_promises_are_broken_at_most_as_often_as_they_say(
    target: MaxDrop | MeanBudget, most_slack: float
) -> None:
    """Draws from exits whose true risk is known; ``benchmarks.calibration`` makes a thousand.

    At a true rate of 5%, more than 6 of 40 broken ones have a probability of 0.3%.
    """
    costs, draws = COSTS[3], 40
    certainty, right = simulated(20_000, 3, 9)
    broken, slack = 0, []
    for draw in range(draws):
        rows = np.random.default_rng(draw).integers(0, len(right), 1500)
        choosing, testing = (rows[part] for part in split(len(rows), draw))
        found = promise(
            (certainty[choosing], right[choosing]), (certainty[testing], right[testing]),
            costs, target, 0.95,
        )  # fmt: skip
        if found is None:
            continue
        exits = exits_of(certainty, found.solution.thresholds)
        if isinstance(target, MeanBudget):
            room = target.value(costs) - float(np.asarray(costs)[exits].mean())
        else:
            last = right[:, -1].mean() if target.against is None else target.against
            drop = last - right[np.arange(len(right)), exits].mean()
            room = target.drop - float(drop)
        broken += room < 0
        slack.append(room)
    assert len(slack) > 0.8 * draws
    assert broken <= 6
    assert np.mean(slack) < most_slack


def test_a_fit_breaks_more_often_than_a_promise() -> None:
    """What the promise is for."""
    from s2d_compiler.calibration.solver import solve

    certainty, right = simulated(20_000, 3, 9)
    broken = 0
    for draw in range(20):
        rows = np.random.default_rng(draw).integers(0, len(right), 1500)
        found = solve(certainty[rows], right[rows], COSTS[3], MaxDrop(0.02))
        assert found is not None
        exits = exits_of(certainty, found.thresholds)
        drop = right[:, -1].mean() - right[np.arange(len(right)), exits].mean()
        broken += drop > 0.02
    assert broken >= 5


def test_where_all_stages_agree_the_number_that_is_named_suffices() -> None:
    target = MaxDrop(0.01)
    with pytest.raises(CalibrationError, match="takes 460 at the least"):
        require_samples(target, COSTS[3], 400, 0.95)
    require_samples(target, COSTS[3], 460, 0.95)
    certainty = np.random.default_rng(0).random((460, 2))
    right = np.ones((460, 3), dtype=bool)
    choosing, testing = split(460, 0)
    found = promise(
        (certainty[choosing], right[choosing]), (certainty[testing], right[testing]),
        COSTS[3], target, 0.95,
    )  # fmt: skip
    assert found is not None
    assert found.p_value <= 0.05
    assert found.solution.cost == pytest.approx(COSTS[3][0])


def test_exits_that_are_never_right_promise_nothing() -> None:
    certainty = np.random.default_rng(0).random((4000, 2))
    right = np.tile([False, False, True], (4000, 1))
    choosing, testing = split(4000, 0)
    found = promise(
        (certainty[choosing], right[choosing]), (certainty[testing], right[testing]),
        COSTS[3], MaxDrop(0.01), 0.95,
    )  # fmt: skip
    assert found is None or found.solution.right / len(choosing) > 0.99


def test_parts_are_disjoint_and_cover_all() -> None:
    choosing, testing = split(1000, 3)
    assert sorted([*choosing, *testing]) == list(range(1000))
    assert not np.array_equal(split(1000, 4)[0], choosing)
