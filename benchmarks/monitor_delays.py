"""How often the monitor raises a false alarm, and after how many samples it finds a shift.

    python -m benchmarks.monitor_delays [--services 500]

Prints the tables of docs/evaluation.md. Services are simulated: exits are drawn from given rates,
for a calibration and for what follows, a new calibration for every service.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence

import numpy as np

from s2d_compiler.monitoring import Monitor

RATES = (0.6, 0.25, 0.15)
SHIFTS = ((0.55, 0.275, 0.175), (0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.2, 0.3, 0.5))
BATCH = 50


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=500)
    logging.disable()
    services = parser.parse_args().services
    print("| calibration samples | level | services with a false alarm |")
    print("|---:|---:|---:|")
    for known in (300, 2_000, 10_000):
        for level in (0.01, 0.1):
            share = false_alarms(services, known, level, samples=50_000)
            print(f"| {known:,} | {level:.0%} | {share:.1%} |")
    print()
    print("| exit rates become | from the start | after 100,000 samples |")
    print("|---|---:|---:|")
    for rates in SHIFTS:
        delays = [delay(services, rates, before) for before in (0, 100_000)]
        text = "/".join(f"{100 * rate:g}" for rate in rates)
        print(f"| {text}% | {delays[0]:,.0f} | {delays[1]:,.0f} |")


def false_alarms(services: int, known: int, level: float, samples: int) -> float:
    """Share of services in which the monitor ever raises an alarm without a shift."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(services):
        monitor = Monitor(_counts(generator, RATES, known), level, quiet_seconds=math.inf)
        alarms += _feed(monitor, generator, RATES, samples, 250)
    return alarms / services


def delay(services: int, rates: Sequence[float], before: int, known: int = 10_000) -> float:
    """Samples after the shift within which 95% of the services (level 1%) find it."""
    generator = np.random.default_rng(1)
    found = []
    for _ in range(services):
        monitor = Monitor(_counts(generator, RATES, known), 0.01, quiet_seconds=math.inf)
        _feed(monitor, generator, RATES, before, 1_000)
        _feed(monitor, generator, rates, 100_000, BATCH)
        left_at = monitor.state().left_at
        found.append(math.inf if left_at is None else left_at - before)
    return float(np.quantile(found, 0.95, method="higher"))


def _counts(generator: np.random.Generator, rates: Sequence[float], samples: int) -> list[int]:
    return [int(count) for count in generator.multinomial(samples, rates)]


def _feed(
    monitor: Monitor,
    generator: np.random.Generator,
    rates: Sequence[float],
    samples: int,
    batch: int,
) -> bool:
    """Count batches until the samples are through or an alarm is raised."""
    for counts in generator.multinomial(batch, rates, size=samples // batch).tolist():
        if monitor.count(counts):
            return True
    return False


if __name__ == "__main__":
    main()
