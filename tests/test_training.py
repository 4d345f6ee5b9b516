"""Training: what a step does, what a recipe changes, and that it is the same every time."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_compiler import Recipe, fit, masked, transform
from s2d_compiler.data import Data, Preprocessing
from s2d_compiler.errors import DataError
from s2d_compiler.runtime import MacsBudget, StageTimings, Thresholds, Timings
from s2d_compiler.training.feeding import as_data
from s2d_compiler.training.losses import JointLoss
from tests.training import (
    CLASSES,
    PLAN,
    SHORT,
    Stop,
    compiled,
    network,
    same,
    samples,
    staged,
    stopping,
    trained,
    weights,
)

TIMINGS = Timings((1,), (StageTimings((1.0,), (2.0,)),) * 3, {"device": "cpu"})
ONE_STEP = Recipe(
    epochs=1, batch_size=96, optimizer="sgd", lr=0.1, schedule="constant",
    memory_format="contiguous",
)  # fmt: skip


def by_hand(model: nn.Module, loss: Any, optimizer: Any) -> nn.Module:
    """One step on all samples, as anybody would write it."""
    model = copy.deepcopy(model).double().train()
    step = optimizer(model.parameters())
    loss(model, samples()[0].double() / 255, samples()[1]).backward()
    step.step()
    return model


def close(found: nn.Module, expected: nn.Module) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-11)
        for a, b in zip(found.parameters(), expected.parameters(), strict=True)
    )


def sgd(**given: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=1e-4, **given)


# -- a step ------------------------------------------------------------------------------------


def test_a_static_step_is_that_of_cross_entropy() -> None:
    model = network().double()
    expected = by_hand(model, lambda m, x, y: F.cross_entropy(m(x), y), sgd(momentum=0.9))
    assert close(trained(model, ONE_STEP), expected)


def test_a_staged_step_is_that_of_equation_3() -> None:
    dyn = staged(network().double())

    def loss(m: Any, x: Any, y: Any) -> Any:
        return sum(a * F.cross_entropy(o, y) for a, o in zip((1, 2, 0.5), m(x), strict=True))

    expected = by_hand(dyn, loss, sgd(momentum=0.9))
    assert close(trained(dyn, replace(ONE_STEP, stage_weights=(1, 2, 0.5))), expected)
    assert not close(trained(dyn, ONE_STEP), expected)


def test_an_adaptive_step_weighs_by_the_last_loss() -> None:
    dyn = staged(network().double())

    def loss(m: Any, x: Any, y: Any) -> Any:
        each = [F.cross_entropy(o, y) for o in m(x)]
        return sum(each[-1].item() / each[k].item() * each[k] for k in range(3))

    found = trained(dyn, replace(ONE_STEP, stage_weights="adaptive"))
    assert close(found, by_hand(dyn, loss, sgd(momentum=0.9)))


def test_a_distilled_step_goes_to_the_teacher() -> None:
    dyn, teacher = staged(network().double()), network(7).double()

    def loss(m: Any, x: Any, y: Any) -> Any:
        wanted = (teacher(x).detach() / 2).log_softmax(1)
        said = [(o / 2).log_softmax(1) for o in m(x)]
        taught = [(wanted.exp() * (wanted - q)).sum(1).mean() for q in said]
        return sum(
            0.7 * F.cross_entropy(o, y) + 0.3 * 4 * t for o, t in zip(m(x), taught, strict=True)
        )

    recipe = replace(ONE_STEP, distill=0.3, temperature=2.0, form="staged")
    found = trained(dyn, recipe, teacher=teacher)
    assert close(found, by_hand(dyn, loss, sgd(momentum=0.9)))


class Brightness(nn.Module):
    """Tells the classes of ``samples`` apart, if it gets their pixels times 1/255."""

    def forward(self, x: Tensor) -> Tensor:
        means = 50 + 35 * torch.arange(CLASSES, device=x.device)
        return -0.01 * (255 * x.mean((1, 2, 3))[:, None] - means).square()


def test_how_good_the_teacher_is_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """On the validation images; on training images where there are none."""
    held_out = samples(40, 8)
    wrong = held_out[0], (held_out[1] + 1) % CLASSES

    def told(data: Any, **given: Any) -> float | None:
        return fit(staged(), data, SHORT, teacher=Brightness(), **given).teacher

    assert told(samples(), validation=held_out) == 1.0
    assert told(samples()) == 1.0
    assert told((samples()[0], None)) is None
    assert told((samples()[0], None), validation=held_out) == 1.0
    assert fit(staged(), samples(), SHORT).teacher is None
    assert "the teacher is right" not in caplog.text
    assert told(samples(), validation=wrong) == 0.0
    assert "the teacher is right for 0.0% of the images, and guessing one of 4" in caplog.text
    caplog.clear()
    assert told(samples(), preprocessing=Preprocessing(mean=(2.0,))) == pytest.approx(0.25, abs=0.1)
    assert "are the images preprocessed as it was trained" in caplog.text
    caplog.clear()
    few = held_out[0][:2], wrong[1][:2]
    assert told(samples(), validation=few) == 0.0
    assert "the teacher is right" not in caplog.text  # two images say nothing


class InBatches(nn.Module):
    """Takes batches of 16 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu().mean((2, 3)).view(16, 8))
        return out


def test_a_teacher_of_one_batch_size_is_measured_on_whole_batches() -> None:
    recipe, data = SHORT.changed(epochs=1), samples(100)
    dyn = transform(InBatches().eval(), PLAN, (torch.zeros(16, 3, 8, 8),))
    assert fit(dyn, data, recipe, teacher=InBatches()).teacher is not None


class Grainy(Data):
    """Images with noise of torch's generator."""

    def __init__(self) -> None:
        super().__init__("grainy")
        self.pixels, self.classes_of = samples()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def labels(self) -> Tensor:
        return self.classes_of

    def image(self, index: int) -> Tensor:
        return self.pixels[index] // 2 + torch.randint(0, 100, (3, 8, 8)).byte()


def test_training_leaves_random_numbers_as_they_were() -> None:
    """Whatever is looked at before it; and what was drawn before makes no difference to it."""
    found = []
    for seed in (1, 2):
        dyn, teacher = staged(), network(7)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fit(dyn, Grainy(), SHORT.changed(form="staged"), teacher=teacher)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(dyn)
    assert same(*found)


def test_adamw_nesterov_clipping_and_decay_of_norms() -> None:
    model = network(norms=False).double()  # before norms, biases have gradients of rounding alone

    def loss(m: Any, x: Any, y: Any) -> Any:
        return F.cross_entropy(m(x), y)

    def adamw(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3)

    recipe = replace(ONE_STEP, optimizer="adamw", weight_decay=0.3)
    assert close(trained(model, recipe), by_hand(model, loss, adamw))
    nesterov = by_hand(model, loss, sgd(momentum=0.9, nesterov=True))
    assert close(trained(model, replace(ONE_STEP, nesterov=True)), nesterov)

    def undecayed(parameters: Any) -> Any:
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.5)

    recipe = replace(ONE_STEP, decay_norms=False, weight_decay=0.5)
    assert close(trained(model, recipe), by_hand(model, loss, undecayed))

    def clipped(m: Any, x: Any, y: Any) -> Any:
        whole = loss(m, x, y)
        norm = torch.cat([g.flatten() for g in torch.autograd.grad(whole, list(m.parameters()))])
        return loss(m, x, y) * (0.01 / (norm.norm().item() + 1e-6))

    found = trained(model, replace(ONE_STEP, clip_norm=0.01))
    assert close(found, by_hand(model, clipped, sgd(momentum=0.9)))


def test_both_forms_and_a_masked_network_take_the_same_steps() -> None:
    model = network().double()
    dyn = staged(model)
    recipe = replace(SHORT, label_smoothing=0.1)
    of_stages = trained(dyn, replace(recipe, form="staged"))
    copied = copy.deepcopy(dyn)
    history = fit(copied, samples(), replace(recipe, form="masked"), original=model)
    assert history.form == "masked"
    form = masked(model, dyn.plan, (torch.zeros(1, 3, 8, 8).double(),))
    assert fit(form, samples(), recipe).form == "masked"
    for other in (copied, form.extract()):
        for a, b in zip(of_stages(inputs()), other(inputs()), strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert not same(of_stages, dyn)


def inputs() -> torch.Tensor:
    return samples(16, seed=9)[0].double() / 255


def test_the_faster_form_is_taken_and_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    model, dyn = network(), staged()
    caplog.set_level("INFO", "s2d_compiler")
    copied = copy.deepcopy(dyn)
    form = fit(copied, samples(), SHORT, original=model).form
    assert f"training the {form} form" in caplog.text
    assert same(copied, trained(dyn, replace(SHORT, form=form), original=model))
    # A teacher of another structure is no original.
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert fit(dyn, samples(), SHORT, teacher=other).form == "staged"


@pytest.mark.parametrize("form", ["staged", "masked"])
def test_an_original_last_stage_is_frozen_and_teaches(form: str) -> None:
    model = network(dropout=0.2)
    dyn = staged(model, final="original")
    before = weights(dyn.stages[2])
    found = copy.deepcopy(dyn)
    history = fit(found, (samples()[0], None), replace(SHORT, form=form), original=model)
    assert (history.distill, history.epochs[0].stage_losses[2]) == (1.0, None)
    assert history.epochs[0].accuracies == ()
    assert all(map(torch.equal, before, weights(found.stages[2])))
    assert not same(found.stages[0], dyn.stages[0])
    assert all(p.requires_grad for p in found.parameters())
    # The same as with the original given as the teacher.
    told = trained(dyn, replace(SHORT, form=form, labels=False), teacher=model, original=model)
    for a, b in zip(found(inputs().float()), told(inputs().float()), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    both = replace(SHORT, form=form, train_original=True)
    thawed = trained(dyn, both, original=model)
    assert not all(map(torch.equal, before, weights(thawed.stages[2])))


# -- what the recipe changes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"flip": False},
        {"crop_padding": 0},
        {"label_smoothing": 0.2},
        {"precision": "bfloat16"},
        {"schedule": "cosine"},
        {"schedule": "one-cycle"},
        {"schedule": "one-cycle", "peak": 0.7},
        {"schedule": "constant"},
        {"milestones": (0.2,)},
        {"factor": 0.5},
        {"warmup_steps": 3},
        {"momentum": 0.5},
        {"batch_size": 32},
        {"epochs": 1},
        {"lr": 0.1},
        {"weight_decay": 0.1},
        {"stage_weights": (1.0, 1.0, 2.0)},
    ],
    ids=str,
)
def test_each_setting_has_an_effect(changes: dict[str, Any]) -> None:
    assert not same(trained(compiled(), replace(SHORT, **changes)), plain())


@cache
def plain() -> nn.Module:
    return trained(compiled())


@pytest.mark.parametrize("form", ["staged", "masked"])
def test_what_is_frozen_stays_frozen(form: str) -> None:
    """Whatever the original's and the teacher's parameters take."""
    original, taught = network(), network(2).requires_grad_(False)
    dyn = staged(original)
    for name, parameter in dyn.named_parameters():
        parameter.requires_grad_(".0." not in name.partition(".")[2])
    assert len({p.requires_grad for p in dyn.parameters()}) == 2
    original.requires_grad_(False)
    after = trained(dyn, SHORT.changed(form=form), original=original, teacher=taught)
    pairs = zip(dyn.parameters(), after.parameters(), strict=True)
    assert all(torch.equal(a, b) != a.requires_grad for a, b in pairs)


def test_adaptive_weights_stay_finite_where_a_loss_comes_to_nothing() -> None:
    loss = JointLoss(None, 0.0, 1.0, 0.0)
    assert loss.weights_for([0.5, 2.0, 1.0]) == (2.0, 0.5, 1.0)
    for few in ([0.0, 1.0], [-1e-9, 1.0], [0.0, 0.0], [-1e-9, -1e-9], [0.0], [-1e-9]):
        weights = loss.weights_for(few)
        assert weights[-1] == 1
        assert all(0 <= weight <= 1e3 for weight in weights)
    logits = torch.tensor([[60.0, 0.0]], requires_grad=True)
    worse = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    each = loss.of_stages([logits, worse], torch.tensor([0]), None)
    assert each[0] == 0
    weights = loss.weights_for([value.item() for value in each])
    torch.stack(
        [weight * value for weight, value in zip(weights, each, strict=True)]
    ).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


class Volumes(nn.Module):
    """Weights of five dimensions, which channels_last is not for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(x[:, None]).mean((2, 3, 4)))
        return result


def test_weights_of_five_dimensions_are_trained() -> None:
    model = Volumes().eval()
    assert not same(model, trained(model))


def test_a_refusal_leaves_the_network_as_it_was() -> None:
    model = network().train().to(memory_format=torch.channels_last)
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = weights(model)
    with pytest.raises(DataError, match="the label"):
        fit(model, (samples()[0], samples()[1] + 9), SHORT)
    assert all(map(torch.equal, before, weights(model)))
    assert [module.training for module in model[:3]] == [True, False, True]
    assert all(p.grad is not None for p in model.parameters())
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("labels", [torch.rand(96), torch.eye(96).long(), torch.tensor(1), ["a"]])
def test_labels_are_one_whole_number_per_image(labels: Any) -> None:
    with pytest.raises(DataError, match=r"data: .*(whole numbers of shape|no dense tensor)"):
        fit(network(), (samples()[0], labels), SHORT)


def test_memory_format_is_the_networks_while_it_is_trained() -> None:
    seen = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append([t.is_contiguous(memory_format=torch.channels_last) and t.stride()[1] == 1
                         for t in (x, self.conv.weight)])  # fmt: skip
            return self.conv(x).mean((2, 3))

    model = Looking()
    fit(model, samples(), SHORT)
    assert all(map(all, seen[1:]))  # the first was a trial
    assert model.conv.weight.is_contiguous()
    seen.clear()
    fit(model, samples(), replace(SHORT, memory_format="contiguous"))
    assert not any(map(any, seen))


def test_the_best_epoch_is_kept() -> None:
    recipe = replace(SHORT, epochs=4, lr=0.2, schedule="constant", keep="best")
    model = network()
    history = fit(model, samples(), recipe, validation=samples(40, seed=5))
    scores = [epoch.validation[0] for epoch in history.epochs]
    assert history.kept == scores.index(max(scores)) + 1 < 4
    right = (model(samples(40, seed=5)[0] / 255).argmax(1) == samples(40, seed=5)[1]).float().mean()
    assert right == pytest.approx(max(scores))


# -- what is told ------------------------------------------------------------------------------


def test_a_network_learns_and_its_history_says_so() -> None:
    dyn = staged()
    held_out = samples(50, seed=5)
    recipe = Recipe(epochs=8, batch_size=16, optimizer="sgd", lr=0.1)
    told: list[Any] = []
    history = fit(dyn, samples(), recipe, validation=held_out, on_progress=told.append)
    assert [e.epoch for e in history.epochs] == list(range(1, 9))
    assert history.epochs[-1].loss < 0.7 * history.epochs[0].loss
    last = history.epochs[-1]
    assert last.loss == pytest.approx(sum(v for v in last.stage_losses if v is not None))
    for stage, logits in enumerate(dyn(held_out[0] / 255)):
        right = (logits.argmax(1) == held_out[1]).double().mean()
        assert last.validation[stage] == pytest.approx(right.item())
        assert last.validation[stage] > 0.5
    steps = [progress for progress in told if progress.result is None]
    assert [(p.epoch, p.step) for p in steps] == [(e, s) for e in range(1, 9) for s in range(1, 7)]
    assert [p.result for p in told if p.result] == list(history.epochs)
    assert steps[-1].accuracies == pytest.approx(last.accuracies)
    assert steps[-1].images_per_second > 0
    assert not any(module.training for module in dyn.modules())


def test_training_accuracy_is_that_of_the_steps() -> None:
    """With a rate too small to change anything, it is the network's own."""
    model = network(norms=False)
    recipe = Recipe(epochs=1, batch_size=32, optimizer="sgd", lr=1e-12, schedule="constant")
    (epoch,) = fit(model, samples(), recipe).epochs
    right = (model(samples()[0] / 255).argmax(1) == samples()[1]).double().mean()
    assert epoch.accuracies[0] == pytest.approx(right.item())
    loss = F.cross_entropy(model(samples()[0] / 255), samples()[1])
    assert epoch.loss == pytest.approx(loss.item(), rel=1e-5)


def test_settings_go_with_the_weights() -> None:
    dyn = staged()
    dyn.settings = replace(
        dyn.settings, policy=Thresholds((0.9, 0.8)), calibration={"a": 1}, timings=TIMINGS
    )
    preprocessing = Preprocessing(mean=(0.5,))
    fit(dyn, samples(), SHORT, preprocessing=preprocessing)
    assert (dyn.settings.policy, dyn.settings.calibration) == (None, None)
    assert (dyn.settings.preprocessing, dyn.settings.timings) == (preprocessing, TIMINGS)
    stored = copy.deepcopy(dyn)
    fit(dyn, samples(), SHORT)  # the stored one is used
    fit(stored, samples(), SHORT, preprocessing=preprocessing)
    assert same(dyn, stored)
    dyn.settings = replace(dyn.settings, policy=MacsBudget(10**9))
    fit(dyn, samples(), SHORT)
    assert dyn.settings.policy == MacsBudget(10**9)


# -- the same every time -------------------------------------------------------------------------


def test_two_trainings_have_the_same_bits_and_leave_generators_alone() -> None:
    model = network(dropout=0.3)
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    drawn = (torch.rand(1), random.random(), numpy.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    first = trained(model)
    assert (torch.rand(1), random.random(), numpy.random.rand()) == drawn
    assert same(first, trained(model))


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (SHORT, 4),
        (replace(SHORT, optimizer="adamw", precision="bfloat16", keep="best"), 4),
        (replace(SHORT, schedule="one-cycle", stage_weights="adaptive", momentum=0.0), 4),
        (replace(SHORT, form="masked"), 8),
    ],
)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(
    recipe: Recipe, steps: int, tmp_path: Any
) -> None:
    model = network(dropout=0.3)
    dyn, held_out = staged(model), samples(40, seed=5)
    original = model if recipe.form == "masked" else None
    whole = copy.deepcopy(dyn)
    history = fit(whole, samples(), recipe, validation=held_out, original=original)
    pieces, calls = copy.deepcopy(dyn), 0
    given = {"validation": held_out, "checkpoint": tmp_path / "c", "checkpoint_steps": 2,
             "original": original}  # fmt: skip
    while True:
        pieces, calls = copy.deepcopy(dyn), calls + 1
        try:
            found = fit(pieces, samples(), recipe, on_progress=stopping(steps), **given)
        except Stop:
            continue
        break
    assert calls > 1
    assert same(whole, pieces)
    assert [replace(e, seconds=0) for e in found.epochs] == [
        replace(e, seconds=0) for e in history.epochs
    ]
    assert found.kept == history.kept
    # What is done is done.
    again = fit(pieces, samples(), recipe, **given)
    assert again.resumed == 2
    assert same(whole, pieces)


class Drawing(torch.utils.data.Dataset[Any]):
    """A data set that augments by itself, from every generator there is."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(1) + random.random() + numpy.random.rand() + numpy.random.randn()
        return samples()[0][index] / 255 + noise.float() / 100, int(samples()[1][index])


def test_a_data_set_that_draws_goes_on_bit_for_bit(tmp_path: Any) -> None:
    from s2d_compiler.data.functions import MapStyle

    data = MapStyle("drawing", Drawing())
    whole = trained(network(), data=data)
    assert not same(whole, trained(network()))
    for _ in range(9):
        pieces = network()
        try:
            fit(pieces, data, SHORT, checkpoint=tmp_path / "c", checkpoint_steps=1,
                on_progress=stopping(5))  # fmt: skip
        except Stop:
            continue
        break
    assert same(whole, pieces)


def test_files_are_fed_as_arrays_are(tmp_path: Any) -> None:
    from PIL import Image

    from s2d_compiler.data import open_data

    for number, (image, label) in enumerate(zip(*samples(), strict=True)):
        folder = tmp_path / str(int(label))
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    files = open_data(f"folder:{tmp_path}")
    arrays = (torch.stack([files.image(k) for k in range(96)]), files.labels)
    assert same(trained(network(), data=files), trained(network(), data=arrays))


def test_images_stay_bytes_until_they_are_on_the_device() -> None:
    images = samples()[0]
    data = as_data((images, samples()[1]), "data")
    assert data.images([0, 1]).dtype == torch.uint8  # type: ignore[union-attr]
    assert data.image(0).data_ptr() == images.data_ptr()
