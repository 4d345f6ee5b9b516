"""Times the compiler itself over torchvision's classifiers, beside Torch-Pruning.

For every model, in a process of its own and in turns: capturing it; everything after that
(analysis, passes, thin weights; three stages of 4, 2 and 2 eighths with full reuse, largest weights
first; without the self-check); and Torch-Pruning building its dependency graph of the same model
and halving every group. A time is the fastest of several turns, since other work on the machine
only ever adds to it. Memory is the peak of the first turn's capture and compilation above what the
process held before the model was built; the model itself is in it.

    python -m benchmarks.compile_time --write docs/compile-time.md
    python -m benchmarks.compile_time resnet50 swin_t --results /tmp/two.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import zoo  # makes torchvision importable

import torchvision  # isort: skip
from s2d_compiler import Plan
from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.compiler import compile_program
from s2d_compiler.tracing import capture

PLAN = Plan.from_dict(zoo.PLANS[1])
TIMES_PARAMETERS = 2.5
"""Aim: the peak above the start is at most so many times the parameters' bytes..."""
EXTRA_BYTES = 200_000_000
"""... and this."""
SLOWEST = 15.0
"""Aim: seconds after the capture, for the slowest model."""
SECONDS = 180
GIGABYTES = 8.0
PRUNING = "torch-pruning"


def need_torch_pruning() -> Any:
    """The module, or an explanation of how to get it."""
    try:
        import torch_pruning
    except ImportError:
        raise SystemExit(
            "benchmarks.compile_time: Torch-Pruning is not installed; "
            "pip install -e '.[benchmarks]' -c constraints.txt"
        ) from None
    return torch_pruning


# -- one model, in its own process -----------------------------------------------------------------


@contextlib.contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Keep the shortest time of a block."""
    gc.collect()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    into[name] = min(into.get(name, seconds), seconds)


def after_capture(program: Any) -> Any:
    """Everything but the capture and the self-check."""
    assignment = assign(program, analyse_channels(program), PLAN)
    return compile_program(program, PLAN, assignment=assignment)


def halve(pruning: Any, model: nn.Module, x: torch.Tensor) -> None:
    """Build Torch-Pruning's dependency graph and prune every group to half its channels."""
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    kinds = [nn.Conv2d, nn.Linear]
    for group in graph.get_all_groups(ignored_layers=outputs_of(model), root_module_types=kinds):
        count = graph.get_out_channels(group[0].dep.target.module)
        group.prune(idxs=list(range(count // 2)))


def outputs_of(model: nn.Module) -> list[nn.Module]:
    """The layers that predict classes, auxiliary ones included."""
    return [
        m
        for m in model.modules()
        if getattr(m, "out_features", getattr(m, "out_channels", None)) == 1000
    ]


def warm_up(pruning: Any) -> None:
    """What the first use alone costs: imports, registrations."""
    small = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    after_capture(capture(small.eval(), input_shape=(3, 8, 8)))
    halve(pruning, small, torch.zeros(1, 3, 8, 8))


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model as it is trained, with parameters of some size, and its input shape."""
    options = {} if name not in ("googlenet", "inception_v3") else {"init_weights": False}
    with zoo.without_initialisation():
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    size = 299 if name == "inception_v3" else 224
    return model, (3, size, size)


def measure(name: str, turns: int, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure one model; ``write`` gets all that is known after every step."""
    pruning = need_torch_pruning()
    warm_up(pruning)
    gc.collect()
    row: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    before = zoo.resident(os.getpid())
    model, shape = build(name)
    row["parameter_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    row["input"] = list(shape)
    for turn in range(turns):
        with timed(seconds, "capture"):
            program = capture(model, input_shape=shape)
        with timed(seconds, "after"):
            dyn = after_capture(program)
        if not turn:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            row["peak_bytes"] = peak * (1 if sys.platform == "darwin" else 1024) - before
        del program, dyn
        write(row | seconds)
        if "pruning_failure" in row:
            continue
        other, _ = build(name)
        x = torch.randn(1, *shape)
        try:
            with timed(seconds, "pruning"):
                halve(pruning, other, x)
        except Exception as error:
            row["pruning_failure"] = zoo.brief(error)
            seconds.pop("pruning", None)
        else:
            row["pruned_share"] = sum(p.numel() for p in other.parameters()) / sum(
                p.numel() for p in model.parameters()
            )
            try:
                with torch.no_grad():
                    other(x)
            except Exception as error:
                row["pruned_does_not_run"] = zoo.brief(error)
        del other
        write(row | seconds)


def work(name: str, turns: int, target: Path) -> None:
    """Measure one model and write its row, whatever happens."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def write(row: dict[str, Any]) -> None:
        target.write_text(json.dumps(row))

    try:
        measure(name, turns, write)
    except Exception as error:
        write({"failure": zoo.brief(error)})


# -- a run -----------------------------------------------------------------------------------------


def run_one(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one model in a fresh process."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        ended = zoo.guarded(
            "benchmarks.compile_time",
            [name, "--turns", str(arguments.turns), "--row", str(target)],
            arguments.seconds,
            arguments.gigabytes,
        )
        if target.exists():
            row = json.loads(target.read_text())
    if ended.why:
        row["pruning_failure" if "after" in row else "failure"] = ended.why
    return {
        "population": "torchvision",
        "model": name,
        **row,
        "turns": arguments.turns,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": zoo.machine(),
        "versions": zoo.versions("torchvision") | {PRUNING: zoo.version_of(PRUNING)},
        "sources": zoo.sources(),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    if "failure" in row:
        return [row["model"], f"**failed**: {row['failure']}", *[""] * 7]
    megabytes = row["peak_bytes"] / 1e6
    aim = TIMES_PARAMETERS * row["parameter_bytes"] / 1e6 + EXTRA_BYTES / 1e6
    note = row.get("pruning_failure", "")
    if "pruned_does_not_run" in row:
        note = f"pruned, but does not run: {row['pruned_does_not_run']}"
    pruning = row.get("pruning")
    return [
        row["model"],
        f"{row['capture']:.2f}",
        f"{row['after']:.2f}",
        f"{row['after'] / row['capture']:.2f}",
        f"{pruning:.2f}" if pruning else "",
        f"{row['after'] / pruning:.2f}" if pruning else "",
        f"{row['parameter_bytes'] / 1e6:.0f}",
        f"{megabytes:.0f}" + ("" if megabytes <= aim else f" (aim {aim:.0f})"),
        note[:120].replace("|", "\\|"),
    ]


COLUMNS = (
    "model",
    "capture, s",
    "after, s",
    "after / capture",
    "Torch-Pruning, s",
    "after / Torch-Pruning",
    "parameters, MB",
    "peak, MB",
    "Torch-Pruning's failure",
)


def line(what: str, values: Sequence[float], digits: int = 2) -> str:
    """Median and extremes of some numbers."""
    return (
        f"- {what}: median {statistics.median(values):.{digits}f}, "
        f"from {min(values):.{digits}f} to {max(values):.{digits}f}"
    )


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows come to."""
    good = [r for r in rows if "failure" not in r]
    lines = [f"- {len(good)} of {len(rows)} models compiled"]
    if not good:
        return lines
    slowest = max(good, key=lambda r: float(r["after"]))
    lines += [
        line("Capture, seconds", [r["capture"] for r in good]),
        line("Everything after the capture, seconds", [r["after"] for r in good])
        + f" ({slowest['model']}; aim: at most {SLOWEST:.0f})",
        line("After the capture / capture", [r["after"] / r["capture"] for r in good])
        + " (aim: at most 1 in the median)",
    ]
    over = [r for r in good if r["peak_bytes"] > aim_bytes(r)]
    shares = [r["peak_bytes"] / aim_bytes(r) for r in good]
    lines.append(
        line("Peak memory above the start / (2.5 x parameter bytes + 200 MB)", shares)
        + f"; above 1 on {len(over)} of {len(good)}"
        + (f": {', '.join(sorted(r['model'] for r in over))}" if over else "")
    )
    both = [r for r in good if "pruning" in r]
    run = [r for r in both if "pruned_does_not_run" not in r]
    lines.append(
        f"- Torch-Pruning pruned {len(both)} of {len(good)}; of these {len(run)} then run a forward"
    )
    if both:
        ratios = [r["after"] / r["pruning"] for r in both]
        lines.append(
            line("Everything after the capture / Torch-Pruning", ratios)
            + f" (aim: below 1 in the median); below 1 on {sum(x < 1 for x in ratios)} "
            f"of {len(both)}"
        )
        ratios = [(r["after"] + r["capture"]) / r["pruning"] for r in both]
        lines.append(line("The same, capture included", ratios))
    return lines


def aim_bytes(row: dict[str, Any]) -> float:
    """The most memory that compiling a model should take above the start."""
    return float(TIMES_PARAMETERS * row["parameter_bytes"] + EXTRA_BYTES)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """docs/compile-time.md, from the rows alone."""
    lines = [PREFACE.strip(), ""]
    machines = ", ".join(sorted({str(r["machine"]) for r in rows}))
    used: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row["versions"].items():
            used.setdefault(package, set()).add(version)
    lines += [
        f"- Machine: {machines}; one thread",
        f"- Dates: {', '.join(sorted({str(r['date']) for r in rows}))}",
        "- Versions: "
        + ", ".join(f"{p} {' and '.join(sorted(v))}" for p, v in sorted(used.items())),
        f"- Turns: {', '.join(sorted({str(r['turns']) for r in rows}))}",
        "",
        "## In short",
        "",
        *summary(rows),
        "",
        "## Models",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * 7 + "---|",
    ]
    lines += [
        "| " + " | ".join(cells(r)) + " |" for r in sorted(rows, key=lambda r: str(r["model"]))
    ]
    return "\n".join(lines) + "\n"


PREFACE = """
# How long compiling takes

Written by `python -m benchmarks.compile_time --write docs/compile-time.md` (`make compile-time`).
Every classification model of torchvision, in a process of its own, on one thread, in turns: the
capture; everything after it (analysis, passes, thin weights; the self-check is left out), for three
stages of 4, 2 and 2 eighths with full reuse, largest weights first; and Torch-Pruning building its
dependency graph of the same model at the same input (224x224, Inception 299x299), which takes a
forward of the model, and halving every group, the prediction layers left alone. Each time is the
fastest of the turns. What the first use alone costs (imports) is in none of them. Times on a shared
machine are noisy; the ratios compare what ran side by side.

*Peak* is resident memory at its highest during capture and compilation, above what the process held
before the model was built; it contains the model's own parameters.
"""


def main() -> None:
    """Measures models and writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all when left out")
    default = zoo.HERE / "results" / "compile-time.jsonl"
    parser.add_argument("--results", default=str(default))
    parser.add_argument("--write", metavar="FILE", help="write the page from the results")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="limit for one model")
    parser.add_argument("--again", action="store_true", help="measure again what has a row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        work(arguments.names[0], arguments.turns, Path(arguments.row))
        return
    need_torch_pruning()
    results = Path(arguments.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    names = arguments.names or zoo.names_of("torchvision")
    for number, name in enumerate(names, start=1):
        if not arguments.again and ("torchvision", name) in zoo.read_rows(results):
            continue
        row = run_one(name, arguments)
        with results.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"[{number}/{len(names)}] " + " | ".join(cells(row)), flush=True)
    rows = [r for (_, n), r in zoo.read_rows(results).items() if n in names]
    print("\n".join(summary(rows)))
    if arguments.write:
        Path(arguments.write).write_text(page(rows))


if __name__ == "__main__":
    main()
