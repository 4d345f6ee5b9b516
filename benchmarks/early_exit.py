"""Real time saved: networks in stages against the fastest static form of their originals.

    python -m benchmarks.early_exit                # all rows that are missing, then the page
    python -m benchmarks.early_exit --models resnet50 --batch 16
    python -m benchmarks.early_exit --no-measure   # writes the page from the rows alone

Networks have random weights and are cut into stages of 4, 2 and 2 eighths of all channels; of
every batch 60, 25 and 15% of the samples leave at the three exits. Rows are kept in a file as
they are made, and made once; an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from cyclopts import Parameter
from rich.console import Console
from torch import nn

from s2d_compiler import DynamicModel, transform
from s2d_compiler.benchmarking import benchmark
from s2d_compiler.benchmarking.profiling import break_down, excess
from s2d_compiler.benchmarking.results import BatchResult
from s2d_compiler.optimizing import optimize, optimize_static
from s2d_compiler.program import Program
from s2d_compiler.tracing import capture

SHARES = (0.6, 0.25, 0.15)
MODELS = ("resnet50", "resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0",
          "shufflenet_v2_x1_0", "vit_b_32", "cifar_resnet20")  # fmt: skip
REUSES = ("none", "all")
POOR = 0.8
FOLDER = Path(__file__).parent.parent

app = cyclopts.App(
    name="python -m benchmarks.early_exit", help=__doc__, help_format="plaintext", version_flags=()
)
console = Console(width=110, stderr=True)
_SEVERAL = Parameter(consume_multiple=True)


def original(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with random weights and batch norm that does something, and its input's shape."""
    torch.manual_seed(0)
    if name == "cifar_resnet20":
        from examples.cifar_models import resnet20

        model, shape = resnet20(), (3, 32, 32)
    else:
        from torchvision import models

        model, shape = models.get_model(name, weights=None), (3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert module.running_mean is not None
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
    return model.eval(), shape


def staged(model: nn.Module, shape: tuple[int, ...], reuse: str) -> DynamicModel:
    """The network in stages of 4, 2 and 2 eighths."""
    plan = {
        "stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": reuse},
        "input_shape": list(shape),
    }  # fmt: skip
    return transform(model, plan)


@app.default
def main(
    *,
    models: Annotated[Sequence[str], _SEVERAL] = MODELS,
    reuse: Annotated[Sequence[str], _SEVERAL] = REUSES,
    batch: Annotated[Sequence[int], _SEVERAL] = (1, 16, 32),
    backends: Annotated[Sequence[str], _SEVERAL] = ("eager", "onednn"),
    inductor_models: Annotated[Sequence[str], _SEVERAL] = ("resnet50",),
    rounds: int = 7,
    seconds: float = 0.25,
    threads: int = 2,
    results: Path = FOLDER / "benchmarks" / "results" / "early-exit.jsonl",
    page: Path = FOLDER / "docs" / "early-exit-time.md",
    measure: bool = True,
) -> None:
    """Measure what is missing and write the page.

    Args:
        models: Networks, of torchvision or cifar_resnet20.
        reuse: none, all, or both.
        batch: Batch sizes.
        backends: Of the dynamic networks, and of the originals.
        inductor_models: Networks whose originals run on inductor, too (a minute per batch size).
        rounds: Turns of every form.
        seconds: Length of a turn, at least one run.
        threads: Threads.
        results: Rows, as JSON lines.
        page: The page to write.
        measure: Whether to make rows.
    """
    torch.set_num_threads(threads)
    failed = []
    for name in models if measure else ():
        try:
            _measure_model(
                name, reuse, batch, backends, name in inductor_models, rounds, seconds, results
            )
        except Exception as error:  # the other networks' rows are worth having
            console.print_exception(max_frames=4)
            failed.append(f"{name}: {type(error).__name__}")
    rows = read_rows(results)
    if rows:
        page.write_text(page_of(rows))
        console.print(f"written: {page}")
    if failed:
        raise SystemExit(f"failed, run again for their rows: {', '.join(failed)}")


def read_rows(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Rows by network, reuse and batch size; the last of each counts."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(row["model"], row["reuse"], row["batch"]): row for row in rows}


def _measure_model(
    name: str,
    reuses: Sequence[str],
    sizes: Sequence[int],
    backends: Sequence[str],
    has_inductor: bool,
    rounds: int,
    seconds: float,
    results: Path,
) -> None:
    known = read_rows(results)
    missing = [(r, b) for r in reuses for b in sizes if (name, r, b) not in known]
    if not missing:
        return
    model, shape = original(name)
    program = capture(model, None, shape)
    statics = [*backends, *(["inductor"] if has_inductor and "inductor" not in backends else [])]
    networks = {r: staged(model, shape, r) for r in dict.fromkeys(r for r, _ in missing)}
    for size in dict.fromkeys(b for _, b in missing):
        made: dict[Any, Any] = {}
        for kind in (r for r, b in missing if b == size):
            began = time.perf_counter()
            dyn = networks[kind]
            with console.status(f"{name}, reuse {kind}") as status:
                found = benchmark(
                    dyn, program, batches=[size], backends=backends, static_backends=statics,
                    distribution=SHARES, rounds=rounds, seconds=seconds, made=made,
                    progress=lambda what, kind=kind, status=status: status.update(  # type: ignore[misc]
                        f"{name}, reuse {kind}: {what}"
                    ),
                )  # fmt: skip
                parts = _breakdown(dyn, program, found.batches[0])
            row = {
                "model": name, "reuse": kind, "batch": size, "machine": dict(found.machine),
                "skipped": dict(found.skipped), **found.batches[0].to_dict(), "breakdown": parts,
                "seconds": round(time.perf_counter() - began, 1),
            }  # fmt: skip
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            best = found.batches[0].dynamic[0]
            efficiencies = " ".join(f"{e.efficiency or 0:.2f}" for e in best.exits)
            console.print(f"{name}, reuse {kind}, batch {size}: efficiency {efficiencies} "
                          f"({best.form}), {row['seconds']:.0f} s")  # fmt: skip


@torch.no_grad()
def _breakdown(dyn: DynamicModel, program: Program, found: BatchResult) -> dict[str, Any] | None:
    """Operators by kind of the best dynamic and the best uncompiled static form."""
    best = found.dynamic[0]
    if all((e.efficiency or 0) >= POOR for e in best.exits) or best.form == "inductor":
        return None
    form = next(s.form for s in found.static if s.form != "inductor")
    backend, _, layout = form.partition(" ")
    size = found.batch
    inputs = [torch.randn(size, *shape) for shape in dyn.parts.input_shapes]
    fast = optimize(dyn, backend=best.form, batch=size)
    if getattr(fast.parts, "channels_last", False) or layout == "nhwc":
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    memory_format = "contiguous" if layout == "nchw" else "auto"
    static = optimize_static(program, backend=backend, memory_format=memory_format, batch=size)
    one = break_down(lambda: static(*inputs))
    rows: dict[str, Any] = {"static": {"form": form, **asdict(one)}, "exits": []}
    for number, stage in enumerate(dyn.cost.stages):

        def run(last: int = number) -> None:
            for position, _ in enumerate(fast.exits_of(tuple(inputs))):
                if position == last:
                    return

        two = break_down(run)
        share = stage.cumulative_macs / dyn.cost.original_macs
        rows["exits"].append({**asdict(two), "macs": share, "excess": excess(two, one, share)})
    return rows


# -- the page ------------------------------------------------------------------------------------


def page_of(rows: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """The page, from rows."""
    machines = dict.fromkeys(
        f"{r['machine']['processor']}, {r['machine']['threads']} threads, torch "
        f"{r['machine']['torch']}, Python {r['machine']['python']}"
        for r in rows.values()
    )
    lines = [
        "# Time saved by leaving early", "",
        "Written by `python -m benchmarks.early_exit` from `benchmarks/results/early-exit.jsonl`.",
        f"Machine: {'; '.join(machines)}.", "",
        "Networks with random weights, cut into stages of 4, 2 and 2 eighths of all channels, run "
        "by their fastest form (`dyn.optimized`). All times are shares of the *fastest static "
        "form* of the original: batch norm folded, NCHW and channels-last, eager and oneDNN's "
        "fused operators, inductor with freezing where it is named. Forms take turns; a number "
        "is the median over rounds. Efficiency is (MACs ratio) / (time ratio). Of a batch 60, 25 "
        "and 15% of the samples leave at the three exits, through `predict`; *speedup* is "
        "throughput then, over the static form's. *Break-even*: the share of samples leaving "
        "early above which the dynamic network is faster.", "",
        "| network | reuse | batch | static: form, ms | form | MACs at the exits | time at the "
        "exits | efficiency | speedup | break-even |",
        "|---|---|---:|---|---|---|---|---|---:|---:|",
    ]  # fmt: skip
    ordered = sorted(rows.values(), key=_order)
    lines += [_row(row) for row in ordered]
    lines += ["", *_breakdown_lines(ordered)]
    skipped = {f"{k}: {v}" for row in ordered for k, v in row["skipped"].items()}
    if skipped:
        lines += ["", "## Left out", "", *(f"- {line}" for line in sorted(skipped))]
    return "\n".join(lines) + "\n"


def _order(row: dict[str, Any]) -> tuple[int, int, int]:
    name = row["model"]
    return (
        MODELS.index(name) if name in MODELS else len(MODELS),
        REUSES.index(row["reuse"]),
        row["batch"],
    )


def _row(row: dict[str, Any]) -> str:
    best, static = row["dynamic"][0], row["static"][0]
    even = best["break_even"]
    exits = best["exits"]
    return (
        f"| {row['model']} | {row['reuse']} | {row['batch']} "
        f"| {static['form']}, {static['typical']:.1f} | {best['form']} "
        f"| {_joined(e['macs'] for e in exits)} | {_joined(e['time'] for e in exits)} "
        f"| {_joined(e['efficiency'] for e in exits)} | {best['speedup']:.2f} "
        f"| {'never' if even is None else f'{even:.0%}'} |"
    )


def _joined(values: Any) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _breakdown_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    poor = [row for row in rows if row.get("breakdown")]
    if not poor:
        return [f"No efficiency is below {POOR}."]
    lines = [
        f"## What the time goes to where an efficiency is below {POOR}", "",
        "Milliseconds of one batch up to the last exit below it, by kind of operator (torch's "
        "profiler, scaled to the time without it), and in parentheses what is above the static "
        "network's times the share of MACs: where time does not fall as MACs do.", "",
        "| network | reuse | batch | exit | kinds of operators, ms (above) | operators, static's |",
        "|---|---|---:|---:|---|---|",
    ]  # fmt: skip
    for row in poor:
        exits = row["dynamic"][0]["exits"]
        number = max((k for k, e in enumerate(exits) if e["efficiency"] < POOR), default=None)
        if number is None:
            continue
        part, static = row["breakdown"]["exits"][number], row["breakdown"]["static"]
        kinds = [
            f"{kind} {part['milliseconds'].get(kind, 0):.1f} ({above:+.1f})"
            for kind, above in part["excess"]
            if abs(above) > 0.03 * sum(part["milliseconds"].values())
        ]
        calls = f"{sum(part['calls'].values()):.0f}, {sum(static['calls'].values()):.0f}"
        lines.append(f"| {row['model']} | {row['reuse']} | {row['batch']} | {number + 1} "
                     f"| {', '.join(kinds)} | {calls} |")  # fmt: skip
    return lines


if __name__ == "__main__":
    app()
