"""What is stored with a network for running it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2d_compiler.fields import Fields, damaged
from s2d_compiler.runtime.policies import Policy, policy_from_dict, policy_to_dict
from s2d_compiler.runtime.timings import Timings

if TYPE_CHECKING:
    from s2d_compiler.data import Preprocessing


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a network is to be run, and what is known of its running.

    Attributes:
        policy: What ``predict`` uses when it is given none.
        preprocessing: From images to inputs.
        timings: Recorded times per stage, for deadlines.
        calibration: What calibration found and promised: plain data.
    """

    policy: Policy | None = None
    preprocessing: Preprocessing | None = None
    timings: Timings | None = None
    calibration: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``dyn.pt``.

        Raises:
            PolicyError: The policy's measure is a function.
        """
        return {
            "policy": None if self.policy is None else policy_to_dict(self.policy),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "timings": None if self.timings is None else self.timings.to_dict(),
            "calibration": None if self.calibration is None else dict(self.calibration),
        }

    @classmethod
    def from_dict(cls, data: Fields) -> RunSettings:
        """Read what ``to_dict`` wrote.

        Raises:
            FormatError: Something in it is of another kind.
        """
        preprocessing = None
        if data.value("preprocessing") is not None:
            from s2d_compiler.data import Preprocessing

            preprocessing = Preprocessing.from_dict(data.inner("preprocessing"))
        return cls(
            policy=None if data.value("policy") is None else policy_from_dict(data.inner("policy")),
            preprocessing=preprocessing,
            timings=None
            if data.value("timings") is None
            else Timings.from_dict(data.inner("timings")),
            calibration=None if data.value("calibration") is None else _plain(data),
        )


def _plain(data: Fields) -> dict[str, Any]:
    """What calibration stored, if it is what JSON can hold."""
    found = data.named("calibration")
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        damaged(data.at("calibration"), "there is more in it than plain data")
    return found
