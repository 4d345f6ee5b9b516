"""The optimised form of a staged network: for running only."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx, nn

from s2d_compiler.dynamic import DynamicParts, StagedNetwork
from s2d_compiler.errors import UsageError


@dataclass(frozen=True)
class RunningParts(DynamicParts):
    """What a network is made of, for one that reads images channels-last.

    Attributes:
        channels_last: Whether inputs of four dimensions are brought into that format.
    """

    channels_last: bool = False

    def flat_inputs(self, inputs: tuple[Any, ...], keywords: Any) -> tuple[Any, ...]:
        leaves = super().flat_inputs(inputs, keywords)
        if not self.channels_last:
            return leaves
        return tuple(
            v.contiguous(memory_format=torch.channels_last)
            if isinstance(v, torch.Tensor) and v.ndim == 4
            else v
            for v in leaves
        )


class OptimizedModel(StagedNetwork):
    """A staged network rewritten to run fast: the same answers, no training, no saving.

    It has its own copies of the weights: what happens to the network that it was made of does
    not change it. Call it, ``predict`` or ``anytime`` like that one; it keeps no gradients. Its
    settings are those of that one, recorded times included, which are longer than its own.

    Attributes:
        backend: What runs it: ``"eager"``, ``"onednn"`` or ``"inductor"``.
    """

    def __init__(self, stages: Sequence[nn.Module], parts: RunningParts, backend: str):
        super().__init__(stages, parts)
        self.backend = backend
        super().train(False)

    def exits_of(self, inputs: tuple[Any, ...]) -> Any:
        """See ``StagedNetwork``."""
        running = super().exits_of(inputs)
        while True:
            with torch.no_grad():
                try:
                    output = next(running)
                except StopIteration:
                    return
            yield output

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        """A copy; packed and compiled stages are shared, since nothing in them changes."""
        stages = list(self.stages)
        if self.backend == "eager":
            stages = copy.deepcopy(stages, memo)
        assert isinstance(self.parts, RunningParts)
        copied = OptimizedModel(stages, self.parts, self.backend)
        copied.settings = self.settings
        return copied

    def train(self, mode: bool = True) -> OptimizedModel:
        """Stay in evaluation mode.

        Raises:
            UsageError: Training is asked for.
        """
        if mode:
            raise UsageError(
                "train: an optimised network only runs; train the one that it was made of, and "
                "call its optimized() again."
            )
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``to``, ``double`` and their like do to tensors; packed weights stay what they are.

        Raises:
            UsageError: Weights are packed, and would be of another type or elsewhere.
        """
        if self.backend != "onednn":
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        found = fn(torch.zeros(1))
        if found.dtype != torch.float32 or found.device.type != "cpu":
            raise UsageError(
                f"to: weights that are packed for oneDNN cannot become {found.dtype} on "
                f"{found.device}; convert the network that it was made of, and call its "
                "optimized() again."
            )
        return self

    def save(self, path: object) -> NoReturn:
        """Refused.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "save: an optimised network is made for this machine; save the one that it was made "
            "of, and call its optimized() where it runs."
        )


def running_copy(stage: fx.GraphModule) -> fx.GraphModule:
    """A stage with a graph of its own over the same modules."""
    return fx.GraphModule(stage, stage.graph)
