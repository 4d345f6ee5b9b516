"""From a trained network to a dynamic one, on real images, in about two minutes.

The images are scikit-learn's handwritten digits, 1797 of 8x8 pixels, which come with that
package. ``make demo`` runs the four steps; by hand they are::

    python -m examples.digits train --output model.pt
    s2d-compile model.pt --arch examples.digits:build --splits examples/digits.json -o dyn.pt
    s2d train dyn.pt --data examples.digits:dataset --split train --crop-padding 1 \\
        --epochs 60 --batch-size 64 --optimizer adamw --lr 0.005 --schedule one-cycle \\
        --teacher model.pt --arch examples.digits:build --temperature 2 -o trained.pt
    python -m examples.digits eval model.pt dyn.pt trained.pt
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import cyclopts
import numpy
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import s2d_compiler
from s2d_compiler import DynamicModel, Recipe
from s2d_compiler.training import History

SEED = 0
HELD_OUT = 450  # of 1797 images: a quarter, which training never sees
BATCH = 64
EPOCHS = 60

app = cyclopts.App(
    name="python -m examples.digits", help=__doc__, help_format="plaintext", version_flags=()
)
console = Console()


# The network


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A small residual network: four blocks at 8x8 and 4x4, 16 and 32 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, 10)."""
        x = self.layer2(self.layer1(self.stem(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def build() -> DigitNet:
    """Build the untrained network; ``--arch examples.digits:build`` names this function."""
    return DigitNet()


# The data


@dataclass(frozen=True, slots=True)
class Digits:
    """Images (N, 1, 8, 8) with values from 0 to 1, and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Digits:
        return Digits(self.images[rows], self.labels[rows])


@cache
def load_data() -> tuple[Digits, Digits]:
    """Give the training and the held-out digits; the seed alone decides which is which."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(numpy.float32) / 16).view(-1, 1, 8, 8)
    digits = Digits(images, torch.from_numpy(labels.astype(numpy.int64)))
    shuffled = digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))]
    return shuffled[HELD_OUT:], shuffled[:HELD_OUT]


def dataset(split: str = "test") -> TensorDataset:
    """Give one part for the commands: ``--data examples.digits:dataset --split test``.

    The network takes values from 0 to 1 as they are, so that no preprocessing is needed.
    """
    train, test = load_data()
    digits = {"train": train, "test": test}[split]
    return TensorDataset(digits.images, digits.labels)


# Training and measuring


def fit(model: nn.Module, epochs: int = EPOCHS, lr: float = 1e-2) -> History:
    """Train a model in place on the training digits, moved by up to a pixel each way."""
    digits, _ = load_data()
    recipe = Recipe(
        epochs=epochs,
        batch_size=BATCH,
        optimizer="adamw",
        lr=lr,
        weight_decay=1e-2,
        schedule="one-cycle",
        crop_padding=1,
        seed=SEED,
    )
    return s2d_compiler.fit(model, (digits.images, digits.labels), recipe)


@torch.no_grad()
def stage_accuracies(model: nn.Module) -> list[float]:
    """Give the share of held-out digits that each output of the model gets right."""
    _, held_out = load_data()
    outputs = model.eval()(held_out.images)
    stages = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(logits.argmax(1) == held_out.labels).double().mean().item() for logits in stages]


def comparison(static: nn.Module, before: DynamicModel, after: DynamicModel) -> Table:
    """Lay out what each stage costs and how often it is right, beside the static network."""
    _, held_out = load_data()
    table = Table(
        title=f"Cost per image, and the share of {len(held_out)} held-out digits got right"
    )
    table.add_column("stage")
    for header in ("MACs", "cumulative MACs", "share", "as compiled", "trained"):
        table.add_column(header, justify="right")
    cost = after.cost
    rows = zip(cost.stages, stage_accuracies(before), stage_accuracies(after), strict=True)
    for number, (stage, untuned, tuned) in enumerate(rows, start=1):
        share = stage.cumulative_macs / cost.original_macs
        costs = (f"{stage.macs:,}", f"{stage.cumulative_macs:,}", f"{share:.0%}")
        table.add_row(str(number), *costs, f"{untuned:.1%}", f"{tuned:.1%}")
    (accuracy,) = stage_accuracies(static)
    table.add_section()
    macs, right = f"{cost.original_macs:,}", f"{accuracy:.1%}"
    table.add_row("original", macs, macs, "100%", right, right)
    return table


# The commands

Output = Annotated[Path, cyclopts.Parameter(alias="-o")]


@app.command
def train(*, output: Output = Path("model.pt"), epochs: int = EPOCHS) -> None:
    """Train the static network and save its state dict."""
    torch.manual_seed(SEED)
    model, start = build(), time.perf_counter()
    fit(model, epochs)
    (accuracy,) = stage_accuracies(model)
    torch.save(model.state_dict(), output)
    seconds = time.perf_counter() - start
    console.print(f"{output}: {accuracy:.1%} of held-out digits right, after {seconds:.0f} s")


@app.command(name="eval")
def evaluate(model: Path, before: Path, after: Path, /) -> None:
    """Print the stage table: costs, and accuracies before and after training."""
    static = build()
    static.load_state_dict(torch.load(model, weights_only=True))
    console.print(comparison(static, s2d_compiler.load(before), s2d_compiler.load(after)))


if __name__ == "__main__":
    torch.set_num_threads(1)  # at this size more threads would mostly wait for each other
    app()
