"""From the data of a ``dyn.pt`` to a network: everything is checked before it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.analysis.cost import Cost
from s2d_compiler.attributes import find, graph_module, is_taken, put
from s2d_compiler.depth_plan import DepthPlan
from s2d_compiler.depth_report import DepthReport
from s2d_compiler.dynamic import DynamicModel, DynamicParts, Interface
from s2d_compiler.errors import FormatError
from s2d_compiler.fields import Fields, as_number, as_text, damaged, shown
from s2d_compiler.graph_codec import decode_graph
from s2d_compiler.module_codec import decode_module
from s2d_compiler.operator_names import WEIGHT_NORMS
from s2d_compiler.plans import plan_from_dict
from s2d_compiler.program import is_plain_name, is_reserved
from s2d_compiler.provenance import Positions, Slice
from s2d_compiler.report import Report
from s2d_compiler.runtime.settings import RunSettings
from s2d_compiler.structure import decode_structure


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a file may use beside what needs no permission.

    Attributes:
        operators: Operators as ``namespace::operator``; None to look at a file without running
            it.
        types: Classes by name; None likewise.
    """

    operators: Collection[str] | None = ()
    types: Mapping[str, type] | None = field(default_factory=dict)


def decode_network(
    data: Any, allowed: Allowed, device: str | torch.device | None = None
) -> DynamicModel:
    """The staged network that ``format.to_data`` described.

    Args:
        data: What the file holds; ``fields.require_plain`` has accepted it.
        allowed: What it may use.
        device: Where its parameters and buffers go; None to leave them.

    Raises:
        FormatError: The data is no network.
    """
    row = Fields(data, "")
    tensors = [_tensor(item, device) for item in row.rows("tensors")]
    modules = [_module(item, tensors, allowed) for item in row.rows("modules")]
    stages = [
        _stage(item, modules, tensors, number, allowed)
        for number, item in enumerate(row.rows("stages"), start=1)
    ]
    parts = _parts(row, allowed)
    if not len(stages) == len(parts.interfaces) == len(parts.cost.stages) == parts.plan.stages:
        damaged(
            "stages",
            f"{len(stages)} stages with {len(parts.interfaces)} interfaces and "
            f"{len(parts.cost.stages)} costs, but the plan has {parts.plan.stages}",
        )
    for number, stage in enumerate(stages):
        _check_interface(stage, parts, number)
    dyn = DynamicModel(stages, parts)
    dyn.training = any(m.training for m in modules)
    for container in (dyn.stages, *stages):
        container.training = dyn.training
    if row.number("version", 1) >= 2:
        dyn.settings = RunSettings.from_dict(row.inner("settings"))
    _check_provenance(dyn)
    return dyn


def _parts(row: Fields, allowed: Allowed) -> DynamicParts:
    plan = plan_from_dict(row.named("plan"))
    report = row.inner("report")
    is_depth = isinstance(plan, DepthPlan)
    specs = {
        key: None if row.value(key) is None else decode_structure(row.inner(key), allowed.types)
        for key in ("output_spec", "input_spec")
    }
    shapes = [
        tuple(as_number(n, row.at("input_shapes"), most=2**31 - 1) for n in _whole(shape, row))
        for shape in row.items("input_shapes")
    ]
    parts = DynamicParts(
        plan=plan,
        cost=Cost.from_dict(row.inner("cost")),
        report=DepthReport.from_dict(report) if is_depth else Report.from_dict(report),
        provenance=_provenance(row.inner("provenance")),
        interfaces=tuple(_interface(item) for item in row.rows("interfaces")),
        owners=_positions(row, "owners", torch.int16, 0, plan.stages),
        input_shapes=tuple(shapes),
        batch=None if row.value("batch") is None else row.number("batch", 1),
        made_by=dict(row.named("made_by")),
        **specs,
    )
    if not _takes_all_inputs(parts):
        damaged("input_spec", "the structure of its inputs is not that of a call")
    return parts


def _whole(shape: Any, row: Fields) -> list[int]:
    if type(shape) is not list or len(shape) > 64:
        damaged(row.at("input_shapes"), f"{shown(shape)} is no shape")
    return shape


def _takes_all_inputs(parts: DynamicParts) -> bool:
    """Whether the structure of the inputs is that of a call with all of them."""
    spec = parts.input_spec
    return spec is None or (
        spec.type is tuple
        and [child.type for child in spec._children] == [tuple, dict]
        and spec.num_leaves == len(parts.input_shapes)
        and all(isinstance(name, str) for name in spec._children[1]._context)
    )


# -- tensors and modules -------------------------------------------------------------------------


def _tensor(row: Fields, device: str | torch.device | None) -> torch.Tensor:
    data = row.value("data")
    is_parameter, requires_grad = row.flag("parameter"), row.flag("requires_grad")
    if not _is_dense(data):
        damaged(row.at("data"), "it is no tensor of numbers that all lie in the file, each once")
    tensor: torch.Tensor = data if device is None else data.to(device)
    if not is_parameter:
        return tensor
    if requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        damaged(row.at("requires_grad"), f"{tensor.dtype} numbers have no gradient")
    return nn.Parameter(tensor, requires_grad=requires_grad)


def _is_dense(value: Any) -> bool:
    """Whether a tensor is plain, and its elements fill its storage, each in a place of its own."""
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_nested:
        return False
    if value.is_quantized or value.is_meta or value.requires_grad or value.__dict__:
        return False
    if value.is_conj() or value.is_neg():
        return False
    if value.untyped_storage().nbytes() != value.numel() * value.element_size():
        return False
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != expected:
            return not value.numel()
        expected *= size
    return value.storage_offset() == 0


def _reference(row: Fields, key: str, count: int) -> int:
    """A position in a list of so many."""
    return row.number(key, 0, count - 1)


def _module(row: Fields, tensors: list[torch.Tensor], allowed: Allowed) -> nn.Module:
    held, unsaved = dict[str, torch.Tensor](), set[str]()
    for key in row.named("tensors"):
        where = row.inner("tensors").inner(key)
        held[key] = tensors[_reference(where, "tensor", len(tensors))]
        if not where.flag("saved"):
            unsaved.add(key)
    module = decode_module(row, held, frozenset(unsaved), allowed.operators)
    slots = {
        k: v for k, v in [*module._parameters.items(), *module._buffers.items()] if v is not None
    }
    if set(held) != set(slots):
        damaged(
            row.at("tensors"), f"a {row.text('class')} has {', '.join(sorted(slots)) or 'none'}"
        )
    for key, tensor in held.items():
        if tensor.shape != slots[key].shape:
            damaged(
                f"{row.at('tensors')}.{key}",
                f"it is {tuple(tensor.shape)}, not {tuple(slots[key].shape)}",
            )
        if key in module._parameters:
            if not isinstance(tensor, nn.Parameter):
                damaged(f"{row.at('tensors')}.{key}", "it is no parameter")
            module._parameters[key] = tensor
            continue
        module._buffers[key] = tensor
        if key in unsaved:
            module._non_persistent_buffers_set.add(key)
    return module.train(row.flag("training"))


# -- stages --------------------------------------------------------------------------------------


def _stage(
    row: Fields,
    modules: list[nn.Module],
    tensors: list[torch.Tensor],
    number: int,
    allowed: Allowed,
) -> fx.GraphModule:
    graph = decode_graph(row.rows("graph"), allowed.operators)
    root = nn.Module()
    layers, attributes = row.inner("modules"), row.inner("attributes")
    for target in row.named("modules"):
        _assign(root, target, modules[_reference(layers, target, len(modules))], True, layers)
    for target in row.named("attributes"):
        where = attributes.inner(target)
        tensor = tensors[_reference(where, "tensor", len(tensors))]
        _assign(root, target, tensor, where.flag("saved"), attributes)
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in layers.data:
            damaged(
                row.at("graph"), f"{node.name!r} calls {shown(node.target)}, which is not there"
            )
        if node.op == "get_attr" and not isinstance(find(root, str(node.target)), torch.Tensor):
            damaged(
                row.at("graph"), f"{node.name!r} reads {shown(node.target)}, which is not there"
            )
        if node.target in WEIGHT_NORMS:
            _check_not_empty(node, root, row)
    graph.lint()
    result = graph_module(root, graph, f"Stage{number}")
    result.training = any(m.training for m in result.children())
    return result


def _check_not_empty(node: fx.Node, root: nn.Module, row: Fields) -> None:
    """Require a weight norm of a parameter that has elements."""
    weight = node.args[0] if node.args else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        damaged(row.at("graph"), f"{node.name} normalises something else than a parameter")
    if not find(root, str(weight.target)).numel():
        damaged(row.at("graph"), f"{node.name} normalises a parameter without elements")


def _assign(root: nn.Module, target: str, value: Any, saved: bool, row: Fields) -> None:
    parts = target.split(".")
    if not is_plain_name(target) or is_reserved(target):
        damaged(row.place, f"{shown(target)} is no name, or one that torch uses itself")
    if len(parts) > 60:
        damaged(row.place, f"{shown(target)} has more than 60 parts")
    inside = (".".join(parts[:n]) for n in range(1, len(parts)))
    if any(is_taken(root, container) for container in inside) or find(root, target) is not None:
        damaged(row.place, f"{shown(target)} lies inside another module, or is there twice")
    put(root, target, value, saved=saved)


# -- interfaces ----------------------------------------------------------------------------------


def _interface(row: Fields) -> Interface:
    inputs: list[tuple[Any, ...]] = []
    for position, item in enumerate(row.items("inputs")):
        place = f"{row.at('inputs')}[{position}]"
        if type(item) is not list or len(item) != {"input": 2, "feature": 3}.get(_first(item), 0):
            damaged(place, f'{shown(item)} is neither ["input", k] nor ["feature", stage, k]')
        inputs.append((item[0], *(as_number(n, place) for n in item[1:])))
    return Interface(tuple(inputs), row.number("features"))


def _first(item: list[Any]) -> str:
    return item[0] if item and type(item[0]) is str else ""


def _check_interface(stage: fx.GraphModule, parts: DynamicParts, number: int) -> None:
    """Require that a stage's inputs exist and its outputs have the network's structure.

    Raises:
        FormatError: Something does not fit.
    """
    place, interface = f"stage {number + 1}", parts.interfaces[number]
    nodes = list(stage.graph.nodes)
    takes = sum(n.op == "placeholder" for n in nodes)
    if takes != len(interface.inputs):
        damaged(place, f"its graph takes {takes} inputs and its interface {len(interface.inputs)}")
    for where in interface.inputs:
        if where[0] == "input":
            known = where[1] < len(parts.input_shapes)
        else:
            known = where[1] < number and where[2] < parts.interfaces[where[1]].features
        if not known:
            damaged(place, f"it takes {where!r:.80}, which no earlier stage hands on")
    output = nodes[-1].args[0] if nodes and nodes[-1].op == "output" and nodes[-1].args else None
    leaves = 1 if parts.output_spec is None else parts.output_spec.num_leaves
    counts = [len(o) if isinstance(o, tuple) else -1 for o in _tuple(output)]
    if counts != [leaves, interface.features]:
        damaged(place, "its outputs are not those of the network")
    if not all(isinstance(value, fx.Node) for value in _tuple(output)[1]):
        damaged(place, "a feature that it hands on is no value of its graph")


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


# -- provenance ----------------------------------------------------------------------------------


def _positions(row: Fields, key: Any, dtype: torch.dtype, least: int, most: int) -> tuple[int, ...]:
    tensor = row.value(key)
    if not _is_dense(tensor) or tensor.dtype != dtype or tensor.ndim != 1:
        damaged(row.at(key), f"{shown(tensor)} is no list of numbers ({dtype})")
    numbers: list[int] = tensor.tolist()
    for number in (min(numbers), max(numbers)) if numbers else ():
        as_number(number, row.at(key), least, most)
    return tuple(numbers)


def _provenance(row: Fields) -> dict[str, Slice]:
    items = Fields(dict(enumerate(row.items("indices"))), row.at("indices"))
    indices = [
        _positions(items, number, torch.int32, 0, 2**31 - 1) for number in range(len(items.data))
    ]
    slices = row.inner("slices")
    found: dict[str, Slice] = {}
    for key, item in row.named("slices").items():
        if type(item) is not list or len(item) != 2 or type(item[1]) is not list:
            damaged(slices.at(key), f"{shown(item)} is no source and positions")
        index: list[Positions] = [
            None if i is None else indices[as_number(i, slices.at(key), 0, len(indices) - 1)]
            for i in item[1]
        ]
        found[key] = Slice(as_text(item[0], slices.at(key)), tuple(index))
    return found


def _check_provenance(dyn: DynamicModel) -> None:
    """Require that slices have the shapes of the tensors that they are of."""
    state = dyn.state_dict()
    for key, where in dyn.parts.provenance.items():
        if key not in state:
            continue
        shape = tuple(state[key].shape)
        fits = len(where.index) == len(shape) and all(
            positions is None or len(positions) == size
            for positions, size in zip(where.index, shape, strict=True)
        )
        if not fits:
            raise FormatError(
                f"provenance.slices.{key[:80]}: the slice is not of the shape {shape} that the "
                "tensor has; the file is damaged, compile the model again."
            )
