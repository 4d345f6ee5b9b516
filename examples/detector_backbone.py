"""A detector whose backbone is one exit of a dynamic network.

Only the backbone is compiled: proposals, boxes and non-maximum suppression choose what runs by
the values of tensors, and stay as they are. The backbone has no classifier; its exits are feature
pyramids of the original's shapes, so that any of them fits where the backbone was::

    python -m examples.detector_backbone

The detector here has random weights and two made-up images. One step of training shows how the
exits learn together: their losses are added up, and they share the backbone's parameters and the
detector's heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from s2d_compiler import DynamicModel, transform

from torchvision.models import detection  # isort: skip  # after s2d_compiler

#: A compiled network takes inputs of one shape, so the detector scales every image to it.
SIZE = 128
PLAN = {
    "stages": 3,
    "groups": 8,
    "default": {"split": [4, 6], "concat": "all"},
    "input_shape": [3, SIZE, SIZE],
}


def build() -> nn.Module:
    """A RetinaNet that scales its images to ``SIZE`` by ``SIZE``."""
    detector: nn.Module = detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, fixed_size=(SIZE, SIZE)
    )
    return detector


def example_data() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, and where the objects in them are."""
    images = [torch.rand(3, 100, 150), torch.rand(3, 90, 90)]
    boxes = [torch.tensor([[10.0, 10.0, 60.0, 80.0]]), torch.tensor([[5.0, 20.0, 70.0, 60.0]])]
    return images, [
        {"boxes": box, "labels": torch.tensor([label])} for label, box in enumerate(boxes, start=1)
    ]


def compile_backbone(detector: nn.Module) -> DynamicModel:
    """The detector's backbone in stages."""
    return transform(detector, PLAN, submodule="backbone")


def with_exit(detector: nn.Module, backbone: DynamicModel, stage: int) -> nn.Module:
    """The detector with one exit of the dynamic backbone in place of its own.

    Args:
        detector: The original; left as it is. What is not the backbone is shared with it.
        backbone: What ``compile_backbone`` returned; its parameters are shared, too.
        stage: The exit, from 1.
    """
    changed = copy.copy(detector)
    changed._modules = {**detector._modules, "backbone": backbone.at_stage(stage)}
    return changed


def train_step(detector: nn.Module, backbone: DynamicModel) -> list[float]:
    """One step of all exits together.

    Returns:
        The loss of every exit before the step.
    """
    images, targets = example_data()
    exits = [
        with_exit(detector, backbone, stage).train() for stage in range(1, len(backbone.stages) + 1)
    ]
    parameters = {p for each in exits for p in each.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    losses: list[Any] = [sum(each(images, targets).values()) for each in exits]
    optimizer.zero_grad()
    sum(losses).backward()
    optimizer.step()
    return [loss.item() for loss in losses]


def report(backbone: DynamicModel, losses: list[float]) -> Table:
    """What every exit costs, and its loss."""
    original = backbone.cost.original_macs
    table = Table(caption=f"backbone of the original: {original:,} MACs")
    for title in ("exit", "MACs", "of the original", "loss"):
        table.add_column(title, justify="right")
    for stage, loss in enumerate(losses, start=1):
        macs = backbone.at_stage(stage).macs
        table.add_row(str(stage), f"{macs:,}", f"{macs / original:.0%}", f"{loss:.3f}")
    return table


def main() -> None:
    """Compile the backbone of a detector, and train the detector with every exit of it."""
    torch.manual_seed(0)
    detector = build()
    backbone = compile_backbone(detector)
    Console().print(report(backbone, train_step(detector, backbone)))


if __name__ == "__main__":
    main()
