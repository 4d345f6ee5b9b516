"""When a loss has gone astray."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Watch"]

#: The mean loss is over about so many steps.
STEPS = 50
#: It has gone astray at so many times both that of guessing and that of the first step.
TIMES = 3.0


@dataclass
class Watch:
    """What is remembered of a training's losses.

    Attributes:
        guessing: The loss of a network that gives every class the same probability.
        first: The loss of the first step; below 0 before it.
        mean: An exponential mean of all since.
    """

    guessing: float
    first: float = -1.0
    mean: float = 0.0

    def see(self, loss: float) -> str | None:
        """Take note of a step's loss, and say what is wrong if it has gone astray."""
        if not math.isfinite(loss):
            return f"the loss is {loss}, and it must stay finite"
        if self.first < 0:
            self.first = self.mean = loss
        self.mean += (loss - self.mean) / STEPS
        if self.mean > TIMES * max(self.guessing, self.first):
            return (
                f"the loss has risen to {self.mean:.3g} (mean of about {STEPS} steps), and it must "
                f"stay below {TIMES:g} times that of guessing ({self.guessing:.3g}) and of the "
                f"first step ({self.first:.3g})"
            )
        return None
