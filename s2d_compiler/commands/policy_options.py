"""A policy on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from s2d_compiler.errors import PolicyError, UsageError

if TYPE_CHECKING:
    from s2d_compiler.runtime import Policy

__all__ = ["FORMS", "read_policy"]

FORMS = (
    "stored, none, thresholds such as 0.9,0.8 or entropy:0.2,0.4 (never: nobody leaves), macs:N, "
    "batch-macs:N or ms:N"
)


def read_policy(text: str, stored: Policy | None) -> Policy | None:
    """The policy that somebody wrote.

    Args:
        text: ``stored``; ``none``; ``0.9,0.8`` or ``confidence:0.9,0.8`` (also ``margin``,
            ``entropy``), one threshold per stage but the last, ``never`` where nobody leaves;
            ``macs:N`` (per sample), ``batch-macs:N``, ``ms:N``.
        stored: ``dyn.settings.policy``.

    Returns:
        None for ``none``, and for ``stored`` where none is.

    Raises:
        UsageError: It is no policy.
    """
    from s2d_compiler.runtime import MEASURES, Deadline, MacsBudget, Thresholds

    if text in ("stored", "none"):
        return stored if text == "stored" else None
    kind, colon, rest = text.partition(":")
    if not colon:
        kind, rest = "confidence", text
    try:
        if kind in MEASURES:
            never = float("-inf" if kind == "entropy" else "inf")
            values = [never if part == "never" else float(part) for part in rest.split(",")]
            return Thresholds(tuple(values), kind)
        if kind in ("macs", "batch-macs"):
            per = "sample" if kind == "macs" else "batch"
            return MacsBudget(_whole(rest), per)
        if kind == "ms":
            return Deadline(float(rest))
    except ValueError:
        pass
    except PolicyError as error:
        raise UsageError(f"--policy: {error}") from error
    raise UsageError(f"--policy: {json.dumps(text)[:60]} is no policy; write {FORMS}")


def _whole(text: str) -> Any:
    value = float(text.replace("_", ""))
    return int(value) if value.is_integer() else value
