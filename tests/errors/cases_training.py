"""Recipes, data and networks that do not fit together, checkpoints, files of trainings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from torch import nn

from s2d_compiler import Recipe, cli, fit, masked
from s2d_compiler.commands import running
from s2d_compiler.errors import (
    CheckpointError,
    DataError,
    ProcessError,
    TrainingDivergedError,
    UsageError,
)
from s2d_compiler.masking.transfer import freeze_as
from s2d_compiler.training import checkpoints
from s2d_compiler.training.distributed import Processes, joined
from tests.errors.case import Case
from tests.errors.cases_commands import raising
from tests.training import SHORT, Stop, network, samples, staged, stopping

BEGIN_ANEW = "remove it to begin anew"


def recipe(*parts: str, **settings: Any) -> Case:
    return Case(lambda folder: Recipe(**settings), UsageError, *parts)


def fitting(
    *parts: str,
    model: Callable[[], nn.Module] = network,
    data: Any = None,
    error: Any = DataError,
    recipe: Recipe = SHORT,
    **given: Any,
) -> Case:
    def trigger(folder: Path) -> object:
        return fit(model(), samples() if data is None else data, recipe, **given)

    return Case(trigger, error, *parts)


def images(change: Callable[[torch.Tensor], Any]) -> Any:
    return (change(samples()[0]), samples()[1])


def with_nan(pixels: torch.Tensor) -> torch.Tensor:
    pixels = pixels / 255
    pixels[7, 0, 0, 0] = torch.nan
    return pixels


def sizes() -> Any:
    """A data set whose images have two sizes."""
    from s2d_compiler.data.functions import MapStyle

    rows = [(torch.zeros(3, 8, 8 + (k == 3)), k % 4) for k in range(16)]
    return MapStyle("sizes", rows)


def checkpoint(*parts: str, change: Callable[[Any], object], recipe: Recipe = SHORT) -> Case:
    """A checkpoint of a training that was stopped, changed."""

    def trigger(folder: Path) -> object:
        with suppress(Stop):
            fit(network(), samples(), SHORT, checkpoint="c", checkpoint_steps=1,
                on_progress=stopping(3))  # fmt: skip
        data = checkpoints.read_checkpoint("c")
        change(data)
        assert data is not None
        checkpoints.write_checkpoint("c", data)
        return fit(network(), samples(), recipe, checkpoint="c")

    return Case(trigger, CheckpointError, *parts)


def damaged(content: bytes, *parts: str) -> Case:
    def trigger(folder: Path) -> object:
        Path("c").write_bytes(content)
        return fit(network(), samples(), SHORT, checkpoint="c")

    return Case(trigger, CheckpointError, *parts)


def of_another_format(folder: Path) -> object:
    torch.save({"a": 1}, "c")
    return fit(network(), samples(), SHORT, checkpoint="c")


def command(words: str, *parts: str, error: Any = UsageError) -> Case:
    """``s2d train`` with these words."""

    def trigger(folder: Path) -> object:
        staged().save("dyn.pt")
        pixels, labels = samples()
        numpy.savez("a.npz", images=pixels.numpy(), labels=labels.numpy())
        with mock.patch.object(running, "_fail", raising):
            return cli.main(["train", "dyn.pt", "-o", "t.pt", "--quiet", *words.split()])

    return Case(trigger, error, *parts)


def without_tensorboard(folder: Path) -> object:
    with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
        return command("--data a.npz --epochs 1 --tensorboard tb", *[""] * 4).trigger(folder)


def other_process(folder: Path) -> object:
    def fail(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    processes = Processes()
    processes.count, processes.rank = 2, 1
    with mock.patch.object(dist, "all_reduce", fail):
        return processes.sum(torch.zeros(1))


def too_few_gpus(folder: Path) -> object:
    world = {"WORLD_SIZE": "9", "RANK": "8", "LOCAL_RANK": "8"}
    with mock.patch.dict("os.environ", world), joined("cuda"):
        return None


class Diverging(nn.Module):
    """Its output is not a number while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(x.flatten(1))
        return result * torch.nan if self.training else result


def two_inputs() -> nn.Module:
    dyn = staged()
    dyn.parts = replace(dyn.parts, input_shapes=dyn.parts.input_shapes * 2)
    return dyn


def sharing_modules(folder: Path) -> object:
    model = network()
    return fit(model, samples(), SHORT, teacher=model)


def frozen_in_part(folder: Path) -> object:
    """One of the slices of a parameter takes no gradient."""
    dyn = staged()
    dyn.get_parameter("stages.1.0.weight").requires_grad_(False)
    form = masked(network(), dyn.plan, (torch.zeros(1, 3, 8, 8),))  # type: ignore[arg-type]
    freeze_as(form._weights(), dyn)
    return form


def with_fixed_batch() -> nn.Module:
    dyn = staged()
    dyn.parts = replace(dyn.parts, batch=16)
    return dyn


CASES: dict[str, Case] = {
    "a setting of a recipe": recipe("lr", "-1", "a number above 0", "correct this", lr=-1),
    "a list in a recipe": recipe(
        "milestones", "[0.5, 0.2]", "each above the one before", "correct this",
        milestones=(0.5, 0.2),
    ),
    "a preset": Case(
        lambda folder: Recipe.preset("fast"), UsageError,
        "preset", "'fast'", "is none of fine-tune, s2dnas-resnet", "give one",
    ),
    "a field of a recipe": Case(
        lambda folder: Recipe().changed(speed=1), UsageError,
        "recipe", "'speed'", "is no setting", "there are epochs",
    ),
    "a recipe that is none": Case(
        lambda folder: Recipe.from_dict([1]), UsageError,  # type: ignore[arg-type]
        "recipe", "a list", "settings by name belong", "give a dict",
    ),
    "no data": fitting("data", "a str", "neither data nor a pair", "give what", data="a.npz",
                       error=UsageError),
    "no images": fitting("data", "None", "there must be some", "give (images, labels)",
                         data=(None, samples()[1])),
    "no image of a class": fitting(
        "data", "0 images", "it takes one", "give some",
        data=(torch.zeros(0, 3, 8, 8), torch.zeros(0).long()),
    ),
    "too few labels": fitting(
        "data", "96 images and 3 labels", "each image has one", "give as many",
        data=(samples()[0], samples()[1][:3]),
    ),
    "one class": fitting(
        "data", "all 96 images are of class 0", "sees one class only", "give data of all classes",
        data=(samples()[0], torch.zeros(96).long()),
    ),
    "labels out of range": fitting(
        "data", "the label 4", "0 to 3", "give data of the classes",
        data=(samples()[0], samples()[1] + 1),
    ),
    "no labels": fitting(
        "data", "images without labels", "cross entropy needs them", "give labels",
        data=(samples()[0], None),
    ),
    "no labels to validate with": fitting(
        "validation", "images without labels", "accuracy needs them", "give labels",
        validation=(samples()[0], None),
    ),
    "fewer images than a batch": fitting(
        "data", "96 images", "a step takes 128", "a smaller batch size",
        recipe=Recipe(),
    ),
    "pixels that are NaN": fitting(
        "data: image 7", "NaN or infinite", "the loss would be", "correct or remove it",
        data=images(with_nan),
    ),
    "images of another shape": fitting(
        "data: image 0", "3x8x7", "the network takes 3x8x8", "give --resize", model=staged,
        data=images(lambda x: x[..., :7]),
    ),
    "images that a static network does not take": fitting(
        "data: image 0", "(1, 8, 8)", "the network fails with it", "resize or crop",
        data=images(lambda x: x[:, :1]),
    ),
    "images of two sizes": fitting(
        "sizes: image 3", "3x8x9 float32", "another image of its batch has 3x8x8", "resize all",
        data=sizes(),
    ),
    "classes": fitting(
        "network", "4, 5", "must tell the same", "give a network and a teacher of one",
        teacher=nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
    ),
    "nothing to train": fitting(
        "network", "a Flatten", "training changes these", "give a network that has some",
        model=nn.Flatten, error=UsageError,
    ),
    "several inputs": fitting(
        "network", "2 inputs", "one image per sample", "a loop of your own", model=two_inputs
    ),
    "half precision without a GPU": fitting(
        "precision", "float16", "small ones survive", "take bfloat16", error=UsageError,
        recipe=SHORT.changed(precision="float16"),
    ),
    "weights in half precision": fitting(
        "network: 0.weight", "bfloat16", "are float32 or float64", "call network.float()",
        model=lambda: network().bfloat16(), error=UsageError,
    ),
    "a teacher that is trained": Case(
        sharing_modules, UsageError,
        "teacher", "0.weight is trained", "stays as it is", "give a copy",
    ),
    "the best epoch of none that was validated": fitting(
        "recipe: keep", "best", "no validation data", "give some, or keep the last",
        error=UsageError, recipe=SHORT.changed(keep="best"),
    ),
    "images that are no numbers": fitting(
        "data", "a ndarray", "no dense tensor", "give tensors or arrays",
        data=(numpy.array([None] * 96), samples()[1]),
    ),
    "batches that fail in training alone": fitting(
        "data", "shape (1, 3, 8, 8)", "Expected more than 1 value per channel", "that go together",
        model=lambda: nn.Sequential(nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.Flatten()),
        recipe=SHORT.changed(batch_size=1),
    ),
    "a parameter that is frozen in part": Case(
        frozen_in_part, UsageError,
        "stages.1.0.weight", "requires_grad=False", "one tensor for both", "in its staged form",
    ),
    "a fixed batch": fitting(
        "batch_size", "8", "batches of 16 only", "set it to that", model=with_fixed_batch,
        error=UsageError, recipe=SHORT.changed(batch_size=8),
    ),
    "a fixed batch to validate": fitting(
        "validation", "9 images", "batches of 16 only", "give a multiple", model=with_fixed_batch,
        validation=(samples()[0][:9], samples()[1][:9]),
    ),
    "no teacher": fitting(
        "teacher", "50%", "what it teaches", "give one", error=UsageError,
        recipe=SHORT.changed(distill=0.5),
    ),
    "a teacher in vain": fitting(
        "teacher", "distill at 0", "never asked", "leave it out", error=UsageError,
        recipe=SHORT.changed(distill=0), teacher=network(),
    ),
    "weights of stages": fitting(
        "stage_weights", "2 numbers", "trained number 3", "give one for each", model=staged,
        error=UsageError, recipe=SHORT.changed(stage_weights=(1, 1)),
    ),
    "another form": fitting(
        "form", "masked", "it cannot be had", "give the original", model=staged,
        error=UsageError, recipe=SHORT.changed(form="masked"),
    ),
    "a loss that is none": fitting(
        "epoch 1, step 1", "nan", "must stay finite", "lower the learning rate", model=Diverging,
        error=TrainingDivergedError,
    ),
    "a checkpoint that is none": damaged(
        b"PK", "c", "no checkpoint", "or is damaged", BEGIN_ANEW
    ),
    "a checkpoint of another format": Case(
        of_another_format, CheckpointError,
        "c is", "not of the format", "which this package reads", BEGIN_ANEW,
    ),
    "a checkpoint of another recipe": checkpoint(
        "c: recipe.lr", "0.05 there and 0.1 here", "goes on only as it began", "give what it began",
        change=lambda data: None, recipe=SHORT.changed(lr=0.1),
    ),
    "a checkpoint with another kind of value": checkpoint(
        "c: watch[0]", "'a'", "a float belongs", BEGIN_ANEW,
        change=lambda data: data["watch"].__setitem__(0, "a"),
    ),
    "a checkpoint without a value": checkpoint(
        "c: weights", "0.weight", "is missing there", BEGIN_ANEW,
        change=lambda data: data["weights"].pop("0.weight"),
    ),
    "a checkpoint with too few values": checkpoint(
        "c: losses", "0 values", "where 2 belong", BEGIN_ANEW,
        change=lambda data: data["losses"].clear(),
    ),
    "a checkpoint with a tensor of another shape": checkpoint(
        "c: right[0]", "shape (2,)", "where a tensor of shape (1,)", BEGIN_ANEW,
        change=lambda data: data["right"].__setitem__(0, torch.zeros(2)),
    ),
    "another process": Case(
        other_process, ProcessError,
        "process 1", "Connection closed", "each step takes all of them", "start all again",
    ),
    "too few GPUs": Case(
        too_few_gpus, UsageError,
        "--device: process 8", "there are", "has no GPU", "start as many processes",
    ),
    "--resume": command(
        "--data a.npz --resume yes", "--resume", "'yes'", "none of auto, must, never", "write one"
    ),
    "--resume must": command(
        "--data a.npz --resume must", "--resume", "t.pt.checkpoint", "there is no checkpoint",
        "write auto",
    ),
    "--milestones": command(
        "--data a.npz --milestones half", "--milestones", '"half"', "no list of numbers",
        "write numbers with commas",
    ),
    "--tensorboard": Case(
        without_tensorboard, UsageError,
        "--tensorboard", "not installed", "it writes tb", "pip install s2d-compiler[tensorboard]",
    ),
}  # fmt: skip
