"""What every exit said of every sample, and where each one left."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2d_compiler.runtime.measures import measure_values
from s2d_compiler.runtime.policies import Policy, thresholds_of

if TYPE_CHECKING:
    from s2d_compiler.runtime.predictions import Predictions

__all__ = ["Observations"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass
class Observations:
    """Filled by ``evaluate``, batch by batch; arrays of n samples at s exits.

    Args:
        policy: Who leaves where; its temperatures scale confidences.
    """

    policy: Policy
    classes: int = 2
    _parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, labels: Tensor, outputs: list[Tensor], found: Predictions | None) -> None:
        """Keep what is needed of a batch; an ``Observer``."""
        assert found is not None
        self.classes = max(2, outputs[0].shape[1])
        columns = {
            "labels": labels,
            "stage": found.stage,
            "predictions": torch.stack([_predicted(output) for output in outputs], 1),
            "plain": _confidences(outputs, None),
        }
        if self.temperatures is not None:
            columns["scaled"] = _confidences(outputs, self.temperatures)
        for name, value in columns.items():
            self._parts.setdefault(name, []).append(value.cpu())

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """What each exit's logits are divided by."""
        thresholds = thresholds_of(self.policy)
        return None if thresholds is None else thresholds.temperatures

    @cached_property
    def labels(self) -> Integers:
        """(n,) the right classes."""
        return self._column("labels")

    @cached_property
    def stage(self) -> Integers:
        """(n,) where each sample left, from 0."""
        return self._column("stage")

    @cached_property
    def predictions(self) -> Integers:
        """(n, s) the class that each exit names; -1 where its output is NaN."""
        return self._column("predictions")

    @cached_property
    def plain(self) -> Floats:
        """(n, s) largest probabilities without temperatures."""
        found: Floats = torch.cat(self._parts["plain"]).numpy()
        return found

    @cached_property
    def scaled(self) -> Floats | None:
        """The same with temperatures; None where there are none."""
        return torch.cat(self._parts["scaled"]).numpy() if "scaled" in self._parts else None

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n, s) whether each exit is right."""
        found: NDArray[np.bool_] = self.predictions == self.labels[:, None]
        return found

    @property
    def answers(self) -> Integers:
        """(n,) the class that each sample got where it left."""
        return self._at_exit(self.predictions)

    @property
    def confidences(self) -> Floats:
        """(n,) how sure the exit was where a sample left."""
        return self._at_exit(self.plain if self.scaled is None else self.scaled)

    def _column(self, name: str) -> Integers:
        found: Integers = torch.cat(self._parts[name]).numpy().astype(np.int64)
        return found

    def _at_exit(self, values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(values, self.stage[:, None], 1)[:, 0]


def _predicted(logits: Tensor) -> Tensor:
    found = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    return found.where(~logits.isnan().any(1), torch.full_like(found, -1))


def _confidences(outputs: list[Tensor], temperatures: tuple[float, ...] | None) -> Tensor:
    scales = temperatures or (1.0,) * len(outputs)
    columns = [
        measure_values("confidence", output, scale)
        for output, scale in zip(outputs, scales, strict=True)
    ]
    return torch.stack(columns, 1).double()
