"""``fit``: train a network by a recipe."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from s2d_compiler.data import Data, Preprocessing, batches, require_fit
from s2d_compiler.data.loading import require_classes
from s2d_compiler.data.sources import Selected
from s2d_compiler.dynamic import StagedNetwork
from s2d_compiler.errors import DataError, UsageError
from s2d_compiler.interrupts import noted
from s2d_compiler.output import check_writable
from s2d_compiler.runtime.policies import thresholds_of
from s2d_compiler.training import checkpoints
from s2d_compiler.training.distributed import Processes
from s2d_compiler.training.feeding import Feed, as_data
from s2d_compiler.training.history import History, Progress
from s2d_compiler.training.loop import Batches, Loop
from s2d_compiler.training.losses import JointLoss
from s2d_compiler.training.recipe import Recipe
from s2d_compiler.training.trainees import Trainee, trainee_of

__all__ = ["fit"]

logger = logging.getLogger(__name__)


def fit(
    network: nn.Module,
    data: Any,
    recipe: Recipe | None = None,
    *,
    validation: Any = None,
    preprocessing: Preprocessing | None = None,
    teacher: nn.Module | None = None,
    original: nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 300.0,
    checkpoint_steps: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    device: str | torch.device | None = None,
) -> History:
    """Train all stages of a network together.

    Two trainings of the same network, data and recipe on the same machine, with as many threads,
    end with the same bits, also where one of them was killed and went on from its checkpoint.

    Args:
        network: A staged network, or a module that returns one tensor of logits ``(N, C)``. It is
            trained in place and left in evaluation mode.
        data: What ``open_data`` returns, or a pair of images and labels; labels may be None where
            there is a teacher.
        recipe: How; ``Recipe()`` when None.
        validation: Data like these; the accuracy of every stage on them is measured after each
            epoch.
        preprocessing: What is done to each image; that of the network's settings when None.
        teacher: A network whose logits are to be met, kept in evaluation mode. For a plan with
            ``"final": "original"`` the frozen last stage when None.
        original: The network that a staged one was made from; it makes the masked form possible.
        checkpoint: A file that is written every now and then and at the end of each epoch; if it
            exists, training goes on from it.
        checkpoint_seconds: After how much time it is written.
        checkpoint_steps: After how many steps it is written; None: by time alone.
        on_progress: Called after each step and each epoch.
        device: Where; the network's own when None.

    Returns:
        What each epoch was like.

    Raises:
        UsageError, DataError: Network, data, recipe and teacher do not fit together.
        CheckpointError: The checkpoint is damaged, or of another training.
        TrainingDivergedError: The loss went astray; the network gets the checkpoint's weights.
        OutputError: A checkpoint cannot be written; the one before stays.
    """
    recipe = recipe or Recipe()
    path = None if checkpoint is None else os.fspath(checkpoint)
    trainee = trainee_of(network, recipe.train_original)
    place = torch.device(device) if device is not None else _device_of(network)
    _require_precision(recipe, place)
    if path is not None:
        check_writable(path)
    images = as_data(data, "data")
    held_out = None if validation is None else as_data(validation, "validation")
    preprocessing = _preprocessing(network, preprocessing)
    shape = _require_fit(network, recipe, preprocessing, images, held_out)
    labels = _labels(images, recipe, teacher is not None or trainee.frozen is not None)
    distill = _distill(recipe, trainee, teacher is not None, labels is not None)
    weights = _weights(recipe, trainee)
    processes = Processes()
    feed = Feed(
        images, labels, preprocessing, recipe, shape, place, processes.rank, processes.count
    )
    with (
        _placed(network, teacher, recipe, place),
        _seeded(recipe, place, processes.rank),
        noted() as is_asked,
    ):
        processes.take_from_first(checkpoints.tensors_of(network).values())
        classes = _classes(trainee, teacher, feed, held_out, preprocessing)
        if labels is not None:
            require_classes(images, labels, classes)
        loop = Loop(
            trainee,
            feed,
            recipe,
            JointLoss.of(recipe, weights, distill),
            teacher if distill else None,
            bool(distill) and teacher is None,
            classes,
            _validation(held_out, preprocessing, recipe, shape, place, processes),
            place,
            _run(network, trainee, recipe, feed, teacher if distill else None),
            processes,
            is_asked,
            path,
            checkpoint_seconds,
            checkpoint_steps,
            on_progress if processes.is_first else None,
        )
        if path is not None and (found := checkpoints.read_checkpoint(path)) is not None:
            _require_same_start(path, found, loop)
            loop.resume(found)
        loop()
        kept = loop.epoch
        if loop.best and loop.epoch == recipe.epochs:
            checkpoints.take(network, loop.best)
            kept = loop.best_epoch
    _update_settings(network, preprocessing)
    return History(recipe, trainee.form, distill, tuple(loop.history), kept, loop.resumed)


# -- what is asked for, checked before long work -------------------------------------------------


def _device_of(network: nn.Module) -> torch.device:
    first = next(network.parameters(), None)
    if first is None:
        raise UsageError("the network has no parameters, so that there is nothing to train")
    return first.device


def _require_precision(recipe: Recipe, device: torch.device) -> None:
    if recipe.precision == "float16" and device.type != "cuda":
        raise UsageError(
            f"recipe: precision is float16, and on {device.type} small gradients would be lost, as "
            "its numbers are scaled on cuda only; use bfloat16, or a GPU"
        )


def _preprocessing(network: nn.Module, given: Preprocessing | None) -> Preprocessing:
    stored = network.settings.preprocessing if isinstance(network, StagedNetwork) else None
    found = given or stored or Preprocessing()
    kinds = {torch.float64: "float64"}
    first = next(p for p in network.parameters())
    return replace(found, dtype=kinds.get(first.dtype, "float32"))


def _require_fit(
    network: nn.Module,
    recipe: Recipe,
    preprocessing: Preprocessing,
    data: Data,
    validation: Data | None,
) -> tuple[int, ...] | None:
    for name, some in (("data", data), ("validation", validation)):
        if some is not None and not len(some):
            raise DataError(f"{name}: {some.name} has 0 images; give at least one")
    if not isinstance(network, StagedNetwork):
        return None
    shape = require_fit(data, preprocessing, network.parts.input_shapes)
    if validation is not None:
        require_fit(validation, preprocessing, network.parts.input_shapes)
    fixed = network.parts.batch
    if fixed is not None and recipe.batch_size != fixed:
        raise UsageError(
            f"recipe: batch_size is {recipe.batch_size}, and the network takes batches of {fixed} "
            "only; set it to that, or compile the network with a free batch size"
        )
    if fixed is not None and validation is not None and len(validation) % fixed:
        raise DataError(
            f"{validation.name}: {len(validation)} images, and the network takes batches of "
            f"{fixed} only; give a multiple of that"
        )
    return shape


def _labels(data: Data, recipe: Recipe, is_taught: bool) -> Tensor | None:
    if not recipe.labels:
        return None
    labels = data.labels
    if bool((labels < 0).any()):
        if is_taught and recipe.distill in (None, 1.0):
            return None
        raise DataError(
            f"{data.name}: images without labels, and cross entropy needs them; give a teacher, "
            "with distill at 1 or None, or labels"
        )
    if int(labels.min()) == int(labels.max()):
        raise DataError(
            f"{data.name}: all {len(labels)} images are of class {int(labels[0])}, and a network "
            "that is trained on one class says it of everything; give data of all classes"
        )
    return labels


def _distill(recipe: Recipe, trainee: Trainee, is_given: bool, is_labelled: bool) -> float:
    there = is_given or trainee.frozen is not None
    if recipe.distill is not None:
        if recipe.distill and not there:
            raise UsageError(
                f"recipe: distill is {recipe.distill:g}, and there is no teacher; give one, or "
                "set it to 0"
            )
        if is_given and not recipe.distill:
            raise UsageError(
                "teacher: one is given, and distill of the recipe is 0, so that it would not be "
                "asked; leave it out, or give distill a share above 0"
            )
        return recipe.distill
    if not there and not is_labelled:
        raise UsageError(
            "recipe: labels is False, and there is no teacher to learn from instead; give one"
        )
    if not is_labelled:
        return 1.0
    return 0.5 if there else 0.0


def _weights(recipe: Recipe, trainee: Trainee) -> tuple[float, ...] | None:
    count = len(trainee.trained)
    if isinstance(recipe.stage_weights, str):
        return None
    if recipe.stage_weights and len(recipe.stage_weights) != count:
        raise UsageError(
            f"recipe: stage_weights has {len(recipe.stage_weights)} numbers, and {count} stage(s) "
            "are trained; give one for each of these"
        )
    return recipe.stage_weights or (1.0,) * count


def _classes(
    trainee: Trainee,
    teacher: nn.Module | None,
    feed: Feed,
    validation: Data | None,
    preprocessing: Preprocessing,
) -> int:
    """How many classes the stages tell apart, tried with the first images."""
    network = trainee.network
    fixed = network.parts.batch if isinstance(network, StagedNetwork) else None
    indices = [k % len(feed.data) for k in range(fixed or 1)]
    images = [preprocessing(feed.data.image(k), feed.data.place(k)) for k in indices]
    inputs = torch.stack(images).to(feed.device)
    network.eval()
    with torch.no_grad():
        found = [logits.shape[1] for logits in trainee.logits(inputs)]
        if teacher is not None:
            found.append(trainee.read(teacher(inputs), len(inputs)).shape[1])
    if len(set(found)) > 1:
        raise DataError(
            f"the exits (and the teacher) tell {', '.join(map(str, found))} classes apart, and "
            "they must tell the same; give a network and a teacher for the same classes"
        )
    if validation is not None:
        require_classes(validation, validation.labels, found[0])
    return found[0]


def _validation(
    data: Data | None,
    preprocessing: Preprocessing,
    recipe: Recipe,
    shape: tuple[int, ...] | None,
    device: torch.device,
    processes: Processes,
) -> Batches | None:
    if data is None:
        return None
    if processes.count > 1:
        part = processes.part_of(range(len(data)))
        data = Selected(data, part, data.name)
    last = recipe.memory_format == "channels_last"

    def run() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in batches(data, preprocessing, recipe.batch_size, device, shape):
            if last and inputs.dim() == 4:
                yield inputs.contiguous(memory_format=torch.channels_last), labels
            else:
                yield inputs.contiguous(), labels

    return run


# -- which training this is ----------------------------------------------------------------------


def _run(
    network: nn.Module, trainee: Trainee, recipe: Recipe, feed: Feed, teacher: nn.Module | None
) -> dict[str, Any]:
    tensors = checkpoints.tensors_of(network)
    return {
        "network": checkpoints.hash_of(tensors, numbers=False),
        "start": checkpoints.hash_of(tensors),
        "recipe": recipe.to_dict(),
        "data": feed.fingerprint(),
        "teacher": None if teacher is None else checkpoints.hash_of(
            checkpoints.tensors_of(teacher)
        ),
        "form": trainee.form,
        "processes": feed.processes,
    }  # fmt: skip


def _require_same_start(path: str, found: dict[str, Any], loop: Loop) -> None:
    """A training goes on for the network that it began with, or that it had come to."""
    run = found.get("run")
    if type(run) is dict and loop.run["start"] == found.get("now"):
        loop.run = {**loop.run, "start": run.get("start")}
    checkpoints.require_same_run(path, run, loop.run)


# -- the machine, and as it was before -----------------------------------------------------------


@contextmanager
def _placed(
    network: nn.Module, teacher: nn.Module | None, recipe: Recipe, device: torch.device
) -> Iterator[None]:
    """Networks on the device, in the recipe's memory format; contiguous, evaluating afterwards."""
    last = recipe.memory_format == "channels_last"
    wanted = torch.channels_last if last else torch.contiguous_format
    modes = [] if teacher is None else [(m, m.training) for m in teacher.modules()]
    taught = [network] if teacher is None else [network, teacher]
    for module in taught:
        module.to(device=device)
        module.to(memory_format=wanted)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.eval()
    try:
        flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with flags:
            yield
    finally:
        for module in taught:
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        network.eval()
        for parameter in network.parameters():
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


@contextmanager
def _seeded(recipe: Recipe, device: torch.device, rank: int) -> Iterator[None]:
    """Generators that begin with the recipe's seed, and are as they were afterwards."""
    before = checkpoints.random_states(device)
    torch.manual_seed(recipe.seed + rank)
    random.seed(recipe.seed + rank)
    numpy.random.seed((recipe.seed + rank) % 2**32)
    try:
        yield
    finally:
        checkpoints.set_random_states(before, device)


def _update_settings(network: nn.Module, preprocessing: Preprocessing) -> None:
    if not isinstance(network, StagedNetwork):
        return
    settings = network.settings
    policy = settings.policy
    has_thresholds = policy is not None and thresholds_of(policy) is not None
    if has_thresholds or settings.calibration is not None:
        logger.warning(
            "the thresholds that are stored with the network fit the weights that it had, and are "
            "left out; calibrate it again"
        )
    network.settings = replace(
        settings,
        preprocessing=preprocessing,
        policy=None if has_thresholds else policy,
        calibration=None,
    )
