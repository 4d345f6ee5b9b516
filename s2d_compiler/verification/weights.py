"""The numbers of a staged network, beside the original's slices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import VerifyError
from s2d_compiler.program import Program
from s2d_compiler.thin import originals
from s2d_compiler.verification.words import DAMAGED

#: What training changes besides parameters.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Weights:
    """Which tensors hold the original's numbers.

    Attributes:
        equal: Number of tensors that are their slice of the original, bit for bit.
        changed: Names of parameters and statistics that hold other numbers.
    """

    equal: int
    changed: tuple[str, ...]


def compare_weights(
    dyn: DynamicModel, program: Program, heads: Mapping[str, torch.Tensor] | None = None
) -> Weights:
    """Compare every tensor with the slice that it is said to be.

    Args:
        dyn: The network.
        program: The original.
        heads: By name, tensors that the original does not have, and the numbers they start with.

    Raises:
        VerifyError: One has another shape, or is neither parameter nor statistic and holds other
            numbers, or comes from nowhere.
    """
    sources, heads = originals(program), heads or {}
    equal, changed = 0, []
    saved = set(dyn.state_dict())
    held = [*dyn.named_parameters(remove_duplicate=False),
            *dyn.named_buffers(remove_duplicate=False)]  # fmt: skip
    for name, tensor in held:
        where = dyn.parts.provenance.get(name)
        if where is None and name in heads:
            if _compared(name, tensor, heads[name], "the exit's head"):
                equal += 1
            else:
                _require_sound(name, tensor)
                changed.append(name)
            continue
        if where is None and name not in saved:
            continue  # a constant, whose numbers are part of the terms
        if where is None:
            raise VerifyError(
                f"{name}: this tensor is no slice of the original's, as all that are saved are; "
                f"{DAMAGED}"
            )
        original = sources.get(where.source)
        if original is None:
            raise VerifyError(
                f"{name}: it is said to be a slice of {where.source!r}, which the original does "
                f"not have; {DAMAGED}"
            )
        if len(where.index) != original.dim() or any(
            positions is not None and not all(0 <= p < size for p in positions)
            for positions, size in zip(where.index, original.shape, strict=True)
        ):
            raise VerifyError(
                f"{name}: its slice does not lie in {where.source!r} of shape "
                f"{tuple(original.shape)}; {DAMAGED}"
            )
        expected = where.take(original.detach())
        is_constant = where.source in program.buffers and (
            where.source.rpartition(".")[2] not in _STATISTICS
        )
        if _compared(name, tensor, expected, f"its slice of {where.source!r}"):
            equal += 1
        elif is_constant:
            raise VerifyError(
                f"{name}: other numbers than those of {where.source!r}, a constant, which training "
                f"does not change; {DAMAGED}"
            )
        else:
            _require_sound(name, tensor)
            changed.append(name)
    return Weights(equal, tuple(changed))


def _compared(name: str, tensor: torch.Tensor, expected: torch.Tensor, what: str) -> bool:
    """Whether a tensor holds the numbers that it should, of the same type.

    Raises:
        VerifyError: It has another shape.
    """
    if tuple(expected.shape) != tuple(tensor.shape):
        raise VerifyError(
            f"{name} has shape {tuple(tensor.shape)}, {what} {tuple(expected.shape)}; {DAMAGED}"
        )
    expected = expected.to(tensor.device)
    return tensor.dtype == expected.dtype and _is_same(tensor.detach(), expected)


def _require_sound(name: str, tensor: torch.Tensor) -> None:
    """Training that went wrong leaves numbers that no network can compute with."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return
    wrong = ~torch.isfinite(tensor)
    if name.endswith("running_var"):
        wrong = wrong | (tensor < 0)
    if wrong.any():
        found = float(tensor[wrong].flatten()[0])
        raise VerifyError(
            f"{name}: holds {found:g}, and weights are finite, variances not negative; the "
            "training went wrong: go back to an earlier state."
        )


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    is_nan = (a != a) & (b != b)
    same = (a == b) | is_nan
    if a.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        same &= (a.signbit() == b.signbit()) | is_nan  # zero and negative zero
    return bool(same.all())
