"""What a benchmark finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StaticResult:
    """One form of the original at one batch size; times in milliseconds per batch.

    Attributes:
        form: Backend and memory format.
        typical: Median over rounds, which ratios are made of.
        p50: Over all runs.
        p95: Over all runs.
    """

    form: str
    typical: float
    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class ExitResult:
    """One exit: all samples of a batch leave there.

    Attributes:
        stage: From 1.
        typical, p50, p95: Milliseconds per batch until this exit.
        macs: Cumulative MACs, as a share of the original's.
        time: Typical time, as a share of the fastest static form's; None without one.
        efficiency: ``macs / time``: 1 when time falls as MACs do.
    """

    stage: int
    typical: float
    p50: float
    p95: float
    macs: float
    time: float | None = None
    efficiency: float | None = None


@dataclass(frozen=True, slots=True)
class DynamicResult:
    """One form of the dynamic network at one batch size.

    Attributes:
        form: Backend.
        exits: Per stage.
        mixed: Typical milliseconds of ``predict`` per batch under the exit distribution.
        throughput: Samples per second under it.
        speedup: Throughput over the fastest static form's; None without one.
        break_even: Share of samples that leave early above which the dynamic network is faster
            than the fastest static form, the early ones among themselves as in the distribution;
            0 when it always is, None when it never is, or without a static form.
    """

    form: str
    exits: tuple[ExitResult, ...]
    mixed: float
    throughput: float
    speedup: float | None = None
    break_even: float | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One batch size.

    Attributes:
        batch: Samples.
        static: Forms of the original, the fastest first.
        dynamic: Forms of the dynamic network, the fastest under the distribution first.
    """

    batch: int
    static: tuple[StaticResult, ...]
    dynamic: tuple[DynamicResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def break_even(
    early: Sequence[float], shares: Sequence[float], last: float, static: float
) -> float | None:
    """The share of early exits at which the expected time equals the static network's.

    Args:
        early: Time until each exit but the last.
        shares: Of the samples at these exits; only their proportions count.
        last: Time until the last exit.
        static: Time of the static network.

    Returns:
        0 when even without early exits the dynamic network is faster, None when it never is.
    """
    if last <= static:
        return 0.0
    if not early:
        return None
    total = sum(shares)
    weights = [s / total for s in shares] if total > 0 else [1 / len(early)] * len(early)
    mean = sum(t * w for t, w in zip(early, weights, strict=True))
    return None if mean >= static else (last - static) / (last - mean)
