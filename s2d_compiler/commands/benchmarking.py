"""``s2d bench``: what a dynamic network saves, against the fastest static form of its original."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from s2d_compiler.commands.options import (
    REPORTING,
    SOURCE,
    ModelSource,
    Reporting,
    Result,
    capture_for,
)
from s2d_compiler.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from s2d_compiler.benchmarking import BatchResult, Benchmark
    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.program import Program

_SEVERAL = Parameter(consume_multiple=True, show_default=False)
#: With ``--distribution``: what a sum of shares may be off by, in percent.
_ROUNDING = 1.0


def benchmark_network(
    dyn: Path,
    /,
    *,
    static: Annotated[Path | None, Parameter(show_default=False)] = None,
    source: ModelSource = SOURCE,
    batch: Annotated[Sequence[int], _SEVERAL] = (1, 16, 32),
    backends: Annotated[Sequence[str], _SEVERAL] = (),
    distribution: Annotated[str | None, Parameter(show_default=False)] = None,
    rounds: int = 7,
    seconds: float = 0.3,
    threads: Annotated[int | None, Parameter(show_default=False)] = None,
    device: str = "cpu",
    plot: Annotated[Path | None, Parameter(show_default=False)] = None,
    record: bool = False,
    reporting: Reporting = REPORTING,
) -> Result:
    """Measure a compiled network's time against the fastest static form of the original.

    Latency when all samples leave at one exit, throughput when they leave in given shares (they
    really leave the batch), the share of early exits from which on the dynamic network is faster.
    Forms take turns, so that what else the machine does strikes them alike.

    Args:
        dyn: The compiled network, dyn.pt.
        static: The original network, to compare with; --arch and its like are about it.
        batch: Batch sizes.
        backends: What to run on: eager, onednn, inductor (which compiles for minutes); all that
            can be had when left out.
        distribution: Shares of samples that leave at each stage, such as 60/25/15; equal shares
            when left out.
        rounds: Turns that each form takes.
        seconds: Length of a turn, at least one run.
        threads: Threads that torch uses; its own choice when left out.
        device: Where to run, such as cpu or cuda.
        plot: Draw the times into this file (.png, .svg, .pdf).
        record: Write p50 and p95 of every stage into dyn.pt, for deadlines.
    """
    from s2d_compiler.benchmarking import benchmark
    from s2d_compiler.commands.data_options import read_device
    from s2d_compiler.format import load
    from s2d_compiler.optimizing import BACKENDS
    from s2d_compiler.output import check_writable
    from s2d_compiler.plots import check_plot

    _check(batch, backends, BACKENDS, rounds, seconds, threads)
    if plot is not None:
        check_plot(plot)
    if record:
        check_writable(dyn)
    place = read_device(device)
    network = load(dyn, place).eval()
    shares = read_distribution(distribution, len(network.stages))
    program = None
    if static is not None:
        program = _original(static, source, network, place)
    with _threads(threads), _steps(reporting) as progress:
        found = benchmark(
            network, program, batches=sorted(set(batch)), backends=backends or BACKENDS,
            distribution=shares, rounds=rounds, seconds=seconds, progress=progress,
        )  # fmt: skip
        document = {"dyn": str(dyn), "static": None if static is None else str(static)}
        document |= found.to_dict()
        text: list[RenderableType] = [*_text(found, static is not None)]
        if record:
            progress("recording the times of stages")
            text.append(_record(network, dyn, batch))
            document["recorded"] = network.settings.to_dict()["timings"]
    if plot is not None:
        from s2d_compiler.benchmarking.drawing import draw_benchmark

        draw_benchmark(found, plot, dyn.name)
        document["plot"] = str(plot)
        text.append(f"plot: {plot}")
    return Result(document, text)


def _check(
    batch: Sequence[int],
    backends: Sequence[str],
    known: Sequence[str],
    rounds: int,
    seconds: float,
    threads: int | None,
) -> None:
    for size in batch:
        if not 1 <= size <= 1_000_000:
            raise UsageError(f"--batch: {size} is no number of samples; give 1 or more")
    for backend in backends:
        if backend not in known:
            raise UsageError(
                f"--backends: there is no {backend[:60]!r}; take some of {', '.join(known)}"
            )
    if not 1 <= rounds <= 10_000:
        raise UsageError(f"--rounds: {rounds} is no number of rounds; give 1 to 10000")
    if not 0 <= seconds <= 3600:
        raise UsageError(f"--seconds: {seconds} is no length of a turn; give 0 to 3600")
    if threads is not None and not 1 <= threads <= 4096:
        raise UsageError(f"--threads: {threads} is no number of threads; give 1 or more")


def read_distribution(text: str | None, stages: int) -> tuple[float, ...]:
    """Shares of samples per stage, adding up to 1; equal shares for None.

    Raises:
        UsageError: They are not one share per stage, or do not add up to 100.
    """
    if text is None:
        return (1 / stages,) * stages
    example = "/".join(["60", "25", "15"] if stages == 3 else [f"{100 // stages}"] * stages)
    try:
        shares = [float(part) for part in text.split("/")]
    except ValueError as error:
        raise UsageError(
            f"--distribution: {text[:60]!r} are no shares; write one per stage, such as {example}"
        ) from error
    if len(shares) != stages:
        raise UsageError(
            f"--distribution: {text[:60]!r} has {len(shares)} shares and the network {stages} "
            f"stages; write one per stage, such as {example}"
        )
    total = sum(shares)
    if not all(0 <= share <= 100 for share in shares) or not abs(total - 100) <= _ROUNDING:
        raise UsageError(
            f"--distribution: {text[:60]!r} add up to {total:g}, not to 100; write the shares in "
            f"percent, such as {example}"
        )
    return tuple(share / total for share in shares)


def _original(path: Path, source: ModelSource, network: DynamicModel, device: Any) -> Program:
    """The original, captured for the inputs that the network takes."""
    shapes = network.parts.input_shapes
    if len(shapes) != 1:
        raise UsageError(
            f"--static: {path} has to be captured from one input, and the network takes "
            f"{len(shapes)}; measure it in Python with s2d_compiler.benchmarking.benchmark"
        )
    submodule = source.submodule
    if submodule is None and isinstance(network.parts.made_by.get("submodule"), str):
        submodule = str(network.parts.made_by["submodule"])
    model = replace(source, submodule=submodule).read(path)
    like = next((p for p in network.parameters() if p.is_floating_point()), None)
    if like is not None:
        model = model.to(device=like.device, dtype=like.dtype)
    return capture_for(model, shapes[0])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _steps(reporting: Reporting) -> Iterator[Callable[[str], None]]:
    """What is being done, on a terminal's stderr."""
    if reporting.quiet or reporting.as_json or sys.stderr is None or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        yield status.update


def _record(network: DynamicModel, path: Path, batch: Sequence[int]) -> str:
    from s2d_compiler.runtime import record_timings

    sizes = sorted({*batch, *(s for s in (1, 2, 4, 8, 16, 32) if s <= max(batch))})
    timings = record_timings(network, sizes, runs=20)
    network.settings = replace(network.settings, timings=timings)
    network.save(path)
    return (
        f"recorded: p50 and p95 of {len(timings.stages)} stages at batch sizes "
        f"{', '.join(map(str, timings.batch_sizes))}, in {path}"
    )


def _text(found: Benchmark, has_static: bool) -> Iterator[RenderableType]:
    machine = found.machine
    shares = "/".join(f"{100 * share:.3g}" for share in found.distribution)
    yield (
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; samples "
        f"leave {shares}%"
    )
    for batch in found.batches:
        yield _table(batch)
        yield from _static_lines(batch)
    for name, reason in found.skipped.items():
        yield f"left out: {name}: {reason}"
    if not has_static:
        yield (
            "no original to compare with; name it for efficiency and break-even: --static model.pt"
        )


def _table(batch: BatchResult) -> Table:
    from rich.table import Table

    table = Table(title=f"batch {batch.batch}", title_justify="left")
    table.add_column("form")
    for title in ("exit", "p50 ms", "p95 ms", "of static", "MACs", "efficiency"):
        table.add_column(title, justify="right")
    for form in batch.dynamic:
        for row in form.exits:
            table.add_row(
                form.form if row.stage == 1 else "",
                str(row.stage),
                f"{row.p50:.2f}",
                f"{row.p95:.2f}",
                "-" if row.time is None else f"{row.time:.3f}",
                f"{row.macs:.3f}",
                "-" if row.efficiency is None else f"{row.efficiency:.2f}",
            )
        table.add_section()
    for static in batch.static:
        ratio = static.typical / batch.static[0].typical
        table.add_row(f"static {static.form}", "", f"{static.p50:.2f}", f"{static.p95:.2f}",
                      f"{ratio:.3f}", "1", "")  # fmt: skip
    return table


def _static_lines(batch: BatchResult) -> Iterator[str]:
    for form in batch.dynamic:
        line = f"{form.form}: {form.throughput:,.1f} samples/s with samples leaving"
        if form.speedup is not None:
            line += f", {form.speedup:.2f} times the fastest static form's"
            line += f"; {break_even_text(form.break_even)}"
        yield line


def break_even_text(share: float | None) -> str:
    """The break-even as a sentence."""
    if share is None:
        return "never faster, however many samples leave early"
    if share == 0:
        return "faster even when no sample leaves early"
    return f"faster when more than {share:.0%} of the samples leave early"
