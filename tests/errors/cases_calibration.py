"""Targets, records, temperatures, promises, and what is stored of a calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from s2d_compiler import cli
from s2d_compiler.calibration import (
    Calibration,
    MaxDrop,
    MeanBudget,
    Records,
    Reward,
    calibrate,
    parse_target,
    record,
)
from s2d_compiler.calibration.calibrating import solve_records
from s2d_compiler.calibration.promises import require_samples
from s2d_compiler.commands import running
from s2d_compiler.errors import (
    CalibrationError,
    DataError,
    FormatError,
    OutputError,
    S2DError,
    UsageError,
)
from s2d_compiler.evaluation import evaluate_records
from s2d_compiler.fields import Fields
from s2d_compiler.runtime import MacsBudget, StageTimings, Thresholds, Timings
from tests.errors.case import Case
from tests.errors.cases_commands import raising
from tests.exits import classifier, files, records_of, samples

KINDS = "write drop=0.5%, macs=60%"


def said(trigger: Callable[[], object], *parts: str) -> Case:
    return Case(lambda folder: trigger(), CalibrationError, *parts)


@cache
def found() -> Records:
    return records_of(classifier())


def calibrating(target: Any, *parts: str, stages: int = 3, **given: Any) -> Case:
    return said(lambda: calibrate(classifier(stages=stages), found(), target, **given), *parts)


def recording(outputs: Any, labels: Any, *parts: str) -> Case:
    """Batches of images whose labels, or whose network, are no classifier's."""

    def trigger() -> object:
        dyn = classifier()
        if outputs is not None:
            dyn.forward = lambda *inputs: (outputs,)  # type: ignore[method-assign]
        return record(dyn, [(samples(dyn, 4)[0], labels)], data="mine")

    return said(trigger, *parts)


def file(edit: Callable[[dict[str, Any]], object], *parts: str) -> Case:
    """Records with something else in their file."""

    def trigger(folder: Path) -> object:
        found().save("r.npz")
        with np.load("r.npz") as arrays:
            data = dict(arrays)
        edit(data)
        np.savez("r.npz", **data)
        return Records.load("r.npz")

    return Case(trigger, CalibrationError, *parts)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update({key: np.asarray(value)})


def content(data: bytes | None, *parts: str, largest: int = 2**30) -> Case:
    def trigger(folder: Path) -> object:
        if data is None:
            found().save("r.npz")
        elif data:
            Path("r.npz").write_bytes(data)
        with mock.patch("s2d_compiler.calibration.records._LARGEST", largest):
            return Records.load("r.npz")

    return Case(trigger, CalibrationError, *parts)


def empty() -> Records:
    some = found()
    return replace(
        some,
        labels=some.labels[:0],
        predictions=some.predictions[:0],
        measures={name: values[:0] for name, values in some.measures.items()},
        logits=None,
    )


def evaluating(records: Callable[[], Records], policy: Any, *parts: str) -> Case:
    return said(lambda: evaluate_records(classifier(), records(), policy), *parts)


def both_named(folder: Path) -> object:
    files(folder)
    with mock.patch.object(running, "_fail", raising):
        return cli.main(["eval", "dyn.pt", "--data", "data.npz", "--records", "r.npz"])


def command(error: type[S2DError], words: str, *parts: str) -> Case:
    def trigger(folder: Path) -> object:
        files(folder)
        found().save("r.npz")
        with np.load("data.npz") as arrays:
            np.savez("named.npz", **arrays, classes=np.array(["a", "b"]))
        with mock.patch.object(running, "_fail", raising):
            return cli.main(["calibrate", "dyn.pt", *words.split()])

    return Case(trigger, error, *parts)


def stored(key: str, value: Any, *parts: str) -> Case:
    def trigger(folder: Path) -> object:
        data = solve_records(found(), Reward(), (1.0, 2.0, 4.0), "MACs")[1].to_dict()
        return Calibration.from_dict(Fields(data | {key: value}, "calibration"))

    return Case(trigger, FormatError, f"calibration.{key}", *parts)


def timed(*parts: str) -> Case:
    def trigger() -> object:
        dyn = classifier()
        stages = tuple(StageTimings((1.0,), (2.0,)) for _ in range(3))
        dyn.settings = replace(dyn.settings, timings=Timings((8,), stages, {}))
        return calibrate(dyn, found(), "ms=1", timing_batch=3)

    return said(trigger, *parts)


def nowhere(target: Any, *parts: str) -> Case:
    """Nobody leaves where all confidences are NaN."""

    def trigger() -> object:
        nans = {name: np.full_like(v, np.nan) for name, v in found().measures.items()}
        records = replace(found(), measures=nans)
        return solve_records(records, target, (1.0, 2.0, 4.0), "MACs")

    return said(trigger, *parts)


def untested(*parts: str) -> Case:
    """Early exits that are never right."""

    def trigger() -> object:
        records = found()
        predictions = records.predictions.copy()
        predictions[:, :-1] = (records.labels[:, None] + 1) % 4
        predictions[:, -1] = records.labels
        wrong = replace(records, predictions=predictions)
        return solve_records(wrong, MaxDrop(0.0155), (1.0, 2.0, 4.0), "MACs", confidence=0.95)

    return said(trigger, *parts)


DAMAGED = "remove it and record again"
AGAIN = "the file is damaged, compile the model again"

CASES: dict[str, Case] = {
    # targets
    "kind": said(lambda: parse_target("speed=3"), "--target", "'speed=3'", "is no target", KINDS),
    "no number": said(
        lambda: parse_target("drop"), "--target", "'drop'", "lacks a number", KINDS
    ),
    "another number": said(
        lambda: parse_target("drop=much"), "--target", "drop='much'", "is no number",
        "write one such as 0.5%",
    ),
    "range": said(
        lambda: Reward(0.06), "omega", "0.06", "must be a negative number", "change it"
    ),
    "two budgets": said(
        lambda: MeanBudget(macs=1.0, share=0.5), "a mean budget", "macs, share",
        "takes exactly one of", "give one",
    ),
    "no target": calibrating(
        3, "target", "a int", "is none", "give MaxDrop, MeanBudget, Reward or Enas4dMetric"
    ),
    "measure": calibrating(
        "reward", "measure", "'sureness'", "is none that can be recorded",
        "take one of confidence, entropy, margin", measure="sureness",
    ),
    "one stage": calibrating(
        "reward", "the network", "one stage", "thresholds are for more",
        "compile with more stages", stages=1,
    ),
    "confidence": calibrating(
        "drop=1%", "confidence", "95.0", "is no probability", "give one such as 0.95",
        confidence=95.0,
    ),
    "nothing to promise": calibrating(
        "reward", "target", "COST^-0.06", "has nothing that holds or not", "give such a target",
        confidence=0.95,
    ),
    "no times": calibrating(
        "ms=2", "target", "2 ms", "no times are stored", "give --milliseconds"
    ),
    "falling times": calibrating(
        "ms=2", "milliseconds", "3, 2, 1", "are not what a sample costs",
        "give 3 positive numbers that do not fall", milliseconds=(3, 2, 1),
    ),
    "MACs in milliseconds": calibrating(
        "macs=5000", "target", "5,000 MACs", "costs are given in milliseconds",
        "leave --milliseconds out", milliseconds=(1, 2, 3),
    ),
    "timing batch without times": calibrating(
        "reward", "timing batch", "8", "says which stored times are meant", "leave it out",
        timing_batch=8,
    ),
    "timing batch": timed(
        "timing batch", "3", "no times are recorded", "take one of 8"
    ),
    "budget": calibrating(
        "macs=7", "a mean budget", "7 MACs", "is below what stage 1 costs",
        "compile with a thinner stage 1",
    ),
    "unreachable": calibrating(
        "drop=0%,against=100%", "target", "300 samples", "no thresholds reach that",
        "allow a larger drop",
    ),
    "NaN": nowhere(
        MeanBudget(macs=2.0), "target", "300 samples", "no thresholds keep that",
        "give a larger budget, or mend the network",
    ),
    # promises
    "too few samples": calibrating(
        "drop=0.5%", "300 samples", "0.5% below the last stage", "are too few to promise this",
        "give more samples, a weaker target, or no --confidence", confidence=0.95,
    ),
    "too few for an accuracy": said(
        lambda: require_samples(MaxDrop(0.0, against=0.99), (1.0, 2.0), 20, 0.95),
        "20 samples", "it takes 460", "are too few", "give more samples",
    ),
    "no room": said(
        lambda: require_samples(MaxDrop(0.0), (1.0, 2.0), 10**6, 0.95),
        "target", "0% below", "no number of samples can promise that", "allow a little more",
    ),
    "not passed": untested(
        "target", "1.55% below the last stage", "not even cautious thresholds passed the test",
        "allow more, give more samples, or train the early exits further",
    ),
    # records
    "another network": said(
        lambda: calibrate(classifier(softmax=True), found(), "reward"),
        "records of drawn", "another network", "its confidences are not this one's",
        "record again",
    ),
    "no logits": said(
        lambda: calibrate(
            classifier(), replace(found(), logits=None), "reward", temperature=True
        ),
        "records of drawn", "no logits", "which temperatures are fitted on",
        "record again with --temperature",
    ),
    "no file of records": content(
        b"", "r.npz", "no such file", "of records", "s2d calibrate with --data and --records"
    ),
    "no archive": content(
        b"PK", "r.npz", "BadZipFile", "this is no file of records", DAMAGED
    ),
    "too large": content(
        None, "r.npz", "it claims to hold", "more than records do", DAMAGED, largest=100
    ),
    "records of nothing": file(
        lambda data: data.pop("labels"), "r.npz", "labels", "is missing, or of another kind",
        DAMAGED,
    ),
    "records of a later version": file(
        put("version", 9), "r.npz", "version 9", "this package reads version 1",
        "upgrade s2d-compiler, or record again",
    ),
    "labels of no class": file(
        put("labels", np.full(300, 4)), "r.npz: records: labels", "labels",
        "lie outside the 4 classes", "they are damaged, record again",
    ),
    # recording
    "no samples": said(
        lambda: record(classifier(), [], data="mine"), "mine", "no samples", "there are",
        "give some to calibrate with",
    ),
    "no logits of a stage": recording(
        torch.zeros(4, 3, 5, 5), torch.zeros(4, dtype=torch.long), "stage 1",
        "a tensor of shape (4, 3, 5, 5)", "calibration is for classifiers",
        "give thresholds by hand",
    ),
    "labels of the wrong kind": recording(
        None, torch.zeros(4), "mine", "torch.float32", "are no classes",
        "give (n,) whole numbers from 0",
    ),
    "labels beyond the classes": recording(
        None, torch.full((4,), 7), "mine", "label 7", "the network tells 4 classes apart",
        "give data of the classes that it was trained on",
    ),
    # what is stored
    "stored number": stored(
        "accuracy", 3, "3", "is no number from 0 to 1", AGAIN
    ),
    "stored numbers": stored(
        "exit_rates", [0.5], "a list stands", "3 numbers belong", AGAIN
    ),
    "stored intervals": stored(
        "exit_intervals", [[0.1, 0.2]], "1 entries", "for 3 stages", AGAIN
    ),
    "stored measure": stored(
        "measure", "sureness", "'sureness'", "is not what is measured", AGAIN
    ),
    # the command
    "times on a command line": command(
        UsageError, "--target ms=2 --milliseconds fast", "--milliseconds", "'fast'",
        "is no list of times", "write one per stage",
    ),
    "another preprocessing than recorded": command(
        UsageError, "--target reward --records r.npz --mean 0.5", "--records", "r.npz",
        "another preprocessing", "leave that out",
    ),
    "records that are not there": command(
        UsageError, "--target reward --records none.npz", "--records", "none.npz",
        "is not there to be read", "name a file that is there, or images (--data)",
    ),
    "images for records": command(
        CalibrationError, "--target reward --records data.npz", "data.npz",
        "it holds images, labels", "this is no file of records",
        "name one that s2d calibrate --records wrote",
    ),
    "a number of records": command(
        UsageError, "--target reward --records r.npz --limit 5", "--records", "r.npz",
        "--limit (which is about images", "leave that out",
    ),
    "a split of records": command(
        UsageError, "--target reward --records r.npz --split test[:5]", "--records", "r.npz",
        "the split 'test' (of which records know nothing)", "leave that out",
    ),
    "an empty part of records": command(
        CalibrationError, "--target reward --records r.npz --split [900000:]", "drawn",
        "[900000:]", "holds none of their", "name a part that holds some",
    ),
    # evaluated without running
    "no records to evaluate": evaluating(
        empty, None, "records", "0 samples", "they are damaged", "record again"
    ),
    "batches of records": command(
        UsageError, "--target reward --records r.npz --batch-size 5", "--records", "r.npz",
        "--batch-size (which is about images)", "leave that out",
    ),
    "records under a budget": evaluating(
        found, MacsBudget(10**9), "drawn", "MacsBudget", "depends on more than what exits said",
        "evaluate it on the samples themselves",
    ),
    "records under a measure of one's own": evaluating(
        found, Thresholds((0.5, 0.5), lambda o: o[:, 0]), "drawn", "of one's own",
        "they hold no measure", "evaluate the policy on the samples",
    ),
    "records under temperatures": evaluating(
        lambda: replace(found(), logits=None),
        Thresholds((0.5, 0.5), temperatures=(1.0, 2.0, 1.0)), "drawn", "temperatures",
        "they hold no logits", "record again with logits",
    ),
    "records and images": Case(
        lambda folder: both_named(folder), UsageError, "--records", "--data",
        "read in place of images", "leave one of both out",
    ),
    "over the records": command(
        OutputError, "--target reward --records r.npz -o r.npz", "r.npz", "r.npz",
        "is the records itself", "name another file to write",
    ),
    "over records to come": command(
        OutputError, "--target reward --records n.npz --data data.npz -o ./n.npz", "n.npz",
        "n.npz", "is the records itself", "name another file to write",
    ),
    "over the data": command(
        OutputError, "--target reward --data data.npz -o data.npz", "data.npz", "data.npz",
        "is the data itself", "name another file to write",
    ),
    "data of other classes": command(
        DataError, "--target reward --data named.npz", "named.npz", "2 classes (a, b)",
        "the network tells 4 apart", "give data of the classes",
    ),
    "records of other data": command(
        UsageError, "--target reward --records r.npz --data data.npz", "--records", "drawn",
        "--data names data.npz", "leave --data out to use them, or name another file",
    ),
}  # fmt: skip
