"""Networks that differ from the right one in ways that are easily overlooked: all are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2d_compiler import DynamicModel, Plan, transform, verify
from s2d_compiler.errors import FormatError, VerifyError
from s2d_compiler.format import Allowed, from_data, to_data

Data = dict[str, Any]
PLAN = {"stages": 2, "groups": 8, "default": {"split": [4], "concat": "all"}}


class Around(nn.Module):
    """An operator between a convolution and a head."""

    def __init__(self, operator: Callable[..., torch.Tensor], features: int = 8, **held: Any):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(features, 5)
        self.operator = operator
        for name, value in held.items():
            if isinstance(value, nn.Parameter | nn.Module):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.operator(self, self.norm(self.conv(x)))
        return self.head(y if y.dim() == 2 else y.mean((2, 3)))  # type: ignore[no-any-return]


def compiled(model: nn.Module, x: torch.Tensor | None = None, **plan: Any) -> DynamicModel:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) if x is None else x
    return transform(model, Plan.from_dict({**PLAN, **plan}), (x,))


def rows(data: Data, word: str) -> list[dict[str, Any]]:
    found = [r for stage in data["stages"] for r in stage["graph"]
             if r["op"] == "call_function" and word in r["target"]]  # fmt: skip
    assert found, [r["target"] for s in data["stages"] for r in s["graph"]]
    return found


def refused(
    model: nn.Module,
    change: Callable[[Data], Any],
    x: torch.Tensor | None = None,
    match: str | None = None,
    **plan: Any,
) -> None:
    """A changed file is refused, and computes something else or cannot run as the model can."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) if x is None else x
    model = model.eval()
    dyn = compiled(model, x, **plan)
    verify(model, dyn, (x,))
    data = to_data(dyn)
    change(data)
    with pytest.raises((VerifyError, FormatError), match=match):
        verify(model, from_data(data, "dyn.pt").eval(), (x,), trained=True)


def _sum(equation: str) -> Callable[..., torch.Tensor]:
    def run(self: Any, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, y, y.flip(-1))

    return run


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ncij,ncij->nc", "ncij,ncji->nc"),
        ("ncij,ncij->nc", "ncij,nckl->nc"),
        ("ncii,ncii->nc", "ncij,ncij->nc"),
        ("ncii,ncij->ncij", "ncij,ncii->ncij"),
    ],
)
def test_which_dimensions_are_summed_together(one: str, other: str) -> None:
    def change(data: Data) -> None:
        for row in rows(data, "einsum"):
            row["args"]["tuple"][0] = other

    refused(Around(_sum(one)).double(), change)


def _causal(self: Any, y: torch.Tensor) -> torch.Tensor:
    z = y.flatten(2)
    q, k = (z.unsqueeze(-1).expand(-1, -1, -1, 2) for _ in range(2))
    return F.scaled_dot_product_attention(q * 1.5, k, k * 0.5, is_causal=True).mean(-1).sum(-1)


def test_rows_of_a_causal_attention_have_their_places() -> None:
    """Queries in another order, and the result in the old one."""

    def change(data: Data) -> None:
        for stage in data["stages"]:
            graph = stage["graph"]
            for at, row in list(enumerate(graph)):
                if "scaled_dot_product" in row["target"]:
                    flip = {"op": "call_function", "target": "aten.flip.default"}
                    first = {
                        **flip,
                        "name": "one",
                        "args": {"tuple": [row["args"]["tuple"][0], {"list": [2]}]},
                    }
                    row["args"]["tuple"][0] = {"node": "one"}
                    old, row["name"] = row["name"], "inner"
                    back = {
                        **flip,
                        "name": old,
                        "args": {"tuple": [{"node": "inner"}, {"list": [2]}]},
                    }
                    graph[at : at + 1] = [first, row, back]
                    break

    refused(Around(_causal).double(), change)


def _masked(self: Any, y: torch.Tensor) -> torch.Tensor:
    z = y.flatten(2).unsqueeze(-1)
    return F.scaled_dot_product_attention(z, z * 2, z * 3, attn_mask=self.mask).sum((2, 3))


def test_types_of_constants_count() -> None:
    """A mask of truth values is no mask of numbers."""

    def change(data: Data) -> None:
        found = [t for t in data["tensors"] if t["data"].dtype == torch.bool]
        assert found
        for tensor in found:
            tensor["data"] = tensor["data"].double()

    model = Around(_masked, mask=torch.ones(64, 64, dtype=torch.bool).tril())
    model.conv.double(), model.norm.double(), model.head.double()
    refused(model, change)


def test_scalars_of_another_type_are_others() -> None:
    """Images of bytes overflow when an integer is added, and do not when a number is."""

    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Around(lambda self, y: y)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner((x + 100).to(torch.float64))  # type: ignore[no-any-return]

    def change(data: Data) -> None:
        for row in rows(data, "aten.add"):
            row["args"]["tuple"][1] = 100.0

    refused(Bytes().double(), change, torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8))


def test_large_integers_are_told_apart() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Around(lambda self, y: y)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(((x + 2**53) % 7).to(torch.float64))  # type: ignore[no-any-return]

    def change(data: Data) -> None:
        for row in rows(data, "aten.add"):
            row["args"]["tuple"][1] = 2**53 + 1

    refused(Large().double(), change, torch.randint(0, 256, (2, 3, 8, 8)))


def test_numbers_outside_the_state_dict_are_compared() -> None:
    """Statistics and parameters that are said to be not saved."""
    model = Around(lambda self, y: y * self.scale, scale=nn.Parameter(torch.rand(8, 1, 1))).double()
    dyn = compiled(model.eval())
    data = to_data(dyn)
    norm = next(m for m in data["modules"] if m["class"] == "BatchNorm2d")
    norm["tensors"]["running_mean"]["saved"] = False
    data["tensors"][norm["tensors"]["running_mean"]["tensor"]]["data"] += 1
    with pytest.raises(VerifyError, match="running_mean"):
        verify(model, from_data(data, "dyn.pt"))

    data = to_data(dyn)
    (where,) = data["stages"][0]["attributes"].values()
    where["saved"] = False
    row = data["tensors"][where["tensor"]]
    row["data"], row["parameter"] = row["data"] + 1, False
    with pytest.raises(VerifyError, match="scale"):
        verify(model, from_data(data, "dyn.pt"))


class Mirrored(nn.Module):
    """A convolution whose rows hold the same numbers in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.cat([self.weight, self.weight.flip(1)], 0)
        return self.head(F.conv2d(self.conv(x), w).mean((2, 3)))  # type: ignore[no-any-return]


def test_rows_of_a_computed_weight_are_told_apart() -> None:
    """Results of the two rows change places."""

    def change(data: Data) -> None:
        graph = data["stages"][1]["graph"]
        (head,) = (row for row in graph if row["op"] == "call_module" and row["target"] == "head")
        target, dims = "aten.flip.default", {"list": [1]}
        args = {"tuple": [head["args"]["tuple"][0], dims]}
        flip = {"name": "swapped", "op": "call_function", "target": target, "args": args}
        graph.insert(graph.index(head), flip)
        head["args"] = {"tuple": [{"node": "swapped"}]}

    refused(Mirrored().double(), change, final="original")


def test_a_module_is_called_with_one_tensor() -> None:
    """A transposed convolution may be told the size of its result."""

    def change(data: Data) -> None:
        for stage in data["stages"]:
            for row in stage["graph"]:
                if row["op"] == "call_module" and "up" in row["target"]:
                    row["args"]["tuple"].append({"list": [26, 26]})

    up = nn.ConvTranspose2d(8, 8, 4, stride=3)
    refused(Around(lambda self, y: self.up(y), up=up).double(), change)


def test_a_batch_is_not_fixed() -> None:
    """Batches of the size that is looked at would be right."""

    def change(data: Data) -> None:
        graph = data["stages"][0]["graph"]
        for at, row in enumerate(graph):
            if row["op"] == "call_module" and row["target"] == "conv":
                part = {
                    "name": "part", "op": "call_function", "target": "aten.slice.Tensor",
                    "args": {"tuple": [row["args"]["tuple"][0], 0, 0, 2]},
                }  # fmt: skip
                row["args"]["tuple"][0] = {"node": "part"}
                graph.insert(at, part)
                return

    refused(Around(lambda self, y: y).double(), change)


def test_a_negative_zero_is_no_zero() -> None:
    def change(data: Data) -> None:
        for row in data["tensors"]:
            if row["data"].dim() == 3 and not row["parameter"]:
                row["data"] = -row["data"]

    operator = lambda self, y: (y.abs() / self.zero).clamp(-1, 1)  # noqa: E731
    refused(Around(operator, zero=torch.zeros(8, 1, 1)).double(), change)


# -- in memory -------------------------------------------------------------------------------------


def _edited(dyn: DynamicModel) -> None:
    """A graph that was edited back after another was compiled."""
    stage: Any = dyn.stages[0]
    relu = stage.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
    relu.target = torch.ops.aten.sigmoid.default
    stage.recompile()
    relu.target = torch.ops.aten.relu.default


def _forward(dyn: DynamicModel) -> None:
    dyn.stages[0].forward = lambda *a: None  # type: ignore[method-assign, assignment]


def _hook(dyn: DynamicModel) -> None:
    dyn.stages[1].get_submodule("conv").register_forward_hook(lambda m, x, y: y + 1)


def _stage_hook(dyn: DynamicModel) -> None:
    dyn.stages[1].register_forward_pre_hook(lambda m, x: tuple(v + 1 for v in x))


class _Odd(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def _subclass(dyn: DynamicModel) -> None:
    dyn.stages[0].get_submodule("conv").__class__ = _Odd


def _bias(dyn: DynamicModel) -> None:
    layer: Any = dyn.stages[0].get_submodule("plain")
    del layer.bias
    layer.bias = torch.ones(layer.out_channels, dtype=torch.float64)


def _in_place(dyn: DynamicModel) -> None:
    stage: Any = dyn.stages[0]
    (relu,) = stage.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.relu_.default
    stage.recompile()


@pytest.mark.parametrize(
    "change", [_edited, _forward, _hook, _stage_hook, _subclass, _bias, _in_place]
)
def test_code_in_memory_is_refused(change: Callable[[DynamicModel], None]) -> None:
    model = Around(
        lambda self, y: self.plain(y) + torch.relu(y) * y, plain=nn.Conv2d(8, 8, 1, bias=False)
    )
    model = model.double().eval()
    dyn = compiled(model)
    change(dyn)
    with pytest.raises(VerifyError):
        verify(model, dyn)


# -- what is no accept, but no clear refusal either ------------------------------------------------


def test_training_networks_stay_as_they_are() -> None:
    model = Around(lambda self, y: y).double().eval()
    dyn = compiled(model).train()
    before = {k: v.clone() for k, v in dyn.state_dict().items()}
    verify(model, dyn)
    assert dyn.training
    assert all(m.training for m in dyn.stages.modules())
    assert all(torch.equal(v, before[k]) for k, v in dyn.state_dict().items())


def test_networks_that_cannot_run_are_refused() -> None:
    model = Around(lambda self, y: y).eval()
    x = torch.randn(2, 3, 8, 8)
    dyn = compiled(model, x)
    with pytest.raises(VerifyError):
        verify(model, compiled(model, x).double(), trained=True)
    cost = replace(dyn.cost, stages=dyn.cost.stages[:1])
    dyn.parts = replace(dyn.parts, cost=cost)
    with pytest.raises(VerifyError, match="cost"):
        verify(model, dyn)


def test_operators_of_others_are_not_torchs() -> None:
    """An operator of another library may have the name of one of torch's."""
    with torch.library._scoped_library("s2d_tests_other", "DEF") as library:
        library.define("clone(Tensor x) -> Tensor")
        library.impl("clone", lambda x: x + 1, "CompositeImplicitAutograd")
        model = Around(lambda self, y: y).double().eval()
        data = to_data(compiled(model))
        graph = data["stages"][0]["graph"]
        (head,) = (r for r in graph if r["op"] == "call_module" and r["target"] == "head")
        row = {
            "name": "more", "op": "call_function", "target": "s2d_tests_other.clone.default",
            "args": head["args"],
        }  # fmt: skip
        graph.insert(graph.index(head), row)
        head["args"] = {"tuple": [{"node": "more"}]}
        allowed = Allowed(frozenset(["s2d_tests_other::clone"]))
        with pytest.raises(VerifyError):
            verify(model, from_data(data, "dyn.pt", allowed))


def test_a_cast_is_no_movement() -> None:
    """Numbers that are copied into integers lose their fractions."""
    model = Around(lambda self, y: y + torch.zeros_like(y, dtype=torch.int64)).double()

    def change(data: Data) -> None:
        for stage in data["stages"]:
            graph = stage["graph"]
            for at, row in enumerate(graph):
                if row["target"].startswith("aten.add"):
                    y, zeros = row["args"]["tuple"]
                    part = {"name": "part", "op": "call_function", "target": "aten.copy.default",
                            "args": {"tuple": [zeros, y]}}  # fmt: skip
                    row["args"]["tuple"][0] = {"node": "part"}
                    graph.insert(at, part)
                    break

    refused(model, change)


def test_complex_numbers_are_followed() -> None:
    def operator(self: Any, y: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.complex(y, y * 2) * self.turn).sum(-1)

    model = Around(operator, turn=torch.rand(8, 1, 1, dtype=torch.complex128))
    for part in (model.conv, model.norm, model.head):
        part.double()
    verify(model.eval(), compiled(model))


class LowRank(nn.Module):
    """A weight with a low-rank update."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.up = nn.Parameter(torch.randn(8, 2))
        self.down = nn.Parameter(torch.randn(2, 16))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return F.linear(y, self.weight + self.up @ self.down)


class Updated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.mix = LowRank()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.conv(x).mean((2, 3))).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "model",
    [Updated(), Around(_sum("ncij,ncjk->nc")), Around(_sum("ncij,nckl->nc"))],
    ids=["low rank", "summed alone", "summed apart"],
)
def test_costs_are_what_runs(model: nn.Module) -> None:
    model = model.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    verify(model, compiled(model, x), (x,))
