"""Exit heads along depth: what each is made of, and the numbers that it starts with.

A head reads one value. ``linear`` takes the mean over positions and applies a linear layer
(S2DNAS, section 4: the Naive baseline; CDL's linear classifiers). ``branchynet`` puts one or more
3x3 convolutions with ReLU before that. What the original does to its logits at the very end, such
as a softmax, heads do, too, so that all exits say the same kind of thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from s2d_compiler.analysis.exit_places import ExitPlace
from s2d_compiler.depth_plan import HEADS

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True, slots=True)
class ExitHead:
    """The head of one exit.

    Attributes:
        kind: As in the plan.
        place: Which value it reads.
        shape: Shape of that value, for some batch.
        width: Channels of its convolutions.
        classes: How many numbers per sample it returns.
        dtype: Type of its weights, which is that of the value.
        seed: Of the random numbers that its weights start with.
    """

    kind: str
    place: ExitPlace
    shape: tuple[int, ...]
    width: int
    classes: int
    dtype: torch.dtype
    seed: int

    @property
    def positions(self) -> tuple[int, ...]:
        """Dimensions that are neither samples nor channels."""
        taken = (self.place.batch, self.place.channel)
        return tuple(d for d in range(len(self.shape)) if d not in taken)

    @property
    def is_grid(self) -> bool:
        """Whether positions lie beside each other along every dimension, so that a convolution
        can move over them. Those of tokens, a list with channels last, do not: a convolution is
        then a linear layer at every token."""
        rank = len(self.positions)
        return rank in (2, 3) or (rank == 1 and self.place.channel < self.positions[0])

    @property
    def layer_order(self) -> tuple[int, ...]:
        """The order of the value's dimensions in which convolutions take them: samples, channels
        and positions; of tokens samples, positions and channels."""
        batch, channel = self.place.batch, self.place.channel
        if self.is_grid:
            return (batch, channel, *self.positions)
        return (batch, *self.positions, channel)

    @property
    def layer_channel(self) -> int:
        """The dimension of the channels then."""
        return 1 if self.is_grid else len(self.shape) - 1

    def layers(self) -> tuple[tuple[str, nn.Module, int], ...]:
        """Name, layer and number of positions per sample at which it runs, in order. The layers
        hold the numbers that the seed gives."""
        generator = torch.Generator().manual_seed(self.seed)
        count, rank = prod(self.shape[d] for d in self.positions), len(self.positions)
        found: list[tuple[str, nn.Module, int]] = []
        channels = self.shape[self.place.channel]
        for number in range(1, HEADS[self.kind] + 1):
            layer: nn.Module
            with torch.device("meta"):
                if self.is_grid:
                    kind = _CONVOLUTIONS[rank]
                    layer = kind(channels, self.width, 3, padding=1, dtype=self.dtype)
                else:
                    layer = nn.Linear(channels, self.width, dtype=self.dtype)
            found.append((f"conv{number}", _filled(layer, generator), count))
            channels = self.width
        with torch.device("meta"):
            layer = nn.Linear(channels, self.classes, dtype=self.dtype)
        return (*found, ("linear", _filled(layer, generator), 1))

    @property
    def macs(self) -> int:
        """MACs per sample."""
        counts = ((layer.weight, positions) for _, layer, positions in self.layers())
        return sum(w.numel() * n for w, n in counts if isinstance(w, torch.Tensor))


def _filled(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A layer with weights and biases drawn evenly from within 1 / sqrt(fan in), as torch's
    layers begin; drawn in single precision on the CPU, so that they are the same everywhere."""
    bound = 0.0
    for name, parameter in list(layer.named_parameters()):
        if name == "weight":
            bound = prod(parameter.shape[1:]) ** -0.5
        drawn = torch.empty(parameter.shape, dtype=torch.float32)
        drawn.uniform_(-bound, bound, generator=generator)
        setattr(layer, name, nn.Parameter(drawn.to(parameter.dtype)))
    return layer
