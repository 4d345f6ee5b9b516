"""``s2d report``: one page about a staged network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from s2d_compiler.commands.data_options import DATA, DataSource, read_device
from s2d_compiler.commands.options import (
    REPORTING,
    SOURCE,
    ModelSource,
    Reporting,
    Result,
    require_other_file,
)
from s2d_compiler.commands.policy_options import read_policy
from s2d_compiler.commands.progress import progress
from s2d_compiler.errors import UsageError


def report_network(
    dyn: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    data: DataSource = DATA,
    no_labels: bool = False,
    policy: str = "stored",
    static: Annotated[Path | None, Parameter(show_default=False)] = None,
    source: ModelSource = SOURCE,
    device: str = "cpu",
    reporting: Reporting = REPORTING,
) -> Result:
    """Write a page about a compiled network: stages, cost, exits, accuracy, confidences, images.

    One HTML file that loads nothing from anywhere.

    Args:
        dyn: The compiled network, dyn.pt.
        output: The file to write, such as report.html; an existing one is replaced.
        no_labels: Leave out what takes labels; a .npz file then needs none.
        policy: When samples leave: stored (with the network; where none is, a threshold is tried),
            thresholds such as 0.9,0.8 or entropy:0.2,0.4 (never: nobody leaves), macs:N,
            batch-macs:N or ms:N.
        static: The original network, to compare with; --arch and its like are about it.
        device: Where to run, such as cpu or cuda.
    """
    from s2d_compiler.format import load
    from s2d_compiler.output import check_writable
    from s2d_compiler.plots import check_matplotlib
    from s2d_compiler.reporting import write_report

    check_matplotlib("report")
    if policy == "none":
        raise UsageError(
            "--policy: none lets nobody leave, and a report is about who leaves where; write "
            "thresholds, such as 0.9,0.8, or leave the option out"
        )
    inputs = {"the compiled network": dyn, "the original": static, "the data": data.data}
    require_other_file(output, {name: Path(p) for name, p in inputs.items() if p is not None})
    check_writable(output)
    network = load(dyn, read_device(device)).eval()
    source.require_shape_of(dyn, network.parts.input_shapes)
    chosen = read_policy(policy, network.settings.policy)
    samples = data.samples(network, labels=not no_labels)
    original = None if static is None else source.read(static).to(device)

    def shown(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        return progress(items, total, what, reporting)

    found = write_report(
        network, samples.data, output, policy=chosen, preprocessing=samples.preprocessing,
        original=original, file=dyn, batch_size=samples.batch_size, labelled=not no_labels,
        progress=shown,
    )  # fmt: skip
    document = {"output": str(output), "data": samples.data.name, **found.to_dict()}
    return Result(document, [f"written: {output}"])
