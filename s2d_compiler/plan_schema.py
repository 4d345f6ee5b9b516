"""The JSON Schemas of plans, which editors complete and check plans with.

``python -m s2d_compiler.plan_schema`` prints where their files are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: The schema's file, of draft 2020-12.
PATH = Path(__file__).with_name("plan.schema.json")
#: That of plans of exits along depth.
DEPTH_PATH = Path(__file__).with_name("depth-plan.schema.json")


def plan_schema() -> dict[str, Any]:
    """The schema; its description lists what only ``Plan`` itself checks."""
    schema: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return schema


def depth_plan_schema() -> dict[str, Any]:
    """The schema of plans of exits along depth; likewise."""
    schema: dict[str, Any] = json.loads(DEPTH_PATH.read_text(encoding="utf-8"))
    return schema


if __name__ == "__main__":
    print(PATH, DEPTH_PATH, sep="\n")
