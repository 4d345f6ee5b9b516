"""Trainings that are killed, interrupted or diverge, disks that fill, checkpoints of others."""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler import Recipe, fit
from s2d_compiler.data import open_data
from s2d_compiler.data.functions import MapStyle
from s2d_compiler.errors import CheckpointError, DataError, OutputError, TrainingDivergedError
from s2d_compiler.training import checkpoints
from s2d_compiler.training.checkpoints import read_checkpoint
from tests.faults import answer, hidden_files, many, needs_fork, small_disk, start, wait
from tests.training import SHORT, Stop, network, same, samples, staged, stopping, weights

LONG = replace(SHORT, epochs=3)


def training(folder: Path, ending: str = "", recipe: Recipe = LONG, **given: Any) -> int:
    """Train a network in this process, its checkpoint in a folder; the result beside it."""
    torch.set_num_threads(1)
    model = network(dropout=0.3)
    fit(model, samples(), recipe, validation=samples(20, seed=5), checkpoint=folder / "c",
        checkpoint_steps=1, **given)  # fmt: skip
    torch.save(weights(model), folder / f"end{ending}")
    return 0


def killing(folder: Path, seconds: float, step: int) -> int:
    """Train, and be killed after some seconds or steps."""

    def callback(_: object) -> None:
        nonlocal step
        step -= 1
        if step == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return training(folder, on_progress=callback)


@needs_fork
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """At any step; ``make faults`` kills at any time as well."""
    (tmp_path / "whole").mkdir()
    assert training(tmp_path / "whole") == 0
    chance, killed, cut = random.Random(0), 0, 0
    for number in range(20 if many() else 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        status = -signal.SIGKILL
        while status:
            seconds = chance.uniform(0.05, 2.0) if many() else 0.0
            steps = chance.randrange(4, 16)
            status = wait(start(lambda folder=folder, a=seconds, b=steps: killing(folder, a, b)))
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
            found = read_checkpoint(folder / "c")
            cut += found is not None and found["step"] > 0
        ends = [torch.load(f / "end", weights_only=True) for f in (tmp_path / "whole", folder)]
        assert all(map(torch.equal, *ends))
        assert not hidden_files(folder)
    assert killed > 0
    assert cut > 0


@needs_fork
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_interrupted_it_writes_a_checkpoint_and_goes_on(
    sent: signal.Signals, tmp_path: Path
) -> None:
    """Whatever step it was at: no checkpoint is written but for the signal's sake."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def interrupted() -> int:
        steps = 0

        def callback(progress: Any) -> None:
            nonlocal steps
            steps += 1
            if steps == 5:
                os.kill(os.getpid(), sent)

        model = network(dropout=0.3)
        before = signal.getsignal(sent)
        try:
            fit(model, samples(), LONG, checkpoint=tmp_path / "a" / "c", on_progress=callback)
        except KeyboardInterrupt:
            found = read_checkpoint(tmp_path / "a" / "c")
            assert found is not None
            assert (found["epoch"], found["step"], steps) == (0, 5, 5)
            assert signal.getsignal(sent) == before
            # The network is as far as the checkpoint, so that it can go on by itself.
            fit(model, samples(), LONG, checkpoint=tmp_path / "a" / "c")
            torch.save(weights(model), tmp_path / "end")
            return 7
        return 1

    assert wait(start(interrupted)) == 7
    model = network(dropout=0.3)
    fit(model, samples(), LONG)
    assert all(map(torch.equal, weights(model), torch.load(tmp_path / "end", weights_only=True)))


@needs_fork
def test_a_disk_that_fills_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()

    def fill() -> str:
        try:
            small_disk(folder, 256 * 1024)
        except OSError:
            return "skip"
        with suppress(Stop):
            fit(network(), samples(), LONG, checkpoint=folder / "c", checkpoint_steps=1,
                on_progress=stopping(3))  # fmt: skip
        old = (folder / "c").read_bytes()
        with open(folder / "full", "wb") as file, suppress(OSError):
            while True:
                os.write(file.fileno(), b"\0" * 4096)
        try:
            fit(network(), samples(), LONG, checkpoint=folder / "c", checkpoint_steps=1)
        except OutputError as error:
            whole = (folder / "c").read_bytes() == old
            return f"{whole} {error}"
        return "nothing was refused"

    said = answer(fill)
    if said == "skip":
        pytest.skip("this system lets nobody mount a small disk")
    assert said == (
        f"True {folder / 'c'} cannot be written: the disk is full; free some space or choose "
        "another disk"
    )


# -- divergence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e6, 20.0])
def test_a_diverging_training_stops_with_its_last_good_checkpoint(
    lr: float, tmp_path: Path
) -> None:
    """Either to what is not finite, or beyond what guessing gives."""
    model = network(norms=False)
    recipe = replace(LONG, epochs=60, warmup_steps=300, lr=lr, schedule="constant")
    with pytest.raises(TrainingDivergedError, match=r"epoch \d+, step \d+: the (loss|weights)"):
        fit(model, samples(), recipe, checkpoint=tmp_path / "c", checkpoint_steps=1)
    found = read_checkpoint(tmp_path / "c")
    assert found is not None
    kept = found["weights"]
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert all(map(torch.equal, weights(model), kept.values()))


class Breaking(nn.Module):
    """Breaks after some passes in training."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after
        self.fc = nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.after -= self.training
        result: torch.Tensor = self.fc(x.flatten(1))
        return result if self.after >= 0 else result * torch.nan


def test_nothing_is_learnt_from_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    model = Breaking(10)
    with pytest.raises(TrainingDivergedError, match="epoch 2, step 5: the loss is nan"):
        fit(model, samples(), SHORT, checkpoint=tmp_path / "c")
    found = read_checkpoint(tmp_path / "c")
    assert found is not None
    assert found["epoch"] == 1
    assert torch.equal(model.fc.weight, found["weights"]["fc.weight"])


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a training that was stopped in its second epoch."""
    with pytest.raises(Stop):
        fit(network(), samples(), SHORT, checkpoint=tmp_path / "c", checkpoint_steps=1,
            on_progress=stopping(9))  # fmt: skip
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("recipe.lr is 0.05 there and 0.1 here", {"recipe": replace(SHORT, lr=0.1)}),
        ("recipe.milestones is", {"recipe": replace(SHORT, milestones=(0.3,))}),
        ("a network of other layers", {"network": network(norms=False)}),
        ("a network that began with other weights", {"network": network(seed=2)}),
        ("other images or labels", {"data": samples(seed=4)}),
        ("other images or labels", {"data": (samples()[0], samples()[1].flip(0))}),
        ("another teacher", {"teacher": network(seed=2)}),
    ],
)
def test_a_checkpoint_of_another_training(
    said: str, changes: dict[str, Any], checkpoint: Path
) -> None:
    before = checkpoint.read_bytes()
    given: dict[str, Any] = {"network": network(), "data": samples(), "recipe": SHORT, **changes}
    with pytest.raises(CheckpointError, match=f"{said}.*goes on only as it began; give"):
        fit(**given, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def _places(value: Any, *path: Any) -> Any:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, *path, key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _places(item, *path, number)


WRONG = [None, "text", -1, 10**9, 0.5, [], {}, torch.ones(2), [[]], {"a": 1}]


def test_what_was_frozen_and_what_chose_are_part_of_a_training(tmp_path: Path) -> None:
    recipe, path = SHORT.changed(keep="best"), tmp_path / "c"
    first, other = samples(), samples(48)

    def stopped(freeze: bool, validation: Any) -> None:
        model = network()
        model[0].requires_grad_(not freeze)
        fit(model, samples(), recipe, checkpoint=path, checkpoint_steps=1, validation=validation,
            on_progress=stopping(3))  # fmt: skip

    with pytest.raises(Stop):
        stopped(True, first)
    with pytest.raises(CheckpointError, match="other parameters were frozen"):
        stopped(False, first)
    with pytest.raises(CheckpointError, match="other validation data"):
        stopped(True, other)
    with pytest.raises(Stop):
        stopped(True, first)


def test_whatever_is_changed_in_a_checkpoint_is_refused(checkpoint: Path) -> None:
    """Every value in it replaced by others, every key left out: refused, or of no effect."""
    good = read_checkpoint(checkpoint)
    assert good is not None
    chance = random.Random(0)
    tried = 0
    for place in list(_places(good)):
        if not place or (place[0] in ("weights", "optimizer", "run") and chance.random() > 0.2):
            continue
        wrong = chance.choice([w for w in WRONG if type(w) is not type(_at(good, place))])
        for change in ("replace", "remove"):
            data = copy.deepcopy(good)
            holder = _at(data, place[:-1])
            if change == "remove":
                del holder[place[-1]]
            else:
                holder[place[-1]] = wrong
            checkpoints.write_checkpoint(checkpoint, data)
            if place[0] == "optimizer" and change == "remove" and len(place) > 1:
                continue  # a parameter without a gradient has none
            with pytest.raises(CheckpointError, match=str(checkpoint)):
                fit(network(), samples(), SHORT, checkpoint=checkpoint)
            tried += 1
    assert tried > 40


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def test_a_damaged_checkpoint_is_refused_and_kept(checkpoint: Path) -> None:
    good = checkpoint.read_bytes()
    chance = random.Random(0)
    for number in range(12):
        damaged = bytearray(good)
        if number % 2:
            damaged = damaged[: chance.randrange(len(good))]
        else:
            damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        checkpoint.write_bytes(damaged)
        try:
            fit(network(), samples(), SHORT, checkpoint=checkpoint)
        except CheckpointError:
            assert checkpoint.read_bytes() == damaged
        else:  # a bit that nobody reads
            model = network()
            fit(model, samples(), SHORT)
            again = network()
            checkpoint.write_bytes(damaged)
            fit(again, samples(), SHORT, checkpoint=checkpoint)
            assert same(model, again)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"format": checkpoints.FORMAT, "run": Harm()}, tmp_path / "c")
    with pytest.raises(CheckpointError, match="no checkpoint of a training, or is damaged"):
        fit(network(), samples(), SHORT, checkpoint=tmp_path / "c")
    assert not (tmp_path / "harm").exists()


def test_the_form_of_a_checkpoint_is_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, dyn = network(), staged()
    forced = replace(SHORT, form="masked")
    with pytest.raises(Stop):
        fit(copy.deepcopy(dyn), samples(), SHORT, original=model, checkpoint=tmp_path / "c",
            checkpoint_steps=1, on_progress=stopping(3))  # fmt: skip
    found = read_checkpoint(tmp_path / "c")
    assert found is not None
    caplog.set_level(logging.INFO)
    history = fit(dyn, samples(), SHORT, original=model, checkpoint=tmp_path / "c")
    assert history.form == found["run"]["form"]
    assert "a step takes" not in caplog.text
    with pytest.raises(CheckpointError, match=r"recipe\.form is 'auto' there and 'masked' here"):
        fit(dyn, samples(), forced, original=model, checkpoint=tmp_path / "c")


# -- data ------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    from PIL import Image

    for number, (image, label) in enumerate(zip(*samples(), strict=True)):
        folder = tmp_path / "images" / str(int(label))
        folder.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    data = open_data(f"folder:{tmp_path / 'images'}")
    broken = Path(data.place(50))

    def breaking(progress: Any) -> None:
        if progress.result is not None:
            broken.write_bytes(broken.read_bytes()[:60])

    model = network()
    with pytest.raises(DataError, match=f"{broken}: this image cannot be read"):
        fit(model, data, SHORT, checkpoint=tmp_path / "c", on_progress=breaking)
    found = read_checkpoint(tmp_path / "c")
    assert found is not None
    assert found["epoch"] == 1


class Signalling(torch.utils.data.Dataset[Any]):
    """Sends a signal to its process when an image is read for the so many-th time."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.after -= 1
        if self.after == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return samples(40, seed=5)[0][index], int(samples(40, seed=5)[1][index])


@needs_fork
def test_interrupted_while_it_validates_it_validates_again(tmp_path: Path) -> None:
    whole = network()
    history = fit(whole, samples(), SHORT, validation=samples(40, seed=5))

    def interrupted() -> int:
        data = MapStyle("signalling", Signalling(40 + 3 + 20))  # labels, trials, half of an epoch
        try:
            fit(network(), samples(), SHORT, validation=data, checkpoint=tmp_path / "c")
        except KeyboardInterrupt:
            return 7
        return 1

    assert wait(start(interrupted)) == 7
    found = read_checkpoint(tmp_path / "c")
    assert found is not None
    assert (found["epoch"], found["step"]) == (0, 6)
    model = network()
    again = fit(model, samples(), SHORT, validation=samples(40, seed=5), checkpoint=tmp_path / "c")
    assert same(model, whole)
    assert [e.validation for e in again.epochs] == [e.validation for e in history.epochs]
