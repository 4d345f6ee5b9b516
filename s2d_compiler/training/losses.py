"""The joint loss of all stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from s2d_compiler.training.recipe import Recipe

__all__ = ["JointLoss", "two_sided"]


#: The largest adaptive weight.
MOST = 1e3


@dataclass(frozen=True, slots=True)
class JointLoss:
    """A sum over the stages that are trained.

    Attributes:
        weights: One per trained stage; None: DDI's adaptive ones.
        distill: The share of distillation.
        temperature: Of distillation.
        label_smoothing: Of the labels.

    Source: S2DNAS, equation 3; DDI, section 3.2, "Training for RADI"; of distillation, Hinton et
        al., "Distilling the knowledge in a neural network" (2015), as ENAS4D uses it.
    """

    weights: tuple[float, ...] | None
    distill: float
    temperature: float
    label_smoothing: float

    @classmethod
    def of(cls, recipe: Recipe, weights: tuple[float, ...] | None, distill: float) -> JointLoss:
        """The loss of a recipe whose weights and share of distillation are known."""
        return cls(weights, distill, recipe.temperature, recipe.label_smoothing)

    def of_stages(
        self, outputs: Sequence[Tensor], labels: Tensor | None, teacher: Tensor | None
    ) -> list[Tensor]:
        """The loss of each stage by itself.

        Args:
            outputs: Logits ``(N, C)`` of each trained stage.
            labels: ``(N,)``; None only where everything is distilled.
            teacher: Its logits ``(N, C)``; None only where nothing is distilled.
        """
        return [self._of_stage(logits, labels, teacher) for logits in outputs]

    def weights_for(self, losses: Sequence[float]) -> tuple[float, ...]:
        """What each stage's loss is multiplied with, in a batch of these losses.

        The adaptive ones are the last loss divided by each, so that all count the same; at most
        ``MOST``, as losses come to 0, and by rounding below it.
        """
        if self.weights is not None:
            return self.weights
        last = max(losses[-1], 0.0)
        others = [last / loss if MOST * loss > last else MOST for loss in losses[:-1]]
        return (*others, 1.0)

    def _of_stage(self, logits: Tensor, labels: Tensor | None, teacher: Tensor | None) -> Tensor:
        logits = _at_least_float32(logits)
        total = logits.new_zeros(())
        if self.distill < 1 and labels is not None:
            found = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            total = total + (1 - self.distill) * found
        if self.distill > 0 and teacher is not None:
            wanted = F.log_softmax(_at_least_float32(teacher) / self.temperature, 1)
            said = F.log_softmax(logits / self.temperature, 1)
            found = F.kl_div(said, wanted, reduction="batchmean", log_target=True)
            total = total + self.distill * self.temperature**2 * found
        return total

    def of_guessing(self, stages: int, classes: int) -> float:
        """What it is about at most for a network that gives every class the same probability."""
        share = 1 - self.distill + self.distill * self.temperature**2
        return sum(self.weights or (1.0,) * stages) * share * math.log(max(2, classes))


def two_sided(logits: Tensor) -> Tensor:
    """Single logits ``(N, 1)`` as the two ``(N, 2)`` whose softmax is their sigmoid."""
    return F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
