"""Exits along depth: what every exit computes, what it costs, and that files keep it.

Heads are held against values that forward hooks take from the model itself, so that nothing of
the compiler decides what is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from passes.cost import CountCost
from passes.depth_exits import AddDepthExits
from passes.extract import ExtractStages
from s2d_compiler import DynamicModel, load, transform, verify
from s2d_compiler.analysis.cost import cost_of
from s2d_compiler.compiler import compile_program
from s2d_compiler.depth_checking import check_depth
from s2d_compiler.depth_plan import HEADS, DepthPlan
from s2d_compiler.depth_report import DepthReport
from s2d_compiler.errors import PlanError, VerifyError
from s2d_compiler.exit_placement import ExitPlacement, place_exits
from s2d_compiler.program import Program
from s2d_compiler.staging import staged_graph_of
from s2d_compiler.tracing import capture
from s2d_compiler.verification.verify import verify_captured
from tests.networks import Drawn, networks, settle
from tests.test_passes import NETWORKS, text_of

timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")

Golden = Callable[[str, str], None]


def seen(model: nn.Module, path: str, *inputs: Tensor) -> Tensor:
    """What the last call of a module returns."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, i, o: found.append(o))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        hook.remove()
    return found[-1]


def headed(x: Tensor, channel: int, kind: str, state: dict[str, Tensor], stage: int) -> Tensor:
    """What a head makes of a value with samples first."""
    x = x.movedim(channel, 1)
    name = f"stages.{stage}.exit_head"
    for k in range(1, HEADS[kind] + 1):
        weight, bias = state[f"{name}.conv{k}.weight"], state[f"{name}.conv{k}.bias"]
        if weight.dim() == 4:
            x = F.conv2d(x, weight, bias, padding=1)
        else:
            x = F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        x = F.relu(x)
    x = x.mean(tuple(range(2, x.dim()))) if x.dim() > 2 else x
    return F.linear(x, state[f"{name}.linear.weight"], state[f"{name}.linear.bias"])


def counted(dyn: DynamicModel, x: Tensor) -> list[int]:
    """MACs per sample up to every exit, by torch's own counter."""
    found = []
    with (
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        for _ in dyn.exits(x):
            found.append(counter.get_total_flops() // 2 // len(x))
    return found


def made(
    model: nn.Module, plan: DepthPlan, x: Tensor, path: Path | None = None
) -> tuple[DynamicModel, ExitPlacement]:
    """A network with exits along depth, and what must be true of every one."""
    program = capture(model, (x,))
    placement = place_exits(program, plan)
    dyn = compile_program(program, plan, assignment=placement)
    check(model, program, dyn, x)
    if path is not None:
        dyn.save(path)
        again = load(path)
        assert (again.plan, again.report, again.cost) == (dyn.plan, dyn.report, dyn.cost)
        with torch.no_grad():
            assert all(map(torch.equal, again(x), dyn(x)))
        verify_captured(program, again)
    return dyn, placement


def check(model: nn.Module, program: Program, dyn: DynamicModel, x: Tensor) -> None:
    """What every exit returns and costs, and what is held for it."""
    with torch.no_grad():
        original, found = model(x), dyn(x)
    assert len(found) == len(dyn.stages) == dyn.plan.stages
    assert torch.equal(found[-1], original), "the last exit is the original's"
    for stage, output in enumerate(found, start=1):
        assert output.shape == original.shape
        assert output.dtype == original.dtype
        with torch.no_grad():
            assert torch.equal(dyn.at_stage(stage)(x), output)
    assert counted(dyn, x) == [stage.cumulative_macs for stage in dyn.cost.stages]
    heads = sum(row.head_macs for row in report(dyn).exits)
    assert dyn.cost.stages[-1].cumulative_macs == dyn.cost.original_macs + heads
    verify_captured(program, dyn)
    assert all(".exit_head." in key for key in dyn.state_dict() if key not in dyn.provenance)
    held = {id(p): p.numel() for p in dyn.parameters()}
    assert sum(stage.parameters for stage in dyn.cost.stages) == sum(held.values())


def report(dyn: DynamicModel) -> DepthReport:
    assert isinstance(dyn.report, DepthReport)
    return dyn.report


# -- random networks -------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, paths: Sequence[str]) -> DepthPlan:
    fractions = draw(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=3, unique=True))
    exits: list[Any] = sorted(fractions)
    if draw(st.booleans()):
        exits = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3, unique=True))
        exits.sort(key=paths.index)
    head = draw(st.sampled_from(list(HEADS)))
    return DepthPlan(tuple(exits), head, draw(st.sampled_from([None, 3])))


@settings(max_examples=10)
@given(data=st.data(), drawn=networks(), seed=st.integers(0, 2**16))
def test_random_networks(
    data: st.DataObject, drawn: Drawn, seed: int, tmp_path_factory: Any
) -> None:
    x = drawn.batch(3, seed)
    model = settle(drawn.model, x, seed)
    with torch.no_grad():
        output = model(x)
    paths = [name for name, module in model.named_modules() if name and list(module.parameters())]
    plan = data.draw(plans(paths), label="plan")
    if not isinstance(output, Tensor) or output.dim() != 2:
        with pytest.raises(PlanError, match="exits along depth are for classifiers"):
            transform(model, plan, (x,))
        return
    try:
        dyn, _ = made(model, plan, x, tmp_path_factory.mktemp("dyn") / "dyn.pt")
    except PlanError as error:  # the same value twice, one after the head, several values
        event(str(error).partition(": ")[2][:40])
        assume(False)
    state = {k: v.detach() for k, v in dyn.state_dict().items()}
    with torch.no_grad():
        outputs = dyn(x)
    for number, (exit_, kind) in enumerate(zip(plan.exits, plan.heads, strict=True)):
        if isinstance(exit_, str):
            value = seen(model, exit_, x)
            found = [headed(value, c, kind, state, number) for c in range(1, value.dim())
                     if value.shape[c] == report(dyn).exits[number].channels]  # fmt: skip
            assert any(torch.allclose(outputs[number], f, atol=1e-12) for f in found)


# -- networks of others ----------------------------------------------------------------------------


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=7)  # type: ignore[no-any-return]


def mobilenet() -> nn.Module:
    return torchvision.models.mobilenet_v3_small(  # type: ignore[no-any-return]
        num_classes=7, width_mult=0.3
    )


def googlenet() -> nn.Module:
    return torchvision.models.googlenet(  # type: ignore[no-any-return]
        num_classes=7, init_weights=False
    )


def swin() -> nn.Module:
    return torchvision.models.SwinTransformer(  # type: ignore[no-any-return]
        [4, 4], 16, [1, 2, 1], [2, 4, 4], [4, 4], num_classes=7
    )


def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    settings = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)]
    return torchvision.models.ConvNeXt(settings, num_classes=7)  # type: ignore[no-any-return]


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [
        MBConvConfig(*b) for b in ((1, 3, 1, 32, 8, 1), (4, 3, 2, 8, 8, 2), (4, 5, 2, 8, 8, 1))
    ]
    return EfficientNet(blocks, 0.2, num_classes=7)  # type: ignore[no-any-return]


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 3), 8, 2, num_classes=7)  # type: ignore[no-any-return]


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=7, **options)


# model, size of its input, exits, and the dimension of the channels where it is not 1
ZOO: dict[str, tuple[Callable[[], nn.Module], int, tuple[str | float, ...], dict[int, int]]] = {
    "resnet18": (resnet, 32, ("maxpool", "layer2.0.conv1", 0.7), {}),
    "mobilenet_v3": (
        mobilenet, 32, ("features.1", "features.4.block.2.fc1", "features.9"), {}
    ),
    "densenet": (
        densenet, 32, ("features.denseblock1.denselayer1", "features.transition1", 0.98), {}
    ),
    "googlenet": (googlenet, 32, ("inception3b.branch3", "inception4c", 0.9), {}),
    "efficientnet": (efficientnet, 32, ("features.1", "features.2.1.block.2", 0.9), {}),
    "swin": (swin, 32, ("features.1.0", "features.2", 0.8), {0: -1, 1: -1}),
    "convnext": (convnext, 32, ("features.1", "features.3.1.block.3"), {1: -1}),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 3, 4, 24, 48, num_classes=7), 32,
        ("conv_proj", "encoder.layers.encoder_layer_1", "encoder.ln"), {1: -1, 2: -1},
    ),
    "timm vit": (
        timm_model("vit_tiny_patch16_224", img_size=32, depth=3), 32,
        ("patch_embed", "blocks.0.attn", "norm"), {0: -1, 1: -1, 2: -1},
    ),
    "timm mixer": (
        lambda: timm.models.mlp_mixer.MlpMixer(7, 64, 3, 32, 3, 24), 64,
        ("blocks.1.mlp_tokens", "blocks.1"), {1: -1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_networks_of_others(name: str, tmp_path: Path) -> None:
    build, size, exits, channels = ZOO[name]
    torch.manual_seed(0)
    model = build().double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    kinds = tuple(list(HEADS)[k % 2] for k in range(len(exits)))
    dyn, placement = made(model, DepthPlan(exits, kinds, 4), x)
    assert check_depth(dyn, placement).tensors == len(dyn.state_dict())
    state = {k: v.detach() for k, v in dyn.state_dict().items()}
    with torch.no_grad():
        outputs = dyn(x)
    for number, exit_ in enumerate(exits):
        if isinstance(exit_, str):
            value = seen(model, exit_, x)
            found = headed(value, channels.get(number, 1), kinds[number], state, number)
            assert torch.allclose(outputs[number], found, atol=1e-10), exit_


# -- places ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = resnet().eval()
    return model, capture(model, None, (3, 32, 32))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.4, 0.6, 0.8, 0.999])
def test_fractions_go_to_the_nearest_block(resnet18: Any, fraction: float) -> None:
    _, program = resnet18
    (head,) = place_exits(program, DepthPlan((fraction,))).heads
    total = cost_of(program, []).original_macs
    assert head.place.is_cut
    assert "." not in head.place.path or head.place.path.endswith(".relu"), "inside no block"
    if 0.1 < fraction < 0.9:
        assert abs(head.place.macs / total - fraction) < 0.08


def test_the_ddi_preset_takes_a_quarter_and_three_quarters() -> None:
    """Eight blocks of one resolution have exits at the second and the sixth, as in DDI's figure."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.conv(x))

    blocks = [nn.Sequential(*(Block() for _ in range(8))) for _ in range(3)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), blocks[0], nn.MaxPool2d(2), blocks[1], nn.MaxPool2d(2),
        blocks[2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    dyn, placement = made(model, DepthPlan(preset="ddi"), x)
    assert [row.path for row in report(dyn).exits] == [
        f"{part}.{block}" for part in (1, 3, 5) for block in (1, 5)
    ]
    assert [row.head for row in report(dyn).exits] == [
        *("branchynet",) * 2, *("branchynet-2",) * 2, *("branchynet-3",) * 2
    ]  # fmt: skip
    assert dyn.plan.stages == 7
    assert place_exits(placement.program, dyn.plan).heads == placement.heads


def test_a_dense_block_can_be_left_where_its_features_are_joined() -> None:
    program = capture(densenet().eval(), None, (3, 32, 32))
    (head,) = place_exits(program, DepthPlan((0.87,))).heads
    assert head.place.operator == "aten.cat.default"
    assert head.place.is_cut


def test_parallel_branches_have_places_inside_them() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(*(nn.Conv2d(3 if not k else 8, 8, 3) for k in range(6)))
            self.second = nn.Sequential(*(nn.Conv2d(3 if not k else 8, 8, 3) for k in range(6)))
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc((self.first(x) * self.second(x)).mean((2, 3)))

    dyn, _ = made(Parallel().eval(), DepthPlan((0.4,)), torch.randn(2, 3, 16, 16))
    assert not report(dyn).exits[0].is_cut
    assert "inside a block" in str(dyn.report)
    assert 0.3 < dyn.cost.stages[0].cumulative_macs / dyn.cost.original_macs < 0.5


def test_the_last_call_of_a_module_counts() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
            self.act, self.fc = nn.ReLU(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(self.act(self.conv(self.stem(x)))))
            return self.fc(self.stem.weight.sum() * x.mean((2, 3)))

    model, x = Repeated().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    dyn, _ = made(model, DepthPlan(("conv",)), x)
    state = {k: v.detach() for k, v in dyn.state_dict().items()}
    assert torch.allclose(
        dyn(x)[0], headed(seen(model, "conv", x), 1, "linear", state, 0), atol=1e-12
    )


def test_heads_end_as_the_original_does(tmp_path: Path) -> None:
    """Exits of a model that returns log-probabilities return log-probabilities."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 4),
        nn.LogSoftmax(1),
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    dyn, _ = made(model, DepthPlan(("1",)), x, tmp_path / "dyn.pt")
    assert torch.allclose(dyn(x)[0].exp().sum(1), torch.ones(3))
    assert "log_softmax" in str(dyn.report)


def test_a_dict_of_one_tensor_is_a_classifier() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(self.body(x).relu().mean((2, 3)))}

    model, x = Named().eval(), torch.randn(2, 3, 8, 8)
    dyn = transform(model, DepthPlan(("body",)), (x,))
    assert [set(output) for output in dyn(x)] == [{"logits"}] * 2
    assert torch.equal(dyn(x)[-1]["logits"], model(x)["logits"])
    verify(model, dyn, (x,))


def test_a_fixed_batch_and_samples_in_the_second_dimension() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.transpose(0, 1)).relu()  # (T, N, C)
            return self.fc(self.second(x).relu().mean(0))

    model, x = Sequence().double().eval(), torch.randn(3, 7, 4, dtype=torch.float64)
    for head in ("linear", "branchynet"):
        dyn, _ = made(model, DepthPlan(("first",), head), x)
        value = seen(model, "first", x).transpose(0, 1)
        state = {k: v.detach() for k, v in dyn.state_dict().items()}
        assert torch.allclose(dyn(x)[0], headed(value, 2, head, state, 0), atol=1e-12)


def test_sizes_of_the_batch_do_not_keep_the_input() -> None:
    """What a stage hands on is what its place holds, though views in later stages take the batch
    size from the network's input."""
    model = timm_model("vit_tiny_patch16_224", img_size=32, depth=2)().eval()
    dyn, _ = made(model, DepthPlan(("blocks.0",), "branchynet", 4), torch.randn(2, 3, 32, 32))
    assert [interface.inputs for interface in dyn.parts.interfaces] == [
        (("input", 0),),
        (("feature", 0, 0),),
    ]
    for count in (1, 5, 0):
        assert [len(o) for o in dyn(torch.randn(count, 3, 32, 32))] == [count] * 2


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["exits", "stages"])
def test_text_of_the_residual_network(step: str, golden: Golden) -> None:
    """The staged graph with its heads, and the stages that are extracted from it."""
    torch.manual_seed(0)
    program = capture(NETWORKS["residual"]().eval(), None, (3, 6, 6))
    placement = place_exits(program, DepthPlan(("bn1", "conv2"), ("branchynet", "linear")))
    graph = AddDepthExits(placement).run(staged_graph_of(program)).graph_module
    if step == "stages":
        graph = ExtractStages().run(graph).graph_module
        graph = CountCost(program).run(graph).graph_module
    golden(f"residual-depth-{step}", text_of(graph))


# -- weights ---------------------------------------------------------------------------------------


def test_heads_begin_with_what_the_seed_gives(resnet18: Any) -> None:
    _, program = resnet18
    plans = [DepthPlan(("layer1", "layer2"), seed=seed) for seed in (0, 1)]
    first, other = (compile_program(program, plan) for plan in plans)
    torch.manual_seed(9)
    again = compile_program(program, plans[0])
    key = "stages.0.exit_head.linear.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    bound = 64**-0.5
    assert 0.9 * bound < float(first.state_dict()[key].abs().max()) <= bound
    assert all(p.requires_grad for p in first.stages[0].parameters())


def test_every_exit_trains(resnet18: Any) -> None:
    model, program = resnet18
    before = copy.deepcopy(model.state_dict())
    dyn = compile_program(program, DepthPlan(("layer1", 0.6), "branchynet", 8))
    dyn.train()
    outputs = dyn(torch.randn(4, 3, 32, 32))
    sum(F.cross_entropy(o, torch.arange(4)) for o in outputs).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in dyn.parameters())
    with torch.no_grad():
        for p in dyn.parameters():
            p -= 0.01 * p.grad  # type: ignore[operator]
    dyn.eval()
    assert verify_captured(program, dyn, trained=True).weights.changed
    with pytest.raises(VerifyError, match="tensors hold other numbers"):
        verify_captured(program, dyn)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_other_types_have_heads_of_their_type() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )
    model = model.to(torch.bfloat16).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    dyn = transform(model, DepthPlan(("1",)), (x,))
    assert {p.dtype for p in dyn.parameters()} == {torch.bfloat16}
    assert torch.equal(dyn(x)[-1], model(x))
    verify(model, dyn, (x,))
