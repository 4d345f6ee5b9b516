"""Options about labelled images, shared by the commands that calibrate, evaluate and measure."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from s2d_compiler.data.preprocessing import Preprocessing
from s2d_compiler.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from s2d_compiler.calibration import Records
    from s2d_compiler.data import Data

__all__ = ["DATA", "DataSource", "Samples", "read_device", "recorded_part"]

logger = logging.getLogger(__name__)

_Hidden = Parameter(show_default=False)


@dataclass(frozen=True, slots=True)
class Samples:
    """Data, and what is done to them for one network.

    Attributes:
        data: The images.
        preprocessing: What is done to each.
        batch_size: How many at a time.
        input_shape: What the network takes, without the batch.
    """

    data: Data
    preprocessing: Preprocessing
    batch_size: int
    input_shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs as the network takes them, and labels; see ``data.batches``."""
        from s2d_compiler.data import batches

        shape = self.input_shape
        return batches(self.data, self.preprocessing, self.batch_size, device, shape)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class DataSource:
    """Where labelled images come from, and what is done to them.

    Args:
        data: cifar10:DIR, cifar100:DIR, folder:DIR (a folder of images per class), FILE.npz
            (arrays images and labels) or package.module:function (returns a data set).
        split: Which part, such as train or test; a slice may follow: train[45000:]. Of records, a
            slice alone: [:2500].
        batch_size: Images at a time.
        limit: Use at most so many images, evenly spaced.
        resize: Resize images: a number for the shorter side, such as 256, or HEIGHTxWIDTH. These
            and the following settings are stored with the network by calibrate, and taken from
            there where they are not given.
        crop: Keep the middle: a number for a square, such as 224, or HEIGHTxWIDTH.
        interpolation: How images are resized: bilinear, bicubic or nearest.
        channels: rgb, bgr or gray; without it, those that the images have.
        scale: What pixels are multiplied with; without it, 1/255 for bytes, 1 for other numbers.
        mean: What is subtracted then, per channel, such as 0.485,0.456,0.406.
        std: What is divided by then, per channel, such as 0.229,0.224,0.225.
    """

    data: Annotated[str | None, _Hidden] = None
    split: Annotated[str | None, _Hidden] = None
    batch_size: int = 64
    limit: Annotated[int | None, _Hidden] = None
    resize: Annotated[str | None, _Hidden] = None
    crop: Annotated[str | None, _Hidden] = None
    interpolation: Annotated[str | None, _Hidden] = None
    channels: Annotated[str | None, _Hidden] = None
    scale: Annotated[float | None, _Hidden] = None
    mean: Annotated[str | None, _Hidden] = None
    std: Annotated[str | None, _Hidden] = None

    def open(self, *, labels: bool = True) -> Data:
        """The images that are named.

        Args:
            labels: Whether they must have labels.

        Raises:
            UsageError: None are named, or as none can be.
            DataError: They cannot be read.
        """
        from s2d_compiler.data import open_data
        from s2d_compiler.data.opening import FORMS

        if self.data is None:
            raise UsageError(
                f"--data: nothing is named, and this command needs images; give {FORMS}"
            )
        for name, value in (("--batch-size", self.batch_size), ("--limit", self.limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: {value} is below 1; give a number of images")
        return open_data(self.data, self.split, labels=labels).limited(self.limit)

    def preprocessing(self, stored: Preprocessing | None) -> Preprocessing:
        """What is done to the images: what is stored with the network, but for what is given.

        Args:
            stored: ``dyn.settings.preprocessing``.

        Raises:
            UsageError: What is given is no such setting.
        """
        texts: dict[str, Any] = {
            "resize": _size("--resize", self.resize),
            "crop": _size("--crop", self.crop),
            "interpolation": self.interpolation,
            "channels": self.channels,
            "scale": self.scale,
            "mean": _numbers("--mean", self.mean),
            "std": _numbers("--std", self.std),
        }
        given = {name: value for name, value in texts.items() if value is not None}
        return replace(stored or Preprocessing(), **given)

    def warn_of_defaults(self, stored: Preprocessing | None, data: Data) -> None:
        """Say so where bytes are only scaled, as nothing else is given or stored."""
        import torch

        is_default = stored is None and self.preprocessing(stored) == Preprocessing()
        if is_default and len(data) and data.image(0).dtype == torch.uint8:
            logger.warning(
                "no preprocessing is given or stored with the network: pixels are only scaled to 0 "
                "to 1 (--mean, --std, --resize, --crop)"
            )

    def samples(self, dyn: Any, *, labels: bool = True) -> Samples:
        """The images as one network takes them, the first one tried.

        Args:
            dyn: The staged network; its ``settings.preprocessing`` is what was stored.
            labels: Whether they must have labels.

        Raises:
            UsageError, DataError: Options, data and network do not fit together.
        """
        from s2d_compiler.data import require_fit

        data = self.open(labels=labels)
        stored = dyn.settings.preprocessing
        preprocessing = self.preprocessing(stored)
        self.warn_of_defaults(stored, data)
        preprocessing = replace(preprocessing, dtype=_dtype_of(dyn, preprocessing))
        shape = require_fit(data, preprocessing, dyn.parts.input_shapes)
        size: int = dyn.parts.batch or self.batch_size
        if dyn.parts.batch and len(data) % size:
            remedy = f"give --limit {len(data) // size * size}"
            if len(data) < size:
                remedy = f"give at least {size} images"
            raise UsageError(
                f"--data: {len(data)} images, and the network takes batches of {size} only; "
                f"{remedy}, or compile it with a free batch size"
            )
        return Samples(data, preprocessing, size, shape)


DATA = DataSource()


def recorded_part(records: Records, source: DataSource, path: Path) -> Records:
    """The samples of a file of records that ``--split`` names, where no data are named.

    Raises:
        UsageError: Options about images are given that records do not follow.
        CalibrationError: No samples are left.
    """
    from s2d_compiler.data import Preprocessing
    from s2d_compiler.data.opening import parse_split

    stored, what, part, text = None, None, None, ""
    if source.data is None:
        name, part, text = parse_split(source.split)
        if name is not None:
            what = f"the split {name!r} (of which records know nothing)"
    if source.data is None and source.batch_size != DATA.batch_size:
        what = "--batch-size (which is about images)"
    if source.data is None and source.limit is not None:
        what = "--limit (which is about images: --split '[:100]' takes the first 100 records)"
    if records.preprocessing is not None:
        stored = Preprocessing.from_dict(dict(records.preprocessing), f"{path}: preprocessing")
    if source.preprocessing(stored) != (stored or Preprocessing()):
        what = "another preprocessing"
    if what is not None:
        raise UsageError(
            f"--records: {path} is read, and {what} is named; leave that out, or take images "
            "(--data) and no records that are there"
        )
    return records if part is None else records.part(part, text)


def read_device(text: str) -> torch.device:
    """Where to run.

    Raises:
        UsageError: There is no such device here.
    """
    import torch

    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--device: {text!r} cannot be used here ({first_line(error)[:160]}); write cpu, or "
            "cuda where torch sees a GPU"
        ) from error
    return device


def _dtype_of(dyn: Any, preprocessing: Preprocessing) -> str:
    """The kind of numbers that the network computes with, if it is one that images can have."""
    from s2d_compiler.data.preprocessing import DTYPES

    names = {dtype: name for name, dtype in DTYPES.items()}
    first = next((p for p in dyn.parameters() if p.is_floating_point()), None)
    return preprocessing.dtype if first is None else names.get(first.dtype, preprocessing.dtype)


def _size(option: str, text: str | None) -> Any:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if match is None:
        raise UsageError(
            f"{option}: {json.dumps(text)[:60]} is no size; write a number of pixels, such as 224, "
            "or HEIGHTxWIDTH, such as 224x320"
        )
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise UsageError(
            f"{option}: {json.dumps(text)[:60]} is no list of numbers; write one per channel with "
            "commas between them, such as 0.485,0.456,0.406"
        )
    return values
