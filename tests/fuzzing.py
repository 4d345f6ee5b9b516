"""Random damage to plans, compiled files and model files; nothing but a sentence may come of it.

    python -m tests.fuzzing files --minutes 60 --seed 1
    python -m tests.fuzzing plans --minutes 15
    python -m tests.fuzzing operators --minutes 15
    python -m tests.fuzzing files --seed 1 --only 12345     # one case again, with its traceback

Each case is a file that a seed and a number stand for. Reading it must end in the package's own
error or in a network, of bounded memory and time; such a network may fail when it runs, but must
not take the process down. Cases run in a child process, so that the run survives one that does.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d_compiler import Plan, load, transform
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.errors import FormatError, ModelFileError, PlanError
from s2d_compiler.format import load_to_show, to_data
from s2d_compiler.plans import AnyPlan
from s2d_compiler.reading import read_model
from tests.data_mutations import as_json, copy_containers, mutated, mutated_archive
from tests.random_calls import odd_operands, random_call

#: Memory beyond what the process holds when the cases begin, in bytes.
MEMORY = 2 << 30
#: Seconds that one case may take.
SECONDS = 30
#: Cases in one child process.
BATCH = 500

# -- what is damaged -----------------------------------------------------------------------------


class Normed(nn.Module):
    """Attention, a layer norm, a weight-normed convolution, outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 4, 4))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.project = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.stem(x * scale).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).reshape(-1, 4, 3, 4, 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.project(mixed.transpose(1, 2).reshape(-1, 4, 8))
        return {"logits": self.head(tokens.mean(1)), "tokens": tokens}


def convolutional() -> nn.Module:
    """Convolutions of two kinds with batch norms, a shortcut-free classifier."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)),
        *(nn.PReLU(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


def compiled() -> list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]]:
    """The data of compiled networks, with inputs by position and by keyword."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    plan = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
    scale = torch.ones(2, 1, 1, 1)
    found: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = [
        (to_data(transform(convolutional(), plan, (x,))), (x,), {}),
        (
            to_data(transform(Normed().eval(), plan, (x,), example_kwargs={"scale": scale})),
            (x,),
            {"scale": scale},
        ),
        (to_data(transform(convolutional(), {**plan, "final": "original"}, (x,))), (x,), {}),
        (to_data(transform(convolutional(), DEPTH, (x,))), (x,), {}),
    ]
    return found


DEPTH: dict[str, Any] = {"exits": ["1", 0.95], "head": ["branchynet", "linear"], "width": 4}
PLAN: dict[str, Any] = {
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "resolutions": {
        "32x32": {"split": [3, 5], "concat": [[3, 1], [3, 2]]},
        "49": {"split": [1, 2]},
    },
    "layers": {"layer1.*": {"concat": "none"}, "head": {"split": [2, 3], "concat": [[2, 1]]}},
    "order": "l1",
    "input_shape": [3, 32, 32],
    "final": "cut",
}

# -- cases ---------------------------------------------------------------------------------------

Case = Callable[[random.Random], str]
"""Makes, reads and runs one file; returns what came of it, raises for a defect."""


class Defect(AssertionError):
    """Reading ended in something else than a sentence."""


def sentence(error: Exception) -> None:
    """Require that a refusal is one, and not one about memory."""
    text = str(error)
    if not text or len(text) > 1500 or "\n" in text.strip():
        raise Defect(f"no sentence: {text[:2000]!r}") from error
    for word in (
        "can't allocate",
        "bad_alloc",
        "MemoryError",
        "internal assert",
        "INTERNAL ASSERT",
    ):
        if word in text:
            raise Defect(f"too late: {text[:500]!r}") from error


def plans() -> Case:
    """Plans: as JSON text, and as data."""

    def case(pick: random.Random) -> str:
        is_depth = pick.random() < 0.2
        kind: type[AnyPlan] = DepthPlan if is_depth else Plan
        data = mutated({**DEPTH, "seed": 1} if is_depth else PLAN, pick, in_file=False)
        text = as_json(data)
        if pick.random() < 0.2:
            at = pick.randrange(len(text))
            text = (
                text[:at] + pick.choice('{}[]",:0eE-NIn\\u \x00é') + text[at + pick.randrange(3) :]
            )
        try:
            plan = kind.from_json(text) if pick.random() < 0.7 else kind.from_dict(data)
        except PlanError as error:
            sentence(error)
            return "refused"
        if kind.from_json(plan.to_json()) != plan:
            raise Defect(f"does not come back: {plan.to_json()}")
        str(plan)
        if isinstance(plan, DepthPlan):
            return "read"
        plan.split_for("32x32", ["layer1.0"])
        plan.reads("32x32", "layer1.0")
        try:
            plan.check_against(["32x32", "49"], ["layer1.0", "head"])
        except PlanError as error:
            sentence(error)
        return "read"

    return case


def files(folder: Path) -> Case:
    """``dyn.pt`` and model files."""
    bases = compiled()
    contents = []
    for number, (data, _, _) in enumerate(bases):
        torch.save(data, folder / f"{number}.pt")
        contents.append((folder / f"{number}.pt").read_bytes())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MultiheadAttention(8, 2))
    torch.save(model, folder / "model.pt")
    whole = (folder / "model.pt").read_bytes()
    path = folder / "case.pt"

    def case(pick: random.Random) -> str:
        base = pick.randrange(len(bases))
        data, inputs, keywords = bases[base]
        kind = pick.choice(["data"] * 7 + ["bytes"] * 2 + ["model"])
        if kind == "model":
            path.write_bytes(mutated_archive(whole, pick))
            return _read_model(path)
        if kind == "data":
            try:
                torch.save(mutated(data, pick, in_file=True), path)
            except (RecursionError, RuntimeError, NotImplementedError, UnicodeError, TypeError):
                return "not written"
        else:
            path.write_bytes(mutated_archive(contents[base], pick))
        return _read_compiled(path, inputs, keywords, show=pick.random() < 0.2)

    return case


def operators(folder: Path) -> Case:
    """Compiled files with a call of any permitted operator, on any operands; all are run."""
    (data, inputs, keywords), *_ = compiled()
    path = folder / "call.pt"

    def case(pick: random.Random) -> str:
        changed = copy_containers(data)
        operands = odd_operands(pick)
        stage = changed["stages"][0]
        names = [f"operand{number}" for number in range(len(operands))]
        rows = []
        for name, operand in zip(names, operands, strict=True):
            stage["attributes"][name] = {"tensor": len(changed["tensors"]), "saved": True}
            changed["tensors"].append({"data": operand, "parameter": False, "requires_grad": False})
            rows.append({"name": name, "op": "get_attr", "target": name, "args": {"tuple": []}})
        call = {"name": "call", "op": "call_function", **random_call(names, pick)}
        stage["graph"][-1:-1] = [*rows, call]
        torch.save(changed, path)
        return _read_compiled(path, inputs, keywords, show=False)

    return case


def _read_model(path: Path) -> str:
    try:
        model = read_model(path)
    except ModelFileError as error:
        sentence(error)
        return "refused"
    str(model)
    return "read"


def _read_compiled(
    path: Path, inputs: tuple[Any, ...], keywords: dict[str, Any], *, show: bool
) -> str:
    try:
        dyn = load_to_show(path) if show else load(path)
    except FormatError as error:
        sentence(error)
        return "refused"
    f"{dyn.cost}{dyn.report}{dyn.plan}{dyn.stages[0]}"
    len(dyn.provenance)
    if not show:  # what is only looked at holds stand-ins, which no file does
        to_data(dyn)
    dyn.at_stage(1)
    try:
        dyn(*inputs, **keywords)
    except Exception:
        return "read, but does not run"
    return "read"


# -- runs ----------------------------------------------------------------------------------------


def run_case(case: Case, seed: int, number: int) -> str:
    """One case of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case(random.Random(f"{seed}/{number}"))


def limit_memory() -> None:
    """Let this process have so much more memory and no more."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _batch(case: Case, seed: int, first: int, log: Path) -> None:
    """Run cases in this process and write down which is running and what came of each."""
    limit_memory()
    stream = log.open("w", buffering=1)
    faulthandler.enable(stream)
    for number in range(first, first + BATCH):
        stream.write(f"case {number}\n")
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=stream)
        try:
            outcome = run_case(case, seed, number)
        except BaseException as error:
            trace = "".join(traceback.format_exception(error))
            stream.write(f"DEFECT {number}\n{trace}\n")
            if isinstance(error, KeyboardInterrupt):
                break
        else:
            stream.write(f"= {outcome}\n")
    faulthandler.cancel_dump_traceback_later()


def run(case: Case, seed: int, minutes: float, log: Path, first: int = 0) -> int:
    """Run cases for a while; the number of defects, which stand in the log with their number."""
    end = time.monotonic() + 60 * minutes
    number, defects, counts = first, 0, dict[str, int]()
    while time.monotonic() < end:
        batch = log.with_suffix(".batch")
        child = os.fork()
        if child == 0:
            try:
                _batch(case, seed, number, batch)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        text = batch.read_text(errors="replace")
        for line in text.splitlines():
            if line.startswith("= "):
                counts[line[2:]] = counts.get(line[2:], 0) + 1
        ran = text.count("\ncase ") + text.startswith("case ")
        found = [f"DEFECT {part}" for part in text.split("DEFECT ")[1:]]
        if status:
            found.append(f"CRASH {number + ran - 1} (status {status})\n" + text[-6000:])
        with log.open("a") as stream:
            for item in found:
                stream.write(f"{item.split(chr(10) + 'case ')[0]}\n\n")
            stream.write(f"{number + ran} cases, {counts}\n")
        defects += len(found)
        number += ran
    return defects


def make_case(what: str, folder: Path) -> Case:
    """The cases of one kind; they write into a folder."""
    return plans() if what == "plans" else {"files": files, "operators": operators}[what](folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["plans", "files", "operators"])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this case alone, in this process")
    parser.add_argument("--log", type=Path, help="default: fuzzing-WHAT-SEED.log")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(options.what, Path(folder))
        if options.only is not None:
            limit_memory()
            faulthandler.enable()
            print(run_case(case, options.seed, options.only))
            return 0
        log = options.log or Path(f"fuzzing-{options.what}-{options.seed}.log")
        defects = run(case, options.seed, options.minutes, log, options.first)
        print(f"{defects} defects; see {log}")
    return bool(defects)


if __name__ == "__main__":
    sys.exit(main())
