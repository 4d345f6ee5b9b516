"""Records, temperatures, and thresholds stored with a network, from Python and the command."""

from __future__ import annotations

import json
import logging
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2d_compiler import S2DError, load
from s2d_compiler.calibration import (
    Calibration,
    MaxDrop,
    MeanBudget,
    Records,
    Reward,
    calibrate,
    record,
)
from s2d_compiler.calibration.calibrating import solve_records
from s2d_compiler.calibration.records import fingerprint
from s2d_compiler.calibration.temperature import HIGHEST, LOWEST, fit_temperature
from s2d_compiler.cli import main
from s2d_compiler.errors import CalibrationError, FormatError
from s2d_compiler.fields import Fields
from s2d_compiler.runtime import MEASURES, StageTimings, Thresholds, Timings, measure_values
from tests.exits import classifier, files, records_of, samples, with_measures

DYN = classifier()
RECORDS = records_of(DYN)

# -- recording -------------------------------------------------------------------------------------


def test_records_are_what_the_network_says() -> None:
    images, labels = samples(DYN)
    dyn = classifier().train()
    parts = zip(images.split(70), labels.split(70), strict=True)
    records = record(dyn, parts, data="drawn", logits=True)
    assert dyn.training
    dyn.eval()
    with torch.no_grad():
        outputs = dyn(images)
    assert len(records) == len(labels)
    assert records.stages == 3
    for stage, output in enumerate(outputs):
        assert (records.predictions[:, stage] == output.argmax(1).numpy()).all()
        for name in MEASURES:
            wanted = measure_values(name, output).double().numpy()
            assert np.abs(records.measures[name][:, stage] - wanted).max() < 1e-5
    assert (records.right == (records.predictions == labels.numpy()[:, None])).all()


def test_nan_outputs_never_leave_are_wrong_and_are_counted() -> None:
    dyn = classifier()
    images, labels = samples(dyn, 40)
    images[3] = math.nan
    records = record(dyn, [(images, labels)])
    assert records.nan_confidences == (1, 1, 1)
    assert not records.right[3].any()
    found = calibrate(dyn, records, MeanBudget(share=1.0))
    assert found.nan_confidences == (1, 1, 1)
    assert dyn.predict(images).stage[3] == 2


def test_one_logit_is_two_classes() -> None:
    dyn = classifier(1)
    images, labels = samples(dyn, classes=1)
    records = record(dyn, [(images, labels)], logits=True)
    assert records.classes == 2
    assert records.right[:, -1].mean() > 0.8
    found = calibrate(dyn, records, "drop=5%", temperature=True)
    assert found.drop <= 0.05


def test_probabilities_in_place_of_logits_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    dyn = classifier(softmax=True)
    with caplog.at_level(logging.WARNING):
        record(dyn, [samples(DYN)])
    assert "take the softmax or sigmoid out of the network" in caplog.text
    caplog.clear()
    record(DYN, [samples(DYN)])
    assert not caplog.text


# -- files of records ------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [True, False])
def test_records_come_back_from_their_file(tmp_path: Path, logits: bool) -> None:
    records = replace(records_of(DYN, logits=logits), preprocessing={"mean": [0.5]})
    records.save(tmp_path / "r.npz")
    back = Records.load(tmp_path / "r.npz")
    assert (back.labels == records.labels).all()
    assert (back.predictions == records.predictions).all()
    for name in MEASURES:
        assert (back.measures[name] == records.measures[name]).all()
    assert (back.network, back.data, back.classes) == (fingerprint(DYN), "drawn", 4)
    assert back.preprocessing == {"mean": [0.5]}
    if logits:
        assert back.logits is not None
        assert (back.logits == records.logits).all()
    else:
        assert back.logits is None


_WHOLE: list[bytes] = []


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_records_are_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    if not _WHOLE:
        replace(RECORDS, logits=None).save(path)
        _WHOLE.append(path.read_bytes())
    data = bytearray(_WHOLE[0])
    data[place % len(data)] = value
    path.write_bytes(data[: place % len(data) + 1] if value < 20 else data)
    try:
        back = Records.load(path)
    except CalibrationError:
        return
    assert len(back) == 300


def test_a_pickle_in_records_is_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "ran",)

    np.savez(tmp_path / "r.npz", labels=np.array([Trap()], dtype=object))
    with pytest.raises(CalibrationError, match="no file of records"):
        Records.load(tmp_path / "r.npz")
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    dyn = classifier()
    before = fingerprint(dyn)
    dyn.settings = replace(dyn.settings, policy=Thresholds((0.5, 0.5)))
    dyn.train()
    assert fingerprint(dyn) == before
    dyn.eval().save(tmp_path / "dyn.pt")
    assert fingerprint(load(tmp_path / "dyn.pt")) == before
    with torch.no_grad():
        next(dyn.parameters()).flatten()[0] += 1e-3
    assert fingerprint(dyn) != before


# -- temperatures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_temperatures_are_found_again(scale: float) -> None:
    """Labels drawn from the probabilities of logits, which are then scaled."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(4000, 5)) * 2
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (odds.cumsum(1) > draw.random((4000, 1))).argmax(1)
    found = fit_temperature(logits * scale, labels)
    assert found.value == pytest.approx(scale, rel=0.06)
    assert found.nll[1] <= found.nll[0]
    assert found.ece[1] < 0.02
    tensor, target = torch.from_numpy(logits * scale), torch.from_numpy(labels)
    for near in (0.98, 1.02):
        other = torch.nn.functional.cross_entropy(tensor / (found.value * near), target).item()
        assert found.nll[1] <= other
    at_one = torch.nn.functional.cross_entropy(tensor, target).item()
    assert found.nll[0] == pytest.approx(at_one)


def test_temperatures_stay_in_bounds() -> None:
    separated = np.eye(3).repeat(10, 0) * 5
    labels = np.arange(3).repeat(10)
    assert fit_temperature(separated, labels).value == LOWEST
    assert fit_temperature(separated, (labels + 1) % 3).value == HIGHEST
    assert fit_temperature(separated * math.nan, labels).value == 1.0
    large = fit_temperature(separated * 1e4, labels)
    assert large.is_bounded
    assert math.isfinite(large.nll[1])


# -- thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("target", ["drop=2%", "macs=70%", "reward", "enas4d=60%"])
def test_the_network_does_what_calibration_found(
    measure: str, temperature: bool, target: str
) -> None:
    dyn = classifier()
    images, labels = samples(dyn)
    found = calibrate(dyn, [(images, labels)], target, measure=measure, temperature=temperature)
    predictions = dyn.predict(images)
    counts = predictions.stage.bincount(minlength=3).tolist()
    assert counts == [round(rate * len(labels)) for rate in found.exit_rates]
    right = (predictions.output.argmax(1) == labels).double().mean().item()
    assert right == pytest.approx(found.accuracy)
    assert predictions.macs.double().mean().item() == pytest.approx(found.mean_cost)
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert dyn.settings.calibration == found.to_dict()
    if target == "drop=2%":
        assert found.drop <= 0.02
    if target == "macs=70%":
        assert found.mean_cost <= 0.7 * found.costs[-1]
    for (low, high), rate in zip(found.exit_intervals, found.exit_rates, strict=True):
        assert low <= rate <= high


def test_a_promise_is_of_samples_that_did_not_choose() -> None:
    dyn = classifier()
    found = calibrate(dyn, records_of(dyn), MaxDrop(0.2), confidence=0.9, temperature=True)
    assert found.chosen_on + found.measured_on == found.samples == 300
    assert found.chosen_on == 105
    assert found.bound is not None
    assert found.p_value is not None
    assert found.p_value <= 0.1
    again = calibrate(classifier(), records_of(dyn), MaxDrop(0.2), confidence=0.9, temperature=True)
    assert again == found
    other = calibrate(dyn, records_of(dyn), MaxDrop(0.2), confidence=0.9, seed=1)
    assert other.exit_rates != found.exit_rates


def test_times_are_costs() -> None:
    dyn = classifier()
    records = records_of(dyn)
    found = calibrate(dyn, records, MeanBudget(milliseconds=2.0), milliseconds=(1.0, 2.5, 4.0))
    assert found.unit == "milliseconds"
    assert found.mean_cost <= 2.0
    stages = tuple(StageTimings((t, 4 * t), (t, 4 * t)) for t in (1.0, 1.5, 1.5))
    dyn.settings = replace(dyn.settings, timings=Timings((1, 8), stages, {}))
    assert calibrate(dyn, records, "ms=2").costs == (1.0, 2.5, 4.0)
    assert calibrate(dyn, records, "ms=2", timing_batch=8).costs == (0.5, 1.25, 2.0)
    assert calibrate(dyn, records, "reward", milliseconds=(1, 2, 3)).unit == "milliseconds"
    assert calibrate(dyn, records, "reward").unit == "MACs"


def test_a_refusal_changes_nothing() -> None:
    dyn = classifier()
    records = RECORDS
    calibrate(dyn, records, "drop=5%")
    before = dyn.settings
    with pytest.raises(CalibrationError):
        calibrate(dyn, records, MeanBudget(macs=1.0))
    with pytest.raises(CalibrationError):
        calibrate(dyn, records, MaxDrop(0.001), confidence=0.95)
    assert dyn.settings is before


def test_everybody_may_leave_by_entropy() -> None:
    dyn = classifier()
    images, _ = samples(dyn)
    with torch.no_grad():
        labels = dyn(images)[0].argmax(1)
    found = calibrate(dyn, [(images, labels)], Reward(), measure="entropy")
    assert found.exit_rates == (1.0, 0.0, 0.0)
    assert (dyn.predict(images).stage == 0).all()
    assert (dyn.predict(images * 0).stage == 0).all()


def test_confidences_that_round_above_one_give_thresholds() -> None:
    dyn = classifier()
    records = records_of(dyn)
    high = records.measures["confidence"].copy()
    high[:150] = 1.0000002
    found = calibrate(dyn, with_measures(records, confidence=high), Reward())
    assert isinstance(dyn.settings.policy, Thresholds)
    assert all(v <= 1 or v == math.inf for v in dyn.settings.policy.values)
    assert found.samples == 300


_FOUND = solve_records(RECORDS, MaxDrop(0.05), (1.0, 2.0, 4.0), "MACs")[1].to_dict()


@given(st.data())
def test_a_damaged_calibration_is_refused(data: st.DataObject) -> None:
    found = dict(_FOUND)
    key = data.draw(st.sampled_from(sorted(found)))
    change = st.sampled_from([-1, "x", None, [], {}, [None], [1, 2], math.nan, True])
    found[key] = data.draw(change)
    try:
        back = Calibration.from_dict(Fields(found, "calibration"))
    except FormatError:
        return
    assert json.loads(json.dumps(back.to_dict())) == json.loads(json.dumps(found))


# -- the command -----------------------------------------------------------------------------------


def test_the_command_writes_a_network_that_leaves_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    before = Path("dyn.pt").read_bytes()
    words = "calibrate dyn.pt --target drop=2% --records r.npz -o new.pt"
    assert main([*words.split(), "--data", "data.npz", "--scale", "1"]) == 0
    text = capsys.readouterr().out
    assert "fitted, not promised" in text
    assert "records: written to r.npz" in text
    assert Path("dyn.pt").read_bytes() == before
    new = load("new.pt")
    assert isinstance(new.settings.policy, Thresholds)
    assert new.settings.preprocessing is not None
    assert new.settings.calibration is not None
    assert Calibration.from_dict(new.settings.calibration).drop <= 0.02
    # the same from the records alone, without the data
    Path("data.npz").unlink()
    assert main([*words.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["records"] == "300 of 300 samples, read from r.npz"
    assert document["calibration"] == json.loads(json.dumps(new.settings.calibration))
    assert load("new.pt").settings == new.settings


def test_the_command_may_write_in_place_and_not_over_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = fingerprint(files(tmp_path))
    RECORDS.save("r.npz")
    there = Path("r.npz").read_bytes()
    words = "calibrate dyn.pt --target drop=2% --records r.npz -o"
    assert main([*words.split(), "dyn.pt"]) == 0
    assert fingerprint(load("dyn.pt")) == before
    assert load("dyn.pt").settings.policy is not None
    assert main([*words.split(), "r.npz"]) == 2
    assert "is the records itself" in capsys.readouterr().err
    assert Path("r.npz").read_bytes() == there


def test_the_command_without_output_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    words = "calibrate dyn.pt --target macs=70% --confidence 0.95 --data data.npz --scale 1"
    assert main(words.split()) == 0
    text = capsys.readouterr().out
    assert "nothing is stored" in text
    assert "promised: holds on new samples" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "dyn.pt"]


@pytest.mark.parametrize(
    "words",
    [
        "--target macs=1",
        "--target drop=0.1% --confidence 0.95",
        "--target drop=0%,against=100%",
        "--target reward --confidence 0.95",
        "--target ms=3",
        "--target drop=1% --records bad.npz",
        "--target drop=1% --measure sureness",
    ],
)
def test_a_refused_command_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    Path("bad.npz").write_bytes(b"PK")
    there = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    given = ["calibrate", "dyn.pt", *words.split(), "-o", "new.pt", "--data", "data.npz"]
    assert main([*given, "--scale", "1"]) == 2
    assert capsys.readouterr().err.count("s2d: ") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == there


def test_thresholds_are_stored_with_the_network_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    before = load("dyn.pt").state_dict()
    data = Path("data.npz").read_bytes()
    given = ["calibrate", "dyn.pt", "--data", "data.npz", "--scale", "1", "--target", "macs=80%"]
    assert main([*given, "--records", "r.npz", "-o", "dyn.pt"]) == 0
    dyn = load("dyn.pt")
    assert dyn.settings.policy is not None
    assert all(torch.equal(value, before[name]) for name, value in dyn.state_dict().items())
    capsys.readouterr()
    assert main(["show", "dyn.pt"]) == 0
    said = capsys.readouterr().out
    assert "policy: confidence ≥ " in said
    assert "calibrated: best accuracy at a mean of 80% of the last stage" in said
    assert "fitted, not promised; " in said
    assert main(["show", "dyn.pt", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["settings"]
    assert shown == json.loads(json.dumps(dyn.settings.to_dict()))
    told = ["eval", "dyn.pt", "--data", "data.npz"]
    assert main(told) == 0
    assert "calibrate again" not in capsys.readouterr().err
    with torch.no_grad():
        next(dyn.parameters()).mul_(1.01)
    dyn.save("dyn.pt")
    assert main(told) == 0
    assert "dyn.pt: its weights are not those that" in capsys.readouterr().err
    for other, what in ("data.npz", "the data"), ("r.npz", "the records"):
        assert main([*given, "--records", "r.npz", "-o", other]) == 2
        assert f"{other} is {what} itself" in capsys.readouterr().err
    assert Path("data.npz").read_bytes() == data


def test_records_of_more_bytes_than_there_can_be_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as file:
        file.writestr("labels.npy", b"0" * 1000)
    monkeypatch.setattr("s2d_compiler.calibration.records._LARGEST", 100)
    with pytest.raises(S2DError, match="claims to hold 1,000 bytes"):
        Records.load(tmp_path / "r.npz")
