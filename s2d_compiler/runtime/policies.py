"""When a sample leaves: thresholds, hard budgets, deadlines. Data only; stored with a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from s2d_compiler.errors import PolicyError
from s2d_compiler.fields import Fields, damaged, shown
from s2d_compiler.runtime.measures import LARGER_IS_CERTAIN, MEASURES, Function, largest_value

#: The largest budget: what 64 bits hold.
_MOST = 2**63 - 1
#: A threshold that lets everybody leave may lie a little above what rounding makes of the largest.
_ROUNDING = 1.02


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A sample leaves at the first exit that is certain enough of it.

    Source: S2DNAS, section 3.1; DDI, section 3.2, for entropy.

    Args:
        values: One number per stage but the last. A sample leaves stage t where the measure is
            at least ``values[t]`` (entropy: at most). ``math.inf`` (entropy: ``-math.inf``) lets
            nobody leave there. A value that is NaN never leaves.
        measure: ``"confidence"``, ``"entropy"``, ``"margin"``, or a function of a stage's output
            that returns (N,) numbers, larger for more certainty. ``runtime.measures`` defines them.
        temperatures: One positive number per stage that its logits are divided by, or None.

    Raises:
        PolicyError: A number is out of the measure's range.
    """

    values: tuple[float, ...]
    measure: str | Function = "confidence"
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.measure, str) and self.measure in MEASURES) and not callable(
            self.measure
        ):
            raise PolicyError(
                f"measure: {self.measure!r} is none; take one of {', '.join(MEASURES)}, or a "
                "function of the stage's output."
            )
        values = _numbers(self.values, "thresholds")
        for number, value in enumerate(values, start=1):
            self._check(value, number)
        object.__setattr__(self, "values", values)
        if self.temperatures is None:
            return
        temperatures = _numbers(self.temperatures, "temperatures")
        for number, value in enumerate(temperatures, start=1):
            if not 0 < value < math.inf:
                raise PolicyError(
                    f"temperatures: {value!r} of stage {number} is not above 0; give positive "
                    "numbers, 1 to leave the logits as they are."
                )
        if len(temperatures) != len(values) + 1:
            raise PolicyError(
                f"temperatures: {len(temperatures)} for {len(values)} thresholds; give one per "
                f"stage, the last included ({len(values) + 1})."
            )
        if not isinstance(self.measure, str):
            raise PolicyError(
                "temperatures: a measure of one's own has none; divide by them in the function."
            )
        object.__setattr__(self, "temperatures", temperatures)

    def _check(self, value: float, number: int) -> None:
        if not isinstance(self.measure, str):
            rule = None if not math.isnan(value) else "a number"
        elif self.measure == "entropy":
            rule = None if 0 <= value < math.inf or value == -math.inf else "from 0 on, or -inf"
        else:
            rule = None if 0 <= value <= 1 or value == math.inf else "from 0 to 1, or inf"
        if rule is not None:
            what = self.measure if isinstance(self.measure, str) else "the measure"
            raise PolicyError(
                f"thresholds: {value!r} at stage {number} is no value of {what}; give {rule} for a "
                "stage where nobody leaves."
                if rule != "a number"
                else f"thresholds: {value!r} at stage {number} compares with nothing; give numbers."
            )

    def require_stages(self, count: int) -> None:
        """Refuse a network of another number of stages.

        Raises:
            PolicyError: It is one.
        """
        if len(self.values) != count - 1:
            raise PolicyError(
                f"thresholds: {len(self.values)} for a network of {count} stages; give one per "
                f"stage but the last ({count - 1})."
            )

    def require_classes(self, stage: int, classes: int) -> None:
        """Refuse a threshold that no measure of so many classes comes to.

        Args:
            stage: Whose threshold, an index; not the last.
            classes: How many numbers the stage's output has for a sample.

        Raises:
            PolicyError: It is above the largest value.
        """
        if not isinstance(self.measure, str):
            return
        bound, most = self.values[stage], largest_value(self.measure, classes)
        if bound > most * _ROUNDING and bound != math.inf:
            raise PolicyError(
                f"thresholds: {bound!r} at stage {stage + 1} is above the largest {self.measure} "
                f"of {classes} classes ({most:.6g}); give a value up to it."
            )

    @property
    def larger_is_certain(self) -> bool:
        """Whether a larger value of the measure means more certainty."""
        return not isinstance(self.measure, str) or LARGER_IS_CERTAIN[self.measure]


@dataclass(frozen=True, slots=True)
class MacsBudget:
    """A hard limit on multiply-accumulates; never exceeded.

    Per sample, no stage starts whose cumulative cost is above it. Per batch, stage 1 runs for
    all, and of what is left the least certain samples go on, as many as can be paid for the next
    stage; then again. A sample whose certainty is NaN goes on first.

    Source: DDI, section 3.2 (inference under a hard resource constraint).

    Args:
        macs: Multiply-accumulates, of one sample or of a whole batch.
        per: ``"sample"`` or ``"batch"``.
        thresholds: Where samples leave although they could go on; None to spend what there is.

    Raises:
        PolicyError: It is no budget.
    """

    macs: int
    per: str = "sample"
    thresholds: Thresholds | None = None

    def __post_init__(self) -> None:
        macs: int | float = self.macs
        if isinstance(macs, float) and macs.is_integer():
            macs = int(macs)
        if type(macs) is not int or not 0 < macs <= _MOST:
            raise PolicyError(
                f"macs: {self.macs!r} is no budget; give a positive whole number of "
                "multiply-accumulates."
            )
        object.__setattr__(self, "macs", macs)
        if self.per not in ("sample", "batch"):
            raise PolicyError(f'per: {self.per!r} is neither; say "sample" or "batch".')
        _require_thresholds(self.thresholds)


@dataclass(frozen=True, slots=True)
class Deadline:
    """A time by which to answer, counted from the call of ``predict``.

    Stage 1 always runs. No later stage starts unless its recorded p95 for as many samples fits
    into the time left (``settings.timings``; ``s2d bench --record`` writes them). When the stages
    so far took longer than their recorded p95, the machine is busy, and the next one's is
    stretched by as much.

    Source: DDI, section 3.2 (resource-dependent inference).

    Args:
        milliseconds: For one call.
        thresholds: Where samples leave although there is time; None to use all of it.

    Raises:
        PolicyError: It is no time.
    """

    milliseconds: float
    thresholds: Thresholds | None = None

    def __post_init__(self) -> None:
        (value,) = _numbers([self.milliseconds], "milliseconds")
        if not value > 0:
            raise PolicyError(
                f"milliseconds: {self.milliseconds!r} is no time to answer in; give a positive "
                "number."
            )
        object.__setattr__(self, "milliseconds", value)
        _require_thresholds(self.thresholds)


Policy = Thresholds | MacsBudget | Deadline


def thresholds_of(policy: Policy) -> Thresholds | None:
    """The thresholds of a policy, if it has any."""
    return policy if isinstance(policy, Thresholds) else policy.thresholds


def require_policy(value: Any) -> Policy:
    """Require one of the policies.

    Raises:
        PolicyError: It is something else.
    """
    if not isinstance(value, Policy):
        raise PolicyError(
            f"policy: a {type(value).__name__} is none; give Thresholds, MacsBudget or Deadline, "
            "such as Thresholds((0.9, 0.8))."
        )
    return value


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        _refuse_number(values, what)
    for value in values:
        if type(value) not in (int, float):
            _refuse_number(value, what)
    return tuple(float(value) for value in values)


def _refuse_number(value: Any, what: str) -> NoReturn:
    text = repr(value)
    raise PolicyError(f"{what}: {text[:60]} is no number; give a tuple of plain numbers.")


def _require_thresholds(value: Any) -> None:
    if value is not None and not isinstance(value, Thresholds):
        raise PolicyError(
            f"thresholds: a {type(value).__name__} is none; give Thresholds(...) or None."
        )


# -- as plain data -------------------------------------------------------------------------------


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """Plain data, for JSON and ``dyn.pt``; thresholds that nobody passes are None.

    Raises:
        PolicyError: Its measure is a function, which no file can hold.
    """
    if isinstance(policy, Thresholds):
        if not isinstance(policy.measure, str):
            raise PolicyError(
                f"policy: its measure is a function ({getattr(policy.measure, '__name__', '?')}), "
                "which no file can hold; hand the policy to predict, or take a measure by name."
            )
        return {
            "kind": "thresholds",
            "values": [None if math.isinf(v) else v for v in policy.values],
            "measure": policy.measure,
            "temperatures": None if policy.temperatures is None else list(policy.temperatures),
        }
    inner = None if policy.thresholds is None else policy_to_dict(policy.thresholds)
    if isinstance(policy, MacsBudget):
        return {
            "kind": "macs-budget",
            "macs": policy.macs,
            "per": policy.per,
            "thresholds": inner,
        }
    return {"kind": "deadline", "milliseconds": policy.milliseconds, "thresholds": inner}


def policy_from_dict(data: Fields) -> Policy:
    """Read what ``policy_to_dict`` wrote.

    Raises:
        FormatError: It is no policy.
    """
    kind = data.text("kind")
    if kind == "thresholds":
        return _thresholds(data)
    inner = None if data.value("thresholds") is None else data.inner("thresholds")
    try:
        if kind == "macs-budget":
            thresholds = None if inner is None else _thresholds(inner)
            return MacsBudget(data.number("macs", 1), data.text("per"), thresholds)
        if kind == "deadline":
            thresholds = None if inner is None else _thresholds(inner)
            return Deadline(data.value("milliseconds"), thresholds)
    except PolicyError as error:
        damaged(data.place, str(error).rstrip("."))
    damaged(data.at("kind"), f"{shown(kind)} is no policy")


def _thresholds(data: Fields) -> Thresholds:
    if data.text("kind") != "thresholds":
        damaged(data.at("kind"), f"{shown(data.text('kind'))} stands where thresholds belong")
    measure, temperatures = data.text("measure"), data.value("temperatures")
    never = -math.inf if measure == "entropy" else math.inf
    values = [never if value is None else value for value in data.items("values")]
    given = None if temperatures is None else tuple(data.items("temperatures"))
    try:
        return Thresholds(tuple(values), measure, given)
    except PolicyError as error:
        damaged(data.place, str(error).rstrip("."))
