"""Which form of a network is trained: as it is, stage by stage, or masked."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2d_compiler.dynamic import DynamicModel, StagedNetwork
from s2d_compiler.errors import DataError, S2DError, UsageError
from s2d_compiler.masking.model import MaskedModel, masked
from s2d_compiler.masking.transfer import freeze_as
from s2d_compiler.training.checkpoints import take, tensors_of
from s2d_compiler.training.loop import Loop
from s2d_compiler.training.recipe import Recipe
from s2d_compiler.training.trainees import MaskedTrainee, StagedTrainee, Trainee

__all__ = ["candidates", "faster"]

logger = logging.getLogger(__name__)

#: Steps before and while the forms are timed.
_WARM_UP, _TIMED = 2, 3


def candidates(
    network: nn.Module, recipe: Recipe, originals: list[nn.Module], device: torch.device
) -> list[Trainee]:
    """The forms that a recipe allows and that can be had.

    Args:
        network: What is to be trained.
        recipe: Its form; and whether an original last stage is trained.
        originals: Networks that a staged one may have been made from, the likeliest first.
        device: Where they go.

    Raises:
        UsageError: The form that the recipe names cannot be had.
        DataError: The network takes several inputs.
    """
    trainee: Trainee
    if isinstance(network, MaskedModel):
        trainee = MaskedTrainee(network, recipe.train_original)
    elif isinstance(network, StagedNetwork):
        trainee = StagedTrainee(network, recipe.train_original)
    else:
        trainee = Trainee(network, recipe.train_original)
    if trainee.call is not None and len(trainee.call.input_shapes) != 1:
        raise DataError(
            f"network: it takes {len(trainee.call.input_shapes)} inputs, and training hands over "
            "one image per sample; train such a network with a loop of your own"
        )
    if recipe.form == trainee.form:
        return [trainee]
    problem = f"a {type(network).__name__} has no other form than {trainee.form}"
    if isinstance(network, DynamicModel) and recipe.form in ("auto", "masked"):
        problem = "it is made of the original, which is not given"
        for original in originals:
            try:
                form = _masked(network, original, recipe, device)
                return [form] if recipe.form == "masked" else [trainee, form]
            except S2DError as error:
                problem = str(error).rstrip(".")
                logger.info("no masked form: %s", problem)
    if recipe.form == "auto":
        return [trainee]
    raise UsageError(
        f"recipe: form is {recipe.form}, and it cannot be had ({problem}); give the original that "
        "the network was compiled from, or leave the form at auto"
    )


def _masked(
    network: DynamicModel, original: nn.Module, recipe: Recipe, device: torch.device
) -> MaskedTrainee:
    own = next(network.parameters())
    first = next(original.parameters(), own)
    example = torch.zeros(network.parts.batch or 1, *network.parts.input_shapes[0])
    form = masked(original, network.plan, (example.to(first.device, first.dtype),))  # type: ignore[arg-type]
    form.to(device, own.dtype)
    form.load_dynamic(network)
    freeze_as(form._weights(), network)
    return MaskedTrainee(form, recipe.train_original, network)


def faster(loops: Sequence[Loop]) -> Loop:
    """The one whose form takes less time for a step; the first process decides for all.

    The networks, and all that is random, are afterwards as they were.
    """
    if len(loops) == 1:
        return loops[0]
    inputs, labels = next(loops[0].feed.epoch(0))
    seconds = [_seconds(loop, inputs, labels) for loop in loops]
    seconds = loops[0].processes.all_of(seconds)[0]
    chosen = loops[int(seconds.index(min(seconds)))]
    times = ", ".join(
        f"{1e3 * number:.1f} ms {loop.trainee.form}"
        for number, loop in zip(seconds, loops, strict=True)
    )
    logger.info("a step takes %s: training the %s form", times, chosen.trainee.form)
    return chosen


def _seconds(loop: Loop, inputs: Tensor, labels: Tensor | None) -> float:
    """The least time of a few steps, without the optimiser's part."""
    network = loop.trainee.network
    before = {name: tensor.clone() for name, tensor in tensors_of(network).items()}
    least = float("inf")
    loop.trainee.train()
    for step in range(_WARM_UP + _TIMED):
        start = time.perf_counter()
        losses, _ = loop.forward(inputs, labels)
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        if loop.device.type == "cuda":
            torch.cuda.synchronize(loop.device)
        if step >= _WARM_UP:
            least = min(least, time.perf_counter() - start)
    network.zero_grad(set_to_none=True)
    take(network, before)
    return least
