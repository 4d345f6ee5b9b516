"""Plans of exits along depth: as data, against a model, and networks that are not theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from passes.base import Pass, PassResult, Pipeline
from passes.depth_exits import AddDepthExits
from s2d_compiler import DynamicModel, transform
from s2d_compiler.compiler import compile_program
from s2d_compiler.depth_checking import check_depth
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.errors import CheckError, PassError, PlanError, VerifyError
from s2d_compiler.exit_placement import ExitPlacement, place_exits
from s2d_compiler.program import Program
from s2d_compiler.staging import staged_graph_of
from s2d_compiler.tracing import capture
from s2d_compiler.verification.verify import verify_captured
from tests.errors.case import Case

GOOD: dict[str, Any] = {"exits": ["first", 0.75]}


def conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, 3, padding=1)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class Two(nn.Module):
    """Returns two values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y.relu(), y.sigmoid()


class Net(nn.Module):
    """Two convolutions, a block that returns two values, a table, a head that a mean feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.two = conv(3), conv(), Two()
        self.scale = nn.Parameter(torch.ones(4))
        self.table, self.fc = Lambda(lambda scale: scale.exp()), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.two(self.second(self.first(x).relu()))
        return self.fc((a + b).mean((2, 3)) * self.table(self.scale))  # type: ignore[no-any-return]


class Odd(nn.Module):
    """Whole numbers, and windows in the batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.fc = conv(3), nn.Linear(4, 4), nn.Linear(4, 5)
        self.whole = Lambda(lambda x: x.long() + 1)
        self.fold = Lambda(
            lambda x: x.reshape(x.shape[0], 4, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(
                -1, 16, 4
            )
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.inner(self.fold(y * self.whole(y))).softmax(1)
        return self.fc(y.reshape(x.shape[0], -1, 4).mean(1))  # type: ignore[no-any-return]


class Nested(nn.Module):
    """One value under two names, and a module that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.third, self.fc = conv(3), conv(), nn.Linear(4, 5)
        self.outer, self.skip = nn.Sequential(conv()), Lambda(lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(self.skip(self.first(x).relu())).relu()
        return self.fc(self.third(x).mean((2, 3)))  # type: ignore[no-any-return]


def returning(change: Callable[[Tensor], Any]) -> nn.Module:
    """A model of another kind of output."""
    return nn.Sequential(conv(3), Lambda(change))


@cache
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), None, (3, 8, 8))


def placed() -> ExitPlacement:
    return place_exits(program(), DepthPlan(("first", "second")))


def data(place: str, value: str, rule: str, remedy: str, **changes: Any) -> Case:
    """A plan that is wrong in what ``changes`` says."""

    def trigger(folder: Path) -> object:
        return DepthPlan.from_dict(GOOD | changes, "spec.json")

    return Case(trigger, PlanError, place, value, rule, remedy)


def against(
    exits: list[Any], *parts: str, model: Callable[[], nn.Module] = Net, **more: Any
) -> Case:
    """A plan that does not fit its model."""

    def trigger(folder: Path) -> object:
        plan = DepthPlan.from_dict({"exits": exits, **more}, "spec.json")
        return transform(model().eval(), plan, (torch.zeros(2, 3, 8, 8),))

    return Case(trigger, PlanError, *parts)


def changed(change: Callable[[DynamicModel], Any], *parts: str) -> Case:
    """A network that is changed in memory, and verified."""

    def trigger(folder: Path) -> object:
        dyn = compile_program(program(), placed().plan)
        change(dyn)
        return verify_captured(program(), dyn)

    return Case(trigger, VerifyError, *parts)


def checked(
    change: Callable[[DynamicModel], Any], *parts: str, steps: Any = None
) -> Case:  # fmt: skip
    """A network that is changed in memory, and checked as s2d-compile does."""

    def trigger(folder: Path) -> object:
        placement = placed()
        dyn = compile_program(program(), placement.plan, assignment=placement, pipeline=steps)
        change(dyn)
        return check_depth(dyn, placement, steps=steps)

    return Case(trigger, CheckError, *parts)


def unchanged(dyn: DynamicModel) -> None:
    """Leave it as it is."""


def head_of(dyn: DynamicModel) -> Any:
    stage: Any = dyn.stages[0]
    return stage.get_submodule("exit_head.linear")


def another_number(dyn: DynamicModel) -> None:
    with torch.no_grad():
        head_of(dyn).bias[0] += 1


def another_shape(dyn: DynamicModel) -> None:
    head_of(dyn).bias = nn.Parameter(torch.zeros(5, 1))


def owned(dyn: DynamicModel) -> None:
    dyn.parts = replace(dyn.parts, owners=(1, 2))


def twice(dyn: DynamicModel) -> None:
    """Stage 1 runs its convolution once more for nothing, and says what that costs."""
    stage: Any = dyn.stages[0]
    call = next(node for node in stage.graph.nodes if node.target == "first")
    with stage.graph.inserting_after(call):
        stage.graph.call_module("first", call.args)
    stage.recompile()
    rows = list(dyn.cost.stages)
    layer = next(row for row in rows[0].layers if row.name == "first")
    rows[0] = replace(rows[0], macs=rows[0].macs + layer.macs, layers=(*rows[0].layers, layer))
    rows = [replace(r, cumulative_macs=r.cumulative_macs + layer.macs) for r in rows]
    dyn.parts = replace(dyn.parts, cost=replace(dyn.cost, stages=tuple(rows)))


@dataclass(frozen=True)
class Doubled(Pass):
    """A pass that is wrong about one exit."""

    name: ClassVar[str] = "doubled"
    exit: int

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        output = next(node for node in graph_module.graph.nodes if node.op == "output")
        given: Any = output.args[0]
        exits = list(given)
        (leaf,) = exits[self.exit]
        with graph_module.graph.inserting_before(output):
            twice = graph_module.graph.call_function(torch.ops.aten.add.Tensor, (leaf, leaf))
        twice.meta = dict(leaf.meta)
        exits[self.exit] = (twice,)
        output.args = (tuple(exits),)
        return PassResult(graph_module, changed=True)


def doubled(number: int) -> Callable[[Pipeline], Pipeline]:
    return lambda pipeline: pipeline.insert_after("add-depth-exits", Doubled(number))


def spoiled(folder: Path) -> object:
    """What the pass made is cut short."""
    step = AddDepthExits(placed())
    made = step.run(staged_graph_of(program())).graph_module
    output = next(node for node in made.graph.nodes if node.op == "output")
    exits: Any = output.args[0]
    output.args = (exits[:1],)
    return step.ensures(made)


def again(folder: Path) -> object:
    step = AddDepthExits(placed())
    return step.run(step.run(staged_graph_of(program())).graph_module)


CLASSIFIERS = "exits along depth are for classifiers"
OTHERWISE = "name a part that does (--submodule), or cut channels instead"
REMEDY = "compile the model again"
REPORT = "please report the model and the plan"
CASES: dict[str, Case] = {
    # the plan itself
    "no exits": data("spec.json: exits", "there are", "none", "name module paths", exits=[]),
    "exits missing": Case(
        lambda folder: DepthPlan.from_dict({"head": "linear"}, "spec.json"), PlanError,
        "spec.json: exits", "missing", "a plan needs exits", "add it",
    ),
    "exits no list": data(
        "spec.json: exits", '"layer1"', "is no list", "write module paths", exits="layer1"
    ),
    "too many exits": data(
        "spec.json: exits", "257", "exits are too many", "give 256 at most",
        exits=[f"a{k}" for k in range(257)],
    ),
    "blank path": data(
        "spec.json: exits[1]", "empty path", "names no module", "write one, e.g. layer2.1",
        exits=["a", " "],
    ),
    "no path": data(
        "spec.json: exits[0]", "[0.5]", "neither a module path nor a fraction",
        'write e.g. "layer2.1" or 0.5', exits=[[0.5]],
    ),
    "no fraction": data(
        "spec.json: exits[0]", "1.5", "lie between 0 and 1", "write e.g. 0.5", exits=[1.5]
    ),
    "exit twice": data(
        "spec.json: exits[1]", '"a"', "stands here twice", "drop one", exits=["a", "a"]
    ),
    "fractions go back": data(
        "spec.json: exits", "[0.5, 0.25]", "go back", "write exits in the order of depth",
        exits=[0.5, "a", 0.25],
    ),
    "head": data("spec.json: head", '"mlp"', 'is not "linear"', "write one of", head="mlp"),
    "one of the heads": data(
        "spec.json: head[1]", '"mlp"', 'is not "linear"', "write one of", head=["linear", "mlp"]
    ),
    "heads": data("spec.json: head", "1 kinds", "for 2 exits", "give one per", head=["linear"]),
    "width": data("spec.json: width", "0", "is no number of channels", "give one", width=0),
    "seed": data("spec.json: seed", "-1", "is no whole number", "give one, e.g. 0", seed=-1),
    "preset": data(
        "spec.json: preset", '"msd"', 'is not "ddi"', "write one of these", preset="msd"
    ),
    "null": data("spec.json: width", "null", "says nothing", "leave the key out", width=None),
    # a model
    "unknown path": against(
        ["frist"], "spec.json: exits[0]", '"frist"', "the model has no such module",
        "near it are first",
    ),
    "nothing like it": against(
        ["qqq"], "spec.json: exits[0]", '"qqq"', "the model has no such module",
        "it has first, second",
    ),
    "left nothing": against(
        ["skip"], "spec.json: exits[0]", '"skip"', "left no operator",
        "name the one before it", model=Nested,
    ),
    "two values": against(
        ["two"], "spec.json: exits[0]", '"two"', "returns 2 values", "name a module inside it"
    ),
    "not of the input": against(
        ["table"], "spec.json: exits[0]", '"table"', "does not depend on the input",
        "name a module on the way",
    ),
    "whole numbers": against(
        ["whole"], "spec.json: exits[0]", '"whole"', "holds torch.int64 numbers",
        "a head reads floating-point ones", model=Odd,
    ),
    "windows": against(
        ["fold"], "spec.json: exits[0]", '"fold"', "no dimension of one entry per sample",
        "name the block around it", model=Odd,
    ),
    "no value": against(
        [0.5], "spec.json: exits[0]", "0.5", "no value that an exit could read",
        "name a module path instead",
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
    ),
    "after the head": against(
        ["fc"], "spec.json: exits[0]", '"fc"', "saves nothing", "name an earlier place"
    ),
    "the same value": against(
        ["outer", "outer.0"], "spec.json: exits[1]", '"outer.0"', "is the same value as",
        "name another place", model=Nested,
    ),
    "back": against(
        ["second", "first"], "spec.json: exits[1]", '"first"', "is computed before",
        "write exits in the order of depth",
    ),
    "no quarters": against(
        [], "spec.json: preset", '"ddi"', "no resolution with two places",
        'give "exits" instead', preset="ddi",
        model=lambda: nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 5)),
    ),
    "preset and other exits": against(
        [0.1], "spec.json: exits", "[0.273", "not the exits that the preset gives",
        "drop one of the two keys", preset="ddi", model=Nested,
    ),
    "several outputs": against(
        ["0"], "spec.json", "2 values", CLASSIFIERS, OTHERWISE,
        model=lambda: returning(lambda x: (x.mean((2, 3)), x)),
    ),
    "maps": against(
        ["0"], "spec.json", "(N, 4, 8, 8)", CLASSIFIERS, OTHERWISE,
        model=lambda: returning(lambda x: x.relu()),
    ),
    "classes by samples": against(
        ["0"], "spec.json", "(4, N)", CLASSIFIERS, OTHERWISE,
        model=lambda: returning(lambda x: x.mean((2, 3)).t()),
    ),
    # passes
    "pass twice": Case(
        again, PassError, "add-depth-exits", "this one is with exits", "needs a graph that is",
        "run it after new_staged_graph",
    ),
    "pass spoiled": Case(
        spoiled, PassError, "add-depth-exits", "left", "must be a tuple of 3 exits",
        "give output.args one per stage",
    ),
    # the self-check
    "head changed": checked(
        another_number, "stages.0.exit_head.linear.bias", "was changed",
        "does not hold what the plan's seed gives", REPORT,
    ),
    "an exit differs": checked(
        unchanged, "stage 1", "of the output's spread",
        "differs from the head on the original's value", REPORT, steps=doubled(0),
    ),
    "the last exit differs": checked(
        unchanged, "the last exit", "of the output's spread", "must be equal bit for bit", REPORT,
        steps=doubled(2),
    ),
    # verification
    "another number": changed(
        another_number, "stages.0.exit_head.linear.bias", "1 of", "hold other numbers", "--trained"
    ),
    "another shape": changed(
        another_shape, "stages.0.exit_head.linear.bias", "(5, 1)", "(5,)", REMEDY
    ),
    "owners": changed(
        owned, "the network says", "2 channels", "exits along depth cut none", REMEDY
    ),
    "work of another stage": changed(
        twice, "stage 1", "MACs, its part of the model", "computes what belongs to another stage",
        REMEDY,
    ),
}  # fmt: skip
