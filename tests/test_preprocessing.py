"""From an image as it is stored to what a network takes; settings that are stored with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s2d_compiler import _torchvision as _torchvision  # isort: split

from torchvision import transforms

from s2d_compiler.data import Preprocessing, open_data
from s2d_compiler.errors import FormatError, UsageError
from tests.test_data import IMAGENET, PLAIN, all_of, pixels


def test_preprocessing_is_torchvisions_of_pictures(tmp_path: Path) -> None:
    """Within the rounding of bytes in the resizing: Pillow's and torch's filters differ by that."""
    smooth = numpy.add.outer(numpy.arange(40) * 4, numpy.arange(30) * 3).astype(numpy.uint8)
    image = Image.fromarray(numpy.stack([smooth, smooth // 2, 255 - smooth], axis=-1))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "x.png")
    expected = transforms.Compose(
        [transforms.Resize(20), transforms.CenterCrop((16, 18)), transforms.ToTensor(),
         transforms.Normalize(**IMAGENET)]
    )(image)  # fmt: skip
    how = Preprocessing(resize=20, crop=(16, 18), **IMAGENET)
    found, _ = all_of(open_data(str(tmp_path)), how)
    assert (found[0] - expected).abs().max() <= 1.01 / 255 / 0.224


def test_the_order_of_operations() -> None:
    """Channels, size, scale, mean, std: each by hand."""
    images = torch.from_numpy(pixels(2, 3, 6, 6))
    how = Preprocessing(
        channels="bgr", crop=4, scale=0.5, mean=(1, 2, 3), std=(4.0, 5, 6), dtype="float64"
    )
    by_hand = (
        images.double().flip(1)[..., 1:5, 1:5] * 0.5 - torch.tensor([1.0, 2, 3])[:, None, None]
    )
    by_hand = by_hand / torch.tensor([4.0, 5, 6])[:, None, None]
    torch.testing.assert_close(how(images), by_hand, rtol=0, atol=1e-12)
    assert how(images[0]).equal(how(images)[0])


def test_channels() -> None:
    color = torch.from_numpy(pixels(1, 3, 4, 4))
    gray = Preprocessing(channels="gray", scale=1.0)
    assert gray(color).shape == (1, 1, 4, 4)
    reference = transforms.functional.rgb_to_grayscale(color).float()
    assert (gray(color) - reference).abs().max() <= 1
    assert gray(color[:, :1]).equal(color[:, :1].float())
    assert Preprocessing(channels="rgb", scale=1.0)(color[:, :1]).equal(
        color[:, :1].float().expand(1, 3, 4, 4)
    )


sides = st.integers(1, 500)
settings_of = st.builds(
    Preprocessing,
    channels=st.sampled_from([None, "rgb", "bgr", "gray"]),
    resize=st.none() | sides | st.tuples(sides, sides),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
    crop=st.none() | sides | st.tuples(sides, sides),
    scale=st.none() | st.floats(1e-6, 1e3),
    mean=st.none() | st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=4).map(tuple),
    std=st.none() | st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
)


@given(settings_of)
def test_preprocessing_is_stored_exactly(how: Preprocessing) -> None:
    assert Preprocessing.from_dict(how.to_dict()) == how
    assert Preprocessing.from_dict(json.loads(json.dumps(how.to_dict()))) == how


WRONG: list[tuple[str, Any]] = [
    ("std", [0.0]), ("std", [-1.0]), ("std", []), ("std", [float("nan")]), ("std", "1"),
    ("mean", [float("inf")]), ("mean", [1] * 5000), ("mean", 3), ("mean", [True]),
    ("resize", 0), ("resize", -3), ("resize", 2**40), ("resize", [1]), ("resize", True),
    ("resize", 3.5), ("crop", [4, "4"]), ("crop", "all"), ("scale", 0), ("scale", float("nan")),
    ("scale", "1"), ("channels", "cmyk"), ("channels", 3), ("interpolation", None),
    ("interpolation", "area"), ("dtype", "int8"), ("dtype", None), ("dtype", []),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_settings_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"preprocessing: {key} is"):
        Preprocessing(**{key: value})
    with pytest.raises(FormatError, match=rf"preprocessing: {key} is .* the file is damaged"):
        Preprocessing.from_dict(PLAIN.to_dict() | {key: value})


def test_stored_settings_are_complete_and_known() -> None:
    with pytest.raises(FormatError, match="'gamma' is no setting"):
        Preprocessing.from_dict(PLAIN.to_dict() | {"gamma": 2})
    data = PLAIN.to_dict()
    del data["mean"]
    with pytest.raises(FormatError, match="'mean' is missing"):
        Preprocessing.from_dict(data)
    with pytest.raises(FormatError, match="stands where a dict belongs"):
        Preprocessing.from_dict([1])


def test_it_prints_in_one_line() -> None:
    assert str(PLAIN) == "none"
    how = Preprocessing(resize=256, crop=224, mean=(0.5, 0.25), channels="bgr")
    assert str(how) == "channels bgr, resize 256, crop 224x224, mean 0.5,0.25"
