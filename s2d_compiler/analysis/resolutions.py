"""Resolutions: by which settings of a plan a tensor's channels are cut and reused."""

from __future__ import annotations

from torch import fx

from s2d_compiler.program import SAMPLE_BATCH, batch_dimensions, shape_of


def resolution(node: fx.Node, channel_dimension: int) -> str:
    """Positions per sample and channel: ``HxW`` where a tensor has that form, else a number."""
    sizes = _positions(node, channel_dimension)
    return "x".join(map(str, sizes)) if sizes else "1"


def position_count(node: fx.Node, channel_dimension: int) -> int:
    """The number of positions per sample and channel."""
    count = 1
    for size in _positions(node, channel_dimension):
        count *= size
    return count


def _positions(node: fx.Node, channel_dimension: int) -> list[int]:
    shape = shape_of(node)
    channel = channel_dimension % len(shape)
    batch = batch_dimensions(node)
    fixed = int(node.meta.get("fixed_batch", 1))
    sizes: list[int] = []
    for d, size in enumerate(shape):
        if d == channel:
            continue
        if d in batch or (d == 0 and not batch):  # what has no batch is computed once per call
            merged = size // (SAMPLE_BATCH if batch else fixed)
            if merged > 1:
                sizes.append(merged)
        else:
            sizes.append(size)
    return sizes if channel == 1 and len(shape) > 2 else ([_product(sizes)] if sizes else [])


def _product(sizes: list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def as_pixels(name: str) -> int:
    """Sort key: positions of a resolution's name."""
    return _product([int(part) for part in name.split("x")])
