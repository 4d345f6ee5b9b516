"""The monitor: few false alarms however long it runs, and shifts are found."""

from __future__ import annotations

import itertools
import json
import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2d_compiler import load
from s2d_compiler.calibration import calibrate
from s2d_compiler.errors import UsageError
from s2d_compiler.monitoring import Monitor, _log_mixture
from s2d_compiler.runtime import Predictions
from tests.test_evaluation import SAMPLES, in_batches, network, samples

RATES = (0.6, 0.25, 0.15)


def predictions(stages: Any, undefined: int = 0) -> Predictions:
    stage = torch.as_tensor(stages)
    zeros = torch.zeros(len(stage))
    return Predictions(zeros, stage, zeros, zeros.long(), undefined)


def feed(monitor: Monitor, rng: Any, rates: Any, samples: int, batch: int = 100) -> None:
    """Counts of whole batches, without making the samples."""
    for counts in rng.multinomial(batch, rates, size=samples // batch).tolist():
        monitor.count(counts)


def test_few_false_alarms_however_long_it_runs() -> None:
    """500 services of 30,000 samples each, every one with a calibration of its own."""
    rng = numpy.random.default_rng(0)
    level, services, alarms = 0.05, 500, 0
    for _ in range(services):
        calibrated = rng.multinomial(2_000, RATES).tolist()
        monitor = Monitor(calibrated, level, quiet_seconds=math.inf)
        feed(monitor, rng, RATES, 30_000)
        alarms += monitor.state().has_left
    # At the level itself, more than 39 of 500 would come once in 300 times.
    assert alarms <= 39


def test_few_false_alarms_where_thresholds_were_fitted_to_the_calibration_samples() -> None:
    """The rates of calibration are then a little better than those of new samples."""
    rng = numpy.random.default_rng(1)
    alarms = 0
    for _ in range(150):
        values = rng.random((300, 2))
        right = rng.random((300, 3)) < [0.6, 0.7, 0.75]
        grid = numpy.linspace(0.05, 0.95, 19)
        best = max(itertools.product(grid, grid), key=lambda t: _reward(values, right, t))
        exits = _exits(values, best)
        monitor = Monitor(numpy.bincount(exits, minlength=3).tolist(), 0.05, math.inf)
        one, two = 1 - best[0], best[0] * (1 - best[1])
        feed(monitor, rng, (one, two, 1 - one - two), 20_000)
        alarms += monitor.state().has_left
    assert alarms <= 15  # at the level itself, more would come once in 250 times


def _exits(values: Any, thresholds: Any) -> Any:
    first, second = (values[:, t] >= thresholds[t] for t in range(2))
    return numpy.where(first, 0, numpy.where(second, 1, 2))


def _reward(values: Any, right: Any, thresholds: Any) -> float:
    exits = _exits(values, thresholds)
    return float(right[numpy.arange(len(exits)), exits].mean() - 0.05 * exits.mean())


@pytest.mark.parametrize(
    ("shifted", "within"), [((0.5, 0.3, 0.2), 5_000), ((0.4, 0.3, 0.3), 700), ((0, 0, 1), 100)]
)
@pytest.mark.parametrize("before", [0, 20_000, 200_000])
def test_a_shift_is_found_soon_whenever_it_comes(
    shifted: tuple[float, ...], within: int, before: int
) -> None:
    """Within so many samples in each of 20 services; a block may have to end first."""
    rng = numpy.random.default_rng(2)
    for _ in range(20):
        monitor = Monitor(rng.multinomial(5_000, RATES).tolist(), 0.01, quiet_seconds=math.inf)
        feed(monitor, rng, RATES, before, 1000 if before else 1)
        assert not monitor.state().has_left
        feed(monitor, rng, shifted, within if not before else 2 * within + 1_000, 50)
        state = monitor.state()
        assert state.has_left
        assert state.left_at is not None
        assert before < state.left_at <= state.samples
        assert state.p_value <= 0.01
        assert state.left_rates is not None
        assert abs(state.left_rates[0] - shifted[0]) < abs(state.left_rates[0] - RATES[0])


def test_the_mixture_is_a_probability() -> None:
    """Of all sequences of one length together: 1."""
    total = 0.0
    for counts in itertools.product(range(7), repeat=3):
        if sum(counts) == 6:
            ways = math.factorial(6) / math.prod(map(math.factorial, counts))
            total += ways * math.exp(_log_mixture(counts))
    assert total == pytest.approx(1)


def test_the_evidence_has_a_mean_of_at_most_one_at_every_time() -> None:
    """Exactly, over all sequences: a calibration of 3 samples, then up to 5 of service."""
    rates = (0.7, 0.3)
    for length in range(6):
        mean = 0.0
        for calibrated, seen in itertools.product(range(4), range(length + 1)):
            known, new = (3 - calibrated, calibrated), (length - seen, seen)
            monitor = Monitor(known, 0.5, quiet_seconds=math.inf)
            total = [c + k for c, k in zip(known, new, strict=True)]
            probability = math.comb(3, calibrated) * math.comb(length, seen)
            probability *= math.prod(r**n for r, n in zip(rates, total, strict=True))
            largest = math.prod((n / sum(total)) ** n for n in total)
            mean += probability * math.exp(monitor._constant + _log_mixture(new)) / largest
        assert mean <= 1 + 1e-12


@given(st.lists(st.integers(0, 2), min_size=1, max_size=300), st.integers(1, 70))
def test_what_is_counted(stages: list[int], batch: int) -> None:
    monitor = Monitor([6, 3, 1])
    for start in range(0, len(stages), batch):
        part = stages[start : start + batch]
        monitor.add(predictions(part, undefined=len(part) % 2))
    state = monitor.state()
    assert state.exits == tuple(stages.count(t) for t in range(3))
    assert state.samples == len(stages) == sum(state.exits)
    assert state.rates == tuple(n / len(stages) for n in state.exits)
    assert state.calibrated == (0.6, 0.3, 0.1)
    assert 0 <= state.p_value <= 1


def test_no_samples_are_no_evidence() -> None:
    monitor = Monitor([6, 3, 1])
    assert monitor.add(predictions(torch.zeros(0, dtype=torch.long))) is False
    state = monitor.state()
    assert (state.samples, state.rates, state.p_value) == (0, (0, 0, 0), 1)


def test_one_by_one_is_like_in_batches() -> None:
    rng = numpy.random.default_rng(3)
    stages = rng.choice(3, 2048, p=(0.5, 0.3, 0.2))
    found = []
    for size in (1, 32, 64):
        monitor = Monitor([6000, 2500, 1500], quiet_seconds=math.inf)
        for part in numpy.split(stages, 2048 // size):
            monitor.add(predictions(part))
        found.append(monitor.state())
    assert found[0] == found[1]
    assert found[0].exits == found[2].exits
    assert found[0].has_left == found[2].has_left


def test_blocks_share_the_level() -> None:
    monitor = Monitor([600, 400], 0.04)
    whole, *blocks = monitor._spans
    assert whole.share() == pytest.approx(0.008)
    for span in (whole, *blocks):
        assert span.level == pytest.approx(0.008)
    for span in blocks:
        shares = []
        for number in range(1, 2000):
            span.number = number
            shares.append(span.share())
        assert 0.00799 < sum(shares) <= 0.008


def test_warnings_are_few_and_say_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor([600, 400], quiet_seconds=0.05)
    for _ in range(50):
        monitor.add(predictions([1] * 64))
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "exit rates have left those of calibration" in text
    assert "stage 1 0.0% (calibration 60.0%)" in text
    assert "calibrate again" in text
    assert caplog.records[0].levelno == logging.WARNING
    time.sleep(0.06)
    assert monitor.add(predictions([1]))
    assert len(caplog.records) == 2


def test_nan_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor([600, 400])
    for _ in range(3):
        monitor.add(predictions([0, 1], undefined=2))
    assert monitor.state().nan_confidences == 6
    (record,) = caplog.records
    assert "measure was NaN (2 times in 2 samples)" in record.getMessage()


def test_threads_share_a_monitor() -> None:
    monitor = Monitor([600, 400], quiet_seconds=math.inf)

    def work(stage: int) -> None:
        for _ in range(500):
            monitor.add(predictions([stage] * 3))
            monitor.state()

    threads = [threading.Thread(target=work, args=(n % 2,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.state().exits == (3000, 3000)


def test_reset_and_plain_data() -> None:
    monitor = Monitor([600, 400])
    monitor.add(predictions([1] * 900, undefined=1))
    data = json.loads(json.dumps(monitor.to_dict()))
    assert data["has_left"] is True
    assert data["exits"] == [0, 900]
    assert data["level"] == 0.01
    monitor.reset()
    fresh = Monitor([600, 400])
    assert monitor.state() == fresh.state()
    monitor.add(predictions([0, 0, 0, 1, 1]))
    assert not monitor.state().has_left


def test_it_costs_microseconds() -> None:
    """Beside a prediction, which takes milliseconds; generous, for machines that are busy."""
    monitor = Monitor([6000, 2500, 1500], quiet_seconds=math.inf)
    rng = numpy.random.default_rng(4)
    parts = [predictions(rng.choice(3, 16, p=RATES)) for _ in range(100)]
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for part in parts:
            monitor.add(part)
        best = min(best, (time.perf_counter() - start) / len(parts))
    assert best < 100e-6


def test_what_calibration_stored_is_read() -> None:
    stored = {"exit_rates": [0.6, 0.25, 0.15], "measured_on": 2000, "accuracy": 0.9}
    state = Monitor(stored).state()
    assert (state.calibrated, state.calibration_samples) == (RATES, 2000)


def test_what_calibrate_stores_is_read(tmp_path: Path) -> None:
    """From calibration through a file to the monitor."""
    dyn = network()
    calibrate(dyn, in_batches(20), "reward=-0.06")
    dyn.save(tmp_path / "dyn.pt")
    stored = load(tmp_path / "dyn.pt")
    monitor = Monitor(stored)
    inputs, _ = samples()
    monitor.add(stored.eval().predict(inputs))
    state = monitor.state()
    assert state.rates == pytest.approx(state.calibrated)  # the very same samples
    assert state.calibration_samples == SAMPLES
    assert len(set(state.exits)) > 1
    assert not state.has_left


@pytest.mark.parametrize(
    "stored",
    [{}, {"exit_rates": [0.5, 0.5]}, {"exit_rates": "ab", "measured_on": 3}, [], [0, 0], [1.5, 2],
     {"exit_rates": [0.5, 0.6], "measured_on": 10}, {"exit_rates": [], "measured_on": 10},
     {"exit_rates": [math.nan, 0.5], "measured_on": 10}, {"exit_rates": [1.0], "measured_on": 0},
     {"exit_rates": [1.5, -0.5], "measured_on": 10}, "abc", 3],
)  # fmt: skip
def test_what_is_no_calibration(stored: Any) -> None:
    with pytest.raises(UsageError, match="does not say how many samples left at each stage"):
        Monitor(stored)


def test_predictions_of_another_network() -> None:
    monitor = Monitor([600, 400])
    for stages in ([2], [0, 2]):
        with pytest.raises(UsageError, match="left at stage 3, and calibration knows 2 stages"):
            monitor.add(predictions(stages))
    assert monitor.state().samples == 0
