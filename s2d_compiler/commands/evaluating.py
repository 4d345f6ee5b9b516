"""``s2d eval``: exits and accuracy of a staged network on labelled images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from s2d_compiler.commands.data_options import (
    DATA,
    DataSource,
    Samples,
    read_device,
    recorded_part,
)
from s2d_compiler.commands.options import REPORTING, SOURCE, ModelSource, Reporting, Result
from s2d_compiler.commands.policy_options import read_policy
from s2d_compiler.commands.progress import progress
from s2d_compiler.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from torch import Tensor

    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.evaluation import Evaluation
    from s2d_compiler.runtime.policies import Policy

log = logging.getLogger(__name__)


def evaluate_network(
    dyn: Path,
    /,
    *,
    data: DataSource = DATA,
    records: Annotated[Path | None, Parameter(show_default=False)] = None,
    policy: str = "stored",
    plot: Annotated[Path | None, Parameter(show_default=False)] = None,
    static: Annotated[Path | None, Parameter(show_default=False)] = None,
    source: ModelSource = SOURCE,
    device: str = "cpu",
    reporting: Reporting = REPORTING,
) -> Result:
    """Measure which exits samples take, how accurate each is, and what they cost.

    Args:
        dyn: The compiled network, dyn.pt.
        records: What every exit said of labelled images, as s2d calibrate --records keeps it, in
            place of images; the network does not run. Choose thresholds by one part of it and
            evaluate them on another (--split '[2500:]').
        policy: When samples leave: stored (with the network), none, thresholds such as 0.9,0.8
            or entropy:0.2,0.4 (never: nobody leaves), macs:N, batch-macs:N or ms:N.
        plot: Draw accuracy against MACs over all thresholds into this file (.png, .svg, .pdf).
        static: The original network, to compare with; --arch and its like are about it.
        device: Where to run, such as cpu or cuda.
    """
    from s2d_compiler.evaluation.evaluating import accuracy_of
    from s2d_compiler.format import load
    from s2d_compiler.plots import check_plot

    if plot is not None:
        check_plot(plot)
    if records is not None:
        _require_no_images(data, static)
    network = load(dyn, read_device(device)).eval()
    source.require_shape_of(dyn, network.parts.input_shapes)
    chosen = read_policy(policy, network.settings.policy)
    if policy == "stored":
        _warn_of_old_calibration(dyn, network)
    accuracy, found, preprocessing = None, None, None
    if records is None:
        samples = data.samples(network)
        name, preprocessing = samples.data.name, samples.preprocessing.to_dict()
        found = _run(network, samples, chosen, _Shown(device, dyn.name, reporting))
        if static is not None:
            shown = _Shown(device, static.name, reporting)
            accuracy = accuracy_of(source.read(static).eval().to(device), shown.batches(samples))
    else:
        name, preprocessing, found = _recorded(network, records, data, chosen)
    if policy == "stored":
        _warn_of_same_samples(network, name)
    document: dict[str, Any] = {
        "data": name,
        "preprocessing": preprocessing,
        **found.to_dict(),
        "static_accuracy": accuracy,
    }
    text: list[RenderableType] = [_table(found), *_lines(found, accuracy)]
    if plot is not None:
        from s2d_compiler.evaluation.drawing import draw_trade_off

        draw_trade_off(found, plot, f"{dyn.name} on {_short(name)}", accuracy)
        document["plot"] = str(plot)
        text.append(f"plot: {plot}")
    return Result(document, text)


def _warn_of_old_calibration(dyn: Path, network: DynamicModel) -> None:
    """What calibration found and promised is of the weights that it saw."""
    from s2d_compiler.calibration.records import fingerprint

    found = network.settings.calibration
    if found is not None and found.get("network") not in (None, fingerprint(network)):
        log.warning(
            "%s: its weights are not those that its thresholds were calibrated with, and what was "
            "promised does not hold for them; calibrate again (s2d calibrate)",
            dyn,
        )


def _warn_of_same_samples(network: DynamicModel, name: str) -> None:
    """Thresholds look better than they are on samples that chose them, or some of them."""
    chose = (network.settings.calibration or {}).get("data")
    if chose is not None and (name == chose or name.startswith(f"{chose}[")):
        log.warning(
            "the stored thresholds were chosen on samples of %s, and look better on these than on "
            "others; calibrate and evaluate on separate samples (--split)",
            chose,
        )


@dataclass(frozen=True, slots=True)
class _Shown:
    """Batches with a progress bar.

    Attributes:
        device: Where they are to be.
        name: What is evaluated.
        reporting: Whether there is a bar.
    """

    device: str
    name: str
    reporting: Reporting

    def batches(self, samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
        count = -(-len(samples) // samples.batch_size)
        text = f"evaluating {self.name}"
        return progress(samples.batches(self.device), count, text, self.reporting)


def _run(
    network: DynamicModel, samples: Samples, policy: Policy | None, shown: _Shown
) -> Evaluation:
    from s2d_compiler.data.loading import require_classes
    from s2d_compiler.evaluation import evaluate

    check = partial(require_classes, samples.data)
    return evaluate(network, shown.batches(samples), policy, check)


def _recorded(
    network: DynamicModel, path: Path, source: DataSource, policy: Policy | None
) -> tuple[str, Any, Evaluation]:
    """The name of the samples, what was done to them, and what their exits said."""
    from s2d_compiler.calibration import Records
    from s2d_compiler.evaluation import evaluate_records

    records = recorded_part(Records.load(path), source, path)
    return records.data, records.preprocessing, evaluate_records(network, records, policy)


def _require_no_images(source: DataSource, static: Path | None) -> None:
    for option, value in (("--data", source.data), ("--static", static)):
        if value is not None:
            raise UsageError(
                f"--records: they are read in place of images, and {option} is given too; leave "
                "one of both out"
            )


def _short(name: str) -> str:
    return name if len(name) <= 50 else f"…{name[-49:]}"


def _table(found: Evaluation) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("stage")
    for title in ("leave here", "right of these", "right of all", "MACs so far", "of the original"):
        table.add_column(title, justify="right", overflow="fold")
    for number, stage in enumerate(found.stages, start=1):
        leave = "-" if stage.leaving is None else f"{stage.leaving / found.samples:.2%}"
        share = stage.accuracy_leaving
        table.add_row(
            str(number),
            leave,
            "-" if share is None else f"{share:.2%}",
            f"{stage.accuracy:.2%}",
            f"{stage.macs:,}",
            f"{stage.macs / found.original_macs:.0%}" if found.original_macs else "-",
        )
    return table


def _lines(found: Evaluation, static_accuracy: float | None) -> Iterator[str]:
    from s2d_compiler.evaluation.drawing import policy_text
    from s2d_compiler.evaluation.evaluating import interval

    if found.policy is None or found.accuracy is None or found.macs is None:
        yield (
            "no policy is stored or given (--policy): the exits by themselves, on "
            f"{found.samples:,} samples"
        )
    else:
        low, high = interval(found.accuracy, found.samples)
        share = f" ({found.macs / found.original_macs:.1%} of the original)"
        yield (
            f"{policy_text(found.policy)}: {found.accuracy:.2%} right of {found.samples:,} samples "
            f"(95% interval {low:.2%} to {high:.2%}), {found.macs:,.0f} MACs per sample"
            f"{share if found.original_macs else ''}"
        )
        if found.nan_confidences:
            yield f"{found.nan_confidences:,} times an exit's measure was NaN; nobody left there"
    if static_accuracy is not None:
        yield f"the original: {static_accuracy:.2%} right, {found.original_macs:,} MACs per sample"
