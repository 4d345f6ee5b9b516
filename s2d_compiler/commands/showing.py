"""``s2d show``: what a compiled network holds and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from s2d_compiler.commands.options import REPORTING, Reporting, Result, document_of
from s2d_compiler.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from s2d_compiler.analysis.cost import Cost
    from s2d_compiler.runtime.settings import RunSettings


def show(
    dyn: Path,
    /,
    *,
    layers: bool = False,
    graph: Annotated[int | None, Parameter(show_default=False)] = None,
    report: bool = False,
    reporting: Reporting = REPORTING,
) -> Result:
    """Show a compiled network: cost per stage, plan, stored policy and origin.

    Args:
        dyn: The compiled network, dyn.pt.
        layers: List every layer of every stage with its cost.
        graph: Print the graph of this stage, counted from 1.
        report: Print what was cut, left whole, coupled and unknown, and why.
    """
    from s2d_compiler.format import load_to_show

    staged = load_to_show(dyn)
    count = len(staged.stages)
    if graph is not None and not 1 <= graph <= count:
        raise UsageError(f"--graph: {graph} is no stage; {dyn} has stages 1 to {count}, give one")
    document = document_of(staged)
    text: list[RenderableType] = [staged.cost.table(), f"plan: {staged.plan}"]
    document["settings"] = staged.settings.to_dict()
    text.append("\n".join(_settings_lines(staged.settings)))
    text.append("\n".join(_made_by_lines(staged.parts.made_by)))
    if layers:
        text.append(_layer_table(staged.cost))
    if report:
        text.append(str(staged.report))
    if graph is not None:
        code = str(staged.stages[graph - 1].graph).strip()
        document["graph"] = code
        text.append(code)
    return Result(document, text)


def _settings_lines(settings: RunSettings) -> Iterator[str]:
    """What is stored for running it."""
    from s2d_compiler.evaluation.drawing import policy_text

    if settings.policy is None:
        yield "policy: none stored; s2d calibrate finds one"
    else:
        yield f"policy: {policy_text(settings.policy)}"
    if settings.calibration is not None:
        found = settings.calibration
        promise = found.get("confidence")
        kept = "fitted, not promised" if promise is None else f"promised with {promise}"
        yield f"calibrated: {found.get('target')}; {kept}; {found.get('samples')} samples"
    if settings.preprocessing is not None:
        steps = settings.preprocessing.to_dict().items()
        yield f"preprocessing: {', '.join(f'{k} {v}' for k, v in steps if v is not None)}"
    if settings.timings is not None:
        yield f"times recorded at batch sizes {', '.join(map(str, settings.timings.batch_sizes))}"


def _made_by_lines(made_by: Mapping[str, Any]) -> Iterator[str]:
    yield "made by:"
    for key, value in made_by.items():
        shown = value
        if isinstance(value, Mapping):
            shown = ", ".join(f"{name} {item}" for name, item in value.items())
        yield f"  {key}: {shown}"


def _layer_table(cost: Cost) -> Table:
    from rich.table import Table

    table = Table()
    for title in ("stage", "layer", "operator"):
        table.add_column(title, overflow="fold")
    for title in ("MACs", "parameters"):
        table.add_column(title, justify="right", overflow="fold")
    for number, stage in enumerate(cost.stages, start=1):
        for row in stage.layers:
            counts = (f"{row.macs:,}", f"{row.parameters:,}")
            table.add_row(str(number), row.name, row.operator, *counts)
        table.add_section()
    return table
