"""Training batches: bytes in memory, everything else on the device."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from s2d_compiler.data import Data, Preprocessing
from s2d_compiler.data.loading import _require_shape
from s2d_compiler.data.sources import Arrays
from s2d_compiler.errors import DataError, UsageError
from s2d_compiler.memory import let_through
from s2d_compiler.training.augmentation import augment, draws_of
from s2d_compiler.training.distributed import Processes
from s2d_compiler.training.recipe import Recipe

__all__ = ["Feed", "as_data", "fingerprint"]


class Feed:
    """The batches of a training, each epoch in another order.

    Which images a step takes, and how they are cropped and mirrored, depends on the recipe, the
    epoch and the step alone. With several processes each takes its part of the joint batch.

    Args:
        data: The images.
        labels: ``(N,)``, or None where they are not used.
        preprocessing: What is done to each; crops and flips come between size and numbers.
        recipe: Batch size, crops, flips and seed.
        input_shape: What the network takes, without the batch; None for any.
        device: Where batches go.
        processes: Those that train together.
    """

    def __init__(
        self,
        data: Data,
        labels: Tensor | None,
        preprocessing: Preprocessing,
        recipe: Recipe,
        input_shape: tuple[int, ...] | None,
        device: torch.device,
        processes: Processes,
    ) -> None:
        joint = recipe.batch_size * processes.count
        if len(data) < joint:
            raise DataError(
                f"{data.name}: {len(data)} images, and a step takes {joint}; give more images, or "
                "a smaller batch size"
            )
        self.data = data
        self.labels = labels
        self.preprocessing = preprocessing
        self.recipe = recipe
        self.input_shape = input_shape
        self.device = device
        self.processes = processes
        self.steps = len(data) // joint

    def epoch(self, number: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Inputs and labels of each step of an epoch, from a step on.

        Args:
            number: Which epoch, from 0.
            first: Which step.
        """
        draws = draws_of(self.recipe.seed, number, len(self.data))
        size = self.recipe.batch_size
        parts = []
        for step in range(first, self.steps):
            start = (step * self.processes.count + self.processes.rank) * size
            parts.append(slice(start, start + size))
        orders = [draws.order[part] for part in parts]
        for part, order, images in zip(parts, orders, self._loaded(orders), strict=True):
            # Permuted bytes would keep their strides to the end; the network wants its own.
            work = images.to(self.device)
            work = augment(work, draws.numbers[part], self.recipe.crop_padding, self.recipe.flip)
            inputs = self.preprocessing.normalised(work, self.data.name)
            if images.is_floating_point() and not bool(inputs.isfinite().all()):
                self._refuse_pixels(images, order)
            labels = None if self.labels is None else self.labels[order].to(self.device)
            yield self._formatted(inputs), labels

    def _formatted(self, inputs: Tensor) -> Tensor:
        last = self.recipe.memory_format == "channels_last" and inputs.dim() == 4
        wanted = torch.channels_last if last else torch.contiguous_format
        return inputs.contiguous(memory_format=wanted)

    def _loaded(self, orders: list[Tensor]) -> Iterator[Tensor]:
        if not self.data.concurrent:
            # One after the other, so that random numbers that a data set draws come in an order
            # that a checkpoint can take up.
            for order in orders:
                yield self._together(order.tolist())
            return
        with ThreadPoolExecutor(min(torch.get_num_threads(), 8)) as pool:
            waiting: deque[tuple[list[int], list[Any]]] = deque()
            try:
                for order in orders:
                    indices = order.tolist()
                    waiting.append((indices, [pool.submit(self._one, i) for i in indices]))
                    if len(waiting) == 2:
                        yield self._finished(*waiting.popleft())
                while waiting:
                    yield self._finished(*waiting.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _finished(self, indices: list[int], futures: list[Any]) -> Tensor:
        return self._stacked(indices, [future.result() for future in futures])

    def _together(self, indices: Sequence[int]) -> Tensor:
        whole = self.data.images(indices)
        if whole is None:
            return self._stacked(indices, [self._one(index) for index in indices])
        sized = self.preprocessing.sized(whole, self.data.name)
        self._require_shape(sized[0], indices[0])
        return sized

    def _one(self, index: int) -> Tensor:
        image = self.preprocessing.sized(self.data.image(index), self.data.place(index))
        self._require_shape(image, index)
        return image

    def _stacked(self, indices: Sequence[int], images: list[Tensor]) -> Tensor:
        for index, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape or image.dtype != images[0].dtype:
                raise DataError(
                    f"{self.data.place(index)}: {_size(image)}, and another image of its batch has "
                    f"{_size(images[0])}; resize all to one size (--resize), and crop them (--crop)"
                )
        return torch.stack(images)

    def _require_shape(self, image: Tensor, index: int) -> None:
        shape = self.input_shape
        _require_shape(image.shape, shape, lambda: self.data.place(index), self.preprocessing)

    def _refuse_pixels(self, images: Tensor, order: Tensor) -> None:
        wrong = (~images.isfinite()).flatten(1).any(1).nonzero()
        at = int(order[int(wrong[0])]) if len(wrong) else int(order[0])
        raise DataError(
            f"{self.data.place(at)}: it has pixels that are NaN or infinite, and so the loss would "
            "be; correct or remove it"
        )

    def fingerprint(self) -> str:
        """A hash by which a checkpoint knows the data again, whatever they are called."""
        return fingerprint(self.data, self.labels, self.preprocessing)


def fingerprint(data: Data, labels: Tensor | None, how: Preprocessing | str = "") -> str:
    """A hash of number, labels, preprocessing and some of the images."""
    digest = hashlib.sha256(f"{len(data)} {how}".encode())
    if labels is not None:
        digest.update(labels.cpu().numpy().tobytes())
    for index in sorted({0, len(data) // 2, len(data) - 1}):
        image = data.image(index).contiguous()
        digest.update(f"{tuple(image.shape)} {image.dtype}".encode())
        digest.update(image.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _size(image: Tensor) -> str:
    return f"{'x'.join(map(str, image.shape))} {image.dtype} numbers".replace("torch.", "")


def as_data(given: Any, name: str) -> Data:
    """Data, or a pair of images and labels (or None), as ``Data``.

    Raises:
        UsageError: It is neither.
        DataError: The arrays are no images, or no labels.
    """
    from s2d_compiler.data.arrays import _images, _labels

    if isinstance(given, Data):
        return given
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UsageError(
            f"{name}: a {type(given).__name__} is neither data nor a pair of images and labels; "
            "give what open_data returns, or (images, labels)"
        )
    images, labels = (None if part is None else _tensor(part, name) for part in given)
    if images is None:
        raise DataError(
            f"{name}: the images are None, and there must be some; give (images, labels)"
        )
    if labels is None:
        labels = torch.full((len(images),), -1)
    else:
        labels = _labels(labels.numpy(force=True), f"{name}: labels")
    if len(labels) != len(images):
        raise DataError(
            f"{name}: {len(images)} images and {len(labels)} labels, and each image has one; give "
            "as many of the one as of the other"
        )
    if images.dim() == 4 and (images.dtype == torch.uint8 or images.is_floating_point()):
        found = images.detach()
        if images.shape[3] in (1, 3):
            found = _images(images.numpy(force=True), name)
    else:
        found = _images(images.numpy(force=True), name)
    return Arrays(name, found, labels)


def _tensor(given: Any, name: str) -> Tensor:
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        let_through(error)
        found = None
    if found is None or not found.dim() or found.layout != torch.strided or found.is_meta:
        raise DataError(
            f"{name}: a {type(given).__name__} that is no dense tensor of one number or more per "
            "image stands where images or labels belong; give tensors or arrays of numbers"
        )
    return found
