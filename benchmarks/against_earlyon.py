"""Exits along depth beside earlyon's, after the same layers of one ResNet-18.

    pip install --no-deps earlyon==0.3.0
    python -m benchmarks.against_earlyon

Random weights; which samples leave is forced by thresholds, for both alike. Of a batch 60, 25 and
15% leave after layer2, after layer3 and at the end. earlyon's batched call lets all samples leave
together, where the last of them may: in a mixed batch at the end. Called one by one, each leaves
where it may. Both are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cyclopts
import torch
from rich.console import Console
from torch import Tensor

from s2d_compiler import DynamicModel, Thresholds, transform
from s2d_compiler.benchmarking.forcing import ForcedExits
from s2d_compiler.benchmarking.timer import interleaved, percentile, typical
from s2d_compiler.dynamic import StagedNetwork
from s2d_compiler.optimizing import optimize_static
from s2d_compiler.runtime.recording import describe_machine
from s2d_compiler.tracing import capture

SHARES = (0.6, 0.25, 0.15)
PLACES = ("layer2", "layer3")
BATCH = 32
FOLDER = Path(__file__).parent.parent
#: Thresholds with which a sample leaves at each exit, whatever its confidence is.
FORCED = ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0])

app = cyclopts.App(
    name="python -m benchmarks.against_earlyon", help=__doc__, help_format="plaintext",
    version_flags=(),
)  # fmt: skip


def seconds_of(call: Callable[[], object]) -> Callable[[], list[float]]:
    """A run that is timed as a whole."""

    def run() -> list[float]:
        began = time.perf_counter()
        call()
        return [time.perf_counter() - began]

    return run


def networks() -> tuple[Any, DynamicModel]:
    """earlyon's ResNet-18 and ours, of the same weights."""
    try:
        from earlyon.models.resnet_ee import resnet18_ee
    except ImportError as error:
        raise SystemExit(f"{error}; pip install --no-deps earlyon==0.3.0") from error
    torch.manual_seed(0)
    theirs = resnet18_ee(1000, pretrained=False).eval()
    from torchvision.models import resnet18

    model = resnet18(weights=None).eval()
    model.load_state_dict(theirs.backbone.state_dict())
    ours = transform(model, {"exits": list(PLACES), "input_shape": [3, 224, 224]})
    return theirs, ours


def first_exit(theirs: Any, ours: dict[str, StagedNetwork], x: Tensor) -> dict[str, Any]:
    """Runs in which one sample leaves at the first exit."""

    def earlyon(given: Tensor = x) -> object:
        theirs.config.confidence_thresholds = FORCED[0]
        return theirs(given)

    runs: dict[str, Any] = {"earlyon": earlyon}
    for name, network in ours.items():
        runs[name] = lambda network=network: network.predict(x, Thresholds((0.0, 0.0)))
    return {name: seconds_of(run) for name, run in runs.items()}


def mixed(theirs: Any, ours: dict[str, StagedNetwork], x: Tensor) -> dict[str, Any]:
    """Runs of a batch whose samples leave in the given shares."""
    exits = ForcedExits(SHARES, len(x)).exits[0].tolist()

    def together() -> object:
        theirs.config.confidence_thresholds = FORCED[max(exits)]
        return theirs.forward_inference_batched(x)

    def one_by_one() -> object:
        found = []
        for row, stage in enumerate(exits):
            theirs.config.confidence_thresholds = FORCED[stage]
            found.append(theirs(x[row : row + 1]).prediction)
        return torch.cat(found)

    runs: dict[str, Any] = {"earlyon, batched": together, "earlyon, one by one": one_by_one}
    for name, network in ours.items():
        forced = ForcedExits(SHARES, len(x))

        def predict(network: StagedNetwork = network, forced: ForcedExits = forced) -> object:
            forced.begin()
            return network.predict(x, forced.policy)

        runs[name] = predict
    return {name: seconds_of(run) for name, run in runs.items()}


@app.default
def main(
    *,
    rounds: int = 9,
    seconds: float = 0.4,
    threads: int = 2,
    page: Path = FOLDER / "docs" / "against-earlyon.md",
) -> None:
    """Measure, print and write the page.

    Args:
        rounds: Turns of every candidate.
        seconds: Length of a turn, at least one run.
        threads: Threads.
        page: The page to write.
    """
    torch.set_num_threads(threads)
    theirs, dyn = networks()
    one = torch.randn(1, 3, 224, 224)
    many = torch.randn(BATCH, 3, 224, 224)
    program = capture(_backbone(theirs), None, (3, 224, 224))
    lines = _head(threads)
    with torch.no_grad():
        for x, make, title in ((one, first_exit, "first"), (many, mixed, "mixed")):
            ours: dict[str, StagedNetwork] = {
                "ours, as compiled": dyn,
                "ours, optimised (eager)": dyn.optimized(backend="eager", batch=len(x)),
                "ours, optimised": dyn.optimized(batch=len(x)),
            }
            runs = make(theirs, ours, x)
            static = optimize_static(program, backend="onednn", batch=len(x))
            last = x.contiguous(memory_format=torch.channels_last)
            runs["the original, oneDNN, all layers"] = seconds_of(lambda m=static, v=last: m(v))  # type: ignore[misc]
            for run in runs.values():
                run()
            lines += _table(title, interleaved(runs, rounds, seconds), len(x))
    page.write_text("\n".join(lines) + "\n")
    Console(width=100).print("\n".join(lines), markup=False)


def _backbone(theirs: Any) -> Any:
    from torchvision.models import resnet18

    model = resnet18(weights=None).eval()
    model.load_state_dict(theirs.backbone.state_dict())
    return model


def _head(threads: int) -> list[str]:
    from importlib.metadata import version

    machine = describe_machine(torch.device("cpu"), "")
    return [
        "# Beside earlyon", "",
        "Written by `python -m benchmarks.against_earlyon`. ResNet-18 at 224x224, 1000 classes, "
        "random weights, exits after layer2 and layer3 of both; who leaves is forced. Candidates "
        "take turns.", "",
        f"Machine: {machine['processor']}, {threads} threads, torch {machine['torch']}, earlyon "
        f"{version('earlyon')}.", "",
    ]  # fmt: skip


def _table(kind: str, turns: dict[str, Any], samples: int) -> list[str]:
    if kind == "first":
        lines = ["## One sample that leaves at the first exit", "",
                 "| candidate | p50, ms | p95, ms |", "|---|---:|---:|"]  # fmt: skip
        lines += [
            f"| {name} | {percentile(found, 0, 50):.2f} | {percentile(found, 0, 95):.2f} |"
            for name, found in turns.items()
        ]
    else:
        lines = [f"## A batch of {samples}, 60, 25 and 15% leaving at the three exits", "",
                 "| candidate | samples/s | ms per batch |", "|---|---:|---:|"]  # fmt: skip
        for name, found in turns.items():
            time_ = typical(found, 0)
            lines.append(f"| {name} | {samples / time_ * 1000:.1f} | {time_:.0f} |")
    return [*lines, ""]


if __name__ == "__main__":
    app()
