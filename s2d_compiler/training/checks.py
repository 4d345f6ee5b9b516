"""Whether network, data, recipe and teacher fit together, checked before long work begins."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d_compiler.data import Data, Preprocessing, require_fit
from s2d_compiler.dynamic import CallShape, StagedNetwork
from s2d_compiler.errors import DataError, S2DError, UsageError, first_line
from s2d_compiler.evaluation.evaluating import accuracy_of, interval
from s2d_compiler.memory import let_through
from s2d_compiler.training.recipe import Recipe
from s2d_compiler.training.trainees import Trainee

logger = logging.getLogger(__name__)

__all__ = [
    "accuracy_of_teacher",
    "count_classes",
    "device_of",
    "evaluating",
    "preprocessing_for",
    "require_other",
    "require_precision",
    "require_shapes",
    "require_validation",
    "share_of_distillation",
    "usable_labels",
    "weights_of_stages",
]


def device_of(network: nn.Module, parameters: Iterable[nn.Parameter]) -> torch.device:
    """Where a network is.

    Args:
        network: The network.
        parameters: Those of its parameters that training may change.

    Raises:
        UsageError: It has nothing to train.
    """
    first = next((p for p in parameters if p.requires_grad), None)
    if first is None:
        raise UsageError(
            f"network: a {type(network).__name__} without a parameter that takes a gradient, and "
            "training changes these; give a network that has some, or requires_grad_() it"
        )
    return first.device


def require_precision(network: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Refuse half precision where small gradients, or small steps, would be lost.

    Raises:
        UsageError: float16 elsewhere than on a GPU, or weights in half precision.
    """
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise UsageError(
                f"network: {name} is {str(parameter.dtype)[6:]}, and weights that are trained are "
                "float32 or float64, or small steps are lost; call network.float(), and set the "
                "recipe's precision, in which forward passes compute"
            )
    if recipe.precision == "float16" and device.type != "cuda":
        raise UsageError(
            f"recipe: precision is float16 and the device {device.type}, where gradients are not "
            "scaled so that small ones survive; take bfloat16, or a GPU"
        )


def preprocessing_for(network: nn.Module, given: Preprocessing | None) -> Preprocessing:
    """What is done to images: what is given or stored, in the network's kind of numbers."""
    stored = network.settings.preprocessing if isinstance(network, StagedNetwork) else None
    found = given or stored or Preprocessing()
    is_double = next(network.parameters()).dtype == torch.float64
    return replace(found, dtype="float64" if is_double else "float32")


def require_shapes(
    call: CallShape | None,
    recipe: Recipe,
    preprocessing: Preprocessing,
    data: Data,
    validation: Data | None,
) -> tuple[int, ...] | None:
    """Require images of a size and number that the network takes.

    Returns:
        The shape of one input, if it is known.

    Raises:
        DataError, UsageError: They are not.
    """
    for name, some in (("data", data), ("validation", validation)):
        if some is not None and not len(some):
            raise DataError(f"{name}: {some.name} has 0 images, and it takes one; give some")
    if validation is not None and bool((validation.labels < 0).any()):
        raise DataError(
            f"{validation.name}: images without labels to validate with, and accuracy needs them; "
            "give labels, or no validation data"
        )
    if call is None:
        return None
    shape = require_fit(data, preprocessing, call.input_shapes)
    if validation is not None:
        require_fit(validation, preprocessing, call.input_shapes)
    if call.batch is None:
        return shape
    if recipe.batch_size != call.batch:
        raise UsageError(
            f"recipe: batch_size is {recipe.batch_size}, and the network takes batches of "
            f"{call.batch} only; set it to that, or compile it with a free batch size"
        )
    if validation is not None and len(validation) % call.batch:
        raise DataError(
            f"{validation.name}: {len(validation)} images to validate with, and the network takes "
            f"batches of {call.batch} only; give a multiple of that"
        )
    return shape


def require_validation(recipe: Recipe, validation: Data | None) -> None:
    """Refuse to keep the best epoch where nothing says which that is.

    Raises:
        UsageError: There is nothing to validate with.
    """
    if recipe.keep == "best" and validation is None:
        raise UsageError(
            "recipe: keep is best, and there is no validation data to tell which epoch that is; "
            "give some, or keep the last"
        )


def require_other(trainee: Trainee, teacher: nn.Module | None) -> None:
    """Require a teacher that training does not change.

    Raises:
        UsageError: It has parameters that are trained.
    """
    if teacher is None:
        return
    trained = {id(parameter): name for name, parameter in trainee.parameters().items()}
    for parameter in teacher.parameters():
        if name := trained.get(id(parameter)):
            raise UsageError(
                f"teacher: its parameters are the network's own ({name} is trained), and a teacher "
                "stays as it is; give a copy (copy.deepcopy)"
            )


def usable_labels(data: Data, recipe: Recipe, is_taught: bool) -> Tensor | None:
    """All labels, or None where there are none, or none are wanted.

    Raises:
        DataError: Some are needed and missing, or all are the same.
    """
    if not recipe.labels:
        return None
    labels = data.labels
    if bool((labels < 0).any()):
        if is_taught and recipe.distill in (None, 1.0):
            return None
        raise DataError(
            f"{data.name}: images without labels, and cross entropy needs them; give labels, or a "
            "teacher alone (distill 1)"
        )
    if int(labels.min()) == int(labels.max()):
        raise DataError(
            f"{data.name}: all {len(labels)} images are of class {int(labels[0])}, and a network "
            "that sees one class only says it of everything; give data of all classes"
        )
    return labels


def share_of_distillation(
    recipe: Recipe, is_given: bool, is_last: bool, is_labelled: bool
) -> float:
    """The share that a recipe comes to.

    Args:
        recipe: The recipe.
        is_given: Whether a teacher is.
        is_last: Whether a frozen last stage can teach.
        is_labelled: Whether there are labels.

    Raises:
        UsageError: There is no teacher and one is needed, or one and it would not be asked.
    """
    wanted = recipe.distill
    if not is_labelled:
        wanted = 1.0
    elif wanted is None:
        wanted = 0.5 if is_given or is_last else 0.0
    if wanted and not (is_given or is_last):
        raise UsageError(
            f"teacher: there is none, and {wanted:.0%} of the loss is what it teaches; give one, "
            "or train with labels alone (distill 0)"
        )
    if is_given and not wanted:
        raise UsageError(
            "teacher: one is given, and with distill at 0 it is never asked; leave it out, or give "
            "distill a share above 0"
        )
    return wanted


def weights_of_stages(recipe: Recipe, trained: int) -> tuple[float, ...] | None:
    """What the loss of each trained stage is multiplied with; None where that is adaptive.

    Raises:
        UsageError: They are not one for each.
    """
    if isinstance(recipe.stage_weights, str):
        return None
    if recipe.stage_weights and len(recipe.stage_weights) != trained:
        raise UsageError(
            f"recipe: stage_weights has {len(recipe.stage_weights)} numbers, and the stages that "
            f"are trained number {trained}; give one for each of these"
        )
    return recipe.stage_weights or (1.0,) * trained


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block, and as it was after it, module by module."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def count_classes(
    trainee: Trainee,
    teacher: nn.Module | None,
    preprocessing: Preprocessing,
    data: Sequence[Data],
    device: torch.device,
) -> int:
    """How many classes the stages tell apart, tried with the first images of all data.

    Raises:
        DataError: The network does not take them, or stages or teacher tell others apart.
    """
    batch = 1 if trainee.call is None else trainee.call.batch or 1
    found: list[int] = []
    for some in data:
        image = preprocessing(some.image(0), some.place(0))
        inputs = torch.stack([image] * batch).to(device)
        try:
            with torch.no_grad(), evaluating(trainee.network):
                found += [logits.shape[1] for logits in trainee.logits(inputs)]
                if teacher is not None:
                    found.append(trainee.read(teacher(inputs), len(inputs)).shape[1])
        except S2DError:
            raise
        except Exception as error:
            let_through(error)
            raise DataError(
                f"{some.place(0)}: {tuple(image.shape)} after preprocessing ({preprocessing}), and "
                f"the network fails with it ({first_line(error)[:160]}); resize or crop the images "
                "to what it takes"
            ) from error
    if len(set(found)) > 1:
        raise DataError(
            f"network: its exits, and the teacher, tell {', '.join(map(str, found))} classes "
            "apart, and they must tell the same; give a network and a teacher of one data set"
        )
    return found[0]


def accuracy_of_teacher(
    teacher: nn.Module, batches: Iterable[tuple[Any, Tensor]], count: int, classes: int
) -> float:
    """How good a teacher is on images as it gets them; one that is hardly right is warned of.

    So few images that a good one may have them wrong by chance say nothing.
    """
    found = accuracy_of(teacher, batches)
    if classes > 2 and found < 2 / classes and interval(found, count)[1] < 0.5:
        logger.warning(
            "the teacher is right for %.1f%% of the images, and guessing one of %d classes is for "
            "%.1f%%; are the images preprocessed as it was trained (mean, std, size, channels), "
            "and the classes in the same order?",
            100 * found,
            classes,
            100 / classes,
        )
    return found
