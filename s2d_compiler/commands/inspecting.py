"""``s2d inspect``: what a plan may choose for a network, and a plan to start from."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from s2d_compiler.commands.options import (
    REPORTING,
    SOURCE,
    ModelSource,
    Reporting,
    Result,
    capture_for,
    require_other_file,
)
from s2d_compiler.errors import OutputError
from s2d_compiler.output import check_writable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from s2d_compiler.analysis.exit_places import Depth


def inspect(
    model: Path,
    /,
    *,
    source: ModelSource = SOURCE,
    stages: int = 3,
    groups: int = 8,
    write_plan: Annotated[Path | None, Parameter(show_default=False)] = None,
    force: bool = False,
    layers: bool = False,
    places: bool = False,
    reporting: Reporting = REPORTING,
) -> Result:
    """Show what a plan may choose for a network, and write a plan to start from.

    Args:
        model: The trained network: a file of torch.save, or .safetensors.
        stages: How many stages the plans are to have.
        groups: In how many groups channels are counted.
        write_plan: Write a plan to edit to this file.
        force: Replace the plan's file if there is one.
        layers: List every layer.
        places: List the places for exits along depth ("exits" in a plan).
    """
    from s2d_compiler.analysis.exit_places import Depth
    from s2d_compiler.inspecting import inspect_model
    from s2d_compiler.plan_rules import check_counts

    shape = source.shape
    check_counts(stages, groups, "--")
    if write_plan is not None:
        if os.path.lexists(write_plan) and not force:
            raise OutputError(
                f"{write_plan} exists and may hold your edits; name another file, or pass --force "
                "to replace it"
            )
        require_other_file(write_plan, {"the model": model})
        check_writable(write_plan)
    program = capture_for(source.read(model), shape)
    space = inspect_model(program, stages=stages, groups=groups)
    text: list[RenderableType] = [space.layer_table()] if layers else []
    text += [space.table(), space.remarks()]
    document = space.to_dict()
    if places:
        found = Depth(program)
        text.append(_place_table(found))
        document["places"] = [asdict(place) for place in found.cuts]
    if write_plan is not None:
        space.starter_plan().save(write_plan)
        text.append(
            f"\nwritten: {write_plan}\nNext: edit it, then s2d-compile {shlex.quote(str(model))} "
            f"{source.as_options()}--splits {shlex.quote(str(write_plan))} -o dyn.pt"
        )
    written = None if write_plan is None else str(write_plan)
    return Result({**document, "written": written}, text)


def _place_table(depth: Depth) -> Table:
    from rich.table import Table

    table = Table(caption="an exit by fraction goes to the nearest; module paths go anywhere")
    for title in ("depth", "module", "operator"):
        table.add_column(title, overflow="fold")
    for title in ("channels", "resolution", "MACs"):
        table.add_column(title, justify="right", overflow="fold")
    for place in depth.cuts:
        share = f"{place.macs / depth.total:.3f}"
        row = (share, place.path, place.operator, str(place.channels), place.resolution)
        table.add_row(*row, f"{place.macs:,}")
    return table
