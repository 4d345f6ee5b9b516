"""What a training step costs: static, masked and staged form of one network.

    python -m benchmarks.masked_step                       # ResNet-20 and ResNet-50, s = 2, 3, 5
    python -m benchmarks.masked_step --models resnet20 --stages 3 --precisions float32
    python -m benchmarks.masked_step --no-measure          # prints the table of the kept rows
    python -m benchmarks.masked_step --write docs/masked-form.md    # puts it into the page

A step is forward, loss, backward and SGD with momentum; the static network's loss is its
cross-entropy, the others' the sum over all exits (*last*: that of the last exit alone). Forms take
turns within one run; a figure is the median, over turns, of a form's time divided by the static
one's of the same turn. Every form runs in NCHW and channels-last, the faster one counts.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from s2d_compiler import masked

FOLDER = Path(__file__).parent.parent
#: Batch and size of the images.
CASES = {"resnet20": (128, 32), "resnet50": (16, 64), "resnet50-224": (8, 224)}
SPLITS = {2: [4], 3: [4, 6], 5: [2, 4, 5, 6]}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

app = cyclopts.App(
    name="python -m benchmarks.masked_step", help=__doc__, help_format="plaintext", version_flags=()
)
console = Console(width=110)
_SEVERAL = Parameter(consume_multiple=True)
Step = Callable[[], float]


def original(name: str) -> nn.Module:
    """A network with random weights and ten classes."""
    torch.manual_seed(0)
    if name == "resnet20":
        from examples.cifar_models import resnet20

        return resnet20()
    from torchvision import models

    model: nn.Module = models.resnet50(num_classes=10)
    return model


def steps(name: str, stages: int, precision: str, device: str) -> dict[tuple[str, str], Step]:
    """What runs one step of each form and layout and says how many seconds it took."""
    batch, size = CASES[name]
    model = original(name)
    plan = {"stages": stages, "groups": 8, "default": {"split": SPLITS[stages], "concat": "all"}}
    net = masked(model, plan, (torch.zeros(2, 3, size, size),))
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    modules = {"static": model, "masked": net, "staged": net.extract()}
    networks: dict[tuple[str, str], nn.Module] = {}
    for kind, module in modules.items():
        for layout, memory_format in LAYOUTS.items():
            where: Any = {"device": device, "memory_format": memory_format}
            networks[kind, layout] = copy.deepcopy(module).train().to(**where)
    return {
        (form, layout): _step(
            form,
            networks[form.partition(",")[0], layout],
            images,
            labels,
            layout,
            precision,
            device,
        )
        for form in (*modules, "masked, last")
        for layout in LAYOUTS
    }


def _step(
    form: str, network: nn.Module, images: torch.Tensor, labels: torch.Tensor,
    layout: str, precision: str, device: str,
) -> Step:  # fmt: skip
    where: Any = {"device": device, "memory_format": LAYOUTS[layout]}
    images = images.to(**where)
    labels = labels.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    half = precision == "bfloat16"

    def step() -> float:
        _wait(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            outputs = network(images)
            exits = (outputs,) if form == "static" else outputs
            used = exits[-1:] if form == "masked, last" else exits
            losses = [functional.cross_entropy(output, labels) for output in used]
            loss = torch.stack(losses).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        _wait(device)
        return time.perf_counter() - start

    return step


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(name: str, stages: int, precision: str, device: str, turns: int) -> dict[str, Any]:
    """One row."""
    runs = steps(name, stages, precision, device)
    for _ in range(2):
        for run in runs.values():
            run()
    times: list[dict[tuple[str, str], float]] = [
        {key: run() for key, run in runs.items()} for _ in range(turns)
    ]
    typical = {key: statistics.median(turn[key] for turn in times) for key in runs}
    best = {form: min((typical[form, k], k) for k in LAYOUTS)[1] for form, _ in runs}
    ratios = {
        form: statistics.median(turn[form, best[form]] / turn["static", best["static"]]
                                for turn in times)
        for form in best
    }  # fmt: skip
    batch, size = CASES[name]
    return {
        "model": name, "batch": batch, "size": size, "stages": stages, "precision": precision,
        "seconds": {form: typical[form, layout] for form, layout in best.items()},
        "layout": best, "ratio": ratios, "turns": turns, "device": device,
        "machine": _machine(device), "threads": torch.get_num_threads(),
        "torch": str(torch.__version__), "python": platform.python_version(),
    }  # fmt: skip


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


@app.default
def main(
    *,
    models: Annotated[Sequence[str], _SEVERAL] = ("resnet20", "resnet50"),
    stages: Annotated[Sequence[int], _SEVERAL] = (2, 3, 5),
    precisions: Annotated[Sequence[str], _SEVERAL] = ("float32", "bfloat16"),
    device: str = "cpu",
    turns: int = 9,
    threads: int = 1,
    results: Path = FOLDER / "benchmarks" / "results" / "masked-step.jsonl",
    write: Path | None = None,
    measure: bool = True,
) -> None:
    """Measure, keep the rows and print the table.

    Args:
        models: resnet20, resnet50, resnet50-224.
        stages: Numbers of stages: 2, 3, 5.
        precisions: float32, bfloat16 (autocast).
        device: cpu or cuda.
        turns: How often every form runs.
        threads: Threads.
        results: Rows, as JSON lines; measured again, a row replaces the one before.
        write: A page to put the table into, between its two marks.
        measure: Whether to make rows.
    """
    torch.set_num_threads(threads)
    lines = results.read_text().splitlines() if results.exists() else []
    rows = {_key(row): row for row in map(json.loads, lines)}
    for name in models if measure else ():
        for precision in precisions:
            for count in stages:
                row = measured(name, count, precision, device, turns)
                rows[_key(row)] = row
                results.parent.mkdir(exist_ok=True)
                results.write_text("".join(json.dumps(r) + "\n" for r in _sorted(rows)))
                console.print(_text(row))
    console.print(_table(_sorted(rows)))
    if write is not None:
        page = write.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        write.write_text(f"{before}{BEGIN}\n{_markdown(_sorted(rows))}{END}{after}")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("device", "model", "precision", "stages"))


def _sorted(rows: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[key] for key in sorted(rows)]


HEADER = ("network", "precision", "stages", "static, s", "masked", "last exit alone", "staged")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    network = f"{row['model'].partition('-')[0]}, {row['batch']}x3x{row['size']}x{row['size']}"
    ratios = (row["ratio"][form] for form in ("masked", "masked, last", "staged"))
    return (network, row["precision"], str(row["stages"]), f"{row['seconds']['static']:.3f}",
            *(f"{ratio:.2f}" for ratio in ratios))  # fmt: skip


def _text(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in zip(HEADER, _cells(row), strict=True))


def _where(rows: Sequence[dict[str, Any]]) -> str:
    return "; ".join(
        sorted({f"{r['machine']}, {r['threads']} thread(s), torch {r['torch']}, Python "
                f"{r['python']}, {r['turns']} turns" for r in rows})
    )  # fmt: skip


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Training step, times that of the static network", caption=_where(rows))
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [" | ".join(HEADER), " | ".join(["---", "---", *["---:"] * 5])]
    lines += [" | ".join(_cells(row)) for row in rows]
    return "\n" + "".join(f"| {line} |\n" for line in lines) + f"\n({_where(rows)}.)\n\n"


if __name__ == "__main__":
    app()
