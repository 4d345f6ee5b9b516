"""From an image as it is stored to what a network takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from s2d_compiler.errors import DataError, UsageError
from s2d_compiler.fields import Fields, damaged, fields_of, shown

__all__ = ["CHANNELS", "DTYPES", "INTERPOLATIONS", "Preprocessing"]

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
CHANNELS = ("rgb", "bgr", "gray")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
#: No image that a network takes is larger along a side; a file could otherwise ask for any memory.
_LARGEST_SIDE = 2**13
#: The weights of red, green and blue in a gray value (ITU-R BT.601, as Pillow and torchvision do).
_LUMINANCE = (0.2989, 0.587, 0.114)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What is done to an image before a network sees it, in the order of these settings.

    Images are tensors ``(C, H, W)`` of bytes or of floating-point numbers. What is left at None is
    not done.

    Args:
        channels: ``"rgb"``: three channels, a gray image's repeated; ``"bgr"``: the same in reverse
            order; ``"gray"``: one channel, the luminance. None: those that there are.
        resize: A number: the shorter side gets this length, the other keeps the proportions (as
            torchvision's ``Resize``); a pair: height and width.
        interpolation: How it is resized: ``"bilinear"`` or ``"bicubic"``, both antialiased, or
            ``"nearest"``. Bytes stay bytes.
        crop: Height and width of the part around the middle that is kept; a number for a square.
        scale: What pixels are multiplied with. None: 1/255 for bytes, 1 for other numbers.
        mean: What is subtracted, one number per channel, or one for all.
        std: What the difference is divided by, likewise.
        dtype: The kind of numbers that the network takes.

    Raises:
        UsageError: A setting is none.
    """

    channels: str | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _require_one_of("channels", self.channels, (None, *CHANNELS))
        _require_one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _require_one_of("dtype", self.dtype, tuple(DTYPES))
        set_ = object.__setattr__
        set_(self, "resize", self.resize if _is_side(self.resize) else _pair(self, "resize"))
        crop = (self.crop, self.crop) if _is_side(self.crop) else self.crop
        set_(self, "crop", crop)
        set_(self, "crop", _pair(self, "crop"))
        set_(self, "mean", _numbers(self, "mean"))
        set_(self, "std", _numbers(self, "std"))
        if self.scale is not None:
            if not _is_finite(self.scale) or not self.scale > 0:
                _refuse("scale", self.scale, "a number above 0")
            set_(self, "scale", float(self.scale))
        if self.std is not None and not all(value > 0 for value in self.std):
            _refuse("std", list(self.std), "numbers above 0, as what is divided by must be")

    def __str__(self) -> str:
        given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        return ", ".join(f"{name} {_text(value)}" for name, value in given.items()) or "none"

    def __call__(self, images: Tensor, place: str = "the images") -> Tensor:
        """Preprocess images of one size.

        Args:
            images: ``(N, C, H, W)`` or ``(C, H, W)``, bytes or floating-point numbers.
            place: Where they come from, for messages.

        Returns:
            The same number of images, in ``dtype``.

        Raises:
            DataError: They have other channels than the settings are for, or are too small.
        """
        return self.normalised(self.sized(images, place), place)

    def normalised(self, images: Tensor, place: str = "the images") -> Tensor:
        """The numbers that a network takes, of images that have its size and channels already.

        Args:
            images: ``(N, C, H, W)`` or ``(C, H, W)``, as ``sized`` returned them.
            place: Where they come from, for messages.

        Raises:
            DataError: They have other channels than the settings are for.
        """
        dtype = DTYPES[self.dtype]
        # In half precision the mean would be taken off after rounding.
        work = images.to(dtype if dtype == torch.float64 else torch.float32)
        factor = self.scale
        if factor is None:
            factor = 1.0 if images.is_floating_point() else 1 / 255
        if factor != 1.0:
            work = work * factor
        if self.mean is not None:
            work = work - self._per_channel("mean", work, place)
        if self.std is not None:
            work = work / self._per_channel("std", work, place)
        return work.to(dtype)

    def sized(self, images: Tensor, place: str = "the images") -> Tensor:
        """The first half: channels and size; bytes stay bytes.

        Args:
            images: ``(N, C, H, W)`` or ``(C, H, W)``, bytes or floating-point numbers.
            place: Where they come from, for messages.

        Raises:
            DataError: They have other channels than the settings are for, or are too small.
        """
        images = _with_channels(images, self.channels, place)
        height, width = images.shape[-2:]
        size = self.resize
        if isinstance(size, int):
            short, long = min(height, width), max(height, width)
            other = max(1, int(size * long / short))
            size = (size, other) if height <= width else (other, size)
        if size is not None and size != (height, width):
            images = _resized(images, size, self.interpolation)
            height, width = size
        if self.crop is None:
            return images
        rows, columns = self.crop
        if rows > height or columns > width:
            raise DataError(
                f"{place}: {height}x{width} pixels are left to cut a middle of {rows}x{columns} "
                "out of, and it must fit; resize the images first, or crop less"
            )
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        return images[..., top : top + rows, left : left + columns]

    def _per_channel(self, name: str, images: Tensor, place: str) -> Tensor:
        values: tuple[float, ...] = getattr(self, name)
        channels = images.shape[-3]
        if len(values) not in (1, channels):
            raise DataError(
                f"{place}: images of {channels} channel(s), and {name} has {len(values)} numbers; "
                f"give {name} one number for each channel, or one for all"
            )
        return torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a file."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Any, place: str = "preprocessing") -> Preprocessing:
        """From the plain data of a file, which may be anybody's.

        Raises:
            FormatError: They are none that ``to_dict`` returned.
        """
        row: Fields = fields_of(data, place)
        names = tuple(field.name for field in fields(cls))
        for key in row.data:
            if key not in names:
                damaged(row.place, f"{shown(key)} is no setting; there are {', '.join(names)}")
        values = {name: row.value(name) for name in names}
        try:
            return cls(**values)
        except UsageError as error:
            problem = str(error).partition("; ")[0]
            damaged(row.place, problem.removeprefix("preprocessing: "))


# -- settings ------------------------------------------------------------------------------------


def _refuse(name: str, value: Any, rule: str) -> None:
    text = shown(value)
    if isinstance(value, list | tuple) and len(value) <= 8:
        text = f"[{', '.join(shown(item) for item in value)}]"
    raise UsageError(f"preprocessing: {name} is {text}, not {rule}; correct this setting")


def _require_one_of(name: str, value: Any, allowed: Sequence[str | None]) -> None:
    if not (value is None or type(value) is str) or value not in allowed:
        _refuse(name, value, f"one of {', '.join(str(item) for item in allowed)}")


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST_SIDE


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30


def _pair(owner: Preprocessing, name: str) -> tuple[int, int] | None:
    value: Any = getattr(owner, name)
    if value is None:
        return None
    if type(value) not in (list, tuple) or len(value) != 2 or not all(map(_is_side, value)):
        _refuse(name, value, f"a length of 1 to {_LARGEST_SIDE} pixels, or a pair of these")
    return (value[0], value[1])


def _numbers(owner: Preprocessing, name: str) -> tuple[float, ...] | None:
    value: Any = getattr(owner, name)
    if value is None:
        return None
    if type(value) not in (list, tuple) or not value or not all(map(_is_finite, value)):
        _refuse(name, value, "a list of numbers, one per channel")
    if len(value) > 4096:
        _refuse(name, value, "a list of at most 4096 numbers, one per channel")
    return tuple(float(item) for item in value)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        sizes = all(isinstance(item, int) for item in value)
        return ("x" if sizes else ",").join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- images --------------------------------------------------------------------------------------


def _with_channels(images: Tensor, channels: str | None, place: str) -> Tensor:
    if channels is None:
        return images
    found = images.shape[-3]
    if found not in (1, 3):
        raise DataError(
            f'{place}: {found} channels, and channels = "{channels}" is for images of 1 or 3; '
            "leave that setting out"
        )
    if channels == "gray":
        if found == 1:
            return images
        weights = torch.tensor(_LUMINANCE, device=images.device)[:, None, None]
        gray = (images * weights).sum(-3, keepdim=True)
        return gray.round().to(images.dtype) if images.dtype == torch.uint8 else gray.to(images)
    if found == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    return images.flip(-3) if channels == "bgr" else images


def _resized(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    transforms = _transforms()
    mode = getattr(transforms.InterpolationMode, interpolation.upper())
    resized: Tensor = transforms.functional.resize(images, list(size), mode, antialias=True)
    return resized


@cache
def _transforms() -> Any:
    from torchvision import transforms

    return transforms
