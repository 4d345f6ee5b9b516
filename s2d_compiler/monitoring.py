"""Watching a network that runs: are samples still leaving where they left in calibration?

Exit rates are compared while they come in, after any number of samples, so a test for a fixed
number would raise false alarms sooner or later. The evidence here is always valid: the probability
that it *ever* passes its limit while inputs are like those of calibration is at most ``level``.

Evidence after service counts k, with calibration counts c, is the likelihood ratio

    mixture(c) * mixture(k) / max over p of likelihood(c and k together; p)

in which ``mixture`` is the likelihood averaged over all rates (Dirichlet with parameters 1/2).
Where c and k come from the same rates p, it is at most mixture(c) mixture(k) / likelihood(p), a
nonnegative martingale that starts from a mean of 1, and by Ville's inequality it passes 1/a with a
probability of at most a. That calibration saw only so many samples is thus taken into account.

Sources: Wasserman, Ramdas and Balakrishnan, "Universal inference" (PNAS, 2020), for the ratio and
its sequential form; Lindon and Malek, "Anytime-valid inference for multinomial count data" (NeurIPS
2022), for Dirichlet mixtures over counts; Ville, "Étude critique de la notion de collectif" (1939).

All samples since the start would outvote a change that comes late. So several spans are watched:
all samples, and blocks of 64,000, 16,000, 4,000 and 1,000. Each block is a new test that starts
from nothing, and block j gets the share 1 / (j (j + 1)) of its span's part of ``level``; the parts
add up to it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from s2d_compiler.errors import UsageError

if TYPE_CHECKING:
    from s2d_compiler.dynamic import StagedNetwork
    from s2d_compiler.runtime import Predictions

__all__ = ["Monitor", "MonitorState"]

logger = logging.getLogger(__name__)

#: Block lengths, None for all samples, and the part of the level that each gets.
_SPANS: tuple[tuple[int | None, float], ...] = (
    (None, 0.2),
    (64_000, 0.2),
    (16_000, 0.2),
    (4_000, 0.2),
    (1_000, 0.2),
)
#: Looking at the evidence takes longer than counting; it may be done at any time.
_LOOK_EVERY = 32


@dataclass(frozen=True, slots=True)
class MonitorState:
    """What a monitor has seen.

    Attributes:
        samples: How many, since it was made or reset.
        exits: How many left at each stage.
        rates: The same as shares; zeros while there are none.
        calibrated: The shares in calibration.
        calibration_samples: How many samples those are of.
        nan_confidences: How often an exit's measure was NaN.
        has_left: Whether the rates have left those of calibration, at any time.
        left_at: After how many samples that was noticed; None if it was not.
        left_rates: The shares in the span of samples in which it was noticed.
        p_value: An always-valid one: the smallest level at which the rates would have left. It
            never rises.
    """

    samples: int
    exits: tuple[int, ...]
    rates: tuple[float, ...]
    calibrated: tuple[float, ...]
    calibration_samples: int
    nan_confidences: int
    has_left: bool
    left_at: int | None
    left_rates: tuple[float, ...] | None
    p_value: float

    def __str__(self) -> str:
        stages = ", ".join(
            f"stage {number} {now:.1%} (calibration {then:.1%})"
            for number, (now, then) in enumerate(
                zip(self.left_rates or self.rates, self.calibrated, strict=True), start=1
            )
        )
        return f"{self.samples:,} samples: {stages}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }


class Monitor:
    """Counts where samples leave, and says when that is no longer as it was in calibration.

    ``add`` costs some microseconds beside a prediction. It logs a warning (logger
    ``s2d_compiler.monitoring``) when the exit rates leave those of calibration, and when the first
    NaN comes, at most one every ``quiet_seconds``. Threads may share a monitor.

    Samples are taken to be independent of each other. Inputs that come in runs of similar ones,
    such as the frames of a video, raise more alarms than ``level`` says.

    Example:
        monitor = Monitor(dyn)
        ...
        predictions = dyn.predict(x)
        monitor.add(predictions)

    Args:
        source: A network that ``s2d calibrate`` has written, or what it stored
            (``dyn.settings.calibration``), or how many calibration samples left at each stage.
        level: The probability of ever raising an alarm while inputs are like those of calibration.
        quiet_seconds: The time between two warnings.

    Raises:
        UsageError: There is no calibration, or the level is none.
    """

    def __init__(
        self,
        source: StagedNetwork | Mapping[str, Any] | Sequence[int],
        level: float = 0.01,
        quiet_seconds: float = 60.0,
    ) -> None:
        if not 0 < level < 1:
            raise UsageError(f"level: {level!r} is no probability; give one such as 0.01")
        self._calibrated = _exit_counts(source)
        self.level = level
        self.quiet_seconds = quiet_seconds
        self._lock = threading.Lock()
        self._constant = _log_mixture(self._calibrated)
        self._warned_at = -math.inf
        self._start()

    def _start(self) -> None:
        stages = len(self._calibrated)
        self._exits = [0] * stages
        self._spans = [_Span(length, part * self.level, stages) for length, part in _SPANS]
        self._samples = self._undefined = self._unseen = 0
        self._least = 0.0  # logarithm of the p-value
        self._left_at: int | None = None
        self._left_rates: tuple[float, ...] | None = None

    def reset(self) -> None:
        """Forget all samples, such as after the network was calibrated again.

        The level is that of one start; whoever resets often sees more false alarms.
        """
        with self._lock:
            self._start()

    def add(self, predictions: Predictions) -> bool:
        """Count predictions.

        Args:
            predictions: What ``predict`` returned.

        Returns:
            Whether the exit rates have left those of calibration, now or before.

        Raises:
            UsageError: They are of a network with more stages.
        """
        stages = len(self._calibrated)
        if len(predictions) == 1:
            counts = [0] * max(stages, int(predictions.stage) + 1)
            counts[int(predictions.stage)] = 1
        else:
            counts = predictions.stage.bincount(minlength=stages).tolist()
        return self.count(counts, predictions.nan_confidences)

    def count(self, exits: Sequence[int], nan_confidences: int = 0) -> bool:
        """Like ``add``, from how many samples left at each stage."""
        if len(exits) > len(self._exits):
            raise UsageError(
                f"the predictions left at stage {len(exits)}, and calibration knows "
                f"{len(self._exits)} stages; make a monitor of their own network"
            )
        warning = None
        with self._lock:
            for number, more in enumerate(exits):
                self._exits[number] += more
            count = sum(exits)
            self._samples += count
            self._unseen += count
            first_nan = bool(nan_confidences) and not self._undefined
            self._undefined += nan_confidences
            if self._unseen >= _LOOK_EVERY:
                self._look()
            has_left = self._left_at is not None
            if has_left or first_nan:
                warning = self._due_warning(has_left)
        if warning is not None:
            logger.warning("%s", warning)  # not under the lock: handlers may be slow
        return has_left

    def _look(self) -> None:
        """Weigh the evidence of every span."""
        self._unseen = 0
        for span in self._spans:
            seen = span.counts(self._exits)
            total = [c + k for c, k in zip(self._calibrated, seen, strict=True)]
            evidence = self._constant + _log_mixture(seen) - _log_largest_likelihood(total)
            share = span.share()
            self._least = min(self._least, math.log(self.level / share) - evidence)
            if evidence >= -math.log(share) and self._left_at is None:
                self._left_at = self._samples
                self._left_rates = tuple(count / sum(seen) for count in seen)
            span.go_on(self._exits, self._samples)

    def _due_warning(self, has_left: bool) -> str | None:
        now = time.monotonic()
        if now - self._warned_at < self.quiet_seconds:
            return None
        self._warned_at = now
        if has_left:
            return (
                f"exit rates have left those of calibration: {self._state()}; the inputs or the "
                "network differ from those of calibration: look at them, and calibrate again"
            )
        return (
            f"an exit's measure was NaN ({self._undefined} times in {self._samples:,} samples), "
            "which lets nobody leave early: look for NaN or infinity in the inputs"
        )

    def state(self) -> MonitorState:
        """What has been seen so far, all evidence weighed."""
        with self._lock:
            if self._unseen:
                self._look()
            return self._state()

    def _state(self) -> MonitorState:
        samples, known = self._samples, sum(self._calibrated)
        return MonitorState(
            samples=samples,
            exits=tuple(self._exits),
            rates=tuple(count / max(samples, 1) for count in self._exits),
            calibrated=tuple(count / known for count in self._calibrated),
            calibration_samples=known,
            nan_confidences=self._undefined,
            has_left=self._left_at is not None,
            left_at=self._left_at,
            left_rates=self._left_rates,
            p_value=math.exp(max(self._least, -700.0)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data of ``state``, with the level, for JSON."""
        return {**self.state().to_dict(), "level": self.level}


class _Span:
    """All samples, or one block of them after the other."""

    def __init__(self, length: int | None, level: float, stages: int) -> None:
        self.length = length
        self.level = level
        self.before = [0] * stages
        self.began = 0
        self.number = 1

    def counts(self, exits: Sequence[int]) -> list[int]:
        """Exits since the block began."""
        return [now - then for now, then in zip(exits, self.before, strict=True)]

    def share(self) -> float:
        """The block's part of the level: they add up to the span's."""
        if self.length is None:
            return self.level
        return self.level / (self.number * (self.number + 1))

    def go_on(self, exits: Sequence[int], samples: int) -> None:
        """Begin the next block if this one is full."""
        if self.length is not None and samples - self.began >= self.length:
            self.before = list(exits)
            self.began = samples
            self.number += 1


def _log_mixture(counts: Sequence[int]) -> float:
    """Logarithm of the likelihood of a sequence with these counts, averaged over all rates."""
    half = 0.5 * len(counts)
    found = math.lgamma(half) - math.lgamma(half + sum(counts))
    for count in counts:
        found += math.lgamma(0.5 + count) - _LGAMMA_HALF
    return found


_LGAMMA_HALF = math.lgamma(0.5)


def _log_largest_likelihood(counts: Sequence[int]) -> float:
    """Logarithm of the likelihood of a sequence with these counts, at the rates that suit best."""
    total = sum(counts)
    return sum(count * math.log(count / total) for count in counts if count)


def _exit_counts(source: Any) -> tuple[int, ...]:
    """How many calibration samples left at each stage."""
    settings = getattr(source, "settings", None)
    found = source if settings is None else settings.calibration
    if found is None:
        raise UsageError(
            "the network has no calibration, and a monitor compares with it; run s2d calibrate "
            "first, or hand in how many samples left at each stage"
        )
    counts: Any = _counts_of_rates(found) if isinstance(found, Mapping) else found
    plain = isinstance(counts, Sequence) and all(type(c) is int and c >= 0 for c in counts)
    if not plain or not sum(counts):
        raise UsageError(
            f"calibration: {str(found)[:60]!r} does not say how many samples left at each stage, "
            "and a monitor compares with that; calibrate the network again"
        )
    return tuple(counts)


def _counts_of_rates(calibration: Mapping[str, Any]) -> list[int] | None:
    """Whole numbers from what calibration stored, which may be anybody's; None if they are none."""
    rates, samples = calibration.get("exit_rates"), calibration.get("measured_on")
    if type(samples) is not int or not 0 < samples < 2**53 or not isinstance(rates, list | tuple):
        return None
    if not all(type(rate) in (int, float) and 0 <= rate <= 1 for rate in rates):
        return None
    return [round(rate * samples) for rate in rates] if abs(sum(rates) - 1) < 1e-6 else None
