"""Recipes, learning rates, losses, crops and flips, each against its definition."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from s2d_compiler import Recipe
from s2d_compiler.training.augmentation import augment, draws_of
from s2d_compiler.training.losses import JointLoss, two_sided
from s2d_compiler.training.schedules import learning_rate
from s2d_compiler.training.watching import STEPS, Watch

# -- recipes -----------------------------------------------------------------------------------


def test_a_recipe_survives_json() -> None:
    recipe = Recipe(milestones=(0.1, 0.9), stage_weights=(1, 2), distill=0.25, clip_norm=1)
    read = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert read == recipe
    assert Recipe.from_dict(Recipe(stage_weights="adaptive").to_dict()).stage_weights == "adaptive"


@pytest.mark.parametrize(
    ("name", "batch_size", "epochs", "weight_decay"),
    [
        ("s2dnas-resnet", 128, 200, 1e-4),
        ("s2dnas-vgg", 64, 200, 5e-4),
        ("s2dnas-mobilenet", 128, 300, 1e-4),
        ("s2dnas-densenet", 64, 300, 1e-4),
    ],
)
def test_the_presets_are_table_3(
    name: str, batch_size: int, epochs: int, weight_decay: float
) -> None:
    found = Recipe.preset(name)
    assert (found.batch_size, found.epochs, found.weight_decay) == (
        batch_size, epochs, weight_decay,
    )  # fmt: skip
    assert (found.optimizer, found.momentum, found.nesterov, found.lr) == ("sgd", 0.9, False, 0.1)
    assert (found.schedule, found.milestones, found.factor) == ("step", (0.5, 0.75), 0.1)
    assert (found.warmup_steps, found.crop_padding, found.flip) == (100, 4, True)
    assert (found.stage_weights, found.decay_norms) == ((), True)
    assert Recipe.preset(name, epochs=3).epochs == 3


def test_fine_tuning_begins_and_ends_gently() -> None:
    """Trained weights would not survive the rate that S2DNAS begins with."""
    found = Recipe.preset("fine-tune", batch_size=32)
    assert (found.optimizer, found.schedule, found.batch_size) == ("adamw", "one-cycle", 32)
    first, *_, last = [learning_rate(found, step, 100) for step in range(100)]
    assert last < first < 1e-4


# -- learning rates ----------------------------------------------------------------------------


def rates(steps: int, **given: Any) -> list[float]:
    return [learning_rate(Recipe(lr=1.0, **given), step, steps) for step in range(steps)]


def test_step_falls_at_its_milestones_after_warming_up() -> None:
    found = rates(20, schedule="step", milestones=(0.5, 0.75), factor=0.1, warmup_steps=4)
    expected = [0.25, 0.5, 0.75, 1.0, *[1.0] * 6, *[0.1] * 5, *[0.01] * 5]
    assert found == pytest.approx(expected)


def test_cosine_begins_where_the_warm_up_ends_and_goes_to_zero() -> None:
    found = rates(12, schedule="cosine", warmup_steps=2)
    assert found[:2] == [0.5, 1.0]
    assert found[2:] == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])


@pytest.mark.parametrize("steps", [10, 57, 400])
@pytest.mark.parametrize("peak", [0.2, 0.3, 0.5])
def test_one_cycle_is_torchs(steps: int, peak: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=peak, cycle_momentum=False
    )
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step() if len(expected) < steps else None
    assert rates(steps, schedule="one-cycle", peak=peak) == pytest.approx(expected, abs=1e-12)


def test_constant_only_warms_up() -> None:
    assert rates(4, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


# -- losses ------------------------------------------------------------------------------------


def logits(stages: int = 3, samples: int = 5, classes: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(samples, classes, generator=generator, dtype=torch.float64)
        for _ in range(stages)
    ]


LABELS = torch.tensor([0, 1, 2, 3, 1])


def test_stages_lose_cross_entropy_with_the_labels() -> None:
    outputs = logits()
    loss = JointLoss.of(Recipe(label_smoothing=0.1), (1.0,) * 3, 0.0)
    found = loss.of_stages(outputs, LABELS, None)
    expected = [F.cross_entropy(output, LABELS, label_smoothing=0.1) for output in outputs]
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-14)


def test_distillation_is_the_divergence_at_a_temperature() -> None:
    outputs, teacher = logits(), logits(1)[0].flip(0)
    recipe = Recipe(temperature=4.0)
    (found, *_) = JointLoss.of(recipe, (1.0,) * 3, 0.3).of_stages(outputs, LABELS, teacher)
    p = (teacher / 4).softmax(1)
    q = (outputs[0] / 4).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.7 * F.cross_entropy(outputs[0], LABELS) + 0.3 * 16 * divergence
    assert found == pytest.approx(expected.item(), rel=1e-12)
    alone = JointLoss.of(recipe, (1.0,) * 3, 1.0).of_stages(outputs, None, teacher)[0]
    assert alone == pytest.approx(16 * divergence.item(), rel=1e-12)


def test_adaptive_weights_make_all_terms_the_last_one() -> None:
    """DDI: w_i = C_o / C_i."""
    weights = JointLoss.of(Recipe(), None, 0.0).weights_for([4.0, 0.5, 1.0])
    assert weights == (0.25, 2.0, 1.0)
    assert JointLoss.of(Recipe(), None, 0.0).weights_for([0.0, 1.0])[1] == 1.0
    assert JointLoss.of(Recipe(), (3.0, 1.0), 0.0).weights_for([4.0, 0.5]) == (3.0, 1.0)


def test_a_single_logit_is_two_classes() -> None:
    single = torch.tensor([[0.3], [-2.0]])
    labels = torch.tensor([1, 0])
    expected = F.binary_cross_entropy_with_logits(single[:, 0], labels.float())
    assert F.cross_entropy(two_sided(single), labels) == pytest.approx(expected.item())


def test_half_precision_logits_lose_in_single() -> None:
    loss = JointLoss.of(Recipe(), (1.0,), 0.0)
    (found,) = loss.of_stages([logits(1)[0].bfloat16()], LABELS, None)
    assert found.dtype == torch.float32


# -- divergence --------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_has_gone_astray() -> None:
    watch = Watch(guessing=1.0)
    assert watch.see(5.0) is None
    assert "inf" in (watch.see(math.inf) or "")


def test_a_loss_that_rises_and_stays_has_gone_astray() -> None:
    watch = Watch(guessing=1.0)
    for loss in (0.5, 50.0, *[0.5] * 20):  # one bad step is none
        assert watch.see(loss) is None
    steps = next(step for step in range(10 * STEPS) if watch.see(10.0))
    assert 0 < steps < STEPS


def test_a_loss_that_begins_high_may_stay_there() -> None:
    watch = Watch(guessing=1.0)
    assert all(watch.see(20.0) is None for _ in range(10 * STEPS))


# -- crops and flips ---------------------------------------------------------------------------


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    first, again = draws_of(1, 2, 50), draws_of(1, 2, 50)
    assert torch.equal(first.order, again.order)
    assert torch.equal(first.numbers, again.numbers)
    assert sorted(first.order.tolist()) == list(range(50))
    for other in (draws_of(2, 2, 50), draws_of(1, 3, 50)):
        assert not torch.equal(first.order, other.order)
        assert not torch.equal(first.numbers, other.numbers)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_and_flips_one_by_one(dtype: torch.dtype, padding: int, flip: bool) -> None:
    images = torch.randint(1, 255, (40, 3, 5, 7)).to(dtype)
    numbers = draws_of(0, 0, 40).numbers
    found = augment(images, numbers, padding, flip)
    assert found.dtype == dtype
    seen = set()
    for image, (row, column, side), result in zip(images, numbers.tolist(), found, strict=True):
        top, left = int(row * (2 * padding + 1)), int(column * (2 * padding + 1))
        seen.add((top, left, side < 0.5))
        whole = F.pad(image, (padding,) * 4)
        expected = whole[:, top : top + 5, left : left + 7]
        if flip and side < 0.5:
            expected = expected.flip(-1)
        assert torch.equal(result, expected)
    assert len(seen) > (10 if padding else 1)


def test_every_setting_is_validated() -> None:
    """No field takes what is none of its values."""
    for field in fields(Recipe):
        with pytest.raises(Exception, match=f"recipe: {field.name} is"):
            Recipe(**{field.name: object()})
