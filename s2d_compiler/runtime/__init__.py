"""Running staged networks: measures, policies, and predictions that leave early."""

from s2d_compiler.runtime.measures import MEASURES, measure_values
from s2d_compiler.runtime.policies import Deadline, MacsBudget, Policy, Thresholds
from s2d_compiler.runtime.predictions import Predictions
from s2d_compiler.runtime.recording import record_timings
from s2d_compiler.runtime.settings import RunSettings
from s2d_compiler.runtime.timings import StageTimings, Timings

__all__ = [
    "MEASURES",
    "Deadline",
    "MacsBudget",
    "Policy",
    "Predictions",
    "RunSettings",
    "StageTimings",
    "Thresholds",
    "Timings",
    "measure_values",
    "record_timings",
]
