"""Where every parameter of a stage comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

#: Positions taken along one dimension, None for all of them.
Positions = tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of one tensor of the original.

    Attributes:
        source: Its key in the original's state dict.
        index: Per dimension of the tensor the positions taken, in order; None for all.
    """

    source: str
    index: tuple[Positions, ...]

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Shape of the slice."""
        return tuple(
            size if positions is None else len(positions)
            for size, positions in zip(tensor.shape, self.index, strict=True)
        )

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the slice of the original's tensor."""
        result = tensor
        for dimension, positions in enumerate(self.index):
            if positions is not None:
                index = torch.from_numpy(np.asarray(positions, dtype=np.int64))
                result = result.index_select(dimension, index.to(tensor.device))
        return result.clone() if result is tensor else result


Provenance = Mapping[str, Slice]


def normalised(index: tuple[Positions, ...], shape: tuple[int, ...]) -> tuple[Positions, ...]:
    """Replace index lists that take everything in order by None."""
    return tuple(
        None
        if positions is not None and len(positions) == size and positions == tuple(range(size))
        else positions
        for positions, size in zip(index, shape, strict=True)
    )
