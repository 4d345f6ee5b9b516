"""Several processes that train one network, each on its part of every batch.

Gradients are averaged, so that a step is that of one process with the joint batch. Norms of
batches see their own process's part, as in torch's ``DistributedDataParallel``; their running
statistics are the first process's, which the others take over at the end of each epoch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2d_compiler.errors import ProcessError, UsageError, first_line

__all__ = ["Processes", "joined"]


class Processes:
    """Those that ``torch.distributed`` knows of; this one alone where it was not started."""

    def __init__(self) -> None:
        self.are_several = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if self.are_several else 1
        self.rank = dist.get_rank() if self.are_several else 0

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """Numbers of all processes added up, the same everywhere."""
        if self.count > 1:
            with _explained(self.rank):
                dist.all_reduce(numbers)
        return numbers

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by the mean of all processes'; all as one message for each type."""
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:  # the same everywhere, or messages would not fit together
                parameter.grad = torch.zeros_like(parameter)
            by_type.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.sum(flat)
            parts = torch.split(flat.div_(self.count), [part.numel() for part in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's numbers."""
        if self.count == 1:
            return
        with torch.no_grad(), _explained(self.rank):
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)

    def all_of(self, value: Any) -> list[Any]:
        """Plain data of every process, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _explained(self.rank):
            dist.all_gather_object(found, value)
        return found

    def part_of(self, indices: Sequence[int]) -> Sequence[int]:
        """The share of this process."""
        return indices[self.rank :: self.count]


@contextmanager
def _explained(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            f"process {rank}: another process of this training does not answer "
            f"({first_line(error)[:120]}), and each step takes all of them; see what it said, and "
            "start all again"
        ) from error


@contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Join the processes that ``torchrun`` started, for a command; alone, nothing is done.

    Args:
        device: What was asked for. ``cuda`` becomes the GPU of this process.

    Yields:
        The device of this process.

    Raises:
        UsageError: There are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = device is not None and torch.device(device).type == "cuda"
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"--device: process {local} of this computer has no GPU, there are "
                f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
