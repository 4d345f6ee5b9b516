"""How certain an exit is of its answer: confidence, entropy, margin.

Sources: confidence, the largest softmax probability, is what S2DNAS (section 3.1) and ENAS4D
compare with their thresholds; entropy is DDI's (section 3.2) and BranchyNet's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2d_compiler.errors import PolicyError

#: A measure of one's own: from a stage's output to (N,) numbers, the larger the more certain.
Function = Callable[[Any], Tensor]

#: Whether a larger value of a measure means more certainty.
LARGER_IS_CERTAIN = {"confidence": True, "entropy": False, "margin": True}
#: The measures by name.
MEASURES = tuple(LARGER_IS_CERTAIN)
#: What is said where ``are_probabilities`` holds of all that a network returned.
PROBABILITIES = (
    "the exits return probabilities (no negative numbers, sums of 1, or single numbers from 0 to "
    "1), and measures are of logits: confidences come out too even, and a single number is taken "
    "for class 1 whenever it is above 0; take the softmax or sigmoid out of the network"
)


def measure_values(name: str, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """How certain an exit is of each sample.

    - ``"confidence"``: the largest probability, from 1/C to 1;
    - ``"entropy"``: of the probabilities, in nats, from 0 to ln C; *smaller* is more certain;
    - ``"margin"``: the largest probability less the second largest, from 0 to 1.

    Probabilities are the softmax over dimension 1; of a single logit, (N, 1) or (N,), its sigmoid
    and the rest. Outputs with further dimensions (maps of logits) give the mean over their
    positions.

    Args:
        name: One of ``MEASURES``.
        logits: (N, C), (N, C, ...), or (N,) as (N, 1).
        temperature: What logits are divided by.

    Returns:
        (N,) numbers, NaN where a logit is NaN or infinite upwards.

    Raises:
        PolicyError: There is no such measure, or these are no logits.
    """
    if name not in LARGER_IS_CERTAIN:
        raise PolicyError(
            f"measure: {name!r} is none; take one of {', '.join(MEASURES)}, or a function of the "
            "stage's output."
        )
    if not isinstance(logits, Tensor) or not logits.ndim or not logits.is_floating_point():
        raise PolicyError(
            f"measure {name!r}: the exit returns {_described(logits)}, and only logits (N, C) have "
            "one; hand in measure=, a function from the output to (N,) numbers of which larger "
            "ones are more certain: Thresholds(values, measure=function)."
        )
    if logits.ndim == 1:
        logits = logits.unsqueeze(1)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    values = _values(name, logits)
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _values(name: str, logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        logits = torch.cat([logits, torch.zeros_like(logits)], 1)
    probabilities = torch.softmax(logits, 1)
    if name == "confidence":
        return probabilities.amax(1)
    if name == "entropy":
        entropy: Tensor = torch.special.entr(probabilities).sum(1)
        return entropy
    largest = probabilities.topk(2, 1).values
    return largest.select(1, 0) - largest.select(1, 1)


def largest_value(name: str, classes: int) -> float:
    """The largest value that a measure takes with so many classes."""
    return math.log(max(classes, 2)) if name == "entropy" else 1.0


def are_probabilities(output: Tensor) -> bool:
    """Whether a classifier's output (N, C) looks like probabilities in place of logits.

    Measures of probabilities come out too even, and a sigmoid's number is above 0 whatever it says.
    """
    if output.shape[1] == 1:
        return bool(((output >= 0) & (output <= 1)).all())
    return bool((output >= 0).all() and ((output.sum(1) - 1).abs() < 1e-3).all())


def function_values(function: Function, output: Any, samples: int) -> Tensor:
    """What a measure of one's own says, checked.

    Raises:
        PolicyError: It returned no (N,) tensor of numbers.
    """
    values = function(output)
    if (
        not isinstance(values, Tensor)
        or values.shape != (samples,)
        or values.is_complex()
        or values.dtype == torch.bool
    ):
        raise PolicyError(
            f"measure: the function returned {_described(values)} for {samples} samples; return a "
            f"tensor of shape ({samples},), larger numbers for more certainty."
        )
    return values if values.is_floating_point() else values.double()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    return f"a {type(value).__name__}"
