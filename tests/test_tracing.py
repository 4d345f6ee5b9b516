"""Capture is exact on odd models, leaves them untouched, and says what it cannot capture."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from s2d_compiler import Plan, load, transform
from s2d_compiler.errors import CaptureError, InputShapeError
from s2d_compiler.tracing import capture

ONE = Plan.from_dict({"stages": 1, "groups": 1, "default": {"split": [], "concat": "all"}})
TWO = Plan.from_dict({"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}})
IMAGE = (4, 6, 6)


class Model(nn.Module):
    """Modules under their names, and what ``body`` makes of them and the inputs."""

    def __init__(self, body: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def conv(channels: int = 4, out: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, **options)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def small() -> nn.Module:
    """A convolution, batch norm, dropout and a linear layer."""
    return nn.Sequential(
        conv(bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def inputs_of(shapes: Any, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, *s, generator=generator).to(dtype) for s in shapes)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What capture must leave alone: tensors, their identity, flags, attributes."""
    return {
        "tensors": {k: (id(v), v.clone()) for k, v in model.state_dict(keep_vars=True).items()},
        "modules": {
            name: (id(m), m.training, sorted(vars(m)), len(m._forward_hooks))
            for name, m in model.named_modules()
        },
    }


def assert_same_state(before: dict[str, Any], model: nn.Module) -> None:
    after = state_of(model)
    assert after["modules"] == before["modules"]
    assert list(after["tensors"]) == list(before["tensors"])
    for name, (identity, value) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], value)


# -- exactness on odd models ---------------------------------------------------------------

ODD: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {}


def odd(*shapes: tuple[int, ...]) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def enter(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ODD[build.__name__] = build, shapes
        return build

    return enter


@odd(IMAGE)
def module_called_twice() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(pooled(m.conv(F.relu(m.conv(x)))))

    return Model(body, conv=conv(4, 4), head=nn.Linear(4, 3))


@odd(IMAGE)
def one_module_under_two_names() -> nn.Module:
    shared = conv(4, 4)

    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(pooled(m.second(F.relu(m.first(x)))))

    return Model(body, first=shared, second=shared, head=nn.Linear(4, 3))


@odd(IMAGE)
def one_norm_at_two_places() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(pooled(m.norm(m.second(F.relu(m.norm(m.first(x)))))))

    return Model(body, first=conv(), second=conv(8), norm=nn.BatchNorm2d(8), head=nn.Linear(8, 3))


@odd((6,))
def tied_weights() -> nn.Module:
    model = Model(
        lambda m, x: m.head(F.relu(m.second(F.relu(m.first(x))))),
        first=nn.Linear(6, 6),
        second=nn.Linear(6, 6),
        head=nn.Linear(6, 3),
    )
    model.second.weight = model.first.weight
    return model


@odd((6,))
def decoder_tied_to_the_encoder() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(F.linear(F.relu(m.encoder(x)), m.encoder.weight.t()))

    return Model(body, encoder=nn.Linear(6, 8), head=nn.Linear(6, 3))


class OwnParameters(nn.Module):
    """Functional layers with parameters of the module itself, buffers saved and not."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.offset = nn.Parameter(torch.randn(8))
        self.matrix = nn.Parameter(torch.randn(3, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.register_buffer("scale", torch.randn(8, 1, 1), persistent=False)
        self.register_buffer("shift", torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, self.offset, padding=1) * self.scale + self.shift
        return F.linear(pooled(F.relu(y)) * self.gain, self.matrix)


@odd(IMAGE)
def functional_layers_with_own_parameters() -> nn.Module:
    return OwnParameters()


class Tokens(nn.Module):
    """Parameters used as values: a class token, position embeddings, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 37, 8))
        self.scale = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.conv(x) * self.scale).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.position
        return self.head(F.relu(y))[:, 0]


@odd(IMAGE)
def parameters_used_raw() -> nn.Module:
    return Tokens()


@odd(IMAGE)
def hooks() -> nn.Module:
    model = small()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    return model


class Adapted(nn.Linear):
    """A layer with layers inside and functional dropout: low-rank adaptation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1, self.training)
        return F.linear(x, self.weight, self.bias) + self.up(self.down(x))


@odd((6,))
def layer_that_holds_layers() -> nn.Module:
    return nn.Sequential(Adapted(6, 8), nn.ReLU(), nn.Linear(8, 3))


class NormedConv(nn.Conv2d):
    """A convolution that is also a block."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)
        self.drop, self.norm, self.act = nn.Dropout(0.1), nn.BatchNorm2d(out), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(super().forward(self.drop(x))))


@odd(IMAGE)
def convolution_that_is_a_block() -> nn.Module:
    return nn.Sequential(NormedConv(4, 8), nn.Flatten(), nn.Linear(288, 3))


@odd(IMAGE)
def parametrised_weight() -> nn.Module:
    first = parametrizations.weight_norm(conv())
    return nn.Sequential(first, nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(288, 3))


@odd(IMAGE)
def outputs_in_a_dict() -> nn.Module:
    def body(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return {"logits": m.head(pooled(y)), "features": (y, [y.sum((1, 2, 3))])}

    return Model(body, conv=conv(), head=nn.Linear(8, 3))


@odd(IMAGE)
def one_output_twice() -> nn.Module:
    def body(m: Any, x: Tensor) -> Any:
        y = m.second(F.relu(m.conv(x)))
        return y, y

    return Model(body, conv=conv(), second=conv(8))


@odd(IMAGE)
def input_and_parameter_as_outputs() -> nn.Module:
    def body(m: Any, x: Tensor) -> Any:
        return m.head(pooled(m.conv(x))), x, m.head.bias

    return Model(body, conv=conv(), head=nn.Linear(8, 3))


@odd(IMAGE, (3, 6, 6))
def two_inputs() -> nn.Module:
    def body(m: Any, x: Tensor, z: Tensor) -> Tensor:
        return m.head(pooled(m.left(x) + m.right(z)))

    return Model(body, left=conv(), right=conv(3), head=nn.Linear(8, 3))


@odd(IMAGE)
def divides_by_the_batch_size() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(pooled(m.conv(x)) / x.shape[0])

    return Model(body, conv=conv(), head=nn.Linear(8, 3))


@odd(IMAGE)
def counts_its_calls() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.head(pooled(m.conv(x))) * 2

    model = Model(body, conv=conv(), head=nn.Linear(8, 3))
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    return model


@pytest.mark.parametrize("name", ODD)
def test_captured_program_equals_eager(name: str) -> None:
    build, shapes = ODD[name]
    torch.manual_seed(0)
    model = build().double().eval()
    before = state_of(model)
    program = capture(model, inputs_of(shapes, 2))
    assert_same_state(before, model)
    assert program.batch is None
    for count in (1, 3):
        x = inputs_of(shapes, count)
        with torch.no_grad():
            found = program.graph_module(*x)
            wanted = pytree.tree_leaves(model(*x))
        torch.testing.assert_close(list(found), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ODD)
def test_one_stage_is_the_original(name: str) -> None:
    build, shapes = ODD[name]
    torch.manual_seed(0)
    model = build().double().eval()
    dyn = transform(model, ONE, inputs_of(shapes, 2))
    x = inputs_of(shapes, 3)
    with torch.no_grad():
        (found,), wanted = dyn(*x), model(*x)
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    for got, want in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_outputs_that_are_no_tensors_keep_their_place() -> None:
    def body(m: Any, x: Tensor) -> Any:
        return {"logits": m.head(pooled(m.conv(x))), "loss": None, "classes": 3}

    model = Model(body, conv=conv(), head=nn.Linear(8, 3)).double().eval()
    dyn = transform(model, TWO, inputs_of([IMAGE], 2))
    for output in dyn(*inputs_of([IMAGE], 3)):
        assert output["loss"] is None
        assert output["classes"] == 3
        assert output["logits"].shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_are_kept(dtype: torch.dtype) -> None:
    model = small().to(dtype).eval()
    dyn = transform(model, ONE, input_shape_of(IMAGE, dtype))
    assert {k: v.dtype for k, v in dyn.stages[0].state_dict().items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }
    (x,) = inputs_of([IMAGE], 3, dtype)
    with torch.no_grad():
        assert torch.equal(dyn(x)[0], model(x))
    program = capture(model, input_shape=IMAGE)
    assert program.graph_module(x)[0].dtype == dtype


def input_shape_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.zeros(2, *shape, dtype=dtype),)


def test_examples_of_one_sample_leave_the_batch_free() -> None:
    model = small().double()
    dyn = transform(model, TWO, inputs_of([IMAGE], 1))
    assert dyn(*inputs_of([IMAGE], 7))[0].shape == (7, 3)


def test_model_without_parameters() -> None:
    program = capture(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), input_shape=IMAGE)
    (x,) = inputs_of([IMAGE], 3, torch.float32)
    assert torch.equal(program.graph_module(x)[0], F.avg_pool2d(F.relu(x), 2))


# -- a fixed batch size --------------------------------------------------------------------


def _flattened(m: Any, x: Tensor) -> Tensor:
    return m.head(pooled(F.relu(m.conv(x))).view(1, -1))


def test_hard_coded_batch_of_one(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(_flattened, conv=conv(), head=nn.Linear(8, 3)).double().eval()
    with caplog.at_level(logging.WARNING):
        dyn = transform(model, TWO, inputs_of([IMAGE], 1))
    x = inputs_of([IMAGE], 1)
    with torch.no_grad():
        torch.testing.assert_close(dyn(*x)[-1], model(*x), rtol=1e-11, atol=1e-11)
    assert "takes batches of 1 only" in caplog.text
    assert "test_tracing.py" in caplog.text, "the line that fixes it"
    assert any("fixes its batch size" in note for note in dyn.report.notes)
    with pytest.raises(InputShapeError, match="batches of 1 only"):
        dyn(*inputs_of([IMAGE], 2))


def test_hard_coded_batch_of_one_without_examples() -> None:
    model = Model(_flattened, conv=conv(), head=nn.Linear(8, 3)).double().eval()
    assert capture(model, input_shape=IMAGE).batch == 1


def test_trying_batch_sizes_leaves_the_model_alone() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return _flattened(m, x)

    model = Model(body, conv=conv(), head=nn.Linear(8, 3)).double().eval()
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    before = state_of(model)
    assert capture(model, input_shape=IMAGE).batch == 1
    assert_same_state(before, model)


def test_a_fixed_batch_size_is_that_of_the_examples() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        rows = [pooled(m.conv(x[i : i + 1]))[0] for i in range(x.shape[0])]
        return m.head(torch.stack(rows))

    model = Model(body, conv=conv(), head=nn.Linear(8, 3)).double().eval()
    program = capture(model, inputs_of([IMAGE], 2))
    assert program.batch == 2
    x = inputs_of([IMAGE], 2)
    torch.testing.assert_close(program.graph_module(*x)[0], model(*x), rtol=1e-12, atol=1e-12)


# -- refusals ------------------------------------------------------------------------------


def test_control_flow_on_values_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to name
            return m.conv(x)
        return m.conv(x) * 2

    line = body.__code__.co_firstlineno + 1
    model = Model(body, conv=conv()).double()
    model.conv.eval()
    before = state_of(model)
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs_of([IMAGE], 2))
    assert f"test_tracing.py:{line} (if x.sum() > 0:" in str(caught.value)
    assert_same_state(before, model)
    assert capfd.readouterr() == ("", ""), "torch's own output stays off the terminal"


@pytest.mark.parametrize("shape", [(3, 6, 6), (4, 6), (4, 1, 1, 1, 1)])
def test_wrong_input_shape_is_told_from_a_model_that_cannot_be_captured(
    shape: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    model = small().double()
    before = state_of(model)
    with pytest.raises(InputShapeError) as caught:
        capture(model, inputs_of([shape], 2))
    assert "x".join(map(str, shape)) in str(caught.value)
    remedy = 'give that (example_inputs, "input_shape"'
    if len(shape) != 3:
        remedy = "convolution takes 3 (channels first, without the batch), such as 4x224x224"
    assert remedy in str(caught.value)
    assert_same_state(before, model)
    assert capfd.readouterr() == ("", "")


def test_a_tensor_is_no_tuple_of_inputs() -> None:
    with pytest.raises(InputShapeError, match=r"\(x,\)"):
        capture(small(), torch.zeros(2, *IMAGE))  # type: ignore[arg-type]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match="function"):
        capture(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="OrderedDict"):
        capture(small().state_dict())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(torch.jit.script(small()))


def test_no_shape_to_guess() -> None:
    with pytest.raises(InputShapeError, match="no convolution"):
        capture(nn.Linear(6, 3))


def test_the_guessed_shape_is_noted() -> None:
    program = capture(nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1)))
    assert program.input_shapes == ((3, 224, 224),)
    assert "3x224x224" in program.notes[0]


# -- the model is left as it was -----------------------------------------------------------


def test_model_is_left_as_it_was() -> None:
    model = small().double()
    model[1].eval()  # a frozen norm in a model that trains
    model[0].weight.requires_grad_(False)
    before = state_of(model)
    dyn = transform(model, TWO, inputs_of([IMAGE], 2))
    assert_same_state(before, model)
    for parameter in dyn.parameters():
        with torch.no_grad():
            parameter.add_(1)
    assert_same_state(before, model)
    assert not dyn.stages[0].get_submodule("0").weight.requires_grad
    assert dyn.stages[0].get_submodule("6").weight.requires_grad


def test_gradients_do_not_reach_the_original() -> None:
    model = small().double()
    dyn = transform(model, TWO, inputs_of([IMAGE], 2))
    torch.stack(dyn(*inputs_of([IMAGE], 3))).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in dyn.parameters())


# -- the result is a module like any other -------------------------------------------------


def test_state_dict_keys_are_the_originals() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(8, 8, bias=False), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn1(self.conv1(x)) + x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv()
            self.layer1 = nn.Sequential(Block(), Block())
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(pooled(self.layer1(self.stem(x))))

    model = Net().double()
    dyn = transform(model, TWO, inputs_of([IMAGE], 2))
    keys = set(dyn.state_dict())
    assert keys == {f"stages.{i}.{key}" for i in (0, 1) for key in model.state_dict()}
    assert keys >= {"stages.0.layer1.0.conv1.weight", "stages.1.layer1.1.bn1.running_mean"}
    assert {dyn.provenance[k].source for k in keys} == set(model.state_dict())


def test_tied_weights_stay_tied_under_both_names() -> None:
    torch.manual_seed(0)
    dyn = transform(tied_weights().double(), TWO, inputs_of([(6,)], 2))
    for stage in dyn.stages:
        first, second = stage.get_submodule("first"), stage.get_submodule("second")
        assert first.weight is second.weight
        assert first.bias is not second.bias


def test_deepcopy_to_and_back() -> None:
    dyn = transform(small(), TWO, (torch.zeros(2, *IMAGE),))
    (x,) = inputs_of([IMAGE], 3)
    twin = copy.deepcopy(dyn).double()
    assert next(dyn.parameters()).dtype == torch.float32
    with torch.no_grad():
        for got, want in zip(twin(x), dyn(x.float()), strict=True):
            torch.testing.assert_close(got.float(), want)
        twin.stages[0].get_submodule("0").weight.zero_()
    assert dyn.stages[0].get_submodule("0").weight.abs().sum() > 0
    assert twin.to(torch.bfloat16)(x.bfloat16())[1].dtype == torch.bfloat16
    assert twin.cost == dyn.cost
    assert twin.plan == dyn.plan


def test_dropout_is_active_in_training_alone() -> None:
    dyn = transform(small().double(), TWO, inputs_of([IMAGE], 2))
    assert not any(module.training for module in dyn.modules())
    x = inputs_of([IMAGE], 3)
    assert torch.equal(dyn(*x)[1], dyn(*x)[1])
    dyn.train()
    for module in dyn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for stage in (0, 1):
        assert not torch.equal(dyn(*x)[stage], dyn(*x)[stage])
    assert torch.equal(dyn.eval()(*x)[1], dyn(*x)[1])


def test_functional_dropout_follows_the_mode() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.head(F.dropout(pooled(m.conv(x)), 0.5, m.training))

    dyn = transform(
        Model(body, conv=conv(), head=nn.Linear(8, 3)).double(), TWO, inputs_of([IMAGE], 2)
    )
    x = inputs_of([IMAGE], 3)
    assert torch.equal(dyn(*x)[1], dyn(*x)[1])
    dyn.train()
    assert not torch.equal(dyn(*x)[1], dyn(*x)[1])


def test_running_statistics_are_updated_in_training() -> None:
    model = small().double()
    model[0].weight.requires_grad_(False)
    dyn = transform(model, TWO, inputs_of([IMAGE], 2))
    dyn.train()
    x = inputs_of([IMAGE], 16)
    with torch.no_grad():
        dyn(*x)
        wanted = nn.functional.conv2d(x[0], model[0].weight, padding=1)
    for i, stage in enumerate(dyn.stages):
        norm = stage.get_submodule("1")
        assert norm.num_batches_tracked == 1
        (channels,) = dyn.provenance[f"stages.{i}.1.running_mean"].index
        mean = 0.1 * wanted.mean((0, 2, 3))[list(channels)]
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)


def test_autocast() -> None:
    model = small()
    dyn = transform(model, ONE, (torch.zeros(2, *IMAGE),))
    (x,) = inputs_of([IMAGE], 3, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (found,), wanted = dyn(x), model.eval()(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_capture_under_autocast_and_inference_mode_is_the_same_capture() -> None:
    model = small()
    plain = capture(model, input_shape=IMAGE)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        other = capture(model, input_shape=IMAGE)
    assert str(other.graph_module.graph) == str(plain.graph_module.graph)


def test_dropped_modules_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aux, self.head = conv(), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            y = pooled(self.conv(x))
            return (self.head(y), self.aux(y)) if self.training else self.head(y)

    dyn = transform(Net().double(), TWO, inputs_of([IMAGE], 2))
    assert dyn.report.dropped.unused == ("aux",)
    assert not [key for key in dyn.state_dict() if "aux" in key]


@pytest.mark.parametrize("large", [lambda n: n > 3, lambda n: n % 2 == 0, lambda n: n < 4])
def test_a_branch_on_the_batch_size_fixes_the_batch(large: Callable[[int], bool]) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.mean((2, 3)) if large(x.shape[0]) else y.amax((2, 3))

    model, x = Branch().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = capture(model, example_inputs=(x,))
    assert program.batch == 2
    (found,) = program.graph_module(x)
    assert torch.equal(found, model(x))


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.BatchNorm2d(8), nn.InstanceNorm2d(8)])
def test_a_norm_with_a_weight_and_no_bias_is_cut(norm: nn.Module, tmp_path: Path) -> None:
    norm.weight = nn.Parameter(torch.rand(8))
    norm.register_parameter("bias", None)
    model = nn.Sequential(conv(3), norm, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    model = model.append(nn.Linear(8, 5)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = capture(model, example_inputs=(x,))
    (found,) = program.graph_module(x)
    assert torch.equal(found, model(x))
    plan = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}}
    dyn = transform(model, plan, example_inputs=(x,))
    assert dyn.report.fallbacks == ()
    sizes = [s.get_submodule("0").weight.shape[0] for s in dyn.stages]
    assert sizes == [4, 4]
    dyn.save(tmp_path / "dyn.pt")
    again = load(tmp_path / "dyn.pt")
    assert all(torch.equal(a, b) for a, b in zip(again(x), dyn(x), strict=True))
