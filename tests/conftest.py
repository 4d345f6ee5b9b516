"""Settings of every test run."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# Tests are small and may run in several processes: more threads only wait for each other.
torch.set_num_threads(1)

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
# The same examples every time, unless HYPOTHESIS_PROFILE=fuzz (give --hypothesis-seed to repeat).
settings.register_profile("default", derandomize=True, **_COMMON)  # type: ignore[arg-type]
settings.register_profile("fuzz", max_examples=1000, **_COMMON)  # type: ignore[arg-type]
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
