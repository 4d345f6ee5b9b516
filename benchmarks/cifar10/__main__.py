"""Staged networks against what else one could do, on CIFAR-10.

    python -m benchmarks.cifar10 --data cifar10-train.npz --work build/cifar10
    python -m benchmarks.cifar10 --data cifar10-train.npz --work build/cifar10 --rows static
    python -m benchmarks.cifar10                    # writes the page from the kept rows alone

45,000 of the training images train, 5,000 are held out: the figures are validation figures. All
rows have the same epochs, augmentation and seed. Rows that are done are not made again, and an
interrupted one goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cyclopts
import torch
from cyclopts import Parameter
from rich.console import Console

from benchmarks.cifar10.exporting import export
from benchmarks.cifar10.page import write_page
from benchmarks.cifar10.rows import NETWORKS, rows_of
from benchmarks.cifar10.training import Work, train
from s2d_compiler import Recipe

FOLDER = Path(__file__).parent.parent.parent

app = cyclopts.App(
    name="python -m benchmarks.cifar10", help=__doc__, help_format="plaintext", version_flags=()
)


@app.default
def main(
    *,
    data: str | None = None,
    work: Path = FOLDER / "build" / "cifar10",
    network: str = "resnet20",
    rows: Annotated[Sequence[str], Parameter(consume_multiple=True)] = (),
    epochs: int = 15,
    lr: float = 0.2,
    start_lr: float = 0.05,
    precision: str = "bfloat16",
    threads: int = 1,
    device: str = "cpu",
    results: Path = FOLDER / "benchmarks" / "results" / "cifar10",
    page: Path = FOLDER / "docs" / "cifar10.md",
    examples: str | None = None,
) -> None:
    """Train what is missing and write the page.

    Args:
        data: The 50,000 training images, as ``s2d`` commands take data; none: train nothing.
        work: Folder for checkpoints and trained networks.
        network: resnet20, resnet56, vgg16_bn or mobilenet_v2.
        rows: Names of rows; all of them.
        epochs: Of every row.
        lr: Highest learning rate, from scratch.
        start_lr: The same, from the static network's weights.
        precision: float32, or bfloat16 where torch may.
        threads: Threads.
        device: Where to train.
        results: What is kept.
        page: The page to write.
        examples: A row to put into the folder examples/, trained before.
    """
    _require_known(network, [*rows, *([] if examples is None else [examples])], data)
    torch.set_num_threads(threads)
    console = Console(width=160)
    if data is not None:
        recipe = Recipe(
            epochs=epochs, batch_size=128, optimizer="sgd", lr=lr, nesterov=True,
            weight_decay=5e-4, schedule="one-cycle", peak=0.2, distill=0.7, temperature=4.0,
            precision=precision, crop_padding=4, flip=True, seed=0,
        )  # fmt: skip
        place = Work(network, data, work / network, results / network, recipe, start_lr, device)
        place.folder.mkdir(parents=True, exist_ok=True)
        place.results.mkdir(parents=True, exist_ok=True)
        for row in rows_of(network):
            if not rows or row.name in rows:
                train(row, place, console)
        if examples is not None:
            for file in export(examples, place, FOLDER / "examples"):
                console.print(f"written: {file.name}, {file.stat().st_size:,} bytes")
    write_page(results, page, console)


def _require_known(network: str, names: Sequence[str], data: str | None) -> None:
    """Refuse what would otherwise be left out without a word, before long work begins."""
    if network not in NETWORKS:
        raise SystemExit(f"--network: {network} is none of {', '.join(NETWORKS)}")
    known = [row.name for row in rows_of(network)]
    for name in names:
        if name not in known:
            raise SystemExit(f"{name} is no row of {network}; there are {', '.join(known)}")
    if names and data is None:
        raise SystemExit("--rows and --examples train or read networks, and take --data")


if __name__ == "__main__":
    app()
