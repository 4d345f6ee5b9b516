"""Recording how long stages take, for deadlines."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from s2d_compiler.errors import UsageError
from s2d_compiler.runtime.measures import measure_values
from s2d_compiler.runtime.timings import StageTimings, Timings

if TYPE_CHECKING:
    from s2d_compiler.dynamic import StagedNetwork

#: Runs before those that count: memory is fetched, kernels are chosen.
_WARM_UP = 3


def record_timings(
    network: StagedNetwork,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    runs: int = 50,
    example_inputs: Sequence[Tensor] | None = None,
    backend: str = "eager",
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Measure each stage at each batch size, as ``predict`` runs it.

    A stage's time holds what leads to it: taking out the samples that have left, and reading the
    exit before it.

    Args:
        network: The network, in evaluation mode, on the device that it is to run on.
        batch_sizes: Batch sizes; a network that takes one size only is measured at that.
        runs: Runs per batch size; p95 needs at least 20.
        example_inputs: Inputs (N, ...), of which samples are taken in turn; random numbers when
            None, which integer inputs cannot be.
        backend: What is written down as backend.
        progress: Called with the sizes that are done and how many there are.

    Returns:
        p50 and p95 in milliseconds, and what they were measured on.

    Raises:
        UsageError: There is nothing to measure, or not enough runs for a p95.
    """
    if runs < 20:
        raise UsageError(f"runs: {runs} are too few for a p95; measure at least 20.")
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise UsageError(
            f"batch sizes: {list(batch_sizes)} are none; give sizes from 1, such as 1, 4, 16."
        )
    if network.parts.batch is not None:
        sizes = [network.parts.batch]
    found: list[numpy.ndarray[Any, Any]] = []
    device = torch.device("cpu")
    for done, size in enumerate(sizes):
        inputs = inputs_for(network, size, example_inputs)
        device = inputs[0].device
        found.append(_measure(network, inputs, runs))
        if progress is not None:
            progress(done + 1, len(sizes))
    stages = []
    for stage in range(len(network.stages)):
        times = [table[:, stage] for table in found]
        stages.append(StageTimings(*(_percentiles(times, q) for q in (50, 95))))
    return Timings(tuple(sizes), tuple(stages), describe_machine(device, backend))


def inputs_for(
    network: StagedNetwork, size: int, example_inputs: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """So many samples as flat inputs: examples in turn, or random numbers."""
    if example_inputs is not None:
        rows = torch.arange(size)
        return tuple(v[(rows % len(v)).to(v.device)] for v in example_inputs)
    generator = torch.Generator().manual_seed(0)
    like = next(network.parameters(), torch.zeros(0))
    inputs = []
    for shape in network.parts.input_shapes:
        value = torch.randn((size, *shape), generator=generator)
        value = value.to(device=like.device, dtype=like.dtype)
        inputs.append(value)
    return tuple(inputs)


def describe_machine(device: torch.device, backend: str) -> dict[str, Any]:
    """What times were measured on: plain data."""
    on_cuda = device.type == "cuda"
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


@torch.no_grad()
def _measure(
    network: StagedNetwork, inputs: tuple[Tensor, ...], runs: int
) -> numpy.ndarray[Any, Any]:
    """Milliseconds by run and stage."""
    engine = network.engine
    samples = len(inputs[0])
    everybody = torch.arange(samples, device=inputs[0].device)
    table = numpy.zeros((runs, len(network.stages)))
    gc.collect()
    for run in range(-_WARM_UP, runs):
        batch = engine.batch_of(inputs)
        began = time.perf_counter()
        for number in range(len(network.stages)):
            if number and samples > 1:
                batch.keep(everybody)
            leaves = batch.run(number)
            _read(leaves)
            ended = time.perf_counter()
            if run >= 0:
                table[run, number] = (ended - began) * 1000
            began = ended
    return table


def _read(leaves: Sequence[Any]) -> None:
    """Read an exit as a policy does, which waits for the device."""
    value = next((v for v in leaves if isinstance(v, Tensor)), None)
    if value is None:
        return
    if value.ndim >= 2 and value.is_floating_point() and value.numel():
        value = measure_values("confidence", value)
    value.flatten()[:1].tolist()


def _percentiles(times: Sequence[numpy.ndarray[Any, Any]], q: int) -> tuple[float, ...]:
    return tuple(round(float(numpy.percentile(column, q)), 6) for column in times)
