"""What running with early exits costs and keeps: overhead, memory, deadlines under load.

    python -m benchmarks.running overhead     # predict beside calling the stages by hand
    python -m benchmarks.running memory       # 10,000 mixed predictions
    python -m benchmarks.running deadline     # 1,000 calls, alone and beside a busy process

Networks have random weights: what is measured does not depend on them. Times are compared within
one interleaved run.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cyclopts
import numpy
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.cifar_models import resnet20
from s2d_compiler import Deadline, DynamicModel, MacsBudget, Thresholds, transform
from s2d_compiler.runtime import Policy, record_timings
from s2d_compiler.runtime.recording import describe_machine

PLAN = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}}
NEVER = Thresholds((math.inf, math.inf))

app = cyclopts.App(
    name="python -m benchmarks.running", help=__doc__, help_format="plaintext", version_flags=()
)
console = Console(width=100)


def network(name: str) -> tuple[DynamicModel, tuple[int, ...]]:
    """A network of three stages with full reuse, and the shape of its input."""
    if name == "resnet20":
        model, shape = resnet20(), (3, 32, 32)
    else:
        from torchvision import models

        model, shape = models.get_model(name), (3, 224, 224)
    torch.manual_seed(0)
    return transform(model.eval(), {**PLAN, "input_shape": list(shape)}), shape


def show_machine() -> None:
    """Print what this runs on."""
    found = describe_machine(torch.device("cpu"), "eager")
    console.print(
        f"{found['processor']}, {os.cpu_count()} cores, {found['threads']} threads, torch "
        f"{found['torch']}, eager"
    )


# -- overhead ------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(dyn: DynamicModel, x: Tensor, exits: int) -> None:
    """The stages one after the other, and the confidence of each exit."""
    features: dict[Any, Tensor] = {}
    for number in range(exits):
        taken = dyn.parts.interfaces[number].inputs
        arguments = [x if w[0] == "input" else features[w[1], w[2]] for w in taken]
        leaves, handed = dyn.stages[number](*arguments)
        features.update({(number, k): value for k, value in enumerate(handed)})
        if float(leaves[0].softmax(1).amax(1)) > 2:
            return


def _time(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


@app.command
def overhead(runs: int = 300) -> None:
    """Batch 1: ``predict`` beside calling the stages by hand, both reading every exit."""
    show_machine()
    table = Table("network", "exit", "by hand, ms", "predict, ms", "ratio of medians")
    for name in ("resnet20", "mobilenet_v2", "resnet50"):
        dyn, shape = network(name)
        x = torch.randn(1, *shape)
        count = runs if name == "resnet20" else max(runs // 6, 20)
        for exits in (1, 3):
            policy = Thresholds((0.0, 0.0)) if exits == 1 else NEVER
            both = (partial(by_hand, dyn, x, exits), partial(dyn.predict, x, policy))
            pairs = [[_time(function) for function in both] for _ in range(count)]
            hand, predicted = numpy.median(numpy.array(pairs) * 1000, axis=0)
            table.add_row(
                name, str(exits), f"{hand:.3f}", f"{predicted:.3f}", f"{predicted / hand:.3f}"
            )
    console.print(table)


# -- memory --------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@app.command
def memory(predictions: int = 10_000) -> None:
    """Mixed batch sizes and policies; tensors alive and resident memory before and after."""
    show_machine()
    dyn, shape = network("resnet20")
    costs = [stage.cumulative_macs for stage in dyn.cost.stages]
    dyn.settings = dataclasses.replace(
        dyn.settings, timings=record_timings(dyn, (1, 8, 32), runs=20)
    )
    rng = random.Random(0)
    torch.manual_seed(0)

    def one() -> None:
        size = rng.choice([0, 1, 1, 2, 3, 5, 8, 16])
        x = torch.randn(size, *shape)
        policies: list[Policy] = [
            Thresholds((rng.random(), rng.random())),
            Thresholds((rng.random() * 2, rng.random() * 2), "entropy"),
            MacsBudget(rng.randint(costs[0], costs[2])),
            MacsBudget(rng.randint(costs[0], costs[2]) * max(size, 1), "batch"),
            Deadline(rng.random() * 20),
        ]
        if rng.random() < 0.1:
            next(iter(dyn.anytime(x)))
        else:
            dyn.predict(x, rng.choice(policies))

    table = Table("predictions", "tensors alive", "resident memory, MB")

    def row(done: int) -> None:
        gc.collect()
        alive = sum(type(v) is Tensor for v in gc.get_objects())
        table.add_row(f"{done:,}", str(alive), f"{resident() / 1e6:.1f}")

    for _ in range(300):  # until allocators have what they need
        one()
    row(0)
    for number in range(1, predictions + 1):
        one()
        if number % (predictions // 4) == 0:
            row(number)
    console.print(table)


# -- deadlines -----------------------------------------------------------------------------------


def _keep_busy() -> None:
    while True:
        torch.randn(400, 400) @ torch.randn(400, 400)


@app.command
def deadline(calls: int = 1000, name: str = "resnet20", size: int = 4) -> None:
    """How many calls miss their deadline, by how much, alone and beside a busy process."""
    show_machine()
    dyn, shape = network(name)
    timings = record_timings(dyn, (1, 2, size), runs=100)
    dyn.settings = dataclasses.replace(dyn.settings, timings=timings)
    x = torch.randn(size, *shape)
    p95 = [timings.p95(stage, size) for stage in range(3)]
    console.print(
        f"{name}, batch {size}; recorded p95 of the stages: "
        + ", ".join(f"{t:.2f}" for t in p95)
        + " ms"
    )
    table = Table("", "deadline, ms", "exits 1/2/3", "late", "late by p50, ms", "at most, ms")
    budgets = [1.2 * (p95[0] + p95[1]), 1.2 * sum(p95)]
    for busy in (False, True):
        workers = []
        if busy:
            start = multiprocessing.get_context("spawn")
            workers = [start.Process(target=_keep_busy, daemon=True) for _ in range(2)]
            for worker in workers:
                worker.start()
            time.sleep(8)
        for budget in budgets:
            policy = Deadline(budget)
            late, stages = [], numpy.zeros(3, dtype=int)
            for _ in range(calls):
                began = time.perf_counter()
                found = dyn.predict(x, policy)
                took = (time.perf_counter() - began) * 1000
                stages[int(found.stage[0])] += 1
                if took > budget:
                    late.append(took - budget)
            table.add_row(
                "two busy processes" if busy else "alone",
                f"{budget:.2f}",
                "/".join(map(str, stages)),
                f"{len(late)} of {calls}",
                f"{numpy.median(late):.2f}" if late else "-",
                f"{max(late):.2f}" if late else "-",
            )
        for worker in workers:
            worker.kill()
            worker.join()
    console.print(table)


if __name__ == "__main__":
    sys.exit(app())
