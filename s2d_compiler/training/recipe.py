"""Recipe: how a network is trained, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from s2d_compiler.errors import UsageError
from s2d_compiler.fields import shown

__all__ = ["PRESETS", "Recipe"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine", "one-cycle", "constant"),
    "precision": ("float32", "bfloat16", "float16"),
    "form": ("auto", "staged", "masked"),
    "memory_format": ("contiguous", "channels_last"),
    "keep": ("last", "best"),
}
#: Least, whether it may be that itself, and most.
_NUMBERS: dict[str, tuple[float, bool, float]] = {
    "lr": (0, False, 1e6),
    "momentum": (0, True, 0.9999999),
    "weight_decay": (0, True, 1e6),
    "factor": (0, False, 1),
    "peak": (0, False, 0.9999999),
    "temperature": (0, False, 1e6),
    "label_smoothing": (0, True, 0.9999999),
}
_COUNTS: dict[str, tuple[int, int]] = {
    "epochs": (1, 10**6),
    "batch_size": (1, 10**6),
    "warmup_steps": (0, 10**9),
    "crop_padding": (0, 4096),
    "seed": (0, 2**62 - 1),
}
_FLAGS = ("nesterov", "labels", "flip", "decay_norms", "train_original")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained; the defaults are for networks that begin with trained weights.

    Args:
        epochs: Passes over the data. Each takes whole batches only: what is left over is another
            part of the data every time.
        batch_size: Images at a time, in each process.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: The largest learning rate.
        momentum: SGD's; AdamW keeps its own (0.9, 0.999).
        nesterov: Nesterov's form of it.
        weight_decay: Weight decay.
        decay_norms: Whether biases and the weights of norms decay, too.
        schedule: ``"step"``: times ``factor`` at each milestone; ``"cosine"``: down to 0;
            ``"one-cycle"``: up from a 25th until ``peak``, then down to a 250,000th, both along a
            cosine; ``"constant"``.
        milestones: Shares of all steps after which the rate falls, such as 0.5, 0.75.
        factor: What it is multiplied with there.
        peak: The share of all steps after which one-cycle has its largest rate.
        warmup_steps: Steps over which the rate first rises from 0 along a line.
        stage_weights: What the loss of each stage is multiplied with (alpha of S2DNAS, equation
            3), 1 for all where empty; or ``"adaptive"``, DDI's C_o / C_i for each batch, 1000
            at most.
        distill: The share of distillation in each stage's loss, the rest being cross entropy with
            the labels. None: 0 without a teacher, 1 without labels, 0.5 with both.
        temperature: What logits are divided by for distillation; the loss is multiplied with its
            square.
        labels: Whether labels are used at all.
        label_smoothing: The share of each label that is spread over all classes.
        precision: What forward passes compute in, by autocast; weights and losses are float32.
        clip_norm: The largest norm of all gradients together; None for any.
        crop_padding: Zeros around images, out of which one of the images' size is cut at random.
        flip: Whether every second image, at random, is mirrored.
        seed: Of the order of the images, crops, flips and dropout.
        form: ``"staged"``, ``"masked"`` (one dense pass), or ``"auto"``, the faster one.
        memory_format: ``"channels_last"`` or ``"contiguous"``.
        train_original: Whether the last stage of a plan with ``"final": "original"`` is trained,
            too; it is frozen otherwise.
        keep: The weights at the end: of the ``"last"`` epoch, or of the ``"best"`` one by the mean
            accuracy of the trained stages on the validation data, which then must be given.

    Raises:
        UsageError: A setting is none.

    Source: S2DNAS (ICCV 2019 workshop), sections 3.3 and 4.1, and table 3, for the presets of
        that name.
    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 2e-3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norms: bool = True
    schedule: str = "one-cycle"
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    peak: float = 0.3
    warmup_steps: int = 0
    stage_weights: tuple[float, ...] | str = ()
    distill: float | None = None
    temperature: float = 1.0
    labels: bool = True
    label_smoothing: float = 0.0
    precision: str = "float32"
    clip_norm: float | None = None
    crop_padding: int = 0
    flip: bool = False
    seed: int = 0
    form: str = "auto"
    memory_format: str = "channels_last"
    train_original: bool = False
    keep: str = "last"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices or type(getattr(self, name)) is not str:
                _refuse(name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                _refuse(name, getattr(self, name), "True or False")
        for name, (low, high) in _COUNTS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                _refuse(name, value, f"a whole number from {low} to {high}")
        for name, (least, included, most) in _NUMBERS.items():
            value = _number(getattr(self, name))
            if value is None or not least <= value <= most or (value == least and not included):
                start = "from" if included else "above"
                _refuse(name, getattr(self, name), f"a number {start} {least} to {most:g}")
            object.__setattr__(self, name, value)
        self._check_optional()
        self._check_lists()
        self._check_together()

    def _check_optional(self) -> None:
        for name, rule, low, high in (
            ("distill", "a share from 0 to 1, or None", 0.0, 1.0),
            ("clip_norm", "a number from 1e-12 to 1e12, or None", 1e-12, 1e12),
        ):
            given = getattr(self, name)
            if given is None:
                continue
            value = _number(given)
            if value is None or not low <= value <= high:
                _refuse(name, given, rule)
            object.__setattr__(self, name, value)

    def _check_lists(self) -> None:
        rule = "shares of all steps between 0 and 1, each above the one before"
        values = _numbers("milestones", self.milestones, rule)
        if any(not 0 < v < 1 for v in values) or list(values) != sorted(set(values)):
            _refuse("milestones", list(self.milestones), rule)
        object.__setattr__(self, "milestones", values)
        if self.stage_weights == "adaptive":
            return
        rule = 'numbers from 0, one per stage and one above 0, or "adaptive"'
        values = _numbers("stage_weights", self.stage_weights, rule)
        if any(not 0 <= v < 1e6 for v in values) or (values and not any(values)):
            _refuse("stage_weights", list(values), rule)
        object.__setattr__(self, "stage_weights", values)

    def _check_together(self) -> None:
        if self.schedule == "one-cycle" and self.warmup_steps:
            _refuse("warmup_steps", self.warmup_steps, "0, as one-cycle rises by itself")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            _refuse("nesterov", True, "False, as it is a form of SGD with momentum")
        if not self.labels and self.distill not in (None, 1.0):
            _refuse("distill", self.distill, "1 or None, as there is nothing else without labels")
        if not self.labels and self.label_smoothing:
            _refuse("label_smoothing", self.label_smoothing, "0, as no labels are used")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """A recipe with a name, but for what is changed.

        Args:
            name: One of ``PRESETS``.
            changes: Fields with other values.

        Raises:
            UsageError: There is no such preset or field.
        """
        if name not in PRESETS:
            raise UsageError(f"preset: {shown(name)} is none of {', '.join(PRESETS)}; give one")
        return PRESETS[name].changed(**changes)

    def changed(self, **changes: Any) -> Recipe:
        """The same recipe with other values in some fields.

        Raises:
            UsageError: There is no such field, or it cannot have such a value.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise UsageError(
                    f"recipe: {shown(name)} is no setting; there are {', '.join(names)}"
                )
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, such as JSON holds."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """From what ``to_dict`` returned.

        Raises:
            UsageError: It is something else.
        """
        if not isinstance(data, Mapping):
            raise UsageError(
                f"recipe: {shown(data)} stands where settings by name belong; give a dict"
            )
        return cls().changed(**data)


def _refuse(name: str, value: Any, rule: str) -> None:
    text = shown(value)
    if isinstance(value, list | tuple) and len(value) <= 8:
        text = f"[{', '.join(shown(item) for item in value)}]"
    raise UsageError(f"recipe: {name} is {text}, not {rule}; correct this setting")


def _number(value: Any) -> float | None:
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(name: str, values: Any, rule: str) -> tuple[float, ...]:
    found = [_number(v) for v in values] if type(values) in (list, tuple) else [None]
    if None in found:
        _refuse(name, values, rule)
    return tuple(v for v in found if v is not None)


_S2DNAS = Recipe(
    epochs=200,
    optimizer="sgd",
    lr=0.1,
    schedule="step",
    warmup_steps=100,
    crop_padding=4,
    flip=True,
)

#: For weights that are trained already; and S2DNAS, section 4.1 and table 3, which trains anew.
PRESETS = {
    "fine-tune": Recipe(),
    "s2dnas-resnet": _S2DNAS,
    "s2dnas-vgg": replace(_S2DNAS, batch_size=64, weight_decay=5e-4),
    "s2dnas-mobilenet": replace(_S2DNAS, epochs=300),
    "s2dnas-densenet": replace(_S2DNAS, batch_size=64, epochs=300),
}
