"""``s2d report``: what the page says, that it needs nothing else, and odd networks and data."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from markupsafe import Markup
from torch import Tensor, nn

from s2d_compiler import DynamicModel, cli, transform
from s2d_compiler.calibration import calibrate, record
from s2d_compiler.calibration.temperature import fit_temperature
from s2d_compiler.data import Preprocessing, open_data
from s2d_compiler.data.sources import Arrays
from s2d_compiler.errors import DataError, ModelFileError, UsageError
from s2d_compiler.evaluation import Evaluation, evaluate
from s2d_compiler.reporting import write_report
from s2d_compiler.reporting.findings import findings
from s2d_compiler.reporting.gallery import data_url
from s2d_compiler.reporting.observations import Observations
from s2d_compiler.reporting.reliability import reliability
from s2d_compiler.reporting.tables import class_rows, mistakes
from s2d_compiler.runtime import MacsBudget, Thresholds, Timings
from s2d_compiler.runtime.timings import StageTimings

POLICY = Thresholds((0.5, 0.45))
VOID = {"meta", "br", "img", "line", "rect", "polygon", "use", "path", "circle"}


@pytest.fixture(autouse=True)
def _without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and few tests look at it: those that use ``drawn``."""
    if "drawn" not in request.fixturenames:
        for name in ("reliability_figure", "trade_off_figure"):
            blank = mock.Mock(return_value=Markup("<svg></svg>"))
            monkeypatch.setattr(f"s2d_compiler.reporting.page.{name}", blank)


@pytest.fixture
def drawn() -> None:
    """Real plots."""


class Page(HTMLParser):
    """A page taken apart: texts by element, tables, links; fails where elements do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        if "style" in inside:
            return
        self.texts.append(data)
        if "td" in inside or "th" in inside:
            self.tables[-1][-1][-1] += data.strip()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def table(self, *titles: str) -> list[dict[str, str]]:
        """The rows of the table that has columns of these titles."""
        for rows in self.tables:
            if set(titles) <= set(rows[0]):
                return [dict(zip(rows[0], row, strict=False)) for row in rows[1:]]
        raise AssertionError(titles)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        wanted = attributes.items()
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted)]


def network(stages: int = 3, classes: int = 4, channels: int = 3, **more: Any) -> DynamicModel:
    return copy.deepcopy(_network(stages, classes, channels, json.dumps(more)))


@cache
def _network(stages: int, classes: int, channels: int, changes: str) -> DynamicModel:
    torch.manual_seed(0)
    more = json.loads(changes)
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(3)
    split = [8 * (t + 1) // stages for t in range(stages - 1)]
    plan = {"stages": stages, "groups": 8, "default": {"split": split, "concat": "all"},
            "input_shape": [channels, 8, 8], **more}  # fmt: skip
    if "exits" in more:
        plan = {"input_shape": [channels, 8, 8], **more}
    return transform(model, plan).eval()


def pixels(count: int = 60, channels: int = 3, classes: int = 4, names: Any = None) -> Arrays:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return Arrays("pixels", images, torch.randint(classes, (count,), generator=generator), names)


HOW = Preprocessing(mean=(0.5,), std=(0.25,))


def written(path: Path, dyn: DynamicModel, data: Any, **more: Any) -> tuple[Page, Evaluation]:
    found = write_report(dyn, data, path / "report.html", **more)
    return Page(path / "report.html"), found


def expected(dyn: DynamicModel, data: Arrays, policy: Any) -> Evaluation:
    inputs = HOW(data.images(range(len(data))))  # type: ignore[arg-type]
    return evaluate(dyn, [(inputs, data.labels)], policy)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [POLICY, Thresholds((1.05, math.inf * -1), "entropy"), MacsBudget(10**9)]
)
def test_the_numbers_are_those_of_evaluate(tmp_path: Path, policy: Any) -> None:
    dyn, data = network(), pixels()
    page, found = written(tmp_path, dyn, data, policy=policy, preprocessing=HOW)
    wanted = expected(dyn, data, policy)
    assert found == wanted
    assert wanted.accuracy is not None
    assert wanted.macs is not None
    rows = page.table("stage", "leave here", "right of these", "right of all")
    for row, stage, cost in zip(rows, wanted.stages, dyn.cost.stages, strict=False):
        exact = stage.accuracy_leaving
        assert row["MACs"] == f"{cost.macs:,}"
        assert row["cumulative MACs"] == f"{stage.macs:,}"
        assert row["parameters"] == f"{cost.parameters:,}"
        assert row["leave here"] == f"{(stage.leaving or 0) / 60:.2%}"
        assert row["right of these"] == ("\u2013" if exact is None else f"{exact:.2%}")
        assert row["right of all"] == f"{stage.accuracy:.2%}"
    assert f"right for {wanted.accuracy:.2%}" in page.text
    assert f"{wanted.macs / wanted.original_macs:.1%} of the original" in page.text
    settings = page.table("drop of at most", "thresholds")
    best = wanted.trade_off.frontier
    least = min(p.macs for p in best if p.accuracy >= wanted.stages[-1].accuracy - 1e-9)
    assert settings[0]["MACs per sample"] == f"{least:,.0f}"


def test_classes_and_mistakes_are_those_of_every_sample(tmp_path: Path) -> None:
    dyn, data = network(), pixels(names=["ant", "bee", "cat", "dog"])
    page, _ = written(tmp_path, dyn, data, policy=POLICY, preprocessing=HOW)
    found = dyn.predict(HOW(data.images(range(60))), POLICY)  # type: ignore[arg-type]
    answers, labels = found.output.argmax(1), data.labels
    rows = {row["class"]: row for row in page.table("class", "leave at", "right")}
    assert set(rows) == {"ant", "bee", "cat", "dog"}
    for label, name in enumerate(["ant", "bee", "cat", "dog"]):
        here = labels == label
        assert rows[name]["samples"] == str(int(here.sum()))
        assert rows[name]["1"] == f"{float((found.stage[here] == 0).double().mean()):.0%}"
        assert rows[name]["right"] == f"{float((answers[here] == label).double().mean()):.1%}"
    listed = page.table("class", "taken for", "times")
    for row in listed:
        wanted, taken = (["ant", "bee", "cat", "dog"].index(row[k]) for k in ("class", "taken for"))
        here = (labels == wanted) & (answers == taken)
        assert int(row["times"]) == int(here.sum())
        assert int(row["at 2"]) == int((here & (found.stage == 1)).sum())
    counts = [int(row["times"]) for row in listed]
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) <= int((answers != labels).sum())


def test_the_gallery_has_the_surest_and_the_least_sure_of_every_stage(tmp_path: Path) -> None:
    dyn, data = network(), pixels()
    page, _ = written(tmp_path, dyn, data, policy=POLICY, preprocessing=HOW)
    found = dyn.predict(HOW(data.images(range(60))), POLICY)  # type: ignore[arg-type]
    right = found.output.argmax(1) == data.labels
    shown = [int(re.findall(r"sample (\d+)", image["alt"])[0]) for image in page.all("img")]
    for stage in range(3):
        for hit in (True, False):
            here = ((found.stage == stage) & (right == hit)).nonzero().flatten()
            if len(here):
                surest = here[found.confidence[here].argmax()]
                assert int(surest) in shown
                if hit:
                    assert int(here[found.confidence[here].argmin()]) in shown
    marks = [a["class"].split()[-1] for a in page.all("li") if "shown" in a.get("class", "")]
    assert marks == ["right" if right[index] else "wrong" for index in shown]


def test_errors_of_confidences_are_those_of_the_calibration() -> None:
    """The same quantity, in two places: here with bins for a figure."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(500, 4, generator=generator) * 3).double()
    labels = torch.randint(4, (500,), generator=generator)
    found = fit_temperature(logits.numpy(), labels.numpy())
    for scale, wanted in zip((1.0, found.value), found.ece, strict=True):
        sure, answers = (logits / scale).softmax(1).max(1)
        made = reliability(sure.numpy(), (answers == labels).numpy())
        assert made.error == pytest.approx(wanted)
        assert sum(made.share) == pytest.approx(1)
        exact = float(sure.mean() - (answers == labels).double().mean())
        assert made.bias == pytest.approx(exact)


@pytest.mark.usefixtures("drawn")
def test_calibration_and_temperatures_are_told(tmp_path: Path) -> None:
    dyn, data = network(), pixels(400)
    inputs = HOW(data.images(range(400)))  # type: ignore[arg-type]
    records = record(dyn, [(inputs, data.labels)], data="others", logits=True)
    found = calibrate(dyn, records, "macs=80%", confidence=0.9, temperature=True)
    dyn.settings = dataclasses.replace(dyn.settings, preprocessing=HOW)
    page, _ = written(tmp_path, dyn, data)
    assert "Promised with a probability of 90%: best accuracy at a mean of 80%" in page.text
    row = page.table("stage", "left in calibration")[0]
    assert row["left in calibration"] == f"{found.exit_rates[0]:.1%}"
    assert found.temperatures is not None
    rows = page.table("stage", "ECE", "temperature", "ECE, then")
    for row, fitted in zip(rows, found.temperatures, strict=True):
        assert row["temperature"] == f"{fitted['temperature']:.3f}"
    assert "mean 0.5, std 0.25" in page.text
    assert "weights are not those" not in page.text
    with torch.no_grad():
        next(dyn.parameters()).mul_(1.5)
    page, _ = written(tmp_path, dyn, data)
    assert "The weights are not those that the thresholds were calibrated with" in page.text
    assert "What was promised does not hold any more" in page.text


def test_times_are_told(tmp_path: Path) -> None:
    dyn = network()
    stages = tuple(StageTimings((t + 1.25,), (t + 2.5,)) for t in range(3))
    machine = {"processor": "<Abacus>", "threads": 1, "torch": "2"}
    dyn.settings = dataclasses.replace(dyn.settings, timings=Timings((1,), stages, machine))
    page, _ = written(tmp_path, dyn, pixels(), policy=POLICY)
    rows = page.table("stage", "p50, p95 ms at batch 1")
    assert rows[1]["p50, p95 ms at batch 1"] == "2.25, 3.50"
    assert "recorded on <Abacus>" in page.text


# -- what a page is --------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_the_page_needs_nothing_else_and_is_the_same_every_time(tmp_path: Path) -> None:
    dyn, data = network(), pixels()
    page, _ = written(tmp_path, dyn, data, policy=POLICY)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page.source)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:")
    assert len(page.source) < 400_000
    assert page.source == written(tmp_path, network(), data, policy=POLICY)[0].source


@pytest.mark.usefixtures("drawn")
def test_the_page_can_be_read_aloud(tmp_path: Path) -> None:
    page, _ = written(tmp_path, network(), pixels(), policy=POLICY)
    assert page.all("html", lang="en")
    assert all(image["alt"] for image in page.all("img"))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for a in page.all("a"):
        assert a["href"].removeprefix("#") in ids
    assert len(page.all("h1")) == 1
    assert all(a.get("scope") for t, a in page.elements if t == "th")
    drawings = len(page.all("svg"))
    assert drawings == 1 + 1 + 3
    assert len([a for _, a in page.elements if a.get("role") == "img"]) == drawings
    assert all(a["aria-label"] for _, a in page.elements if a.get("role") == "img")


NASTY = "<script>alert(1)</script>\"'&{{ 7 * 7 }}$x^2$"


def test_texts_of_files_are_texts(tmp_path: Path) -> None:
    """Class names, names of data and files, what made the network: none becomes markup."""
    dyn = network()
    parts = dataclasses.replace(dyn.parts, made_by={"command": NASTY, NASTY: {NASTY: NASTY}})
    dyn.parts = parts
    data = pixels(names=[f"{NASTY}{n}" for n in range(4)])
    data.name = NASTY
    file = tmp_path / "<img src=x onerror=alert(1)>.pt"
    file.write_bytes(b"1")
    page, _ = written(tmp_path, dyn, data, policy=POLICY, file=file)
    assert not page.all("script")
    assert not page.all("img", src="x")
    assert page.text.count(NASTY) > 20
    assert "<img src=x onerror=alert(1)>.pt: a network of 3 stages" in page.text


def test_an_interrupted_writing_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with (
        mock.patch("s2d_compiler.reporting.page.atomic_write", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        write_report(network(), pixels(), path, policy=POLICY)
    assert path.read_text() == "old"
    dyn = network().train()
    write_report(dyn, pixels(), path, policy=POLICY)
    assert dyn.training
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# -- odd networks and data -------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 8])
def test_any_number_of_stages(tmp_path: Path, stages: int) -> None:
    page, _ = written(tmp_path, network(stages), pixels())
    rows = page.table("stage", "MACs", "leave here")
    assert [row["stage"] for row in rows] == [*map(str, range(1, stages + 1)), "original"]
    assert len(page.all("svg")) == 2 + stages
    assert f"A network of {stages} stage" in page.text


def test_exits_along_depth(tmp_path: Path) -> None:
    page, _ = written(tmp_path, network(exits=["1", "3"]), pixels())
    assert "the original's own" in page.text
    assert page.text.count("linear head") >= 2
    assert re.search(r"after 1\b", page.text)


def test_the_untouched_network_as_last_stage(tmp_path: Path) -> None:
    page, _ = written(tmp_path, network(final="original"), pixels())
    assert "the original, run whole" in page.text


def test_a_thousand_classes_are_cut_and_it_says_so(tmp_path: Path) -> None:
    page, _ = written(tmp_path, network(classes=1000), pixels(200, classes=1000), policy=POLICY)
    listed = [row["class"] for row in page.table("class", "leave at")]
    count = int(re.findall(r"Of (\d+) classes the 12 that leave first", page.text)[0])
    assert len(listed) == 25
    assert f"{count - 24} classes in between are not listed" in listed
    assert len(page.table("class", "taken for", "times")) == 10


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_images_of_any_channels(tmp_path: Path, channels: int) -> None:
    page, _ = written(
        tmp_path, network(channels=channels), pixels(30, channels), policy=POLICY, preprocessing=HOW
    )
    assert all(i["src"].startswith("data:image/png;base64,") for i in page.all("img"))
    assert page.all("img")
    assert (f"Of the {channels} channels of each image" in page.text) == (channels != 1)


def test_pictures_are_what_is_seen() -> None:
    import base64
    import io

    from PIL import Image

    def seen(image: Tensor) -> Any:
        url = data_url(image)
        return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))

    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    assert (seen(image) == image.permute(1, 2, 0).numpy()).all()
    assert (seen(image / 255) == image.permute(1, 2, 0).numpy()).all()
    stretched = seen(torch.linspace(-3, 5, 16).view(1, 4, 4))
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert seen(torch.full((1, 4, 4), math.nan)).max() == 0
    large = seen(torch.zeros(3, 400, 200, dtype=torch.uint8))
    assert large.shape == (96, 48, 3)
    noise = torch.randint(256, (3, 224, 224), dtype=torch.uint8)
    assert 8 * 18 * len(data_url(noise)) < 2_500_000  # eight stages of such images


class Vector(nn.Module):
    """Takes no images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())  # type: ignore[no-any-return]


class Both(Vector):
    """Takes two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


PLAN = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}


@pytest.mark.parametrize("model", [Vector, Both])
def test_inputs_that_are_no_images(tmp_path: Path, model: type[nn.Module]) -> None:
    inputs = (torch.randn(40, 5),) * (2 if model is Both else 1)
    dyn = transform(model(), PLAN, inputs)
    labels = numpy.arange(40) % 3
    page, found = written(tmp_path, dyn, (inputs if model is Both else inputs[0].numpy(), labels))
    wanted = evaluate(dyn.eval(), [(inputs, torch.tensor(labels))], found.policy)
    assert found.accuracy == wanted.accuracy
    assert not page.all("img")
    assert "These samples are no images" in page.text


def test_without_labels_what_can_be_said(tmp_path: Path) -> None:
    data = pixels()
    page, _ = written(tmp_path, network(), (data.images(range(60)), None), preprocessing=HOW)
    assert "These samples have no labels" in page.text
    assert "right" not in " ".join(a.get("class", "") for a in page.all("li"))
    assert not re.search(r"right (for|of)|interval", page.text)
    assert len(page.all("svg")) == 1
    assert page.all("img")
    assert "this is only an example" in page.text


def test_without_a_stored_policy_a_threshold_is_tried(tmp_path: Path) -> None:
    dyn, data = network(), pixels()
    page, found = written(tmp_path, dyn, data, preprocessing=HOW)
    assert isinstance(found.policy, Thresholds)
    assert len(set(found.policy.values)) == 1
    assert found.accuracy is not None
    assert found.accuracy >= found.stages[-1].accuracy - 0.005
    assert found == expected(dyn, data, found.policy)
    assert "None is stored with the network" in page.text


def test_nan_and_classes_of_one_kind(tmp_path: Path) -> None:
    images = torch.rand(20, 3, 8, 8)
    images[3] = math.nan
    page, found = written(tmp_path, network(), (images, torch.zeros(20, dtype=torch.long)),
                          policy=Thresholds((0.0, 0.0)))  # fmt: skip
    assert found.nan_confidences == 3
    assert "the measure of an exit was NaN" in page.text
    assert "no class (NaN)" in page.text
    assert [row["class"] for row in page.table("class", "leave at")] == ["class 0"]


def test_findings_about_exits(tmp_path: Path) -> None:
    dyn = network()
    nobody, _ = written(tmp_path, dyn, pixels(), policy=Thresholds((math.inf, math.inf)))
    assert "Nobody leaves early" in nobody.text
    assert "Leaving early costs" not in nobody.text
    everybody, found = written(tmp_path, dyn, pixels(), policy=Thresholds((0.0, 0.0)))
    assert "All samples leave at stage 1" in everybody.text
    worse = dataclasses.replace(found, accuracy=found.stages[-1].accuracy - 0.02)
    said = findings(worse, (), None, "", labelled=True, is_outdated=False)
    assert any(text.startswith("Leaving early costs 2.00 points") for text in said)
    with torch.no_grad():
        values = dyn(pixels().images(range(60)) / 255)[0].softmax(1).amax(1).sort().values
    nearly, _ = written(tmp_path, dyn, pixels(), policy=Thresholds((float(values[3]), 0.0)))
    assert "95.0% of the samples leave at stage 1: compare with" in nearly.text
    assert re.search(r"no more than stage \d", everybody.text)  # of random weights
    assert "There are only 60 samples" in everybody.text


def test_what_is_refused(tmp_path: Path) -> None:
    dyn, path = network(), tmp_path / "a.html"
    for data, said in (
        ("cifar", "neither what open_data returns nor a pair"),
        ((torch.rand(3, 3, 8, 8), torch.zeros(2, dtype=torch.long)), "2, 3 samples"),
        ((torch.rand(0, 3, 8, 8), None), "at least 1"),
        ((torch.rand(3, 3, 8, 8), torch.rand(3)), "class numbers"),
        ((torch.rand(3, 3, 8, 8), torch.tensor([0, -1, 2])), "the least -1"),
        (({"a": 1}, None), "a dict among the inputs"),
        ((torch.rand(3, 3, 8, 8), torch.tensor([0, 1, 4])), "tells 4 classes apart"),
        (pixels(3, channels=1), "1x8x8 after preprocessing"),
    ):
        with pytest.raises(DataError, match=re.escape(said)):
            write_report(dyn, data, path, policy=POLICY)  # type: ignore[arg-type]
    with mock.patch.dict(sys.modules, {"matplotlib": None}), pytest.raises(UsageError):
        write_report(dyn, pixels(), path, policy=POLICY)
    with pytest.raises(ModelFileError, match="there is no such file"):
        write_report(dyn, pixels(), path, policy=POLICY, file=tmp_path / "absent.pt")
    assert not path.exists()


def test_rows_of_classes_without_names_or_of_the_same_name() -> None:
    seen = Observations(POLICY)
    logits = [torch.eye(3)[[0, 0, 1, 2]] * 5] * 3
    found = mock.Mock(stage=torch.tensor([0, 1, 2, 2]))
    seen.add(torch.tensor([0, 1, 1, 2]), logits, found)
    rows = class_rows(seen, ["same", "same", "x" * 300], labelled=True)
    assert sorted(row.name for row in rows)[:2] == ["same", "same"]
    assert max(len(row.name) for row in rows) == 60
    assert [m.count for m in mistakes(seen, None)] == [1]
    assert mistakes(seen, None)[0].wanted == "class 1"


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    data = pixels(40)
    images = data.images(range(40))
    assert images is not None
    numpy.savez("a.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=data.labels.numpy())
    dyn = network()
    dyn.settings = dataclasses.replace(dyn.settings, policy=POLICY, preprocessing=HOW)
    dyn.save("dyn.pt")
    return tmp_path


def test_the_command_writes_what_eval_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "dyn.pt", "--data", "a.npz", "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    assert cli.main(["report", "dyn.pt", "--data", "a.npz", "-o", "r.html", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    same = ("accuracy", "mean_macs", "stages", "policy", "data")
    assert {key: document[key] for key in same} == {key: wanted[key] for key in same}
    assert document["output"] == "r.html"
    page = Page(folder / "r.html")
    assert f"right for {wanted['accuracy']:.2%}" in page.text
    assert "dyn.pt, " in page.text
    assert cli.main(["report", "dyn.pt", "--data", "a.npz", "-o", "r.html"]) == 0
    assert capsys.readouterr().out == "written: r.html\n"


def test_the_command_beside_the_original(folder: Path) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(4)[2].expand(len(x), 4)

    words = "report dyn.pt --data a.npz -o r.html --static model.pt"
    with mock.patch("s2d_compiler.commands.options.ModelSource.read", return_value=Constant()):
        assert cli.main(words.split()) == 0
    share = float((open_data("a.npz").labels == 2).double().mean())
    assert f"The original is right for {share:.2%}" in Page(folder / "r.html").text


def test_the_command_without_labels(folder: Path) -> None:
    """Of a file that has none, as of one that has some."""
    with numpy.load("a.npz") as file:
        numpy.savez("b.npz", images=file["images"])
    for name in ("a", "b"):
        words = f"report dyn.pt --data {name}.npz -o {name}.html --no-labels"
        assert cli.main(words.split()) == 0
    one, other = (Page(folder / f"{name}.html") for name in ("a", "b"))
    assert "These samples have no labels" in one.text
    assert one.source.replace("a.npz", "b.npz") == other.source


def test_what_the_command_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ("-o dyn.pt --data a.npz", "dyn.pt is the compiled network itself"),
        ("-o a.npz --data a.npz", "a.npz is the data itself"),
        ("-o absent/r.html --data a.npz", "absent does not exist"),
        ("-o r.html", "--data: nothing is named"),
        ("-o r.html --data a.npz --policy often", "is no policy"),
        ("--data a.npz", "output"),
    ):
        assert cli.main(["report", "dyn.pt", *words.split()]) == 2, words
        assert said in capsys.readouterr().err
    assert not (folder / "r.html").exists()


@pytest.mark.usefixtures("drawn")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Nothing sticks out at the side, and a class name that is a script does not run."""
    data = pixels(names=["<script>document.title = 'run'</script>", "b" * 200, "c", "d"])
    write_report(network(8), data, tmp_path / "r.html")
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=3000".split()
    probe = (tmp_path / "r.html").read_text()
    probe = probe.replace("default-src 'none'", "script-src 'unsafe-inline'")
    root = "document.documentElement"
    probe += f"<script>{root}.dataset.width = {root}.scrollWidth</script>"
    (tmp_path / "probe.html").write_text(probe)
    for width in (1400, 500):  # no window is narrower
        done = subprocess.run(
            ["chromium", *flags, f"--window-size={width},900", "--dump-dom",
             f"file://{tmp_path}/probe.html"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert int(re.findall(r'data-width="(\d+)"', done.stdout)[0]) <= width
        assert "<title>A network of 8 stages</title>" in done.stdout
