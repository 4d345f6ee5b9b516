"""Images by the stage at which they leave.

Source: ENAS4D, figure 6.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2d_compiler.reporting.observations import Observations
from s2d_compiler.reporting.samples import Samples
from s2d_compiler.reporting.tables import name_of

__all__ = ["GalleryRow", "Shown", "channels_note", "data_url", "gallery"]

#: Longest side of an image in the page, in pixels.
_SIDE = 96
#: Images up to this many pixels a side are stored without loss.
_SMALL = 40
_EACH = 6


@dataclass(frozen=True, slots=True)
class Shown:
    """One image.

    Attributes:
        url: The picture itself, as a data URL.
        index: Its number among the samples.
        wanted: The right class; None where it is not known.
        found: What the network answers.
        confidence: How sure the exit is.
        is_right: Whether the answer is right; None where that is not known.
    """

    url: str
    index: int
    wanted: str | None
    found: str
    confidence: float
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """Some of those that leave at one stage.

    Attributes:
        stage: From 1.
        leaving: How many leave here.
        groups: Title and images, empty ones left out.
    """

    stage: int
    leaving: int
    groups: tuple[tuple[str, tuple[Shown, ...]], ...]


def gallery(seen: Observations, samples: Samples) -> tuple[GalleryRow, ...] | None:
    """Per stage the surest and the least sure right answers, and the surest wrong ones.

    None where samples are no images.
    """
    if samples.image(0) is None:
        return None
    rows = []
    sure = np.nan_to_num(seen.confidences, nan=-1.0)
    for stage in range(seen.plain.shape[1]):
        here = np.flatnonzero(seen.stage == stage)
        ranked = here[np.argsort(-sure[here], kind="stable")].tolist()
        if samples.labelled:
            right = [i for i in ranked if seen.answers[i] == seen.labels[i]]
            wrong = [i for i in ranked if seen.answers[i] != seen.labels[i]]
            chosen = [
                ("right, surest", right[:_EACH]),
                ("right, least sure", right[: _EACH - 1 : -1][:_EACH]),
                ("wrong, surest", wrong[:_EACH]),
            ]
        else:
            chosen = [
                ("surest", ranked[:_EACH]),
                ("least sure", ranked[: _EACH - 1 : -1][:_EACH]),
            ]
        groups = tuple(
            (title, tuple(_shown(index, seen, samples) for index in indices))
            for title, indices in chosen
            if indices
        )
        rows.append(GalleryRow(stage + 1, len(ranked), groups))
    return tuple(rows)


def _shown(index: int, seen: Observations, samples: Samples) -> Shown:
    image = samples.image(index)
    assert image is not None
    label, answer = int(seen.labels[index]), int(seen.answers[index])
    return Shown(
        url=data_url(image),
        index=index,
        wanted=name_of(label, samples.classes) if samples.labelled else None,
        found=name_of(answer, samples.classes),
        confidence=float(seen.confidences[index]),
        is_right=label == answer if samples.labelled else None,
    )


def data_url(image: Tensor) -> str:
    """A picture of an image ``(C, H, W)``, small enough for a page.

    One channel is gray; of two, the first is shown, of more than three the first three. Numbers
    that are neither bytes nor from 0 to 1 are stretched to what can be seen.
    """
    from PIL import Image

    pixels = _bytes(image[: 3 if image.shape[0] >= 3 else 1].detach().cpu())
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
    is_small = max(picture.size) <= _SMALL
    if not is_small:
        picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    kind = "png" if is_small else "jpeg"
    picture.save(stream, kind, **({} if is_small else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _bytes(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    values = image.double().nan_to_num(0, 0, 0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / max(high - low, 1e-12)
    return (values * 255).round().to(torch.uint8)


def channels_note(channels: int) -> str:
    """What cannot be seen of images with so many channels."""
    if channels in (1, 3):
        return ""
    kept = "first" if channels == 2 else "first three"
    return f"Of the {channels} channels of each image the {kept} can be seen."
