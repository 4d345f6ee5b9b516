"""The examples: the networks of the papers, Table 4, and the digits from end to end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from examples import cifar_models, depth_baselines, detector_backbone, digits, table4
from s2d_compiler import DynamicModel, Plan, load, transform
from s2d_compiler.cli import main
from s2d_compiler.depth_report import DepthReport

EXAMPLES = Path(digits.__file__).parent


@pytest.fixture
def render() -> Callable[[object], str]:
    """Print anything that rich prints to a string, at a fixed width."""

    def to_text(renderable: object) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(renderable)
        return capture.get()

    return to_text


def counted_macs(model: nn.Module, *shape: int) -> int:
    """Count MACs per sample as torch does, two FLOPs each."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return int(counter.get_total_flops()) // 2


# S2DNAS, Table 1, to one more digit
CIFAR_MODELS = {
    "ResNet-20, projection": (lambda: cifar_models.resnet20("projection"), 40.8),
    "ResNet-56, projection": (lambda: cifar_models.resnet56("projection"), 125.7),
    "ResNet-110, projection": (lambda: cifar_models.resnet110("projection"), 253.1),
    "ResNet-20, padded": (lambda: cifar_models.resnet20("padded"), 40.6),
    "ResNet-56, padded": (lambda: cifar_models.resnet56("padded"), 125.5),
    "ResNet-110, padded": (lambda: cifar_models.resnet110("padded"), 252.9),
    "VGG16-BN": (cifar_models.vgg16_bn, 313.2),
    "MobileNetV2": (cifar_models.mobilenet_v2, 88.0),
}


@pytest.mark.parametrize(("build", "millions"), CIFAR_MODELS.values(), ids=CIFAR_MODELS.keys())
def test_cifar_models_cost_what_the_paper_says(
    build: Callable[[], nn.Module], millions: float
) -> None:
    assert round(counted_macs(build(), 3, 32, 32) / 1e6, 1) == millions


def test_padded_shortcut_subsamples_and_appends_zeros() -> None:
    x = torch.randn(2, 3, 4, 6)
    y = cifar_models.PaddedShortcut(2)(x)
    assert y.shape == (2, 5, 2, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_unknown_shortcut_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match="'identity'"):
        cifar_models.resnet20("identity")  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_models_answer_per_class(classes: int) -> None:
    for build in (cifar_models.resnet20, cifar_models.vgg16_bn, cifar_models.mobilenet_v2):
        model = build(num_classes=classes).eval()
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


# Table 4

# Output channels of each stage's layers, as S2DNAS prints them in Table 4.
TABLE_4_CHANNELS = {"layer1": (6, 2, 8), "layer2": (16, 4, 12), "layer3": (48, 8, 8)}


@pytest.fixture(scope="module")
def table4_model() -> DynamicModel:
    return table4.compile_table4()


@pytest.mark.parametrize(("layer", "channels"), TABLE_4_CHANNELS.items())
def test_table_4_plan_gives_the_channels_of_the_paper(
    table4_model: DynamicModel, layer: str, channels: tuple[int, ...]
) -> None:
    weights = table4_model.state_dict()
    for stage, width in enumerate(channels):
        for convolution in ("conv1", "conv2"):
            key = f"stages.{stage}.{layer}.4.{convolution}.weight"
            assert weights[key].shape[0] == width


def test_table_4_stage_1_costs_what_its_channels_say(table4_model: DynamicModel) -> None:
    # On top of the 3x3 convolutions: two projections and the exit head.
    extra = 6 * 16 * 16 * 16 + 16 * 48 * 8 * 8 + 48 * 10
    assert table4_model.cost.stages[0].macs == table4.stage_1_by_hand() + extra


def test_table_4_report_shows_our_cost_and_the_papers(
    table4_model: DynamicModel, render: Callable[[object], str]
) -> None:
    text = render(table4.report(table4_model))
    for stage, printed in zip(table4_model.cost.stages, table4.PRINTED, strict=True):
        assert f"{stage.cumulative_macs:,}" in text
        assert printed in text


# The digits


@pytest.fixture
def digit_plan() -> Plan:
    return Plan.load(EXAMPLES / "digits.json")


def test_held_out_digits_are_not_trained_on() -> None:
    training, held_out = digits.load_data()
    assert (len(training), len(held_out)) == (1797 - digits.HELD_OUT, digits.HELD_OUT)
    assert 0 <= training.images.min() < training.images.max() <= 1
    assert set(held_out.labels.tolist()) == set(range(10))
    together = torch.cat([training.labels, held_out.labels]).bincount()
    assert together.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_static_digit_network_learns_in_a_few_steps() -> None:
    torch.manual_seed(0)
    model = digits.build()
    first, last = digits.fit(model, epochs=2).epochs
    assert last.loss < first.loss / 2
    assert digits.stage_accuracies(model)[0] > 0.5


def test_demo_commands_hand_files_to_each_other(
    tmp_path: Path, digit_plan: Plan, render: Callable[[object], str]
) -> None:
    model_file, dyn_file = tmp_path / "model.pt", tmp_path / "dyn.pt"
    trained_file = tmp_path / "trained.pt"
    digits.train(output=model_file, epochs=2)
    static = digits.build()
    static.load_state_dict(torch.load(model_file, weights_only=True))
    transform(static, digit_plan).save(dyn_file)
    command = f"train {dyn_file} --data examples.digits:dataset --split train --epochs 2 "
    main([*f"{command} --batch-size 64 --optimizer adamw --lr 0.005 -o".split(), str(trained_file)])
    digits.evaluate(model_file, dyn_file, trained_file)

    before, trained = load(dyn_file), load(trained_file)
    text = render(digits.comparison(static, before, trained))
    for stage in trained.cost.stages:
        assert f"{stage.cumulative_macs:,}" in text
    assert f"{digits.stage_accuracies(static)[0]:.1%}" in text
    accuracies = zip(digits.stage_accuracies(before), digits.stage_accuracies(trained), strict=True)
    assert all(after > untrained for untrained, after in accuracies)


@pytest.mark.parametrize("name", ["digits.json", "resnet56_table4.json"])
def test_example_plans_survive_a_round_trip(name: str) -> None:
    written = json.loads((EXAMPLES / name).read_text())
    plan = Plan.from_dict(written)
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.stages == written["stages"]


# The detector


def test_a_detector_trains_with_every_exit_of_its_backbone(
    render: Callable[[object], str],
) -> None:
    torch.manual_seed(0)
    detector = detector_backbone.build()
    original = detector.get_submodule("backbone")
    backbone = detector_backbone.compile_backbone(detector)
    losses = detector_backbone.train_step(detector, backbone)
    assert detector.get_submodule("backbone") is original
    assert all(parameter.grad is None for parameter in original.parameters())
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in trained} == {"0", "1", "2"}
    text = render(detector_backbone.report(backbone, losses))
    assert all(f"{loss:.3f}" in text for loss in losses)


# Exits along depth


@pytest.mark.parametrize("method", depth_baselines.PLANS)
def test_baselines_cost_the_original_and_their_heads(method: str) -> None:
    dyn = depth_baselines.compiled("ResNet-20", method)
    assert isinstance(dyn.report, DepthReport)
    heads = sum(row.head_macs for row in dyn.report.exits)
    assert dyn.cost.stages[-1].cumulative_macs == dyn.cost.original_macs + heads
    x = torch.randn(2, 3, 32, 32)
    model = cifar_models.resnet20()
    model.load_state_dict(originals(dyn))
    assert torch.equal(dyn(x)[-1], model.eval()(x))


def originals(dyn: DynamicModel) -> dict[str, torch.Tensor]:
    """The original's state, put together from the stages."""
    state = dyn.state_dict()
    return {where.source: state[key] for key, where in dyn.provenance.items()}


# -- the ResNet-20 that comes trained --------------------------------------------------------------

RESNET = ["--arch", "examples.cifar_models:resnet20"]


def test_the_trained_resnet_is_what_its_plan_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    model, plan, dyn = (f"examples/resnet20-cifar10{end}" for end in (".pt", ".json", "-dyn.pt"))
    assert main(["verify", model, dyn, *RESNET, "--trained"]) == 0
    assert "384 of 384 tensors hold other numbers (trained)" in capsys.readouterr().out
    untrained = str(tmp_path / "untrained.pt")
    assert main(["compile", model, *RESNET, "--splits", plan, "-o", untrained, "--no-check"]) == 0
    trained = load(dyn)
    assert str(load(untrained).cost) == str(trained.cost)
    assert trained.settings.preprocessing is not None
    loaded = cifar_models.resnet20()
    loaded.load_state_dict(torch.load(model, weights_only=True))
    assert loaded.bn1.num_batches_tracked > 1000


def test_evaluation_page_prints_what_the_trained_resnet_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands and the table of docs/evaluation.md, on the records that are committed."""
    page = (EXAMPLES.parent / "docs" / "evaluation.md").read_text()
    block = page.split("```\ns2d calibrate examples/")[1].split("```")[0]
    commands = f"s2d calibrate examples/{block}".replace("\\\n", " ").strip().splitlines()
    shown = page.split(block)[1].split("\n\n")
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main([*shlex.split(command)[1:], "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
    lines = [
        f"| {number} | {stage['share']:.2%} | {stage['accuracy_leaving']:.2%} | "
        f"{stage['accuracy']:.2%} | {stage['macs']:,} |"
        for number, stage in enumerate(document["stages"], start=1)
    ]
    assert [line.rsplit(" ", 2)[0].rstrip() for line in shown[1].splitlines()[2:]] == lines
    sentence = " ".join(shown[2].split())
    assert f"{document['accuracy']:.2%} right of {document['samples']:,} samples" in sentence
    assert f"{document['mean_macs']:,.0f} MACs per sample" in sentence
