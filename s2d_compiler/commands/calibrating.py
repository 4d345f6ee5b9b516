"""``s2d calibrate``: thresholds for a target, stored with the network."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from s2d_compiler.commands.data_options import DATA, DataSource, Samples, recorded_part
from s2d_compiler.commands.options import REPORTING, Reporting, Result, require_other_file
from s2d_compiler.commands.progress import progress
from s2d_compiler.errors import UsageError
from s2d_compiler.output import check_writable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from s2d_compiler.calibration import Calibration, Records
    from s2d_compiler.dynamic import DynamicModel
    from s2d_compiler.runtime.policies import Thresholds

_Hidden = Parameter(show_default=False)


def calibrate_network(
    dyn: Path,
    /,
    *,
    target: str,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], show_default=False)] = None,
    confidence: Annotated[float | None, _Hidden] = None,
    measure: str = "confidence",
    temperature: bool = False,
    records: Annotated[Path | None, _Hidden] = None,
    milliseconds: Annotated[str | None, _Hidden] = None,
    timing_batch: Annotated[int | None, _Hidden] = None,
    seed: Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**62))] = 0,
    source: DataSource = DATA,
    reporting: Reporting = REPORTING,
) -> Result:
    """Choose thresholds for early exits by labelled samples, and store them with the network.

    Use samples that the network was not trained on.

    Args:
        dyn: The compiled and trained network, dyn.pt.
        target: drop=0.5% (of accuracy; against=93.2% after a comma compares with that in place of
            the last stage), macs=60% (of the last stage's; a mean), macs=2e8, ms=3.5, reward=-0.06
            (S2DNAS), or enas4d=2e8 (its target cost; omega=0.09 after a comma).
        output: The file to write; without it, nothing is stored.
        confidence: Promise the drop or the mean budget on new samples of the same distribution
            with this probability, such as 0.95. Without it, thresholds are fitted only.
        measure: confidence, entropy or margin.
        temperature: Fit a temperature per exit first.
        records: A file of what every exit says of every sample. Read where it exists, so that the
            network does not run again (--split '[:2500]' takes a part of it); written where it
            does not.
        milliseconds: What a sample costs up to each stage, such as 1.2,2.0,3.5; without it, the
            times stored with the network.
        timing_batch: The batch size whose stored times are meant; without it, the smallest.
        seed: Seed of the order in which samples are parted for a promise.
    """
    from s2d_compiler.calibration import calibrate, parse_target
    from s2d_compiler.format import load

    parsed = parse_target(target)
    times = None if milliseconds is None else _times(milliseconds)
    if output is not None:
        inputs = {"the data": source.data, "the records": records}
        require_other_file(output, {name: Path(p) for name, p in inputs.items() if p is not None})
        check_writable(output)
    staged = load(dyn)
    recorded, note = _recorded(staged, source, records, temperature, reporting)
    found = calibrate(
        staged, recorded, parsed, measure=measure, confidence=confidence, temperature=temperature,
        milliseconds=times, timing_batch=timing_batch, seed=seed,
    )  # fmt: skip
    policy: Any = staged.settings.policy
    if recorded.preprocessing is not None:
        from s2d_compiler.data import Preprocessing

        preprocessing = Preprocessing.from_dict(dict(recorded.preprocessing))
        staged.settings = replace(staged.settings, preprocessing=preprocessing)
    if output is not None:
        staged.save(output)
    stored = "nothing is stored: name a file with -o" if output is None else f"written: {output}"
    document = {
        "output": None if output is None else str(output),
        "records": note,
        "thresholds": [None if math.isinf(v) else v for v in policy.values],
        "calibration": found.to_dict(),
    }
    text: list[RenderableType] = [_table(found, policy), _sentences(found, note), stored]
    return Result(document, text)


def _times(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--milliseconds: {text[:60]!r} is no list of times; write one per stage with commas "
            "between them, such as 1.2,2.0,3.5"
        ) from None


def _recorded(
    staged: DynamicModel,
    source: DataSource,
    path: Path | None,
    temperature: bool,
    reporting: Reporting,
) -> tuple[Records, str]:
    """Records from a file, or of a run over the data, and where they are from."""
    from s2d_compiler.calibration import Records, record

    if path is not None and path.exists():
        records = Records.load(path)
        if source.data is not None and records.data != _name(source):
            raise UsageError(
                f"--records: {path} holds records of {records.data}, and --data names "
                f"{_name(source)}; leave --data out to use them, or name another file"
            )
        chosen = recorded_part(records, source, path)
        return chosen, f"{len(chosen):,} of {len(records):,} samples, read from {path}"
    if path is not None:
        if source.data is None:
            raise UsageError(
                f"--records: {path} is not there to be read, and no images are named to record; "
                "name a file that is there, or images (--data)"
            )
        check_writable(path)
    samples = source.samples(staged)
    device = next((p.device for p in staged.parameters()), "cpu")
    _require_classes(staged, samples, device)
    total = math.ceil(len(samples) / samples.batch_size)
    records = record(
        staged,
        progress(samples.batches(device), total, "recording", reporting),
        data=samples.data.name,
        preprocessing=samples.preprocessing.to_dict(),
        logits=temperature,
    )
    if path is None:
        return records, "not kept (--records FILE keeps them for other targets)"
    records.save(path)
    return records, f"written to {path}"


def _require_classes(staged: DynamicModel, samples: Samples, device: Any) -> None:
    """Refuse data of another number of classes, by their first batch."""
    import torch

    from s2d_compiler.data.loading import require_classes
    from s2d_compiler.tracing import evaluation_mode

    if samples.data.classes is None:
        return
    inputs, labels = next(samples.batches(device))
    with torch.no_grad(), evaluation_mode(staged):
        output = next(iter(staged.exits(inputs)))
    if isinstance(output, torch.Tensor) and output.ndim == 2:  # record refuses others
        require_classes(samples.data, labels, max(output.shape[1], 2))


def _name(source: DataSource) -> str:
    return source.open().name


def _table(found: Calibration, policy: Thresholds) -> Table:
    from rich.table import Table

    table = Table(caption=f"on {found.measured_on:,} samples; intervals hold together with 95%")
    columns = ("stage", found.measure, "leave", "interval", "right of these", "right of all",
               f"cumulative {found.unit}")  # fmt: skip
    for title in columns:
        table.add_column(title, justify="right")
    for stage, cost in enumerate(found.costs):
        low, high = found.exit_intervals[stage]
        exact = found.exit_accuracies[stage]
        table.add_row(
            str(stage + 1),
            _threshold(policy, stage),
            f"{found.exit_rates[stage]:.1%}",
            f"{low:.1%} to {high:.1%}",
            "" if exact is None else f"{exact:.2%}",
            f"{found.stage_accuracies[stage]:.2%}",
            f"{cost:,.0f}" if found.unit == "MACs" else f"{cost:.3f}",
        )
    return table


def _threshold(policy: Thresholds, stage: int) -> str:
    if stage == len(policy.values):
        return "all"
    value = policy.values[stage]
    if math.isinf(value):
        return "nobody"
    return f"{'from' if policy.larger_is_certain else 'up to'} {value:.6g}"


def _sentences(found: Calibration, note: str) -> str:
    share = found.mean_cost / found.costs[-1]
    cost = f"{found.mean_cost:,.0f}" if found.unit == "MACs" else f"{found.mean_cost:.3f}"
    lines = [
        f"target: {found.target}",
        f"accuracy {found.accuracy:.2%}, {abs(found.drop) * 100:.2f} points "
        f"{'below' if found.drop >= 0 else 'above'} the last stage's; "
        f"{cost} {found.unit} per sample, {share:.1%} of the last stage's",
    ]
    if found.confidence is None:
        lines.append(
            "fitted, not promised: these are the samples that chose the thresholds, and on others "
            "they do worse (--confidence 0.95 promises)"
        )
    else:
        lines.append(
            f"promised: holds on new samples of this distribution with a probability of "
            f"{found.confidence:.0%}; {found.chosen_on:,} samples chose, {found.measured_on:,} "
            f"tested; {found.bound}"
        )
    if found.gap:
        lines.append(f"other thresholds could be better by {found.gap:.2%} at most")
    if any(found.nan_confidences):
        counts = ", ".join(map(str, found.nan_confidences))
        lines.append(f"NaN confidences per stage: {counts}; such samples never leave early")
    for stage, fitted in enumerate(found.temperatures or (), start=1):
        lines.append(f"stage {stage}: {_fitted(fitted)}")
    if not any(found.exit_rates[:-1]):
        lines.append("nobody leaves early: the early exits are not good enough for this target")
    return "\n".join([*lines, f"records: {note}"])


def _fitted(fitted: Any) -> str:
    text = f"temperature {fitted['temperature']:.3f}"
    if fitted["bounded"]:
        text += " (as far as it goes)"
    if fitted["nll"] is not None:
        (nll, nll_after), (ece, ece_after) = fitted["nll"], fitted["ece"]
        text += f"; NLL {nll:.3f} before, {nll_after:.3f} after; ECE {ece:.2%}, {ece_after:.2%}"
    return text
