"""``fit``: train a network by a recipe."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from s2d_compiler.data import Data, Preprocessing, batches
from s2d_compiler.data.loading import require_classes
from s2d_compiler.data.sources import Selected
from s2d_compiler.dynamic import StagedNetwork
from s2d_compiler.interrupts import noted
from s2d_compiler.output import check_writable
from s2d_compiler.runtime.policies import thresholds_of
from s2d_compiler.training import checkpoints, checks, forms
from s2d_compiler.training.distributed import Processes
from s2d_compiler.training.feeding import Feed, as_data, fingerprint
from s2d_compiler.training.history import History, Progress
from s2d_compiler.training.loop import Batches, Loop
from s2d_compiler.training.losses import JointLoss
from s2d_compiler.training.recipe import Recipe
from s2d_compiler.training.trainees import Trainee

__all__ = ["fit"]

logger = logging.getLogger(__name__)

#: So many of the training images say how good a teacher is where there are no others.
_TEACHER_IMAGES = 1000


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
    own = checks.device_of(network, network.parameters())
    place = own if device is None else torch.device(device)
    checks.require_precision(network, recipe, place)
    if path is not None:
        check_writable(path)
    processes = Processes()
    network.to(place)
    processes.take_from_first(checkpoints.tensors_of(network).values())
    originals = [module for module in (original, teacher) if module is not None]
    trainees = forms.candidates(network, recipe, originals, place)
    trainee = trainees[0]
    checks.device_of(network, trainee.parameters().values())
    checks.require_other(trainee, teacher)
    images = as_data(data, "data")
    held_out = None if validation is None else as_data(validation, "validation")
    checks.require_validation(recipe, held_out)
    preprocessing = checks.preprocessing_for(network, preprocessing)
    with _seeded(recipe, place, processes.rank):
        shape = checks.require_shapes(trainee.call, recipe, preprocessing, images, held_out)
    has_last = trainee.frozen is not None
    labels = checks.usable_labels(images, recipe, teacher is not None or has_last)
    distill = checks.share_of_distillation(
        recipe, teacher is not None, has_last, labels is not None
    )
    weights = checks.weights_of_stages(recipe, len(trainee.trained))
    feed = Feed(images, labels, preprocessing, recipe, shape, place, processes)
    found = None if path is None else checkpoints.read_checkpoint(path)
    with _placed([t.network for t in trainees], teacher, recipe, place), noted() as is_asked:
        everything = [images] if held_out is None else [images, held_out]
        with _seeded(recipe, place, processes.rank):
            classes = checks.count_classes(trainee, teacher, preprocessing, everything, place)
        for some in everything if labels is not None else everything[1:]:
            require_classes(some, some.labels, classes)

        taught = None
        if teacher is not None and processes.is_first:
            shown = held_out
            if shown is None and labels is not None:  # whole batches, as in training
                size = recipe.batch_size
                shown = images.limited(max(1, min(len(images), _TEACHER_IMAGES) // size) * size)
            run = _validation(shown, preprocessing, recipe, shape, place, processes=None)
            if shown is not None and run is not None:
                with _seeded(recipe, place, processes.rank):
                    taught = checks.accuracy_of_teacher(teacher, run(), len(shown), classes)

        def loop_of(trainee: Trainee) -> Loop:
            return Loop(
                trainee,
                feed,
                recipe,
                JointLoss.of(recipe, weights, distill),
                teacher if distill else None,
                bool(distill) and teacher is None,
                classes,
                _validation(held_out, preprocessing, recipe, shape, place, processes),
                place,
                _run(trainee, recipe, feed, teacher if distill else None, held_out),
                processes,
                is_asked,
                path,
                checkpoint_seconds,
                checkpoint_steps,
                on_progress if processes.is_first else None,
            )

        with _ended(trainees), _seeded(recipe, place, processes.rank):
            loop = forms.faster([loop_of(trainee) for trainee in _begun(trainees, found)])
        with _ended(trainees), _seeded(recipe, place, processes.rank):
            try:
                if found is not None:
                    _require_same_start(str(path), found, loop)
                    loop.resume(found)
                loop()
                kept = loop.epoch
                if loop.best and loop.epoch == recipe.epochs:
                    checkpoints.take(loop.trainee.network, loop.best)
                    kept = loop.best_epoch
            finally:
                loop.trainee.hand_over()
    network.eval()
    _update_settings(network, preprocessing)
    results = tuple(loop.history)
    return History(recipe, loop.trainee.form, distill, results, kept, loop.resumed, taught)


def _validation(
    data: Data | None,
    preprocessing: Preprocessing,
    recipe: Recipe,
    shape: tuple[int, ...] | None,
    device: torch.device,
    processes: Processes | None,
) -> Batches | None:
    """Batches of data, of a process's part of them where there are several."""
    if data is None:
        return None
    if processes is not None and processes.count > 1:
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


def _begun(trainees: list[Trainee], found: Any) -> list[Trainee]:
    """The form that a checkpoint is of, if it is one of these; all of them otherwise."""
    run = found.get("run") if found is not None else None
    form = run.get("form") if type(run) is dict else None
    return [trainee for trainee in trainees if trainee.form == form] or trainees


def _run(
    trainee: Trainee, recipe: Recipe, feed: Feed, teacher: nn.Module | None, held_out: Data | None
) -> dict[str, Any]:
    """What a checkpoint is known by."""
    frozen = [name for name, p in trainee.network.named_parameters() if not p.requires_grad]
    chooses = held_out is not None and recipe.keep == "best"
    tensors = checkpoints.tensors_of(trainee.hand_over())
    taught = "" if teacher is None else checkpoints.hash_of(checkpoints.tensors_of(teacher))
    return {
        "network": checkpoints.hash_of(tensors, numbers=False),
        "start": checkpoints.hash_of(tensors),
        "recipe": recipe.to_dict(),
        "data": feed.fingerprint(),
        "teacher": taught,
        "form": trainee.form,
        "processes": feed.processes.count,
        **({"frozen": frozen} if frozen else {}),
        **({"validation": fingerprint(held_out, held_out.labels)} if held_out and chooses else {}),
    }


def _require_same_start(path: str, found: dict[str, Any], loop: Loop) -> None:
    """A training goes on for the network that it began with, or that it had come to."""
    run = found.get("run")
    if type(run) is dict and loop.run["start"] == found.get("now"):
        loop.run = {**loop.run, "start": run.get("start")}
    checkpoints.require_same_run(path, run, loop.run)


# -- the machine, and as it was before -----------------------------------------------------------


@contextmanager
def _placed(
    networks: list[nn.Module], teacher: nn.Module | None, recipe: Recipe, device: torch.device
) -> Iterator[None]:
    """Networks on the device, in the recipe's memory format; as they were laid out afterwards."""
    last = recipe.memory_format == "channels_last"
    wanted = torch.channels_last if last else torch.contiguous_format
    taught = networks if teacher is None else [*networks, teacher]
    for module in taught:
        module.to(device=device)
    before = [(tensor, _layout(tensor)) for module in taught for tensor in _images_in(module)]
    for tensor, _ in before:
        tensor.data = tensor.data.contiguous(memory_format=wanted)
    teaching = nullcontext() if teacher is None else checks.evaluating(teacher)
    try:
        with teaching, torch.backends.cudnn.flags(benchmark=False, deterministic=True):
            yield
    finally:
        for tensor, layout in before:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def _images_in(module: nn.Module) -> list[Tensor]:
    """Tensors that have a memory format: channels_last is of four dimensions."""
    tensors = [*module.parameters(), *module.buffers()]
    return [t for t in tensors if t.dim() == 4 and t.is_floating_point()]


def _layout(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format


@contextmanager
def _ended(trainees: list[Trainee]) -> Iterator[None]:
    """Networks in evaluation mode, without gradients, after the block."""
    try:
        yield
    finally:
        for trainee in trainees:
            trainee.network.eval()
            trainee.network.zero_grad(set_to_none=True)


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
