"""How long each stage takes, as recorded on one machine."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from s2d_compiler.errors import PolicyError
from s2d_compiler.fields import Fields, damaged, shown


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Milliseconds that one stage took, per recorded batch size."""

    p50: tuple[float, ...]
    p95: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds per stage and batch size.

    Attributes:
        batch_sizes: The recorded sizes, ascending.
        stages: Per stage.
        machine: Where and how they were recorded: ``device`` (``"cpu"``, ``"cuda"``), processor,
            threads, backend, versions.
    """

    batch_sizes: tuple[int, ...]
    stages: tuple[StageTimings, ...]
    machine: Mapping[str, Any]

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise PolicyError(
                f"timings: batch sizes {list(sizes)} are not ascending from 1; record each size "
                "once."
            )
        for number, stage in enumerate(self.stages, start=1):
            for times in (stage.p50, stage.p95):
                if len(times) != len(sizes) or not all(0 <= t < math.inf for t in times):
                    raise PolicyError(
                        f"timings: stage {number} has {list(times)[:8]} for batch sizes "
                        f"{list(sizes)[:8]}; record one time in milliseconds for each."
                    )

    def p95(self, stage: int, batch: int) -> float:
        """Milliseconds that a stage (an index) takes at most in 95% of its runs.

        Between recorded sizes, that of the next larger one; beyond the largest, as many runs of
        it as are needed.
        """
        times = self.stages[stage].p95
        place = bisect.bisect_left(self.batch_sizes, batch)
        if place < len(times):
            return times[place]
        return times[-1] * math.ceil(batch / self.batch_sizes[-1])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and ``dyn.pt``."""
        return {
            "batch_sizes": list(self.batch_sizes),
            "stages": [{"p50": list(s.p50), "p95": list(s.p95)} for s in self.stages],
            "machine": dict(self.machine),
        }

    @classmethod
    def from_dict(cls, data: Fields) -> Timings:
        """Read what ``to_dict`` wrote.

        Raises:
            FormatError: It holds no times.
        """
        stages = tuple(
            StageTimings(_times(row, "p50"), _times(row, "p95")) for row in data.rows("stages")
        )
        try:
            return cls(data.numbers("batch_sizes"), stages, dict(data.named("machine")))
        except PolicyError as error:
            damaged(data.place, str(error).rstrip("."))


def _times(row: Fields, key: str) -> tuple[float, ...]:
    for value in row.items(key):
        if type(value) not in (int, float):
            damaged(row.at(key), f"{shown(value)} is no time")
    return tuple(float(value) for value in row.items(key))
