"""A dynamic network against the fastest static form of its original."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from s2d_compiler.benchmarking.forcing import ForcedExits
from s2d_compiler.benchmarking.results import (
    BatchResult,
    DynamicResult,
    ExitResult,
    StaticResult,
    break_even,
)
from s2d_compiler.benchmarking.timer import Clock, Run, interleaved, percentile, typical
from s2d_compiler.optimizing import BACKENDS, optimize, optimize_static
from s2d_compiler.optimizing.backends import why_not
from s2d_compiler.runtime.recording import describe_machine, inputs_for

if TYPE_CHECKING:
    from s2d_compiler.dynamic import DynamicModel, StagedNetwork
    from s2d_compiler.program import Program

log = logging.getLogger(__name__)

_FORMATS = {"nchw": "contiguous", "nhwc": "channels_last"}


@dataclass(frozen=True)
class Benchmark:
    """What was measured, and on what.

    Attributes:
        machine: Processor, threads, versions.
        distribution: Share of samples that leaves at each stage.
        batches: Per batch size.
        skipped: Forms that could not be had, and why.
    """

    machine: Mapping[str, Any]
    distribution: tuple[float, ...]
    batches: tuple[BatchResult, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "machine": dict(self.machine),
            "distribution": list(self.distribution),
            "batches": [batch.to_dict() for batch in self.batches],
            "skipped": dict(self.skipped),
        }


def benchmark(
    dyn: DynamicModel,
    program: Program | None,
    *,
    batches: Sequence[int] = (1, 16, 32),
    backends: Sequence[str] = BACKENDS,
    static_backends: Sequence[str] | None = None,
    distribution: Sequence[float] = (),
    rounds: int = 7,
    seconds: float = 0.3,
    inputs: Callable[[int], tuple[Tensor, ...]] | None = None,
    progress: Callable[[str], object] = lambda what: None,
    made: dict[Any, Any] | None = None,
) -> Benchmark:
    """Measure latency at each exit and throughput with samples leaving, against the original.

    Args:
        dyn: The network, in evaluation mode.
        program: The captured original; None to leave it out.
        batches: Batch sizes; a network that takes one size only is measured at that.
        backends: Names of ``BACKENDS``; those that cannot be had are left out and named.
        static_backends: Those to run the original on; the same ones when None.
        distribution: Share of samples leaving at each stage; equal shares when empty.
        rounds: Turns of every form.
        seconds: Length of a turn, at least one run.
        inputs: Makes flat inputs of so many samples; random numbers when None.
        progress: Called with a word on what is done next.
        made: Keeps the forms of the original, for further networks made of it.

    Returns:
        The forms, the fastest first.
    """
    stages = len(dyn.stages)
    shares = tuple(distribution) or (1 / stages,) * stages
    sizes = list(batches) if dyn.parts.batch is None else [dyn.parts.batch]
    device = next((p.device for p in dyn.parameters()), torch.device("cpu"))
    statics = backends if static_backends is None else static_backends
    named = dict.fromkeys([*backends, *statics])
    skipped = {b: r for b in named if (r := why_not(b, device.type)) is not None}
    usable = [b for b in named if b not in skipped]
    chosen = ([b for b in usable if b in statics], [b for b in usable if b in backends])
    forms: dict[Any, Any] = {} if made is None else made
    found = []
    make = inputs or (lambda size: inputs_for(dyn, size))
    kept: dict[str, StagedNetwork] = {}
    with torch.no_grad():
        for size in sizes:
            work = _Batch(
                dyn, program, shares, size, make(size), device, skipped, progress, kept, forms
            )
            found.append(work.measure(*chosen, rounds, seconds))
            gc.collect()
    return Benchmark(describe_machine(device, ", ".join(usable)), shares, tuple(found), skipped)


@dataclass
class _Batch:
    dyn: DynamicModel
    program: Program | None
    shares: tuple[float, ...]
    size: int
    inputs: tuple[Tensor, ...]
    device: torch.device
    skipped: dict[str, str]
    progress: Callable[[str], object]
    kept: dict[str, StagedNetwork]
    forms: dict[Any, Any]

    def measure(
        self, statics: Sequence[str], backends: Sequence[str], rounds: int, seconds: float
    ) -> BatchResult:
        static: dict[str, Run] = {}
        dynamic: dict[str, Run] = {}
        mixed: dict[str, Run] = {}
        for backend in statics:
            for name, run in self._static_runs(backend):
                self._keep(static, f"static {name}", run)
        for backend in backends:
            if (made := self._dynamic(backend)) is None:
                continue
            fast, forced = made, ForcedExits(self.shares, self.size)
            self._keep(dynamic, backend, self._exit_run(fast))
            if backend in dynamic:
                self._keep(mixed, f"mixed {backend}", self._mixed_run(fast, forced))
        self.progress(f"batch {self.size}: measuring")
        turns = interleaved({**static, **dynamic, **mixed}, rounds, seconds)
        originals = sorted(
            (self._static_result(name, turns[name]) for name in static), key=lambda s: s.typical
        )
        base = originals[0].typical if originals else None
        results = [self._dynamic_result(b, turns, base) for b in dynamic if f"mixed {b}" in mixed]
        results.sort(key=lambda r: r.mixed)
        return BatchResult(self.size, tuple(originals), tuple(results))

    # -- what runs ---------------------------------------------------------------------------------

    def _keep(self, runs: dict[str, Run], name: str, run: Run) -> None:
        """Take a candidate that runs, and warm it up; compilers fail at the first run."""
        self.progress(f"batch {self.size}: {name}")
        try:
            for _ in range(2):
                run()
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200]
            self.skipped[f"{name}, batch {self.size}"] = f"{type(error).__name__}: {reason}"
            log.info("left out: %s: %s", name, error)
            return
        runs[name] = run

    def _static_runs(self, backend: str) -> list[tuple[str, Run]]:
        if self.program is None:
            return []
        formats = ("nchw", "nhwc") if backend == "eager" else ("nhwc",)
        if not any(v.ndim == 4 for v in self.inputs):
            formats = ("nchw",)
        found = []
        for layout in formats:
            self.progress(f"batch {self.size}: static {backend}")
            key = (backend, layout, self.size)
            if key not in self.forms:
                self.forms[key] = optimize_static(
                    self.program, backend=backend, memory_format=_FORMATS[layout],
                    batch=self.size, inputs=self.inputs,
                )  # fmt: skip
            module = self.forms[key]
            inputs = self._formatted(layout)
            name = backend if len(formats) == 1 else f"{backend} {layout}"
            found.append((name, self._plain_run(module, inputs)))
        return found

    def _plain_run(self, module: Any, inputs: Sequence[Tensor]) -> Run:
        def run() -> list[float]:
            clock = Clock(self.device)
            module(*inputs)
            return [clock()]

        return run

    def _formatted(self, layout: str) -> tuple[Tensor, ...]:
        if layout == "nchw":
            return self.inputs
        return tuple(
            v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v
            for v in self.inputs
        )

    def _dynamic(self, backend: str) -> StagedNetwork | None:
        """The optimised form; a compiled one serves all batch sizes."""
        if backend in self.kept:
            return self.kept[backend]
        made = optimize(self.dyn, backend=backend, batch=self.size, examples=self.inputs)
        if backend == "inductor":
            self.kept[backend] = made
        return made

    def _exit_run(self, fast: StagedNetwork) -> Run:
        inputs = self._formatted("nhwc") if getattr(fast.parts, "channels_last", False) else (
            self.inputs
        )  # fmt: skip

        def run() -> list[float]:
            clock = Clock(self.device)
            return [clock() for _ in fast.exits_of(inputs)]

        return run

    def _mixed_run(self, fast: StagedNetwork, forced: ForcedExits) -> Run:
        inputs = self._formatted("nhwc") if getattr(fast.parts, "channels_last", False) else (
            self.inputs
        )  # fmt: skip
        policy, spec = forced.policy, fast.parts.input_spec
        given: tuple[Any, Any] = (
            (inputs, {}) if spec is None else pytree.tree_unflatten(list(inputs), spec)
        )

        def run() -> list[float]:
            clock = Clock(self.device)
            for _ in range(forced.calls):
                forced.begin()
                fast.predict(tuple(given[0]), policy, keywords=given[1])
            return [clock() / forced.calls]

        return run

    # -- what is made of it ------------------------------------------------------------------------

    def _static_result(self, name: str, turns: Any) -> StaticResult:
        return StaticResult(
            name.removeprefix("static "), typical(turns, 0), percentile(turns, 0, 50),
            percentile(turns, 0, 95),
        )  # fmt: skip

    def _dynamic_result(self, backend: str, turns: Any, base: float | None) -> DynamicResult:
        cost = self.dyn.cost
        exits = []
        for number, stage in enumerate(cost.stages):
            p50, p95 = (percentile(turns[backend], number, q) for q in (50, 95))
            share = stage.cumulative_macs / cost.original_macs if cost.original_macs else 0.0
            found = ExitResult(number + 1, typical(turns[backend], number), p50, p95, share)
            if base is not None:
                ratio = found.typical / base
                found = replace(found, time=ratio, efficiency=share / ratio)
            exits.append(found)
        mixed = typical(turns[f"mixed {backend}"], 0)
        result = DynamicResult(backend, tuple(exits), mixed, self.size / mixed * 1000)
        if base is None:
            return result
        early = [e.typical for e in exits[:-1]]
        even = break_even(early, self.shares[:-1], exits[-1].typical, base)
        return replace(result, speedup=base / mixed, break_even=even)
