"""Random crops and flips, a batch at once, wherever the images are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Draws", "augment", "draws_of"]


@dataclass(frozen=True, slots=True)
class Draws:
    """All that is random about one epoch's images.

    Attributes:
        order: ``(N,)`` indices of the images.
        numbers: ``(N, 3)`` numbers from 0 to 1, in that order: for row, column and flip.
    """

    order: Tensor
    numbers: Tensor


def draws_of(seed: int, epoch: int, count: int) -> Draws:
    """What is drawn for an epoch: it depends on nothing else, so that there is no state to lose.

    Args:
        seed: The recipe's.
        epoch: Which epoch, from 0.
        count: How many images there are.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    order = torch.randperm(count, generator=generator)
    return Draws(order, torch.rand(count, 3, generator=generator, dtype=torch.float64))


def augment(images: Tensor, numbers: Tensor, padding: int, flip: bool) -> Tensor:
    """Cut each image out of itself with zeros around it, and mirror half of them.

    Args:
        images: ``(N, C, H, W)``.
        numbers: ``(N, 3)``, of ``Draws``.
        padding: Zeros on each side.
        flip: Whether images are mirrored.

    Source: S2DNAS, section 4.1, "Training Details".
    """
    if padding:
        height, width = images.shape[-2:]
        offsets = (numbers[:, :2] * (2 * padding + 1)).long().to(images.device)
        windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        which = torch.arange(len(images), device=images.device)
        images = windows[which, :, offsets[:, 0], offsets[:, 1]]
    if flip:
        is_flipped = (numbers[:, 2] < 0.5).to(images.device)
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
    return images
