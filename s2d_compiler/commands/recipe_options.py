"""A recipe on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from s2d_compiler.errors import UsageError

if TYPE_CHECKING:
    from s2d_compiler.training import Recipe

__all__ = ["RECIPE", "RecipeOptions"]

_Hidden = Parameter(show_default=False)


def _either(name: str) -> Parameter:
    return Parameter(name=f"--{name}", negative=f"--no-{name}", show_default=False)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """How the network is trained. What is not given is as in the preset, or as shown.

    Args:
        preset: A recipe to begin with: fine-tune, for networks compiled from trained weights, which
            is what is shown; or a paper's, from scratch: s2dnas-resnet, s2dnas-vgg,
            s2dnas-mobilenet, s2dnas-densenet.
        epochs: Passes over the data (30).
        optimizer: sgd or adamw (adamw).
        lr: The largest learning rate (0.002).
        momentum: SGD's (0.9).
        nesterov: Nesterov's form of it, or not (not).
        weight_decay: Weight decay (0.0001).
        decay_norms: Whether biases and norms decay, too (they do).
        schedule: step, cosine, one-cycle or constant (one-cycle).
        milestones: Shares of all steps after which step lowers the rate (0.5,0.75).
        factor: What the rate is multiplied with there (0.1).
        peak: Share of all steps after which one-cycle is at its largest rate (0.3).
        warmup_steps: Steps over which the rate rises first (0).
        stage_weights: What each trained stage's loss is multiplied with, such as 1,1,2; or
            adaptive, as in DDI (1 for all).
        distill: Share of distillation in the loss; the rest is cross entropy with the labels (0.5
            with a teacher, 1 without labels).
        temperature: Of distillation (1).
        labels: Whether labels are used (they are); without them, a .npz file needs none.
        label_smoothing: Share of each label that is spread over all classes (0).
        precision: float32, bfloat16, or float16 on a GPU, by autocast (float32).
        clip_norm: Clip the norm of all gradients to this (not).
        crop_padding: Crop at random out of each image with so many zeros around it (0).
        flip: Whether half of the images are mirrored (not).
        seed: Seed of everything random (0).
        form: What is trained: staged; masked, one dense pass (needs --original); or auto, the
            faster of what there is (auto).
        memory_format: channels_last or contiguous (channels_last).
        train_original: Whether a last stage that is the original is trained, too (not).
        keep: last, or best: the weights of the epoch with the best validation accuracy (last).
    """

    preset: Annotated[str | None, _Hidden] = None
    epochs: Annotated[int | None, _Hidden] = None
    optimizer: Annotated[str | None, _Hidden] = None
    lr: Annotated[float | None, _Hidden] = None
    momentum: Annotated[float | None, _Hidden] = None
    nesterov: Annotated[bool | None, _either("nesterov")] = None
    weight_decay: Annotated[float | None, _Hidden] = None
    decay_norms: Annotated[bool | None, _either("decay-norms")] = None
    schedule: Annotated[str | None, _Hidden] = None
    milestones: Annotated[str | None, _Hidden] = None
    factor: Annotated[float | None, _Hidden] = None
    peak: Annotated[float | None, _Hidden] = None
    warmup_steps: Annotated[int | None, _Hidden] = None
    stage_weights: Annotated[str | None, _Hidden] = None
    distill: Annotated[float | None, _Hidden] = None
    temperature: Annotated[float | None, _Hidden] = None
    labels: Annotated[bool | None, _either("labels")] = None
    label_smoothing: Annotated[float | None, _Hidden] = None
    precision: Annotated[str | None, _Hidden] = None
    clip_norm: Annotated[float | None, _Hidden] = None
    crop_padding: Annotated[int | None, _Hidden] = None
    flip: Annotated[bool | None, _either("flip")] = None
    seed: Annotated[int | None, _Hidden] = None
    form: Annotated[str | None, _Hidden] = None
    memory_format: Annotated[str | None, _Hidden] = None
    train_original: Annotated[bool | None, _either("train-original")] = None
    keep: Annotated[str | None, _Hidden] = None

    def recipe(self, batch_size: int | None) -> Recipe:
        """The recipe: the preset, but for what is given.

        Raises:
            UsageError: There is no such preset, or a setting is none.
        """
        from s2d_compiler.training import Recipe

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given |= {"batch_size": batch_size}
        changes = {name: value for name, value in given.items() if value is not None}
        preset = changes.pop("preset", None)
        if "milestones" in changes:
            changes["milestones"] = _numbers("--milestones", changes["milestones"])
        if changes.get("stage_weights", "adaptive") != "adaptive":
            changes["stage_weights"] = _numbers("--stage-weights", changes["stage_weights"])
        return Recipe.preset(preset or "fine-tune").changed(**changes)


RECIPE = RecipeOptions()


def _numbers(option: str, text: str) -> Any:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(
            f"{option}: {json.dumps(text)[:60]} is no list of numbers; write numbers with commas "
            "between them, such as 0.5,0.75"
        ) from None
