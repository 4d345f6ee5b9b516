"""What goes in and what comes out: several inputs, structured outputs, dense outputs, parts."""

from __future__ import annotations

import collections
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from s2d_compiler import DynamicModel, Plan, load, transform
from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import analyse_channels
from s2d_compiler.checking import Proof, check
from s2d_compiler.compiler import compile_program
from s2d_compiler.errors import FormatError, InputShapeError, UsageError
from s2d_compiler.format import from_data, load_to_show, to_data
from s2d_compiler.tracing import capture

import torchvision  # isort: skip

EVERYTHING = os.environ.get("S2D_ZOO") == "all"
REUSE = Plan.from_dict(
    {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "all"}, "order": "l1"}
)
NO_REUSE = Plan.from_dict(
    {"stages": 3, "groups": 8, "default": {"split": [4, 6], "concat": "none"}}
)
ORIGINAL_LAST = Plan.from_dict(
    {
        "stages": 3,
        "groups": 8,
        "default": {"split": [4, 6], "concat": "all"},
        "final": "original",
    }
)


class Pair(NamedTuple):
    """What a network may return."""

    logits: Tensor
    features: Tensor


@dataclass
class Answer:
    """Likewise, as a class that is registered with pytree."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


pytree.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Bag(OrderedDict[str, Tensor]):
    """Likewise, as dictionaries with attributes are."""


pytree.register_pytree_node(
    Bag, lambda d: (list(d.values()), list(d)), lambda v, keys: Bag(zip(keys, v, strict=True))
)


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.b(torch.relu(self.a(x))))
        return self.fc(features.mean((2, 3))), features


class Returns(Net):
    """Returns its logits and features in some structure."""

    def __init__(self, structure: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, x: Tensor) -> Any:
        return self.structure(*self.parts(x))


def images(size: int = 8, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def proven(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: dict[str, Any] | None = None,
    plan: Plan = REUSE,
) -> tuple[DynamicModel, Proof]:
    program = capture(model.double().eval(), inputs, example_kwargs=keywords)
    assignment = assign(program, analyse_channels(program), plan)
    dyn = compile_program(program, plan, assignment=assignment)
    proof = check(dyn, assignment)
    assert not proof.is_vacuous
    return dyn, proof


def same(a: Any, b: Any) -> bool:
    left, right = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(left) == len(right) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


# -- outputs --------------------------------------------------------------------------------------

OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, f: (y, f),
    "tuple of one": lambda y, f: (y,),
    "list": lambda y, f: [f, y],
    "dict": lambda y, f: {"out": y, "features": f},
    "numbers as keys": lambda y, f: {0: y, 1: f},
    "ordered dict": lambda y, f: OrderedDict(out=y, aux=f),
    "default dict": lambda y, f: collections.defaultdict(list, {"out": y}),
    "nested": lambda y, f: {"a": [y, (f, f * 2)], "nothing": None, "number": 3, "text": "x"},
    "twice": lambda y, f: (y, y),
    "torch's own": lambda y, f: (torch.max(f.flatten(2), 2), y),
}
CLASSES: dict[str, tuple[type, Callable[[Tensor, Tensor], Any]]] = {
    "named tuple": (Pair, Pair),
    "dataclass": (Answer, lambda y, f: Answer(y)),
    "nested dataclass": (Answer, lambda y, f: Answer(y, (f, f))),
    "registered class": (Bag, lambda y, f: Bag(logits=y, features=f)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_stage_returns_the_structure_of_the_original(name: str, tmp_path: Path) -> None:
    model, x = Returns(OUTPUTS[name]), images()
    dyn, _ = proven(model, (x,))
    dyn.save(tmp_path / "dyn.pt")
    again = load(tmp_path / "dyn.pt")
    for found, reread in zip(dyn(x), again(x), strict=True):
        assert pytree.tree_structure(found) == pytree.tree_structure(model(x))
        assert pytree.tree_structure(reread) == pytree.tree_structure(model(x))
        assert same(found, reread)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_come_back_when_the_reader_hands_them_in(name: str, tmp_path: Path) -> None:
    kind, structure = CLASSES[name]
    model, x = Returns(structure), images()
    dyn, _ = proven(model, (x,))
    dyn.save(tmp_path / "dyn.pt")
    again = load(tmp_path / "dyn.pt", types=[kind])
    for found, reread in zip(dyn(x), again(x), strict=True):
        assert type(found) is type(reread) is kind
        assert pytree.tree_structure(found) == pytree.tree_structure(model(x))
        assert same(found, reread)


def test_a_named_tuple_comes_back_by_its_fields(tmp_path: Path) -> None:
    x = images()
    dyn, _ = proven(Returns(Pair), (x,))
    dyn.save(tmp_path / "dyn.pt")
    (*_, last) = load(tmp_path / "dyn.pt")(x)
    assert type(last).__name__ == "Pair"
    assert last._fields == ("logits", "features")
    assert torch.equal(last.logits, dyn(x)[-1].logits)


def test_a_class_that_is_not_handed_in_is_refused_and_can_be_looked_at(tmp_path: Path) -> None:
    dyn, _ = proven(Returns(Answer), (images(),))
    dyn.save(tmp_path / "dyn.pt")
    with pytest.raises(FormatError, match=r"test_interfaces\.Answer.*load\(path, types=\[Answer\]"):
        load(tmp_path / "dyn.pt")
    assert load_to_show(tmp_path / "dyn.pt").cost == dyn.cost


def spec_of(kind: str, context: Any, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "context": context, "children": [None, None], **more}


CRAFTED = {
    "a default dict that imports": spec_of("defaultdict", ["antigravity.x", ["a", "b"]]),
    "a class that nobody handed in": spec_of("class", [], **{"class": "subprocess.Popen"}),
    "a named tuple with code in a field": spec_of(
        "namedtuple", ["a", "b=print('x')"], **{"class": "m.N"}
    ),
    "a named tuple with code in its name": spec_of("namedtuple", ["a", "b"], **{"class": "m.N()"}),
    "a named tuple with too few fields": spec_of("namedtuple", ["a"], **{"class": "m.N"}),
    "a dict with too few keys": spec_of("dict", ["a"]),
    "a key that is no text": spec_of("dict", ["a", torch.zeros(1)]),
    "torch's own text": '[1, {"type": "builtins.dict", "context": "[]", "children_spec": []}]',
    "no such kind": spec_of("frozenset", None, **{"class": "frozenset"}),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_file_cannot_choose_what_its_outputs_are_made_of(name: str) -> None:
    dyn, _ = proven(Returns(OUTPUTS["tuple"]), (images(),))
    data = to_data(dyn)
    data["output_spec"] = CRAFTED[name]
    with pytest.raises(FormatError, match="crafted"):
        from_data(data, "crafted")


# -- inputs ---------------------------------------------------------------------------------------


class Two(Net):
    """Two images of one shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.parts(x)[0] + self.parts(y)[0]


class Mixed(Net):
    """An image, a vector that scales its features, and token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.words = nn.Linear(5, 10), nn.Embedding(7, 10)

    def forward(self, x: Tensor, v: Tensor, *, words: Tensor | None = None) -> dict[str, Tensor]:
        y, features = self.parts(x)
        y = y * self.scale(v)
        if words is not None:
            y = y + self.words(words).mean(1)
        return {"y": y, "features": features}


class Keywords(Net):
    """Inputs in any order."""

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self.parts(x)[0] * first - self.parts(x * 0.5)[0] * second


class Nested(Net):
    """A dictionary with a list in it."""

    def forward(self, given: dict[str, Any]) -> Tensor:
        near, far = given["images"]
        return self.parts(near)[0] * given["weight"] + self.parts(far)[0]


class Rest(Net):
    """As many images as there are."""

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.parts(sum(xs[1:], xs[0]) * more["weight"][:, :, None, None])[0]


def _inputs() -> dict[str, tuple[type[Net], tuple[Any, ...], dict[str, Any]]]:
    x, y = images(), images().flip(0)
    v, words = torch.randn(3, 5).double(), torch.tensor([[1, 2], [3, 4], [5, 6]])
    w, u = torch.randn(2, 3, 1).double()
    return {
        "two": (Two, (x, y), {}),
        "two, one by keyword": (Two, (x,), {"y": y}),
        "image and vector": (Mixed, (x, v), {}),
        "image, vector, words": (Mixed, (x, v), {"words": words}),
        "keywords alone": (Keywords, (), {"second": u, "x": x, "first": w}),
        "nested": (Nested, ({"images": [x, y], "weight": w},), {}),
        "any number": (Rest, (x, y, x), {"weight": w}),
    }


INPUTS = _inputs()


@pytest.mark.parametrize("name", INPUTS)
def test_networks_take_what_the_original_takes(name: str, tmp_path: Path) -> None:
    kind, args, kwargs = INPUTS[name]
    model = kind().double().eval()
    dyn, _ = proven(model, args, kwargs)
    dyn.save(tmp_path / "dyn.pt")
    again = load(tmp_path / "dyn.pt")
    reordered = dict(reversed(kwargs.items()))
    assert same(dyn(*args, **kwargs), again(*args, **reordered))
    one = Plan.from_dict({"stages": 1, "groups": 8, "default": {"split": [], "concat": "none"}})
    (only,) = transform(model, one, args, example_kwargs=kwargs)(*args, **reordered)
    wanted = model(*args, **kwargs)
    assert pytree.tree_structure(only) == pytree.tree_structure(wanted)
    for a, b in zip(pytree.tree_leaves(only), pytree.tree_leaves(wanted), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_call_of_another_structure_is_refused() -> None:
    kind, args, kwargs = INPUTS["two, one by keyword"]
    dyn = transform(kind().double(), REUSE, args, example_kwargs=kwargs)
    with pytest.raises(InputShapeError, match=r"\(\*, \*\).*compiled for \(\*, y=\*\)"):
        dyn(*args, kwargs["y"])
    with pytest.raises(InputShapeError, match=r"compiled for \(\*, y=\*\)"):
        dyn(*args, z=kwargs["y"])
    with pytest.raises(InputShapeError, match="compiled for"):
        dyn(*args, y=kwargs["y"][:, :, :4])
    plain = transform(kind().double(), REUSE, (args[0], kwargs["y"]))
    with pytest.raises(InputShapeError, match="without keyword inputs, got y"):
        plain(*args, **kwargs)


def test_an_input_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(InputShapeError, match="an example input is a int"):
        transform(Two(), REUSE, (images(),), example_kwargs={"y": 3})
    with pytest.raises(InputShapeError, match="example_inputs is a tensor"):
        transform(Two(), REUSE, images())


# -- dense outputs --------------------------------------------------------------------------------

SEGMENTATION = [
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet101",
]
SEGMENTERS = [
    (name, options)
    for name in SEGMENTATION
    for options in ([{}] if name.startswith("lraspp") else [{}, {"aux_loss": True}])
]


@pytest.mark.parametrize(("name", "options"), SEGMENTERS if EVERYTHING else SEGMENTERS[:1])
def test_segmentation_networks_get_an_exit_per_stage(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **options)
    x = images(64, 2)
    for plan in (REUSE, NO_REUSE):
        dyn, _ = proven(model, (x,), plan=plan)
        assert dyn.report.cut_share >= 0.99
        assert not dyn.report.unknown
        assert [type(output) for output in dyn(x)] == [OrderedDict] * 3
        for output in dyn(x):
            assert list(output) == (["out", "aux"] if options else ["out"])
            assert all(value.shape == (2, 21, 64, 64) for value in output.values())
    dyn.save(tmp_path / "dyn.pt")
    assert same(load(tmp_path / "dyn.pt")(x), dyn(x))


# -- parts of networks ----------------------------------------------------------------------------

DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 64,
    "ssdlite320_mobilenet_v3_large": 320,
    "fasterrcnn_mobilenet_v3_large_fpn": 64,
    "fasterrcnn_resnet50_fpn": 64,
    "fasterrcnn_resnet50_fpn_v2": 64,
    "retinanet_resnet50_fpn": 64,
    "retinanet_resnet50_fpn_v2": 64,
    "fcos_resnet50_fpn": 64,
    "ssd300_vgg16": 300,
    "maskrcnn_resnet50_fpn": 64,
    "maskrcnn_resnet50_fpn_v2": 64,
    "keypointrcnn_resnet50_fpn": 64,
}


@pytest.mark.parametrize("name", DETECTORS if EVERYTHING else list(DETECTORS)[:1])
def test_backbones_of_detectors(name: str, tmp_path: Path) -> None:
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).double().eval()
    x = images(DETECTORS[name], 2)
    dyn, _ = proven(model.backbone, (x,))
    assert dyn.report.cut_share >= 0.99
    assert not dyn.report.unknown
    wanted = model.backbone(x)
    for output in dyn(x):
        assert pytree.tree_structure(output) == pytree.tree_structure(wanted)
        assert [v.shape for v in output.values()] == [v.shape for v in wanted.values()]
    if name != "ssd300_vgg16":
        dyn.save(tmp_path / "dyn.pt")
        assert same(load(tmp_path / "dyn.pt")(x), dyn(x))


def test_frozen_batch_norm_is_cut_with_its_channels() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torchvision.ops.FrozenBatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.a(x)).relu().mean((2, 3)))

    dyn, _ = proven(Frozen(), (images(),))
    assert not dyn.report.unknown
    assert dyn.report.cut_share == 1.0


class Whole(nn.Module):
    """A network with a part that is to be transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Returns(OUTPUTS["tuple"])
        self.heads = nn.ModuleList([nn.Linear(10, 2)])

    def forward(self, x: Tensor) -> Tensor:
        y, features = self.backbone(x)
        if y.sum() > features.sum():  # what cannot be captured stays out
            return self.heads[0](y)
        return self.heads[0](-y)


def test_a_submodule_alone_is_transformed() -> None:
    model, x = Whole().double().eval(), images()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    dyn = transform(model, REUSE, (x,), submodule="backbone")
    assert same(dyn(x), transform(model.backbone, REUSE, (x,))(x))
    assert dyn.provenance["stages.0.a.weight"].source == "a.weight"
    assert dyn.parts.made_by["submodule"] == "backbone"
    model.backbone = dyn.at_stage(2)  # type: ignore[assignment]
    assert model(x).shape == (3, 2)
    assert before.keys() == Whole().state_dict().keys()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("backbon", "did you mean backbone"),
        ("nothing", "it has backbone, heads"),
        ("backbone.nothing", r"backbone has backbone\.a, backbone\.b, backbone\.fc"),
        ("", "it has backbone, heads"),
        ("heads", "a ModuleList, which holds weights but computes nothing"),
    ],
)
def test_a_submodule_that_cannot_be_transformed_is_refused(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transform(Whole(), REUSE, (images(),), submodule=path)


def test_the_parts_of_an_exported_program_are_out_of_reach() -> None:
    exported = torch.export.export(Returns(OUTPUTS["tuple"]).double(), (images(),)).module()
    with pytest.raises(UsageError, match="An exported program is one graph"):
        transform(exported, REUSE, (images(),), submodule="a")


# -- one exit as a module -------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [REUSE, NO_REUSE, ORIGINAL_LAST], ids=["all", "none", "original"])
def test_a_stage_prefix_computes_its_exit_and_nothing_else(plan: Plan) -> None:
    model, x = Returns(OUTPUTS["dict"]).double().eval(), images()
    dyn = transform(model, plan, (x,))
    outputs = dyn(x)
    for stage, wanted in enumerate(outputs, start=1):
        part = dyn.at_stage(stage)
        assert same(part(x), wanted)
        assert set(part.state_dict()) <= set(dyn.state_dict())
        held = {id(p) for p in dyn.parameters()}
        assert all(id(p) in held for p in part.parameters())
        with FlopCounterMode(display=False) as counter:
            part(x)
        heads = sum(
            row.macs
            for earlier in dyn.cost.stages[: stage - 1]
            for row in earlier.layers
            if row.name.startswith("fc")
        )
        assert heads or stage == 1
        expected = dyn.cost.stages[stage - 1].cumulative_macs - heads
        if plan.final == "original" and stage == 3:
            expected = dyn.cost.original_macs
        assert counter.get_total_flops() == 2 * expected * len(x)
        assert part.macs == expected


def test_a_stage_prefix_of_a_file_can_be_exported(tmp_path: Path) -> None:
    x = images()
    dyn = transform(Returns(OUTPUTS["dict"]).double(), REUSE, (x,))
    dyn.save(tmp_path / "dyn.pt")
    part = load(tmp_path / "dyn.pt").at_stage(2)
    assert same(part(x), dyn(x)[1])
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(part, (x,), dynamic_shapes=(dynamic,)).module()
    assert same(exported(x[:2]), part(x[:2]))


def test_a_stage_prefix_trains_the_network_that_it_comes_from() -> None:
    x = images()
    dyn = transform(Returns(OUTPUTS["tuple"]).double(), REUSE, (x,))
    part = dyn.at_stage(1).train()
    part(x)[0].sum().backward()
    assert dyn.get_parameter("stages.0.a.weight").grad is not None
    assert dyn.get_parameter("stages.1.a.weight").grad is None


@pytest.mark.parametrize("stage", [0, 4, "1", True])
def test_a_stage_that_does_not_exist_is_refused(stage: Any) -> None:
    dyn = transform(Returns(OUTPUTS["tuple"]), REUSE, (images().float(),))
    with pytest.raises(UsageError, match="stages 1 to 3"):
        dyn.at_stage(stage)
