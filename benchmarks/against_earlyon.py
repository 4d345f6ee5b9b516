"""Early exits of earlyon (PyPI) and of this package, at the same places of the same ResNet-18.

    pip install -e '.[benchmarks]' -c constraints.txt
    python -m benchmarks.against_earlyon --write docs/against-earlyon.md

earlyon wraps a network with hooks, and its own ResNet-18 leaves after layer2 and layer3. The same
network, with the same weights, gets exits along depth there (``transform`` with a depth plan).
Heads have random weights; thresholds are set to quantiles of each one's own confidences, so that
the same share of the samples leaves at each exit. In batches earlyon's samples leave together, at
the first exit that is sure of all of them, or run one by one: both are measured, with the same
thresholds. All take turns in one process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy
import torch
from cyclopts import Parameter
from rich.console import Console

from s2d_compiler import DynamicModel, Thresholds, transform
from s2d_compiler.runtime.recording import describe_machine

CLASSES = 10
SHARES = (0.60, 0.25, 0.15)  # of the samples, leaving at exits 1, 2 and at the end
PLAN = {"exits": ["layer2", "layer3"], "head": "linear", "input_shape": [3, 224, 224]}

app = cyclopts.App(
    name="python -m benchmarks.against_earlyon",
    help=__doc__,
    help_format="plaintext",
    version_flags=(),
)
console = Console(width=100)


@dataclass(frozen=True)
class Entry:
    """One way to answer, ready to be timed."""

    name: str
    first: Callable[[], Any]
    mixed: Callable[[], Any]


def quantiles(confidences: numpy.ndarray[Any, Any]) -> tuple[float, float]:
    """Thresholds with which the shares leave, from (N, 2) confidences of the early exits."""
    first = float(numpy.quantile(confidences[:, 0], 1 - SHARES[0]))
    rest = confidences[confidences[:, 0] < first]
    second = float(numpy.quantile(rest[:, 1], 1 - SHARES[1] / (1 - SHARES[0])))
    return first, second


@torch.no_grad()
def earlyon_entries(wrapper: Any, one: torch.Tensor, many: torch.Tensor) -> list[Entry]:
    """Batched, and one by one."""
    outputs = wrapper(many, mode="training")
    seen = torch.stack([o.softmax(1).amax(1) for o in outputs[:-1]], 1).numpy()
    chosen = list(quantiles(seen))

    def first() -> Any:
        wrapper.config.confidence_thresholds[:] = [0.0, 0.0]
        return wrapper(one, mode="inference")

    def batched() -> Any:
        wrapper.config.confidence_thresholds[:] = chosen
        return wrapper.forward_inference_batched(many)

    def single() -> Any:
        wrapper.config.confidence_thresholds[:] = chosen
        return [wrapper(many[i : i + 1], mode="inference") for i in range(len(many))]

    exits = [result.exit_taken for result in single()]
    console.print(f"earlyon leaves at {[exits.count(e) for e in (0, 1, -1)]}")
    return [Entry("earlyon, batched", first, batched), Entry("earlyon, one by one", first, single)]


@torch.no_grad()
def own_entry(name: str, dyn: Any, one: torch.Tensor, many: torch.Tensor) -> Entry:
    """This package, in one form of running."""
    outputs = dyn(many)
    seen = torch.stack([o.softmax(1).amax(1) for o in outputs[:-1]], 1).numpy()
    chosen = Thresholds(quantiles(seen))
    always = Thresholds((0.0, 0.0))
    console.print(f"{name} leaves at {dyn.predict(many, chosen).stage.bincount().tolist()}")
    return Entry(name, lambda: dyn.predict(one, always), lambda: dyn.predict(many, chosen))


def forms(dyn: DynamicModel) -> dict[str, Any]:
    """The forms of running that this machine has."""
    found: dict[str, Any] = {"s2d-compiler, as compiled": dyn}
    found["s2d-compiler, optimized"] = dyn.optimized()
    return found


def measure(entries: list[Entry], kind: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per entry; entries take turns."""
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for turn in range(rounds + 2):
        for entry in entries:
            function = entry.first if kind == "first" else entry.mixed
            began = time.perf_counter()
            function()
            if turn >= 2:
                times[entry.name].append(time.perf_counter() - began)
    return times


@app.default
def main(
    *,
    write: Annotated[Path | None, Parameter(show_default=False)] = None,
    rounds: int = 40,
    batch: int = 32,
) -> None:
    """Measure, and print the table.

    Args:
        write: Also write it to this file.
        rounds: Turns of each entry at batch 1; a fifth of it at the larger batch.
        batch: The larger batch.
    """
    from earlyon.models import resnet18_ee

    torch.manual_seed(0)
    wrapper = resnet18_ee(CLASSES, pretrained=False).eval()
    dyn = transform(wrapper.backbone, PLAN)
    one, many = torch.randn(1, 3, 224, 224), torch.randn(batch, 3, 224, 224)
    entries = earlyon_entries(wrapper, one, many)
    entries += [own_entry(name, form, one, many) for name, form in forms(dyn).items()]
    first = measure(entries, "first", rounds)
    mixed = measure(entries, "mixed", max(rounds // 5, 3))
    table = _table(entries, first, mixed, batch)
    console.print(table, markup=False)
    if write is not None:
        write.write_text(f"{_heading(batch)}\n{table}\n")


def _heading(batch: int) -> str:
    found = describe_machine(torch.device("cpu"), "")
    from importlib.metadata import version

    return f"""# Beside earlyon

ResNet-18 at 224x224, {CLASSES} classes, exits after `layer2` and `layer3`, random weights. *First
exit*: one image that leaves at the first exit. *Mixed*: {batch} images of which
{SHARES[0]:.0%}, {SHARES[1]:.0%} and {SHARES[2]:.0%} leave at the exits. Ratios are to the first
row.

`python -m benchmarks.against_earlyon --write docs/against-earlyon.md`

{found["processor"]}, {os.cpu_count()} cores, {found["threads"]} threads, torch {found["torch"]},
Python {found["python"]}, earlyon {version("earlyon")}
"""


def _table(
    entries: list[Entry],
    first: dict[str, list[float]],
    mixed: dict[str, list[float]],
    batch: int,
) -> str:
    lines = [
        "| | first exit, p50 ms | ratio | mixed, images per second | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    base = numpy.median(first[entries[0].name]), numpy.median(mixed[entries[0].name])
    for entry in entries:
        latency, time_ = numpy.median(first[entry.name]), numpy.median(mixed[entry.name])
        lines.append(
            f"| {entry.name} | {latency * 1000:.2f} | {latency / base[0]:.2f} "
            f"| {batch / time_:.1f} | {base[1] / time_:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(app())
