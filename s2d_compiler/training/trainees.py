"""What is trained: static, staged and masked networks behind one face."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler.dynamic import CallShape, DynamicModel, StagedNetwork
from s2d_compiler.evaluation.evaluating import require_logits
from s2d_compiler.masking.model import MaskedModel
from s2d_compiler.training.losses import two_sided

__all__ = ["MaskedTrainee", "StagedTrainee", "Trainee"]

#: What the masked form calls the stage of an untouched original.
ORIGINAL = -2


class Trainee:
    """A network, with the logits of each of its stages: a static one, of one stage.

    Args:
        network: The network.
        train_original: Whether a last stage that is the original is trained.

    Attributes:
        stages: How many.
        frozen: Index of the stage that is not trained, or None.
    """

    form = "static"

    def __init__(self, network: nn.Module, train_original: bool) -> None:
        self.network = network
        self.stages = self._count()
        self.frozen: int | None = None
        if not train_original and self._ends_with_original():
            self.frozen = self.stages - 1

    def _count(self) -> int:
        return 1

    def _ends_with_original(self) -> bool:
        return False

    def frozen_part(self) -> nn.Module | None:
        """The modules that are not trained."""
        return None

    def hand_over(self) -> nn.Module:
        """Give the weights to the network that ``fit`` was called with, and return that."""
        return self.network

    @property
    def call(self) -> CallShape | None:
        """What the network is called with, where that is known."""
        return None

    @property
    def trained(self) -> list[int]:
        """Indices of the stages that are trained."""
        return [stage for stage in range(self.stages) if stage != self.frozen]

    def train(self) -> None:
        """Training mode, but for what is frozen."""
        self.network.train()
        part = self.frozen_part()
        if part is not None:
            part.eval()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, each once."""
        part = self.frozen_part()
        frozen = set() if part is None else {id(p) for p in part.parameters()}
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad and id(parameter) not in frozen
        }

    def logits(self, inputs: Tensor, *, frozen: bool = True) -> list[Tensor]:
        """The logits ``(N, C)`` of each stage.

        Args:
            inputs: ``(N, ...)``.
            frozen: Whether a frozen last stage is asked, too; its logits have no gradient.
        """
        return [self.read(output, len(inputs)) for output in self._outputs(inputs, frozen)]

    def _outputs(self, inputs: Tensor, frozen: bool) -> Iterator[Tensor]:
        yield self.network(inputs)

    def read(self, output: Any, samples: int) -> Tensor:
        """What a network returned for so many samples as logits ``(N, C)``, C at least 2.

        Raises:
            DataError: It is no such tensor.
        """
        return two_sided(require_logits(output, samples))


class StagedTrainee(Trainee):
    """A staged network: stage after stage."""

    form = "staged"
    network: StagedNetwork

    @property
    def call(self) -> CallShape:
        return self.network.parts

    def _count(self) -> int:
        return len(self.network.stages)

    def _ends_with_original(self) -> bool:
        return getattr(self.network.parts.plan, "final", "cut") == "original"

    def frozen_part(self) -> nn.Module | None:
        return None if self.frozen is None else self.network.stages[self.frozen]

    def _outputs(self, inputs: Tensor, frozen: bool) -> Iterator[Tensor]:
        exits = self.network.exits(inputs)
        for _ in self.trained:
            yield next(exits)
        if self.frozen is not None and frozen:
            with torch.no_grad():
                output = next(exits)
            yield output


class MaskedTrainee(Trainee):
    """A masked network: all stages in one dense pass.

    Args:
        network: The masked form.
        train_original: Whether a last stage that is the original is trained.
        staged: The staged network that gets the weights at the end, if there is one.
    """

    form = "masked"
    network: MaskedModel

    def __init__(
        self, network: MaskedModel, train_original: bool, staged: DynamicModel | None = None
    ) -> None:
        super().__init__(network, train_original)
        self.staged = staged

    @property
    def call(self) -> CallShape:
        return self.network._call

    def _count(self) -> int:
        return self.network.plan.stages

    def _ends_with_original(self) -> bool:
        return self.network.plan.final == "original"

    def frozen_part(self) -> nn.Module | None:
        if self.frozen is None:
            return None
        name = next(name for (stage, _), name in self.network._names.items() if stage == ORIGINAL)
        return self.network.get_submodule(name.partition(".")[0])

    def hand_over(self) -> nn.Module:
        if self.staged is None:
            return self.network
        self.network.write_to(self.staged)
        return self.staged

    def _outputs(self, inputs: Tensor, frozen: bool) -> Iterator[Tensor]:
        outputs = self.network(inputs)
        yield from outputs if frozen else outputs[: len(self.trained)]
