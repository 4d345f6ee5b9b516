"""Where a set of channel positions lies in memory: frames, positions, boxes, packed parts.

A *frame* is a shape of the rank of a value in which every dimension that carries no channels
has size 1. A *position* is a flat (row-major) index into a frame. A *part* of a value holds
some of its positions, in one of two layouts, both of the value's rank:

- *box*: the positions are a product of index lists, one per frame dimension; the part is the
  value with each of those dimensions reduced to its list. With one channel dimension every
  set of positions is a box: the ordinary slice.
- *packed*: anything else. The frame's dimensions are merged into the first of them, the
  others have size 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

Frame = tuple[int, ...]
Positions = npt.NDArray[np.int64]


def channel_dimensions(frame: Frame) -> tuple[int, ...]:
    """Dimensions of a frame that have more than one position."""
    return tuple(d for d, size in enumerate(frame) if size > 1)


def coordinates(frame: Frame, positions: Positions) -> tuple[Positions, ...]:
    """Per dimension of the frame, the coordinate of every position."""
    if not frame:
        return ()
    return tuple(np.asarray(c, dtype=np.int64) for c in np.unravel_index(positions, frame))


@dataclass(frozen=True, slots=True)
class Layout:
    """How a part lies in memory.

    Attributes:
        frame: The frame that the positions index.
        positions: The positions, in the order of the part.
        lists: Per channel dimension its index list when the part is a box, else None.
        array: The positions as an array that cannot be written.
    """

    frame: Frame
    positions: tuple[int, ...]
    lists: tuple[tuple[int, ...], ...] | None
    array: Positions = field(compare=False, repr=False)

    @property
    def dimensions(self) -> tuple[int, ...]:
        return channel_dimensions(self.frame)

    @property
    def is_box(self) -> bool:
        return self.lists is not None

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part of a value of shape ``full``."""
        sizes = list(full)
        dimensions = self.dimensions
        if self.lists is not None:
            for d, chosen in zip(dimensions, self.lists, strict=True):
                sizes[d] = len(chosen)
            return tuple(sizes)
        for d in dimensions:
            sizes[d] = 1
        sizes[dimensions[0]] = len(self.positions)
        return tuple(sizes)


def layout(frame: Frame, positions: Positions, *, packed: bool = False) -> Layout:
    """The layout of these positions: a box if they form one in row-major order."""
    return _layout(frame, positions.astype(np.int64, copy=False).tobytes(), packed)


@lru_cache(maxsize=65536)
def _layout(frame: Frame, data: bytes, packed: bool) -> Layout:
    array = np.frombuffer(data, dtype=np.int64)
    positions = tuple(array.tolist())
    dimensions = channel_dimensions(frame)
    if len(dimensions) <= 1:
        return Layout(frame, positions, (positions,) if dimensions else (), array)
    if packed:
        return Layout(frame, positions, None, array)
    coords = coordinates(frame, array)
    lists = tuple(tuple(int(c) for c in dict.fromkeys(coords[d].tolist())) for d in dimensions)
    size = np.prod([len(chosen) for chosen in lists])
    is_box = size == len(positions) and np.array_equal(box_positions(frame, lists), array)
    return Layout(frame, positions, lists if is_box else None, array)


def box_positions(frame: Frame, lists: tuple[tuple[int, ...], ...]) -> Positions:
    """Positions of a product of index lists, one per channel dimension, row-major."""
    dimensions = channel_dimensions(frame)
    grid = np.arange(int(np.prod(frame, dtype=np.int64)), dtype=np.int64).reshape(frame)
    for d, chosen in zip(dimensions, lists, strict=True):
        grid = np.take(grid, np.asarray(chosen, dtype=np.int64), axis=d)
    return grid.reshape(-1)


def take(tensor: torch.Tensor, where: Layout) -> torch.Tensor:
    """The part of a full tensor, computed directly (for proofs on position tensors)."""
    dimensions = where.dimensions
    if where.lists is not None:
        for d, chosen in zip(dimensions, where.lists, strict=True):
            tensor = tensor.index_select(d, torch.from_numpy(np.array(chosen, dtype=np.int64)))
        return tensor
    order, merged, final = packing(tuple(tensor.shape), dimensions)
    flat = tensor.permute(order).reshape(merged)
    index = torch.from_numpy(where.array.copy())  # frames are row-major
    shape = list(final)
    shape[dimensions[0]] = len(where.positions)
    return flat.index_select(dimensions[0], index).reshape(shape)


def packing(
    shape: tuple[int, ...], dimensions: tuple[int, ...]
) -> tuple[list[int], list[int], list[int]]:
    """Permutation, merged shape and final shape that bring a box into packed layout."""
    first = dimensions[0]
    others = [d for d in range(len(shape)) if d not in dimensions]
    before = [d for d in others if d < first]
    after = [d for d in others if d > first]
    order = before + list(dimensions) + after
    size = int(np.prod([shape[d] for d in dimensions], dtype=np.int64))
    merged = [shape[d] for d in before] + [size] + [shape[d] for d in after]
    final = [1 if d in dimensions else shape[d] for d in range(len(shape))]
    final[first] = size
    return order, merged, final
