"""``s2d train``: every option has its effect, files come out whole, and it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from s2d_compiler import Recipe, cli, fit, load
from s2d_compiler.commands import training_reports
from s2d_compiler.commands.recipe_options import RecipeOptions
from s2d_compiler.commands.training import train_network
from s2d_compiler.data import Preprocessing
from s2d_compiler.training.checkpoints import read_checkpoint
from tests.faults import needs_fork, start, wait
from tests.training import SHORT, network, same, samples, staged

WORDS = (
    "dyn.pt --data a.npz --epochs 2 --batch-size 16 --crop-padding 1 --flip --optimizer sgd "
    "--lr 0.05 --schedule step"
).split()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    staged().save("dyn.pt")
    staged(final="original").save("original.pt")
    torch.save(network().state_dict(), "model.pt")
    pixels, labels = samples()
    numpy.savez("a.npz", images=pixels.numpy(), labels=labels.numpy())
    numpy.savez("unlabelled.npz", images=pixels.numpy())
    return tmp_path


def run(*words: str, output: str = "t.pt") -> Any:
    """Run it quietly; the network that comes out."""
    status = cli.main(["train", *(words or WORDS), "-o", output, "--quiet"])
    assert status == 0
    return load(output)


def test_it_is_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *WORDS, "-o", "t.pt", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = staged()
    history = fit(expected, samples(), SHORT)
    assert same(load("t.pt"), expected)
    assert document["output"] == "t.pt"
    assert document["recipe"] == SHORT.to_dict()
    for row, epoch in zip(document["epochs"], history.epochs, strict=True):
        assert {**row, "seconds": 0} == json.loads(json.dumps(replace(epoch, seconds=0).to_dict()))
    assert sorted(os.listdir(folder)) == [
        "a.npz", "dyn.pt", "model.pt", "original.pt", "t.pt", "unlabelled.npz"
    ]  # fmt: skip


def test_it_says_what_it_did_with_pixels_and_what_comes_next(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels, labels = samples()
    numpy.savez("b.npz", images=(pixels * 255).clamp(0, 255).byte().numpy(), labels=labels.numpy())
    words = [word.replace("a.npz", "b.npz") for word in WORDS]
    assert cli.main(["train", *words, "-o", "t.pt"]) == 0
    said = capsys.readouterr()
    assert "no preprocessing is given or stored with the network" in said.err
    assert "2 epochs; trained" in said.out
    assert "s2d calibrate t.pt --data" in said.out
    assert cli.main(["train", *words, "-o", "t.pt", "--mean", "0.5"]) == 0
    assert "no preprocessing" not in capsys.readouterr().err


def test_every_option_of_a_recipe_reaches_it() -> None:
    """A value of each field, other than what it is without the option."""
    given = {
        "epochs": 3, "optimizer": "sgd", "lr": 0.5, "momentum": 0.5, "weight_decay": 0.5,
        "schedule": "cosine", "milestones": "0.3,0.6", "factor": 0.3, "peak": 0.4,
        "warmup_steps": 7, "stage_weights": "1,2", "distill": 0.7, "temperature": 2.0,
        "label_smoothing": 0.2, "precision": "bfloat16", "clip_norm": 1.5, "crop_padding": 2,
        "seed": 9, "form": "staged", "memory_format": "contiguous", "keep": "best",
        "nesterov": True, "decay_norms": False, "labels": False, "flip": True,
        "train_original": True,
    }  # fmt: skip
    assert {*given, "preset"} == {field.name for field in fields(RecipeOptions)}
    assert {*given, "batch_size"} == {field.name for field in fields(Recipe)}
    app = cli._app("s2d", "")
    app.command(train_network, name="train")
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        words = [option, str(value)]
        if type(value) is bool:
            words = [option if value else f"--no-{option[2:]}"]
        words += {
            "warmup_steps": ["--schedule", "step"], "nesterov": ["--optimizer", "sgd"]
        }.get(name, [])  # fmt: skip
        _, bound, _ = app.parse_args(["train", "dyn.pt", "-o", "t.pt", *words])
        recipe = bound.arguments["options"].recipe(None)
        expected = tuple(map(float, value.split(","))) if "," in str(value) else value
        assert getattr(recipe, name) == expected != getattr(Recipe(), name)
    preset = RecipeOptions(preset="s2dnas-vgg", flip=False).recipe(17)
    assert preset == Recipe.preset("s2dnas-vgg", flip=False, batch_size=17)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--split [:64]", {"data": (samples()[0][:64], samples()[1][:64])}),
        ("--limit 48", {"data": (samples()[0][::2], samples()[1][::2])}),
        ("--mean 0.5 --std 0.2", {"preprocessing": Preprocessing(mean=(0.5,), std=(0.2,))}),
        ("--distill 0.3 --teacher model.pt --arch tests.training:network --form staged",
         {"teacher": network(), "recipe": replace(SHORT, distill=0.3, form="staged")}),
        ("--form masked --original model.pt --arch tests.training:network",
         {"original": network(), "recipe": replace(SHORT, form="masked")}),
        ("--keep best --validation-split [::3]",
         {"validation": (samples()[0][::3], samples()[1][::3]),
          "recipe": replace(SHORT, keep="best")}),
    ],
)  # fmt: skip
def test_data_and_networks_are_those_that_are_named(
    words: str, given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    expected = staged()
    arguments = {"data": samples(), "recipe": SHORT, **given}
    fit(expected, arguments.pop("data"), arguments.pop("recipe"), **arguments)
    assert same(run(*WORDS, *words.split()), expected)
    plain = staged()
    fit(plain, samples(), SHORT)
    assert not same(plain, expected) or "keep" in words or "masked" in words


def test_images_without_labels_train_what_the_original_teaches(folder: Path) -> None:
    words = "original.pt --data unlabelled.npz --no-labels --epochs 2 --batch-size 16".split()
    expected = staged(final="original")
    fit(expected, (samples()[0], None), Recipe(epochs=2, batch_size=16))
    assert same(run(*words), expected)


def test_the_log_has_a_line_per_epoch(folder: Path) -> None:
    run(*WORDS, "--log", "log.jsonl", "--validation-data", "a.npz")
    rows = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    expected = staged()
    history = fit(expected, samples(), SHORT, validation=samples())
    assert [row["validation"] for row in rows] == [list(e.validation) for e in history.epochs]
    assert [row["loss"] for row in rows] == [e.loss for e in history.epochs]


def test_tensorboard_gets_every_number_and_is_imported_for_that_alone(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(*WORDS, "--tensorboard", "tb", "--log", "log.jsonl")
    found = EventAccumulator("tb").Reload()
    rows = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    for stage in range(3):
        scalars = found.Scalars(f"training/stage {stage + 1}")
        assert [s.step for s in scalars] == [1, 2]
        assert [s.value for s in scalars] == pytest.approx([r["accuracies"][stage] for r in rows])
    assert [s.value for s in found.Scalars("lr")] == pytest.approx([r["lr"] for r in rows])
    code = (
        "import sys, s2d_compiler.cli, s2d_compiler.training; print('tensorboard' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


def test_a_terminal_sees_a_bar_with_everything(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    text = training_reports.bar_text
    monkeypatch.setattr(training_reports, "bar_text", lambda p: seen.append(text(p)) or seen[-1])
    assert cli.main(["train", *WORDS, "-o", "t.pt"]) == 0
    said = capsys.readouterr()
    assert len(seen) == 12
    number = r"\d+\.\d+%"
    assert re.fullmatch(
        rf"epoch 2/2  loss \d\.\d+  right {number} {number} {number}  lr 0\.0005  \d+ images/s",
        seen[-1],
    )
    lines = [line for line in said.err.splitlines() if line.startswith("epoch")]
    assert [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "stage" in said.out
    assert "written: t.pt" in said.out


def stopped(words: list[str], sent: signal.Signals) -> int:
    """Run the command, and get a signal in its eighth step."""
    steps = 0
    shown = training_reports.reports

    def reports(*given: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def both() -> Any:
            with shown(*given) as report:

                def tell(progress: Any) -> None:
                    nonlocal steps
                    steps += 1
                    if steps == 9:
                        os.kill(os.getpid(), sent)
                    report(progress)

                yield tell

        return both()

    training_reports.reports = reports
    return cli.main(["train", *words])


@needs_fork
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_command_keeps_what_was_done(
    sent: signal.Signals, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "-o", "t.pt"]
    assert wait(start(lambda: stopped(words, sent))) == 128 + sent
    said = capfd.readouterr().err
    assert "what was done is kept in t.pt.checkpoint; the same command goes on" in said
    assert f"s2d: {'interrupted' if sent == signal.SIGINT else 'terminated'}" in said
    found = read_checkpoint("t.pt.checkpoint")
    assert found is not None
    assert (found["epoch"], found["step"]) == (1, 2)
    assert not Path("t.pt").exists()
    expected = staged()
    fit(expected, samples(), SHORT)
    assert same(run(*WORDS, "--resume", "must"), expected)
    assert not Path("t.pt.checkpoint").exists()


def test_never_begins_anew_and_a_named_checkpoint_stays(folder: Path) -> None:
    Path("mine").write_bytes(b"nothing")
    for resume in ("auto", "never"):  # what is no checkpoint is nobody's to remove
        words = [*WORDS, "-o", "t.pt", "--quiet", "--checkpoint", "mine", "--resume", resume]
        assert cli.main(["train", *words]) == 2
        assert Path("mine").read_bytes() == b"nothing"
    run(*WORDS, "--checkpoint", "kept")
    words = ["--seed", "3", "--checkpoint", "kept"]
    assert cli.main(["train", *WORDS, *words, "-o", "t.pt", "--quiet"]) == 2
    run(*WORDS, *words, "--resume", "never")
    found = read_checkpoint("kept")
    assert found is not None
    assert (found["epoch"], found["run"]["recipe"]["seed"]) == (2, 3)


@pytest.mark.parametrize(
    ("option", "count"), [("--checkpoint-steps 2", 8), ("--checkpoint-seconds 0", 12)]
)
def test_how_often_a_checkpoint_is_written(
    option: str, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s2d_compiler.training import checkpoints

    written: list[Any] = []
    write: Callable[..., None] = checkpoints.write_checkpoint
    monkeypatch.setattr(
        checkpoints, "write_checkpoint", lambda *given: written.append(write(*given))
    )
    run(*WORDS, *option.split())
    assert len(written) == count - 2 * ("steps" in option)


@pytest.mark.parametrize("name", ["dyn.pt", "a.npz", "t.pt", "model.pt"])
def test_no_file_that_is_read_is_written_over(name: str, folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    words = [*WORDS, "--original", "model.pt", "--arch", "tests.training:network", "-o", "t.pt"]
    assert cli.main(["train", *words, "--checkpoint", name, "--quiet"]) == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_device_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["train", *WORDS, "-o", "t.pt", "--device", "cuda"]) == 2
    assert "--device: 'cuda' cannot be used here" in capsys.readouterr().err
