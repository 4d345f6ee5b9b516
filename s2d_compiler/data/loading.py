"""Batches of preprocessed images, and whether data fit a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from s2d_compiler.data.preprocessing import Preprocessing
from s2d_compiler.data.sources import Data
from s2d_compiler.errors import DataError, UsageError

__all__ = ["batches", "require_classes", "require_fit"]

Loaded = tuple[Tensor, list[int]]


def batches(
    data: Data,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    input_shape: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order, batch by batch.

    At most two batches are in memory beside the one that is in use.

    Args:
        data: The images.
        preprocessing: What is done to each.
        batch_size: Images at a time; the last batch may have fewer.
        device: Where inputs and labels go.
        input_shape: What a network takes, without the batch; None: any one shape.

    Yields:
        Inputs ``(n, C, H, W)`` as the network takes them, and labels ``(n,)`` of int64.

    Raises:
        UsageError: No such batch size.
        DataError: An image cannot be read, or is of another shape; the message names it.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size {batch_size} is below 1; give at least 1 image at a time")
    return _batches(data, preprocessing, batch_size, torch.device(device), input_shape)


def _batches(
    data: Data,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device,
    input_shape: Sequence[int] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    shape = None if input_shape is None else tuple(input_shape)
    for images, labels in _loaded(data, preprocessing, batch_size, shape):
        yield images.to(device), torch.tensor(labels, device=device)


def _loaded(
    data: Data, preprocessing: Preprocessing, batch_size: int, shape: tuple[int, ...] | None
) -> Iterator[Loaded]:
    parts = [
        range(start, min(start + batch_size, len(data)))
        for start in range(0, len(data), batch_size)
    ]

    def load_one(index: int) -> tuple[Tensor, int]:
        image, label = data.item(index)
        return preprocessing(image, data.place(index)), label

    if not data.concurrent:
        for part in parts:
            yield _load(data, preprocessing, part, shape, map(load_one, part))
        return
    with ThreadPoolExecutor(min(torch.get_num_threads(), 8)) as pool:
        waiting: deque[tuple[range, list[Future[tuple[Tensor, int]]]]] = deque()
        try:
            for part in parts:
                waiting.append((part, [pool.submit(load_one, index) for index in part]))
                if len(waiting) == 2:
                    ready, futures = waiting.popleft()
                    yield _load(data, preprocessing, ready, shape, (f.result() for f in futures))
            while waiting:
                ready, futures = waiting.popleft()
                yield _load(data, preprocessing, ready, shape, (f.result() for f in futures))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _load(
    data: Data,
    preprocessing: Preprocessing,
    part: range,
    shape: tuple[int, ...] | None,
    items: Iterator[tuple[Tensor, int]],
) -> Loaded:
    """One batch; arrays are preprocessed at once, anything else image by image."""
    whole = data.images(part)
    if whole is not None:
        done = preprocessing(whole, data.name)
        _require_shape(done.shape[1:], shape, lambda: data.place(part[0]), preprocessing)
        return done, [data.label(index) for index in part]
    images: list[Tensor] = []
    labels: list[int] = []
    for index, (image, label) in zip(part, items, strict=True):
        place = _placed(data, index)
        _require_shape(image.shape, shape, place, preprocessing)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{place()}: {_size(image.shape)} after preprocessing, and the images before it "
                f"are {_size(images[0].shape)}; resize all to one size, and crop them"
            )
        images.append(image)
        labels.append(label)
    return torch.stack(images), labels


def _placed(data: Data, index: int) -> Callable[[], str]:
    return lambda: data.place(index)


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _require_shape(
    found: Sequence[int],
    expected: tuple[int, ...] | None,
    place: Callable[[], str],
    preprocessing: Preprocessing,
) -> None:
    if expected is None or tuple(found) == expected:
        return
    if len(expected) != 3:
        raise DataError(
            f"{place()}: an image of {_size(found)}, and the network takes inputs of "
            f"{_size(expected)}, which are no images; use the network from Python"
        )
    remedy = f"give --resize, or --crop {_size(expected[1:])}"
    if found[0] != expected[0]:
        remedy = "give data with as many channels"
        if found[0] in (1, 3) and expected[0] in (1, 3):
            remedy = f"give --channels {'gray' if expected[0] == 1 else 'rgb'}"
    raise DataError(
        f"{place()}: {_size(found)} after preprocessing ({preprocessing}), and the network takes "
        f"{_size(expected)}; {remedy}"
    )


def require_fit(
    data: Data, preprocessing: Preprocessing, input_shapes: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Refuse data that a network does not take, by their first image, before long work begins.

    Args:
        data: The images.
        preprocessing: What is done to each.
        input_shapes: What the network takes, without the batch (``dyn.parts.input_shapes``).

    Returns:
        The one input shape.

    Raises:
        DataError: Another shape, or a network of several inputs.
    """
    if len(input_shapes) != 1:
        raise DataError(
            f"{data.name}: one image per sample, and the network takes {len(input_shapes)} inputs; "
            "run such a network from Python"
        )
    shape = tuple(input_shapes[0])
    image = preprocessing(data.image(0), data.place(0))
    _require_shape(image.shape, shape, lambda: data.place(0), preprocessing)
    return shape


def require_classes(data: Data, labels: Tensor, count: int) -> None:
    """Refuse labels that a network does not know.

    Args:
        data: Where they come from.
        labels: Some of them, ``(n,)``.
        count: How many classes the network tells apart.

    Raises:
        DataError: The data have another number of classes, or a label is too large.
    """
    if data.classes is not None and len(data.classes) != count:
        raise DataError(
            f"{data.name}: {len(data.classes)} classes ({', '.join(data.classes)[:60]}), and the "
            f"network tells {count} apart; give data of the classes that it was trained on"
        )
    if len(labels) and int(labels.max()) >= count:
        raise DataError(
            f"{data.name}: the label {int(labels.max())}, and the network tells {count} classes "
            f"apart, 0 to {count - 1}; give data of the classes that it was trained on"
        )
