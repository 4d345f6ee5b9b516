"""Training: all stages together, by a recipe, with checkpoints.

- ``recipe``: ``Recipe``, how a network is trained, and presets.
- ``fitting``: ``fit``: checks that network, data and recipe fit, and starts the loop.
- ``loop``: steps, epochs, and when to stop; ``history``: what they were like.
- ``losses``, ``schedules``, ``augmentation``: the loss of all stages, learning rates, crops.
- ``feeding``: batches; ``trainees``: networks with the logits of each stage.
- ``checkpoints``: everything that a training is, in one file.
"""

from s2d_compiler.training.fitting import fit
from s2d_compiler.training.history import EpochResult, History, Progress
from s2d_compiler.training.recipe import PRESETS, Recipe

__all__ = ["PRESETS", "EpochResult", "History", "Progress", "Recipe", "fit"]
