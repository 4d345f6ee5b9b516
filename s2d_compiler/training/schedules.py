"""The learning rate of a step."""

from __future__ import annotations

import math

from s2d_compiler.training.recipe import Recipe

__all__ = ["learning_rate"]

#: How far below its largest rate one-cycle begins, and ends below that.
_START, _END = 1 / 25, 1e-4 / 25


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of one step: it depends on nothing else, so that there is no state to lose.

    Args:
        recipe: The schedule.
        step: Which step, from 0.
        steps: How many there are altogether.

    Source: of one-cycle, Smith and Topin, "Super-convergence" (2019), with torch's
        ``OneCycleLR``'s numbers; of the rest, S2DNAS, section 4.1.
    """
    if recipe.schedule == "one-cycle":
        return recipe.lr * _one_cycle(step, steps, recipe.peak)
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "step":
        passed = sum(step >= share * steps for share in recipe.milestones)
        return recipe.lr * recipe.factor**passed
    if recipe.schedule == "cosine":
        share = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
        return recipe.lr * _between(1.0, 0.0, share)
    return recipe.lr


def _one_cycle(step: int, steps: int, peak: float) -> float:
    top = max(1.0, peak * steps - 1)
    if step <= top:
        return _between(_START, 1.0, step / top)
    return _between(1.0, _END, (step - top) / max(1.0, steps - 1 - top))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, share)))
