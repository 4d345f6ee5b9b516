"""Compiles and proves whole populations of models, one row per model.

Every model gets random weights, is captured at a small input where it allows one, compiled in
three stages of 4, 2 and 2 eighths without reuse (channels in index order) and with full reuse
(largest weights first), and both results are proven. Each runs in a process of its own, with a
limit on time and memory, so that whatever happens to one becomes its row. A row is one line of
JSON; a run that was interrupted goes on where it stopped.

    python -m benchmarks.zoo torchvision --results benchmarks/results/zoo.jsonl
    python -m benchmarks.zoo timm resnet10t --results /tmp/one.jsonl
    python -m benchmarks.zoo --results benchmarks/results/zoo.jsonl --write docs/zoo.md
    python -m benchmarks.zoo --choose            # fixes timm's population again
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.init
from torch import Tensor, nn

import s2d_compiler  # makes torchvision importable  # noqa: F401

import torchvision  # isort: skip
from s2d_compiler import Plan
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import ChannelAnalysis, analyse_channels
from s2d_compiler.checking import check
from s2d_compiler.compiler import compile_program
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import CheckError, S2DError
from s2d_compiler.program import Program
from s2d_compiler.report import LayerReport, Report
from s2d_compiler.tracing import capture

HERE = Path(__file__).parent
ROOT = HERE.parent
CHOSEN = HERE / "timm_models.json"
POPULATIONS = ("torchvision", "segmentation", "timm")
TITLES = {
    "torchvision": "torchvision: classification",
    "segmentation": "torchvision: segmentation",
    "timm": "timm: the smallest model of each model file",
}
PLANS: tuple[dict[str, Any], ...] = tuple(
    {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": concat}, "order": order}
    for concat, order in (("none", "index"), ("all", "l1"))
)
SMALL = 96
"""Height and width of timm's images where the model takes them."""
BATCH = 2
"""Inputs that are compared; batch-norm statistics come from twice as many."""
SEEDS = 3
"""Random weights that are tried until the outputs depend on the input."""
THOROUGH_UP_TO = 30_000_000
"""Parameters up to which files are written and read and causality is tried twice."""
AIM_CUT = 0.99
AIM_STAGE_ONE = 0.35
SECONDS = 1800
GIGABYTES = 10.0


# -- models ----------------------------------------------------------------------------------------


def need_timm() -> Any:
    """The module, or an explanation of how to get it."""
    try:
        import timm
    except ImportError:
        raise SystemExit(
            "benchmarks.zoo: timm is not installed; pip install -e '.[dev]' -c constraints.txt"
        ) from None
    return timm


def chosen() -> dict[str, str]:
    """Model file of timm -> its model in the population."""
    found: dict[str, str] = json.loads(CHOSEN.read_text())["models"]
    return found


def names_of(population: str) -> list[str]:
    """The models of a population, the smaller ones first where that is known."""
    if population == "timm":
        return list(chosen().values())
    if population == "torchvision":
        models = torchvision.models
        names = list(models.list_models(module=models))
        sizes = {n: models.get_model_weights(n).DEFAULT.meta["num_params"] for n in names}
        return sorted(names, key=lambda n: (sizes[n], n))
    names = list(torchvision.models.list_models(module=torchvision.models.segmentation))
    return [*names, *(f"{n} (aux_loss)" for n in names if not n.startswith("lraspp"))]


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """Models are built with whatever memory held; ``settle`` sets every parameter anyway."""
    with contextlib.ExitStack() as stack:
        for function in dir(torch.nn.init):
            if function.endswith("_") and not function.startswith("_"):
                nothing = mock.patch.object(torch.nn.init, function, lambda t, *_, **__: t)
                stack.enter_context(nothing)
        yield


def build(population: str, name: str) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """A model in evaluation mode, and the input shapes to try, the smallest first."""
    from tests.test_zoo import OPTIONS, SIZES

    if population == "timm":
        timm = need_timm()
        model = timm.create_model(name, pretrained=False).eval()
        own = tuple(int(n) for n in model.default_cfg["input_size"])
        small = (own[0], SMALL, SMALL)
        return model, [small, own] if own[1] > SMALL else [own]
    bare, _, option = name.partition(" ")
    options: dict[str, Any] = dict(OPTIONS.get(name, {}))
    if population == "segmentation":
        options = {"weights_backbone": None, **({"aux_loss": True} if option else {})}
    model = torchvision.models.get_model(bare, weights=None, **options).eval()
    size = SIZES.get(name, 64)
    return model, [(3, size, size)]


def choose() -> dict[str, str]:
    """The smallest model of each of timm's model files that runs at its own input size."""
    timm = need_timm()
    from timm.models._registry import _module_to_models

    models: dict[str, str] = {}
    with warnings.catch_warnings(), without_initialisation(), torch.no_grad():
        warnings.simplefilter("ignore")
        for file in sorted(_module_to_models):
            sizes: dict[str, int] = {}
            for name in sorted(_module_to_models[file]):
                with contextlib.suppress(Exception), torch.device("meta"):
                    model = timm.create_model(name, pretrained=False)
                    sizes[name] = sum(p.numel() for p in model.parameters())
            for name in sorted(
                sizes or _module_to_models[file], key=lambda n: (sizes.get(n, 0), n)
            ):
                try:
                    model = timm.create_model(name, pretrained=False).eval()
                    model(torch.zeros(1, *model.default_cfg["input_size"]))
                except Exception as error:
                    print(f"{name} does not run: {error}", file=sys.stderr)
                    continue
                models[file] = name
                print(file, name, sizes.get(name), flush=True)
                break
    return models


# -- one model, in its own process -----------------------------------------------------------------


class DiffersError(Exception):
    """The result is not what the plan says."""


@dataclass
class Compiler:
    """One captured model, compiled by any plan."""

    program: Program
    channels: ChannelAnalysis
    kept: list[tuple[DynamicModel, StageAssignment]] = field(default_factory=list)

    def __call__(self, spec: dict[str, Any]) -> tuple[DynamicModel, StageAssignment]:
        """The staged network, and what it was made from."""
        if self.kept and self.kept[0][1].plan == Plan.from_dict(spec):
            return self.kept.pop()  # so that two are never held at once
        assignment = assign(self.program, self.channels, Plan.from_dict(spec))
        dyn = compile_program(self.program, assignment.plan, assignment=assignment)
        return dyn, assignment

    def figures(self) -> dict[str, Any]:
        """What a row says of the plan without reuse."""
        self.kept.append(self(PLANS[0]))
        return figures(self.kept[0][0])


def first_that_runs(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The first input shape at which the model runs."""
    for shape in shapes[:-1]:
        with contextlib.suppress(Exception), torch.no_grad():
            model(torch.zeros(1, *shape))
            return shape
    return shapes[-1]


def examine(population: str, name: str) -> dict[str, Any]:
    """Compile and prove one model; its row."""
    from tests.networks import settle

    start = time.perf_counter()
    row: dict[str, Any] = {}
    with without_initialisation():
        model, shapes = build(population, name)
    for parameter in model.parameters():
        parameter.data.zero_()  # what was never set could be anything
    shape = first_that_runs(model, shapes)
    row["input"] = list(shape)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    model = model.double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * BATCH, *shape, generator=generator, dtype=torch.float64)
    notes: list[str] = []
    for seed in range(SEEDS):
        model = settle(model, images, seed)
        before = time.perf_counter()
        try:
            program = capture(model, (images[:BATCH],))
        except S2DError as error:
            if shape == shapes[-1]:
                raise
            shape, notes = shapes[-1], [f"not captured at {shape[-1]}: {type(error).__name__}"]
            row["input"] = list(shape)
            images = torch.randn(2 * BATCH, *shape, generator=generator, dtype=torch.float64)
            model = settle(model, images, seed)
            program = capture(model, (images[:BATCH],))
        row["capture_seconds"] = round(time.perf_counter() - before, 1)
        compiled = Compiler(program, analyse_channels(program))
        row |= compiled.figures()
        try:
            worst, vacuous = by_reference(model, images[:BATCH], compiled)
            row["proof"] = "reference"
        except DiffersError:
            raise
        except Exception as why:
            notes.append(f"reference: {brief(why)}")
            compiled.kept.clear()
            worst, vacuous = by_self_check(compiled)
            row["proof"] = "self-check"
        row |= {"error": worst, "vacuous": vacuous, "seed": seed}
        if not vacuous:
            break
    row["notes"] = notes
    row["outcome"] = "vacuous" if row["vacuous"] else "proven"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def figures(dyn: DynamicModel) -> dict[str, Any]:
    """What a row says of the plan without reuse."""
    report, cost = dyn.report, dyn.cost
    assert isinstance(report, Report)
    total = max(1, report.original_macs)
    left = [
        {
            "what": f.operator,
            "why": f.reason,
            "places": len(f.uses),
            "share": f.macs / total,
            "kind": "versioned",
        }
        for f in report.fallbacks
    ]
    whole: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.whole:
        if layer.reason in {f.reason for f in report.fallbacks} and not layer.channels:
            continue
        key = (re.sub(r"\d+", "*", layer.layer), re.sub(r"\d+", "*", layer.reason))
        whole.setdefault(key, []).append(layer)
    left += [
        {
            "what": what if len(layers) > 1 else layers[0].layer,
            "why": layers[0].reason,
            "places": len(layers),
            "share": sum(layer.macs for layer in layers) / total,
            "kind": "whole",
        }
        for (what, _), layers in whole.items()
    ]
    return {
        "layers": len(report.layers),
        "cut_share": report.cut_share,
        "stage1": cost.stages[0].cumulative_macs / max(1, cost.original_macs),
        "macs": cost.original_macs,
        "left": sorted(left, key=lambda x: -x["share"]),
        "stage1_by": [[kind, macs / total] for kind, macs in report.stage_one],
    }


def by_reference(model: nn.Module, x: Tensor, compiled: Compiler) -> tuple[float, bool]:
    """Prove all consequences with the reference of the tests.

    Raises:
        DiffersError: One does not hold.
    """
    from tests import consequences
    from tests.reference import Structure

    structure = Structure(model, x)
    small = sum(p.numel() for p in model.parameters()) <= THOROUGH_UP_TO
    worst, vacuous = 0.0, False
    for spec in PLANS:
        dyn, _ = compiled(spec)
        measured = consequences.Measured([], [], dyn)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dyn.pt" if small else None
            broken = consequences.check_dyn(model, dyn, x, measured, path, structure, small)
        if broken:
            raise DiffersError("; ".join(dict.fromkeys(broken)))
        worst = max([worst, *measured.errors])
        vacuous = vacuous or bool(measured.vacuous)
        del dyn, measured
        gc.collect()
    return worst, vacuous


def by_self_check(compiled: Compiler) -> tuple[float, bool]:
    """Prove masked equivalence with the compiler's own masked form.

    Raises:
        DiffersError: It does not hold.
    """
    worst, vacuous = 0.0, False
    for spec in PLANS:
        dyn, assignment = compiled(spec)
        try:
            proof = check(dyn, assignment, batch=BATCH)
        except CheckError as error:
            raise DiffersError(str(error)) from error
        worst = max([worst, *proof.errors])
        vacuous = vacuous or proof.is_vacuous
        del dyn, assignment
        gc.collect()
    return worst, vacuous


def brief(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def work(population: str, name: str, target: Path) -> None:
    """Examine one model and write its row, whatever happens."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = examine(population, name)
    except DiffersError as error:
        row = {"outcome": "differs", "why": brief(error)}
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
        row = {"outcome": "failed", "why": f"{brief(error)} ({where})"}
    target.write_text(json.dumps(row))


# -- a run -----------------------------------------------------------------------------------------


def sources() -> str:
    """A digest of the compiler's sources: rows of other sources are stale."""
    digest = hashlib.sha256()
    for folder in ("s2d_compiler", "passes"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> str:
    """Processor and number of cores."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if models:
            return f"{models[0]}, {len(models)} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def versions(population: str) -> dict[str, str]:
    """Versions of what a row depends on."""
    packages = ["torch", "torchvision", *(["timm"] if population == "timm" else [])]
    return {package: version_of(package) for package in packages}


def version_of(package: str) -> str:
    """The version that is installed."""
    return importlib.metadata.version(package)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds now; 0 where the system does not tell."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        limit: Which limit stopped it, empty if none did.
        why: Why there may be no result, empty if it ended by itself with success.
        peak: The most memory that it held, in bytes.
    """

    limit: str
    why: str
    peak: int


def guarded(module: str, arguments: Sequence[str], seconds: float, gigabytes: float) -> Ended:
    """Run a module of this project in a process of its own, with limits."""
    start, peak, limit = time.perf_counter(), 0, ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, stdout=log, stderr=log, env=environment,
        )  # fmt: skip
        try:
            while process.poll() is None and not limit:
                time.sleep(0.1)
                peak = max(peak, resident(process.pid))
                if time.perf_counter() - start > seconds:
                    limit = f"stopped after {seconds:.0f} s"
                elif peak > gigabytes * 1e9:
                    limit = f"stopped at {gigabytes:g} GB of memory"
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        log.seek(0)
        last = log.read().decode(errors="replace").strip().splitlines()[-1:]
    why = limit
    if process.returncode and not limit:
        why = f"the process ended with {process.returncode}: {' '.join(last)[:300]}"
    return Ended(limit, why, peak)


def run_one(population: str, name: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """Examine one model in a fresh process; its row, also when the process ends early."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        arguments = [population, name, "--row", str(target)]
        ended = guarded("benchmarks.zoo", arguments, seconds, gigabytes)
        if target.exists():
            row: dict[str, Any] = json.loads(target.read_text())
        else:
            row = {"outcome": "stopped" if ended.limit else "failed", "why": ended.why}
    return {
        "population": population,
        "model": name,
        **row,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": ended.peak,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(population),
        "sources": sources(),
    }


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last row of every model; a line that was cut off is left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                rows[row["population"], row["model"]] = row
    return rows


def is_done(row: dict[str, Any] | None, again: str) -> bool:
    """Whether a row need not be made again."""
    if row is None or again == "all":
        return False
    if again == "failed":
        return bool(row["outcome"] == "proven")
    return again != "stale" or bool(row["sources"] == sources())


def run(population: str, names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Examine models in turn and append their rows."""
    results = Path(arguments.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    names = names or names_of(population)
    for number, name in enumerate(names, start=1):
        if is_done(read_rows(results).get((population, name)), arguments.again):
            continue
        row = run_one(population, name, arguments.seconds, arguments.gigabytes)
        with results.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"[{number}/{len(names)}] " + " | ".join(cells(row)), flush=True)


# -- the page --------------------------------------------------------------------------------------

COLUMNS = (
    "model",
    "input",
    "layers",
    "MACs in cut layers",
    "stage 1",
    "left whole or versioned",
    "largest error",
    "proof",
    "seconds",
    "GB",
)


def percent(share: float) -> str:
    """A share rounded down to a tenth of a percent, so that 100.0% means all."""
    return f"{int(share * 1000 + 1e-9) / 10:.1f}%"


def shorten(reason: str) -> str:
    """The first clause of a reason."""
    return reason.partition(", so")[0].replace("|", "\\|")


def left_text(left: Sequence[dict[str, Any]], most: int = 3) -> str:
    """What was left whole or versioned, costliest first, in one cell."""
    parts = []
    for entry in left[:most]:
        places = f" in {entry['places']} places" if entry["places"] > 1 else ""
        share = f", {entry['share']:.1%}" if entry["share"] >= 0.0005 else ""
        parts.append(f"`{entry['what']}`{places}{share}: {shorten(entry['why'])}")
    if len(left) > most:
        parts.append(f"{len(left) - most} more")
    return "; ".join(parts)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    effort = [f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e9:.1f}"]
    if row["outcome"] not in ("proven", "vacuous"):
        why = row["why"].replace("|", "\\|")
        return [row["model"], *[""] * 6, f"**{row['outcome']}**: {why}", *effort]
    proof = row["proof"] + (", **shows nothing**" if row["vacuous"] else "")
    return [
        row["model"],
        "x".join(str(n) for n in row["input"][1:]),
        str(row["layers"]),
        percent(row["cut_share"]),
        f"{row['stage1']:.3f}",
        left_text(row["left"]),
        f"{row['error']:.0e}",
        proof,
        *effort,
    ]


def summary(population: str, rows: Sequence[dict[str, Any]], expected: int) -> list[str]:
    """What the rows of a population come to."""
    proven = [r for r in rows if r["outcome"] == "proven"]
    by = {how: sum(r["proof"] == how for r in proven) for how in ("reference", "self-check")}
    lines = [
        f"- **{len(proven)} of {expected} proven**: {by['reference']} with the independent "
        f"reference (all consequences), {by['self-check']} with the compiler's own masked form "
        "(masked equivalence), where the reference has no rule."
    ]
    lines += [
        f"  - Self-check: {r['model']} ({'; '.join(n.rpartition(': ')[2] for n in r['notes'])})"
        for r in proven
        if r["proof"] == "self-check"
    ]
    rest = expected - len(rows)
    if rest:
        lines.append(f"- {rest} have not been tried.")
    for outcome, words in (
        ("vacuous", "show nothing (the output hardly depends on the input)"),
        ("differs", "differ from what the plan says"),
        ("failed", "failed"),
        ("stopped", "were stopped at a limit of time or memory"),
    ):
        names = [r["model"] for r in rows if r["outcome"] == outcome]
        if names:
            lines.append(f"- {len(names)} {words}: {', '.join(sorted(names))}.")
    measured = [r for r in rows if "cut_share" in r]
    if not measured:
        return lines
    shares = sorted(r["cut_share"] for r in measured)
    low = [r for r in measured if r["cut_share"] < AIM_CUT]
    lines.append(
        f"- MACs in cut layers: smallest {percent(shares[0])}, median "
        f"{percent(statistics.median(shares))}; at least {AIM_CUT:.0%} in "
        f"{len(measured) - len(low)} of {len(measured)}."
    )
    lines += explained("Below", low, lambda r: percent(r["cut_share"]), left_reasons)
    costly = [r for r in measured if r["stage1"] > AIM_STAGE_ONE]
    ones = [r["stage1"] for r in measured]
    lines.append(
        f"- Stage 1 costs at most {AIM_STAGE_ONE} of the original in "
        f"{len(measured) - len(costly)} of {len(measured)} (median {statistics.median(ones):.3f}, "
        f"largest {max(ones):.3f})."
    )
    lines += explained("Above", costly, lambda r: f"{r['stage1']:.3f}", stage_one_reasons)
    errors = [r["error"] for r in proven]
    if errors:
        lines.append(
            f"- Largest error of any proven model: {max(errors):.0e} of the output's spread over "
            f"inputs; median {statistics.median(errors):.0e}."
        )
    return lines


def explained(
    word: str,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], str],
    reasons: Callable[[dict[str, Any]], str],
) -> list[str]:
    """One sub-item per model that misses an aim."""
    ordered = sorted(rows, key=lambda r: str(r["model"]))
    return [f"  - {word}: {r['model']} ({value(r)}): {reasons(r)}" for r in ordered]


def left_reasons(row: dict[str, Any]) -> str:
    """Why a model's cut share is low."""
    return left_text(row["left"], most=2) or "no reason given"


def stage_one_reasons(row: dict[str, Any]) -> str:
    """What a model's first stage pays for, as shares of the original."""
    return ", ".join(f"{share:.2f} {kind}" for kind, share in row["stage1_by"])


def page(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """docs/zoo.md, from the rows alone."""
    lines = [PREFACE.strip(), ""]
    everything = list(rows.values())
    for key, label in (("machine", "Machine"), ("date", "Dates")):
        lines.append(f"- {label}: {', '.join(sorted({str(r[key]) for r in everything}))}")
    used: dict[str, set[str]] = {}
    for row in everything:
        for package, version in row["versions"].items():
            used.setdefault(package, set()).add(version)
    versions = ", ".join(f"{p} {' and '.join(sorted(v))}" for p, v in sorted(used.items()))
    lines.append(f"- Versions: {versions}")
    states = len({r["sources"] for r in everything})
    if states > 1:
        lines.append(f"- Made with {states} states of the compiler's sources")
    for population in POPULATIONS:
        mine = [r for (p, _), r in rows.items() if p == population]
        if not mine:
            continue
        expected = names_of(population)
        mine = sorted((r for r in mine if r["model"] in expected), key=lambda r: str(r["model"]))
        lines += ["", f"## {TITLES[population]}", ""]
        lines += summary(population, mine, len(expected))
        lines += ["", "| " + " | ".join(COLUMNS) + " |"]
        lines.append("|---|---|---:|---:|---:|---|---:|---|---:|---:|")
        lines += ["| " + " | ".join(cells(r)) + " |" for r in mine]
    return "\n".join(lines) + "\n"


PREFACE = """
# The zoo

Whole populations of models, each compiled in three stages of 4, 2 and 2 eighths of every layer's
channels, without reuse (channels in index order) and with full reuse (largest weights first), and
both results proven. Written by `python -m benchmarks.zoo --results benchmarks/results/zoo.jsonl
--write docs/zoo.md` from the rows that `make zoo-table` makes.

- *layers*: weighted layers, and matrix products without weights.
- *MACs in cut layers*: share of the original's multiply-accumulates in layers of which every
  stage owns output channels; prediction layers, weights without a channel axis and attention
  products that every stage runs on its own channels count as cut.
- *stage 1*: multiply-accumulates of stage 1, its head included, over the original's, without
  reuse, at this input; heads and the layers that read the image weigh more in small inputs.
- *left whole or versioned*: what is not cut, costliest first, with its share of the MACs.
- *largest error*: over both plans and all stages, in units of the output's spread over inputs.
- *proof*: *reference* is the independent reference in `tests/` with all four consequences of
  [semantics.md](semantics.md); *self-check* is the compiler's own masked form, where the reference
  has no rule for the model. Either in float64 with random weights.
- *seconds*, *GB*: everything, building, proving and counting included, on one thread, and the most
  memory held on the way.
"""


def main() -> None:
    """Runs populations, or writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("population", nargs="?", choices=POPULATIONS)
    parser.add_argument("names", nargs="*", help="models; all of the population when left out")
    parser.add_argument("--results", default=str(HERE / "results" / "zoo.jsonl"))
    parser.add_argument("--write", metavar="FILE", help="write the page from the results")
    parser.add_argument(
        "--again",
        choices=["none", "failed", "stale", "all"],
        default="none",
        help="which rows to make again: those not proven, those of other sources, all",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="limit for one model")
    parser.add_argument("--choose", action="store_true", help="fix timm's population again")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        work(arguments.population, arguments.names[0], Path(arguments.row))
        return
    if arguments.choose:
        text = json.dumps({"timm": version_of("timm"), "models": choose()}, indent=1)
        CHOSEN.write_text(text + "\n")
    if arguments.population == "timm":
        need_timm()
    if arguments.population:
        run(arguments.population, arguments.names, arguments)
    if arguments.write:
        Path(arguments.write).write_text(page(read_rows(Path(arguments.results))))


if __name__ == "__main__":
    main()
