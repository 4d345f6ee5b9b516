"""Calibration: thresholds for early exits from what the exits say of labelled samples.

- ``recording``, ``records``: confidence and correctness of every exit for every sample, once.
- ``temperature``: one temperature per exit.
- ``targets``: what thresholds are to achieve.
- ``instances``, ``lattice``, ``search``, ``solver``: the thresholds that achieve it best.
- ``binomial``, ``bounds``, ``promises``: thresholds that keep a target on new samples, with a
  promised probability.
- ``results``, ``calibrating``: what was found, and the whole of it.
"""

from s2d_compiler.calibration.calibrating import calibrate
from s2d_compiler.calibration.recording import record
from s2d_compiler.calibration.records import Records
from s2d_compiler.calibration.results import Calibration
from s2d_compiler.calibration.targets import (
    Enas4dMetric,
    MaxDrop,
    MeanBudget,
    Reward,
    Target,
    parse_target,
)

__all__ = [
    "Calibration",
    "Enas4dMetric",
    "MaxDrop",
    "MeanBudget",
    "Records",
    "Reward",
    "Target",
    "calibrate",
    "parse_target",
    "record",
]
