"""What thresholds are to achieve: typed targets, and their text for ``--target``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2d_compiler.calibration.search import Score
from s2d_compiler.errors import CalibrationError

#: Sums of costs may differ by rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class MaxDrop:
    """Least cost at an accuracy of at most ``drop`` below that of the last stage.

    Args:
        drop: Share of all samples: 0.005 for half a percentage point.
        against: An accuracy to compare with in place of the last stage's, such as the static
            network's: 0.932.

    Raises:
        CalibrationError: It is no share.
    """

    drop: float
    against: float | None = None

    def __post_init__(self) -> None:
        _require(self.drop, "drop", 0, 1, "a share from 0 to 1, such as 0.005 or 0.5%")
        if self.against is not None:
            _require(self.against, "against", 0, 1, "an accuracy from 0 to 1, such as 93.2%")

    def __str__(self) -> str:
        reference = "the last stage" if self.against is None else f"{self.against:.2%}"
        return f"least cost at an accuracy at most {_percent(self.drop)} below {reference}"

    def needed(self, last_right: float, samples: int) -> float:
        """How many of the samples must be right."""
        reference = last_right if self.against is None else self.against * samples
        return math.ceil(reference - self.drop * samples - 1e-9)

    def score(self, samples: int, last_right: float, costs: tuple[float, ...]) -> Score:
        """Less cost is better, where enough are right; of equal costs, more right."""
        needed, tie = self.needed(last_right, samples), 1e-9 * costs[0]

        def score(right: Any, cost: Any) -> Any:
            return np.where(right >= needed, tie * right - cost, -np.inf)

        return score


@dataclass(frozen=True, slots=True)
class MeanBudget:
    """Best accuracy at a mean cost per sample of at most a budget.

    Source: MSDNet (Huang et al., 2018), budgeted batch classification.

    Args:
        macs: Multiply-accumulates per sample.
        milliseconds: Milliseconds per sample, in place of MACs.
        share: Share of what the last stage costs in MACs, in place of either.

    Raises:
        CalibrationError: Not exactly one is given, or it is no budget.
    """

    macs: float | None = None
    milliseconds: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        _require_one(self.macs, self.milliseconds, self.share, "a mean budget")

    def __str__(self) -> str:
        return f"best accuracy at a mean of {_cost_text(self)} per sample"

    def value(self, costs: tuple[float, ...]) -> float:
        """The budget per sample, in the unit of the costs."""
        return _cost_value(self, costs)

    def score(self, samples: int, last_right: float, costs: tuple[float, ...]) -> Score:
        """More right is better, where the cost is kept; of equally many, the cheapest."""
        most = self.value(costs) * samples * (1 + _ROUNDING)
        tie = 0.5 / (samples * costs[-1])

        def score(right: Any, cost: Any) -> Any:
            return np.where(cost <= most, right - tie * cost, -np.inf)

        return score


@dataclass(frozen=True, slots=True)
class Reward:
    """Highest ACC * COST^omega, COST being the mean per sample.

    Source: S2DNAS, equation 2, with omega = -0.06 (section 4.1). The unit of COST does not change
    which thresholds are best.

    Args:
        omega: Negative; the further from 0, the more cost counts.

    Raises:
        CalibrationError: It is not below 0.
    """

    omega: float = -0.06

    def __post_init__(self) -> None:
        _require(self.omega, "omega", -100, -1e-12, "a negative number, such as -0.06")

    def __str__(self) -> str:
        return f"highest ACC x COST^{self.omega:g}"

    def score(self, samples: int, last_right: float, costs: tuple[float, ...]) -> Score:
        """The reward."""
        omega = self.omega

        def score(right: Any, cost: Any) -> Any:
            return right / samples * np.power(np.asarray(cost, dtype=float) / samples, omega)

        return score


@dataclass(frozen=True, slots=True)
class Enas4dMetric:
    """Highest ACC_avg * min(COST_target / COST_avg, 1)^omega.

    Source: ENAS4D, "Evaluation metric", with omega = 0.09 ("Model setup").

    Args:
        macs: COST_target in multiply-accumulates per sample.
        milliseconds: The same in milliseconds per sample, in place of MACs.
        share: The same as a share of what the last stage costs in MACs.
        omega: Positive; the larger, the more cost above the target counts.

    Raises:
        CalibrationError: A number is out of range, or not exactly one cost is given.
    """

    macs: float | None = None
    milliseconds: float | None = None
    share: float | None = None
    omega: float = 0.09

    def __post_init__(self) -> None:
        _require_one(self.macs, self.milliseconds, self.share, "ENAS4D's metric")
        _require(self.omega, "omega", 1e-12, 100, "a positive number, such as 0.09")

    def __str__(self) -> str:
        return f"highest ACC x min({_cost_text(self)} / COST, 1)^{self.omega:g}"

    def value(self, costs: tuple[float, ...]) -> float:
        """COST_target, in the unit of the costs."""
        return _cost_value(self, costs)

    def score(self, samples: int, last_right: float, costs: tuple[float, ...]) -> Score:
        """The metric; of equal ones, the cheapest."""
        most, omega = self.value(costs) * samples, self.omega
        tie = 1e-9 / (samples * costs[-1])

        def score(right: Any, cost: Any) -> Any:
            cost = np.asarray(cost, dtype=float)
            return right / samples * np.power(np.minimum(most / cost, 1), omega) - tie * cost

        return score


Target = MaxDrop | MeanBudget | Reward | Enas4dMetric


def wants_milliseconds(target: Target) -> bool:
    """Whether a target is in milliseconds."""
    return getattr(target, "milliseconds", None) is not None


# -- numbers ---------------------------------------------------------------------------------------


def _require(value: Any, what: str, least: float, most: float, rule: str) -> None:
    if not isinstance(value, int | float) or value is True or not least <= value <= most:
        raise CalibrationError(f"target: {what} is {value!r}, and must be {rule}; change it.")


def _require_one(macs: Any, milliseconds: Any, share: Any, what: str) -> None:
    given = {"macs": macs, "milliseconds": milliseconds, "share": share}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise CalibrationError(
            f"target: {what} has {', '.join(given) or 'no cost'}, and takes exactly one of macs, "
            "milliseconds and share; give one."
        )
    ((name, value),) = given.items()
    _require(value, name, 1e-300, 1e300, "a positive number")


def _cost_value(target: MeanBudget | Enas4dMetric, costs: tuple[float, ...]) -> float:
    if target.share is not None:
        return target.share * costs[-1]
    value = target.macs if target.milliseconds is None else target.milliseconds
    assert value is not None
    return value


def _cost_text(target: MeanBudget | Enas4dMetric) -> str:
    if target.share is not None:
        return f"{_percent(target.share)} of the last stage's MACs"
    if target.milliseconds is not None:
        return f"{target.milliseconds:g} ms"
    return f"{target.macs:,.0f} MACs"


def _percent(share: float) -> str:
    return f"{share * 100:g}%"


# -- text ------------------------------------------------------------------------------------------

_KINDS = "drop=0.5%, macs=60%, macs=2e8, ms=3.5, reward=-0.06 or enas4d=2e8"
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(%?)")


def parse_target(text: str) -> Target:
    """Read a target as it stands on a command line.

    - ``drop=0.5%``, ``drop=0.005``, ``drop=0.5%,against=93.2%``: `MaxDrop`
    - ``macs=60%`` (of the last stage's), ``macs=2e8``, ``ms=3.5``: `MeanBudget`
    - ``reward=-0.06``, ``reward``: `Reward`
    - ``enas4d=2e8``, ``enas4d=60%``, ``enas4d=2e8,omega=0.09``: `Enas4dMetric`

    Raises:
        CalibrationError: It is none.
    """
    words = dict(_word(part) for part in text.split(","))
    kind = next(iter(words))
    known = {
        "drop": {"drop", "against"},
        "macs": {"macs"},
        "ms": {"ms"},
        "reward": {"reward"},
        "enas4d": {"enas4d", "omega"},
    }
    if kind not in known or set(words) - known[kind] or len(words) != text.count(",") + 1:
        raise CalibrationError(f"--target: {text[:60]!r} is no target; write {_KINDS}.")
    numbers = {word: _number(word, value) for word, value in words.items() if value is not None}
    if kind == "reward":
        return Reward(numbers["reward"][0]) if numbers else Reward()
    if len(numbers) < len(words):
        raise CalibrationError(f"--target: {text[:60]!r} lacks a number; write {_KINDS}.")
    value, is_share = numbers[kind]
    if kind == "drop":
        return MaxDrop(value, numbers["against"][0] if "against" in numbers else None)
    if kind == "ms":
        return MeanBudget(milliseconds=value)
    if kind == "macs":
        return MeanBudget(share=value) if is_share else MeanBudget(macs=value)
    omega = numbers["omega"][0] if "omega" in numbers else 0.09
    if is_share:
        return Enas4dMetric(share=value, omega=omega)
    return Enas4dMetric(macs=value, omega=omega)


def _word(part: str) -> tuple[str, str | None]:
    name, equals, value = part.partition("=")
    return name.strip().lower(), value.strip() if equals else None


def _number(word: str, text: str) -> tuple[float, bool]:
    """A number, and whether it is a percentage."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise CalibrationError(
            f"--target: {word}={text[:40]!r} is no number; write one such as 0.5%, 2e8 or 3.5."
        )
    value = float(found[1])
    return (value / 100, True) if found[2] else (value, False)
