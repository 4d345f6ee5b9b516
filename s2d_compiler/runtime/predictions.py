"""What a run with early exits gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Predictions:
    """The answers for a batch of N samples, in the order of the inputs.

    Attributes:
        output: The output, of the original's structure; each sample's is that of the exit where
            it left.
        stage: (N,) integers: the stage where each sample left, as an index into ``dyn.stages``.
        confidence: (N,) values of the policy's measure at that exit; of ``"confidence"`` where
            the policy has no thresholds. NaN where the outputs are no logits and no function says
            otherwise.
        macs: (N,) integers: multiply-accumulates spent on each sample.
        nan_confidences: How many times an exit's measure was NaN, which lets nobody leave early.
    """

    output: Any
    stage: Tensor
    confidence: Tensor
    macs: Tensor
    nan_confidences: int = 0

    def __len__(self) -> int:
        return int(self.stage.shape[0])

    def __str__(self) -> str:
        counts = self.stage.bincount().tolist() if len(self) else []
        exits = ", ".join(f"{n} at stage {t}" for t, n in enumerate(counts, start=1) if n)
        mean = f"{self.macs.double().mean().item():,.0f}" if len(self) else "no"
        return f"{len(self)} samples: {exits or 'none'}; {mean} MACs per sample"
