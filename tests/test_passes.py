"""Every pass: its graph before and after as text, what it refuses, and the numbers.

The texts are in ``tests/goldens``; ``pytest --update-goldens`` writes them, for review as a
diff. The numbers are compared with the masked form, in float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import s2d_compiler
from passes.base import Pass, PassResult
from passes.concat import ConcatFeatures
from passes.cost import CountCost
from passes.exits import AddExits
from passes.mask import MaskChannels
from passes.original import AppendOriginal
from passes.split import SplitChannels
from s2d_compiler.analysis.assignment import StageAssignment, assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.compiler import default_pipeline
from s2d_compiler.errors import PassError
from s2d_compiler.masked_evaluation import masked_outputs, static_outputs
from s2d_compiler.provenance import Slice
from s2d_compiler.staging import new_staged_graph
from s2d_compiler.thin import fill
from s2d_compiler.tracing import capture
from s2d_compiler.verifier import verify_graph
from tests.networks import settle

Golden = Callable[[str, str], None]


# -- networks ------------------------------------------------------------------------------


def conv(channels: int, out: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


class Residual(nn.Module):
    """A convolution with batch norm, one with a shortcut around it, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.fc = conv(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        return self.fc(x.mean((2, 3)))


class Shuffled(nn.Module):
    """Half of the channels pass by a convolution, then the halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.fc = conv(3, 8), conv(4, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, used = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, F.relu(self.branch(used))], 1)
        x = x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Versioned(nn.Module):
    """An operator that no rule knows, a mean over channels, and features as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x + torch.cumsum(x, 1) * torch.sigmoid(x.mean(1, keepdim=True))
        return self.conv2(x) + x


class Mixed(nn.Module):
    """Grouped and depthwise convolutions, group norm, gates, a padded shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.depth, self.grouped = conv(12, 12, groups=12), conv(12, 16, groups=2)
        self.norm = nn.GroupNorm(4, 16)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)
        self.gate = nn.Conv2d(16, 1, 1)
        self.point, self.fc = nn.Conv2d(16, 20, 1), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depth(self.stem(x)))
        x = F.pad(x, (0, 0, 0, 0, 2, 2)) + self.norm(self.grouped(x))
        s = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        x = x * s[:, :, None, None] * torch.sigmoid(self.gate(x))
        return self.fc(F.relu(self.point(x)).amax((2, 3)))


class Attention(nn.Module):
    """Tokens: layer norm, two heads of attention, a class token and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.zeros(1, 10, 16))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.fc = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        x = x + self.proj(a.transpose(1, 2).flatten(2))
        return self.fc(self.norm2(x).mean(1))


NETWORKS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "shuffled": Shuffled,
    "versioned": Versioned,
    "mixed": Mixed,
    "attention": Attention,
}
TWO = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}
THREE = {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": [[2, 1], [3, 2]]}}


def assigned(name: str, plan: dict[str, Any]) -> StageAssignment:
    """A network in float64 whose output depends on its input, and a plan applied to it."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    settle(model, x)
    program = capture(model, (x,))
    return assign(program, analyse_channels(program), s2d_compiler.Plan.from_dict(plan))


def after(assignment: StageAssignment, *steps: str) -> fx.GraphModule:
    """The staged graph after the first passes, up to and with those named."""
    graph = new_staged_graph(assignment)
    for each in default_pipeline(assignment).passes:
        if each.name in steps:
            graph = each.run(graph).graph_module
    return graph


# -- texts ---------------------------------------------------------------------------------


def text_of(graph_module: fx.GraphModule) -> str:
    """One line per node: its stage, what it computes, what its tensors are slices of."""
    lines = [_line(graph_module, node) for node in graph_module.graph.nodes]
    for name, stage in graph_module.named_modules():
        if name and isinstance(stage, fx.GraphModule):
            lines += [
                "",
                f"{name}:",
                *(_line(stage, n, graph_module, name) for n in stage.graph.nodes),
            ]
    return "\n".join(lines) + "\n"


def _line(
    owner: fx.GraphModule, node: fx.Node, table: fx.GraphModule | None = None, prefix: str = ""
) -> str:
    stage = node.meta.get("stage", "")
    macs = f"  {node.meta['macs']} MACs" if node.meta.get("macs") else ""
    if node.op == "output":
        return f"     return {_text(node.args[0])}"
    if node.op == "placeholder":
        return f"{stage:>3}  {node.name} = input"
    args = ", ".join(map(_text, node.args))
    if node.op == "call_function":
        target = node.target
        name = target._opname if isinstance(target, torch._ops.OpOverload) else target.__name__
        return f"{stage:>3}  {node.name} = {name}({args}){macs}"
    slices = (table or owner).meta["slices"]
    full = f"{prefix}.{node.target}" if prefix else str(node.target)
    held = [
        f"{key.removeprefix(full).removeprefix('.')} {_slice(where)}"
        for key, where in slices.items()
        if key == full or key.startswith(f"{full}.")
    ]
    if node.op == "get_attr":
        return f"{stage:>3}  {node.name} = {node.target} {'; '.join(held)}".rstrip()
    called = owner.get_submodule(str(node.target))
    if isinstance(called, fx.GraphModule):
        return f"{stage:>3}  {node.name} = {node.target}({args})"
    kept = [h for h in held if h.startswith(("weight", "bias"))]
    what = type(called).__name__ + (f": {'; '.join(kept)}" if kept else "")
    return f"{stage:>3}  {node.name} = {node.target}({args})  {what}{macs}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _slice(where: Slice) -> str:
    """``conv2.weight[0:4, :, :, :]``, with a list where positions are no range."""

    def text(positions: tuple[int, ...] | None) -> str:
        if positions is None:
            return ":"
        if positions == tuple(range(positions[0], positions[0] + len(positions))):
            return f"{positions[0]}:{positions[-1] + 1}"
        return f"{list(positions)}"

    return f"{where.source}[{', '.join(map(text, where.index))}]"


STEPS = {
    "split": ("split-channels",),
    "concat": ("split-channels", "concat-features"),
    "exits": ("split-channels", "concat-features", "add-exits"),
    "extract": ("split-channels", "concat-features", "add-exits", "extract-stages"),
    "original": (
        "split-channels",
        "concat-features",
        "add-exits",
        "extract-stages",
        "append-original",
    ),
    "cost": (
        "split-channels",
        "concat-features",
        "add-exits",
        "extract-stages",
        "append-original",
        "count-cost",
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_text_of_the_residual_network(step: str, golden: Golden) -> None:
    plan = THREE | {"stages": 3, "default": {"split": [4, 6], "concat": "all"}, "final": "original"}
    golden(f"residual-{step}", text_of(after(assigned("residual", plan), *STEPS[step])))


@pytest.mark.parametrize("name", ["shuffled", "versioned"])
def test_text_of_exits(name: str, golden: Golden) -> None:
    golden(f"{name}-exits", text_of(after(assigned(name, TWO), *STEPS["exits"])))


@pytest.mark.parametrize("name", ["residual", "versioned"])
def test_text_of_the_masked_network(name: str, golden: Golden) -> None:
    assigned_ = assigned(name, TWO)
    made = MaskChannels(assigned_).run(new_staged_graph(assigned_)).graph_module
    golden(f"{name}-masked", text_of(made))


def test_masks_need_an_empty_graph() -> None:
    plan = assigned("residual", TWO)
    with pytest.raises(PassError, match="mask-channels needs a graph that is empty"):
        MaskChannels(plan).run(after(plan, "split-channels"))


# -- numbers -------------------------------------------------------------------------------


def run(graph_module: fx.GraphModule, assignment: StageAssignment, *inputs: Tensor) -> Any:
    """Outputs of a staged graph, its weights filled in."""
    fill(graph_module, graph_module.meta["slices"], assignment.program)
    graph_module.recompile()
    with torch.no_grad():
        return graph_module.eval()(*inputs)


def assert_equal(found: Any, wanted: Any) -> None:
    """Equal up to 1e-10 of the spread of what is wanted over its inputs."""
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        spread = float((want - want.mean(0)).abs().max())
        assert spread > 1e-6 * float(want.abs().max()), "the output hardly depends on the input"
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-10 * spread


def sample() -> Tensor:
    return torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("plan", [TWO, THREE], ids=["two", "three"])
def test_split_equals_the_masked_form_without_reuse(name: str, plan: dict[str, Any]) -> None:
    assignment = assigned(name, plan)
    alone = replace(assignment, reads=dict.fromkeys(assignment.reads, frozenset()))
    found = run(after(assignment, *STEPS["split"]), assignment, sample())
    assert_equal(found, masked_outputs(alone, (sample(),))[-1])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("plan", [TWO, THREE], ids=["two", "three"])
def test_concat_equals_the_masked_form(name: str, plan: dict[str, Any]) -> None:
    assignment = assigned(name, plan)
    found = run(after(assignment, *STEPS["concat"]), assignment, sample())
    assert_equal(found, masked_outputs(assignment, (sample(),))[-1])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("step", ["exits", "extract"])
def test_every_exit_equals_the_masked_form(name: str, step: str) -> None:
    assignment = assigned(name, THREE)
    found = run(after(assignment, *STEPS[step]), assignment, sample())
    for got, want in zip(found, masked_outputs(assignment, (sample(),)), strict=True):
        assert_equal(got, want)


def test_the_original_is_appended_whole() -> None:
    assignment = assigned("mixed", TWO | {"stages": 2, "final": "original"})
    network = after(assignment, *STEPS["original"])
    found = run(network, assignment, sample())
    assert_equal(found[-1], static_outputs(assignment, (sample(),)))
    assert torch.equal(found[-1][0], static_outputs(assignment, (sample(),))[0])
    last = network.get_submodule("stages.1")
    assert [n.name for n in last.graph.nodes if n.op == "placeholder"] == ["x"]


def test_split_alone_joins_no_stages() -> None:
    """Without reuse stage 2 computes the same whatever stage 1 holds, up to the head."""
    assignment = assigned("residual", TWO)
    graph = after(assignment, *STEPS["split"])
    for node in graph.graph.nodes:
        if node.op == "output" or node.target is torch.ops.aten.cat.default:
            continue
        stages = {operand.meta["stage"] for operand in node.all_input_nodes} - {0}
        assert node.meta.get("kind") == "Linear" or stages <= {node.meta["stage"]}


def test_extracted_stages_hand_on_only_what_is_read() -> None:
    network = after(assigned("residual", THREE), *STEPS["extract"])
    for name in ("stages.0", "stages.1", "stages.2"):
        stage = network.get_submodule(name)
        assert not [n for n in stage.graph.nodes if n.op == "placeholder" and not n.users]
    for node in network.graph.nodes:
        assert node.users or node.op in ("output", "placeholder"), node.name


def test_cost_counts_the_weights_that_the_stages_hold() -> None:
    assignment = assigned("residual", TWO)
    network = after(assignment, *STEPS["extract"])
    CountCost(assignment.program).run(network)
    macs = {
        (i, node.name.removeprefix(f"stages_{i}_")): node.meta["macs"]
        for i in (0, 1)
        for node in network.get_submodule(f"stages.{i}").graph.nodes
        if node.meta.get("kind") in ("Conv2d", "Linear")
    }
    positions = 6 * 6
    assert sorted(macs.values()) == sorted(
        [
            4 * 3 * 9 * positions,  # conv1, stage 1 and 2
            4 * 3 * 9 * positions,
            4 * 4 * 9 * positions,  # conv2, stage 1
            4 * 8 * 9 * positions,  # conv2, stage 2, reading both
            4 * 5,  # heads
            8 * 5,
        ]
    )


# -- refusals ------------------------------------------------------------------------------

STATES = {
    "empty": (),
    "split": STEPS["split"],
    "exits": STEPS["exits"],
    "extracted": STEPS["extract"],
}
REFUSED = [
    ("split-channels", "split"),
    ("split-channels", "exits"),
    ("split-channels", "extracted"),
    ("concat-features", "empty"),
    ("concat-features", "extracted"),
    ("add-exits", "empty"),
    ("add-exits", "extracted"),
    ("extract-stages", "empty"),
    ("extract-stages", "split"),
    ("extract-stages", "extracted"),
    ("append-original", "empty"),
    ("append-original", "split"),
    ("append-original", "exits"),
    ("count-cost", "empty"),
    ("count-cost", "split"),
    ("count-cost", "exits"),
]


def pass_named(name: str, assignment: StageAssignment) -> Pass:
    if name == "append-original":
        return AppendOriginal(assignment.program)
    pipeline = default_pipeline(assignment)
    return pipeline.passes[pipeline.index(name)]


@pytest.mark.parametrize(("name", "state"), REFUSED)
def test_wrong_order_is_refused(name: str, state: str) -> None:
    assignment = assigned("residual", TWO)
    graph = after(assignment, *STATES[state])
    before = text_of(graph)
    with pytest.raises(PassError, match=name) as caught:
        pass_named(name, assignment).run(graph)
    assert caught.value.__notes__ == [f"while running {pass_named(name, assignment)!r}"]
    assert text_of(graph) == before


def test_concat_twice_changes_nothing_more() -> None:
    assignment = assigned("residual", THREE)
    once = after(assignment, *STEPS["concat"])
    x = sample()
    again = ConcatFeatures(assignment).run(after(assignment, *STEPS["concat"])).graph_module
    assert set(again.meta["slices"].items()) == set(once.meta["slices"].items())
    assert_equal(run(again, assignment, x), run(once, assignment, x))


def test_nothing_to_reuse_changes_nothing() -> None:
    plan = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "none"}}
    assignment = assigned("residual", plan)
    graph = after(assignment, *STEPS["split"])
    before = text_of(graph)
    assert not ConcatFeatures(assignment).run(graph).changed
    assert text_of(graph) == before


# -- the contract of a pass ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Edit(Pass):
    """Does what it is told, and says what it is told to say."""

    name: ClassVar[str] = "edit"
    edit: Callable[[fx.GraphModule], None]
    changed: bool = True
    promise: str = ""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.edit(graph_module)
        return PassResult(graph_module, self.changed)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if self.promise:
            raise PassError(self.promise)


def add_relu(graph_module: fx.GraphModule) -> None:
    """A second relu behind the first."""
    first = next(n for n in graph_module.graph.nodes if n.target is torch.ops.aten.relu.default)
    with graph_module.graph.inserting_after(first):
        second = graph_module.graph.call_function(torch.ops.aten.relu.default, (first,))
    second.meta = dict(first.meta)
    first.replace_all_uses_with(second, delete_user_cb=lambda user: user is not second)


@pytest.fixture
def exits() -> fx.GraphModule:
    """The residual network's graph with exits, its weights not filled in."""
    return after(assigned("residual", TWO), *STEPS["exits"])


def test_a_pass_that_hides_a_change_is_caught(exits: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="edit changed the graph and said that it did not"):
        Edit(add_relu, changed=False).run(exits)


def test_a_pass_that_tells_is_not(exits: fx.GraphModule) -> None:
    assert Edit(add_relu).run(exits).changed
    assert not Edit(lambda graph_module: None, changed=False).run(exits).changed


def test_errors_keep_their_class_and_name_the_pass(exits: fx.GraphModule) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        Edit(lambda graph_module: operator.truediv(1, 0) and None).run(exits)
    assert caught.value.__notes__[0].startswith("while running Edit(edit=")


def test_broken_promises_are_errors(exits: fx.GraphModule) -> None:
    with pytest.raises(PassError, match="it is not green") as caught:
        Edit(add_relu, promise="it is not green").run(exits)
    assert "while running Edit(" in caught.value.__notes__[0]


def test_a_pass_must_leave_a_verified_graph(exits: fx.GraphModule) -> None:
    def forget(graph_module: fx.GraphModule) -> None:
        add_relu(graph_module)
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.meta.pop("stage")

    with pytest.raises(PassError, match=r"has no stage; set meta\['stage'\]"):
        Edit(forget).run(exits)


# -- the verifier --------------------------------------------------------------------------


def node_of(graph_module: fx.GraphModule, stage: int, kind: str) -> fx.Node:
    return next(
        n
        for n in graph_module.graph.nodes
        if n.meta.get("stage") == stage and n.meta.get("kind") == kind
    )


def no_stage(graph_module: fx.GraphModule) -> str:
    del node_of(graph_module, 2, "BatchNorm2d").meta["stage"]
    return "'stages_1_bn1'.*has no stage"


def later_stage(graph_module: fx.GraphModule) -> str:
    early, late = (node_of(graph_module, stage, "Conv2d") for stage in (1, 2))
    late.prepend(early)
    norm = node_of(graph_module, 1, "BatchNorm2d")
    norm.args = (late,)
    return "of stage 1 reads 'stages_1_conv1' of stage 2"


def nobodys_reads_a_stage(graph_module: fx.GraphModule) -> str:
    node_of(graph_module, 2, "BatchNorm2d").meta["stage"] = 0
    return "of stage 0 reads 'stages_1_conv1' of stage 2"


def exit_of_a_later_stage(graph_module: fx.GraphModule) -> str:
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    first, second = output.args[0]
    output.args = ((second, first),)
    return "the exit of stage 1 is 'stages_1_fc' of stage 2"


def no_module(graph_module: fx.GraphModule) -> str:
    node_of(graph_module, 1, "Linear").target = "stages.0.gone"
    return "calls 'stages.0.gone', which does not exist"


def no_attribute(graph_module: fx.GraphModule) -> str:
    node = node_of(graph_module, 1, "Linear")
    with graph_module.graph.inserting_before(node):
        graph_module.graph.create_node("get_attr", "stages.0.gone").meta["stage"] = 1
    return "reads 'stages.0.gone', which does not exist"


def slice_of_another_length(graph_module: fx.GraphModule) -> str:
    key = "stages.1.conv2.weight"
    where = graph_module.meta["slices"][key]
    graph_module.meta["slices"][key] = replace(where, index=((0, 1, 2), *where.index[1:]))
    return r"stages.1.conv2.weight has shape \(4, 8, 3, 3\), its slice 3 positions"


def slice_of_another_rank(graph_module: fx.GraphModule) -> str:
    key = "stages.1.conv2.weight"
    where = graph_module.meta["slices"][key]
    graph_module.meta["slices"][key] = replace(where, index=where.index[:2])
    return r"stages.1.conv2.weight has shape \(4, 8, 3, 3\), its slice 2 dimensions"


def slice_of_nothing(graph_module: fx.GraphModule) -> str:
    graph_module.meta["slices"]["stages.0.gone.weight"] = Slice("conv1.weight", (None,) * 4)
    return r"meta\['slices'\] names 'stages.0.gone.weight', which does not exist"


CORRUPTIONS = [
    no_stage,
    later_stage,
    nobodys_reads_a_stage,
    exit_of_a_later_stage,
    no_module,
    no_attribute,
    slice_of_another_length,
    slice_of_another_rank,
    slice_of_nothing,
]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_verifier_sees_every_corruption(
    corrupt: Callable[[fx.GraphModule], str], exits: fx.GraphModule
) -> None:
    verify_graph(exits)
    message = corrupt(exits)
    with pytest.raises(PassError, match=message):
        verify_graph(exits)


def node_in_another_stage(stage: fx.GraphModule) -> str:
    node_of(stage, 1, "Conv2d").meta["stage"] = 2
    return "of stage 2 stands in stage 1"


def no_module_of_a_stage(stage: fx.GraphModule) -> str:
    node_of(stage, 1, "Linear").target = "gone"
    return "calls 'gone', which does not exist"


@pytest.mark.parametrize("corrupt", [node_in_another_stage, no_module_of_a_stage])
def test_verifier_looks_into_extracted_stages(
    corrupt: Callable[[fx.GraphModule], str],
) -> None:
    network = after(assigned("residual", TWO), *STEPS["extract"])
    verify_graph(network)
    stage = network.get_submodule("stages.0")
    assert isinstance(stage, fx.GraphModule)
    message = corrupt(stage)
    with pytest.raises(PassError, match=message):
        verify_graph(network)


def test_the_passes_of_a_pipeline_have_names_and_print_in_one_line() -> None:
    assignment = assigned("residual", TWO | {"final": "original"})
    for each in default_pipeline(assignment).passes:
        assert len(repr(each)) < 60
        assert "\n" not in repr(each)
    assert isinstance(default_pipeline(assignment).passes[0], SplitChannels)
    assert [type(p) for p in default_pipeline(assignment).passes][-2:] == [
        AppendOriginal,
        CountCost,
    ]
    assert AddExits(assignment).name == "add-exits"
