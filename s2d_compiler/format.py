"""``dyn.pt``: a staged network as data.

One ``torch.save`` of plain containers and tensors, read with torch's weights-only loader:

- ``format``, ``version``: what the file is;
- ``stages``: per stage its graph (operators by name), which modules and tensors it uses;
- ``modules``: class, arguments and tensors of every module, once;
- ``tensors``: every tensor once, with whether it is a parameter;
- ``provenance``: where each came from; ``owners``: the stage of every atom;
- ``input_spec``, ``output_spec``: the structure of inputs and outputs;
- ``plan``, ``cost``, ``report``, ``interfaces``, ``made_by``...: plain data.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import zipfile
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler._version import FILE_FORMAT
from s2d_compiler.analysis.cost import Cost
from s2d_compiler.attributes import find, graph_module, is_container, is_saved, is_taken, put, read
from s2d_compiler.dynamic import DynamicModel, DynamicParts, Interface
from s2d_compiler.errors import FormatError, S2DError
from s2d_compiler.graph_codec import (
    OWN_NAMESPACES,
    decode_graph,
    decode_module,
    encode_graph,
    encode_module,
)
from s2d_compiler.memory import explained
from s2d_compiler.output import atomic_write
from s2d_compiler.plan import Plan
from s2d_compiler.provenance import Slice
from s2d_compiler.report import Report
from s2d_compiler.structure import (
    decode_structure,
    encode_structure,
    foreign_types,
    types_by_name,
)

log = logging.getLogger(__name__)

VERSION = 1


# -- writing -------------------------------------------------------------------------------------


def save(dyn: DynamicModel, path: str | os.PathLike[str]) -> None:
    """Write a staged network.

    Raises:
        FormatError: It holds something that a file cannot (code, foreign modules).
        OutputError: The file cannot be written.
        OutOfMemoryError: Its tensors cannot be gathered for it.
    """
    with explained(f"writing {os.fspath(path)}", "move the network to the CPU first"):
        data = _without_identity(to_data(dyn))
        atomic_write(path, lambda stream: torch.save(data, stream))


def _without_identity(value: Any) -> Any:
    """Plain data in which equal texts are one object, and no other containers are shared.

    Pickle writes a second reference to an object otherwise than a second object that is equal, so
    that equal data could give different files.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) is dict:
        return {_without_identity(k): _without_identity(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_identity(item) for item in value)
    return value


def permissions(dyn: DynamicModel) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ``load`` must be allowed for a network: ``operators``, and names of ``types``."""
    operators = {
        f"{node.target.namespace}::{node.target._opname}"
        for stage in dyn.stages
        if isinstance(stage, fx.GraphModule)
        for node in stage.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace not in OWN_NAMESPACES
    }
    specs = [spec for spec in (dyn.parts.output_spec, dyn.parts.input_spec) if spec is not None]
    types = {name for spec in specs for name in foreign_types(encode_structure(spec))}
    return tuple(sorted(operators)), tuple(sorted(types))


def to_data(dyn: DynamicModel) -> dict[str, Any]:
    """A staged network as plain containers and tensors."""
    tables = _Tables()
    stages = [tables.stage(stage, number) for number, stage in enumerate(dyn.stages, start=1)]
    parts = dyn.parts
    return {
        "format": FILE_FORMAT,
        "version": VERSION,
        "made_by": dict(parts.made_by),
        "plan": parts.plan.to_dict(),
        "cost": parts.cost.to_dict(),
        "report": parts.report.to_dict(),
        "interfaces": [
            {"inputs": [list(i) for i in f.inputs], "features": f.features}
            for f in parts.interfaces
        ],
        "owners": torch.tensor(parts.owners, dtype=torch.int16),
        "input_shapes": [list(shape) for shape in parts.input_shapes],
        "batch": parts.batch,
        "output_spec": None if parts.output_spec is None else encode_structure(parts.output_spec),
        "input_spec": None if parts.input_spec is None else encode_structure(parts.input_spec),
        "provenance": _encode_provenance(parts.provenance),
        "stages": stages,
        "modules": tables.modules,
        "tensors": tables.tensors,
    }


@dataclass
class _Tables:
    """Modules and tensors, each once however many stages use it."""

    modules: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    module_ids: dict[int, int] = field(default_factory=dict)
    tensor_ids: dict[int, int] = field(default_factory=dict)

    def stage(self, stage: nn.Module, number: int) -> dict[str, Any]:
        assert isinstance(stage, fx.GraphModule)
        place = f"stage {number}"
        modules: dict[str, int] = {}
        attributes: dict[str, Any] = {}
        for node in stage.graph.nodes:
            target = str(node.target)
            if node.op == "call_module":
                modules[target] = self._module(stage.get_submodule(target), f"{place}, {target}")
            elif node.op == "get_attr" and not _lies_in_module(stage, target):
                attributes[target] = {
                    "tensor": self._tensor(read(stage, target)),
                    "saved": is_saved(stage, target),
                }
        return {
            "graph": encode_graph(stage.graph, place),
            "modules": modules,
            "attributes": attributes,
        }

    def _module(self, module: nn.Module, place: str) -> int:
        if id(module) not in self.module_ids:
            row = encode_module(module, place)
            row["tensors"] = {
                key: {
                    "tensor": self._tensor(value),
                    "saved": key not in module._non_persistent_buffers_set,
                }
                for key, value in [*module._parameters.items(), *module._buffers.items()]
                if value is not None
            }
            row["training"] = module.training
            self.module_ids[id(module)] = len(self.modules)
            self.modules.append(row)
        return self.module_ids[id(module)]

    def _tensor(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self.tensor_ids:
            self.tensor_ids[id(tensor)] = len(self.tensors)
            kept = tensor.detach()
            if kept.untyped_storage().nbytes() != kept.numel() * kept.element_size():
                kept = kept.clone()
            self.tensors.append(
                {
                    "data": kept,
                    "parameter": isinstance(tensor, nn.Parameter),
                    "requires_grad": bool(tensor.requires_grad),
                }
            )
        return self.tensor_ids[id(tensor)]


def _lies_in_module(stage: nn.Module, target: str) -> bool:
    """Whether a tensor belongs to a module that is stored as a module."""
    container = stage.get_submodule(target.rpartition(".")[0])
    return not is_container(container) and container is not stage


def _encode_provenance(provenance: Mapping[str, Slice]) -> dict[str, Any]:
    indices: dict[tuple[int, ...], int] = {}
    rows = {
        key: [
            where.source,
            [None if p is None else indices.setdefault(p, len(indices)) for p in where.index],
        ]
        for key, where in provenance.items()
    }
    return {"indices": [torch.tensor(i, dtype=torch.int32) for i in indices], "slices": rows}


# -- reading ---------------------------------------------------------------------------------------


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


def load(
    path: str | os.PathLike[str],
    map_location: str | torch.device = "cpu",
    *,
    operators: Collection[str] = (),
    types: Collection[type] = (),
) -> DynamicModel:
    """Read a staged network that ``DynamicModel.save`` wrote. No code in the file is run.

    Args:
        path: The file.
        map_location: Device for the tensors.
        operators: Operators that the file may use besides aten's and torchvision's, such as
            ``["mylib::myop"]``. Import what defines them first. Running the network runs them.
        types: Classes of its inputs and outputs besides tuples, lists, dicts and their kin.
            Named tuples that are not given come back as new ones of the same name and fields.

    Raises:
        FormatError: The file is damaged, newer, something else, or uses what is not allowed.
        OutOfMemoryError: It does not fit in memory.
    """
    if isinstance(operators, str) or not all(_is_operator_name(name) for name in operators):
        raise FormatError(
            f"operators: {operators!r} is no list of operators; write namespace::operator, such "
            'as ["mylib::myop"].'
        )
    allowed = Allowed(frozenset(operators), types_by_name(types))
    with _reading(path):
        return from_data(_read(path, map_location), os.fspath(path), allowed)


def load_to_show(path: str | os.PathLike[str]) -> DynamicModel:
    """Read a staged network to look at it; what ``load`` would want allowed cannot be run."""
    with _reading(path):
        return from_data(_read(path, "cpu"), os.fspath(path), Allowed(None, None))


def _reading(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    return explained(f"reading {os.fspath(path)}", "check that the file is the one you mean")


def _is_operator_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and all(p.isidentifier() for p in f"{name}".split("::", 1))
        and ("::" in name)
    )


def _read(path: str | os.PathLike[str], map_location: str | torch.device) -> Any:
    name = os.fspath(path)
    try:
        _check_whole(name)
        return torch.load(name, map_location=map_location, weights_only=True)
    except IsADirectoryError as error:
        raise FormatError(f"{name} is a directory; name the dyn.pt file inside it.") from error
    except FileNotFoundError as error:
        raise FormatError(
            f"{name}: no such file; compile one with s2d-compile MODEL --splits PLAN -o {name}."
        ) from error
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        ValueError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
    ) as error:
        log.debug("%s: %s", name, error)
        raise FormatError(
            f"{name} is not a dyn.pt, or is damaged: torch's weights-only loader refuses it. "
            f"If it is a model, compile it with s2d-compile {name} --splits PLAN -o OUTPUT."
        ) from error


def _check_whole(name: str) -> None:
    """Compare the checksums in the archive, which torch does not.

    Raises:
        zipfile.BadZipFile: One differs.
    """
    with zipfile.ZipFile(name) as archive:
        if (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{member} is damaged")


def from_data(data: Any, name: str, allowed: Allowed | None = None) -> DynamicModel:
    """The staged network that ``to_data`` described.

    Raises:
        FormatError: The data is none.
    """
    if not isinstance(data, dict) or data.get("format") != FILE_FORMAT:
        raise FormatError(
            f"{name} is not a dyn.pt; it may be a model, which s2d-compile turns into one."
        )
    version = data.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(
            f"{name} has format {version!r}, this package reads up to {VERSION}; "
            "upgrade s2d-compiler."
        )
    try:
        return _network(data, allowed or Allowed())
    except S2DError as error:
        raise FormatError(f"{name}: {error}") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        AssertionError,
        RuntimeError,
        OverflowError,
        SyntaxError,
    ) as error:
        raise FormatError(
            f"{name} is damaged ({type(error).__name__}: {_sentence(error)})."
        ) from error


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]


def _network(data: Mapping[str, Any], allowed: Allowed) -> DynamicModel:
    tensors = [_tensor(row) for row in data["tensors"]]
    modules = [_module(row, tensors, f"module {i}") for i, row in enumerate(data["modules"])]
    stages = [
        _stage(row, modules, tensors, number, allowed)
        for number, row in enumerate(data["stages"], start=1)
    ]
    specs = {
        key: None if data[key] is None else decode_structure(data[key], allowed.types)
        for key in ("output_spec", "input_spec")
    }
    parts = DynamicParts(
        plan=Plan.from_dict(data["plan"]),
        cost=Cost.from_dict(data["cost"]),
        report=Report.from_dict(data["report"]),
        provenance=_decode_provenance(data["provenance"]),
        interfaces=tuple(
            Interface(tuple(tuple(i) for i in row["inputs"]), int(row["features"]))
            for row in data["interfaces"]
        ),
        owners=tuple(data["owners"].tolist()),
        input_shapes=tuple(tuple(int(n) for n in shape) for shape in data["input_shapes"]),
        batch=None if data["batch"] is None else int(data["batch"]),
        made_by=dict(data["made_by"]),
        **specs,
    )
    if not len(stages) == len(parts.interfaces) == parts.plan.stages:
        raise FormatError(
            f"{len(stages)} stages, but the plan has {parts.plan.stages}; the file is damaged."
        )
    for number, stage in enumerate(stages):
        _check_interface(stage, parts, number)
    dyn = DynamicModel(stages, parts)
    dyn.training = any(m.training for m in modules)
    return dyn


def _check_interface(stage: fx.GraphModule, parts: DynamicParts, number: int) -> None:
    """Require that a stage's inputs exist and its outputs have the network's structure.

    Raises:
        FormatError: Something does not fit.
    """
    place, interface = f"stage {number + 1}", parts.interfaces[number]
    nodes = list(stage.graph.nodes)
    if sum(n.op == "placeholder" for n in nodes) != len(interface.inputs):
        raise FormatError(f"{place}: its graph takes another number of inputs; damaged.")
    for where in interface.inputs:
        known = where[0] == "input" and len(where) == 2 and 0 <= where[1] < len(parts.input_shapes)
        if where[0] == "feature" and len(where) == 3 and 0 <= where[1] < number:
            known = 0 <= where[2] < parts.interfaces[where[1]].features
        if not known:
            raise FormatError(f"{place}: it takes {where!r}, which no earlier stage hands on.")
    output = nodes[-1].args[0] if nodes and nodes[-1].op == "output" else None
    leaves = 1 if parts.output_spec is None else parts.output_spec.num_leaves
    if not _takes_all_inputs(parts):
        raise FormatError("the structure of its inputs is not that of a call; damaged.")
    if not isinstance(output, tuple) or [len(o) for o in output] != [leaves, interface.features]:
        raise FormatError(f"{place}: its outputs are not those of the network; damaged.")


def _takes_all_inputs(parts: DynamicParts) -> bool:
    """Whether the structure of the inputs is that of a call with all of them."""
    spec = parts.input_spec
    return spec is None or (
        spec.type is tuple
        and [child.type for child in spec._children] == [tuple, dict]
        and spec.num_leaves == len(parts.input_shapes)
        and all(isinstance(name, str) for name in spec._children[1]._context)
    )


def _tensor(row: Mapping[str, Any]) -> torch.Tensor:
    data = row["data"]
    if not isinstance(data, torch.Tensor):
        raise FormatError("a tensor is no tensor; the file is damaged.")
    return (
        nn.Parameter(data, requires_grad=bool(row["requires_grad"])) if row["parameter"] else data
    )


def _module(row: Mapping[str, Any], tensors: list[torch.Tensor], place: str) -> nn.Module:
    held = {str(key): tensors[where["tensor"]] for key, where in row["tensors"].items()}
    unsaved = frozenset(str(key) for key, where in row["tensors"].items() if not where["saved"])
    module = decode_module({k: row[k] for k in ("class", "arguments")}, place, held, unsaved)
    wanted = {
        k for k, v in [*module._parameters.items(), *module._buffers.items()] if v is not None
    }
    if set(row["tensors"]) != wanted:
        raise FormatError(
            f"{place} ({row['class']}) has not the tensors {', '.join(sorted(wanted))}."
        )
    for key, where in row["tensors"].items():
        tensor, slot = (
            tensors[where["tensor"]],
            module._parameters.get(key, module._buffers.get(key)),
        )
        assert slot is not None
        if tensor.shape != slot.shape:
            raise FormatError(
                f"{place} ({row['class']}): {key} is {tuple(tensor.shape)}, "
                f"not {tuple(slot.shape)}."
            )
        if key in module._parameters:
            if not isinstance(tensor, nn.Parameter):
                raise FormatError(f"{place}: {key} is no parameter.")
            module._parameters[key] = tensor
        else:
            module._buffers[key] = tensor
            if not where["saved"]:
                module._non_persistent_buffers_set.add(key)
    return module.train(bool(row["training"]))


def _stage(
    row: Mapping[str, Any],
    modules: list[nn.Module],
    tensors: list[torch.Tensor],
    number: int,
    allowed: Allowed,
) -> fx.GraphModule:
    place = f"stage {number}"
    graph = decode_graph(row["graph"], place, allowed.operators)
    root = nn.Module()
    for target, index in row["modules"].items():
        _assign(root, target, modules[index], True, place)
    for target, where in row["attributes"].items():
        _assign(root, target, tensors[where["tensor"]], bool(where["saved"]), place)
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in row["modules"]:
            raise FormatError(
                f"{place}: node {node.name!r} calls {node.target!r}, which the file does not hold."
            )
        if node.op == "get_attr" and not isinstance(find(root, str(node.target)), torch.Tensor):
            raise FormatError(
                f"{place}: node {node.name!r} reads {node.target!r}, which the file does not hold."
            )
    graph.lint()
    result = graph_module(root, graph, f"Stage{number}")
    result.training = any(m.training for m in result.children())
    return result


def _assign(root: nn.Module, target: str, value: Any, saved: bool, place: str) -> None:
    parts = str(target).split(".")
    inside = (".".join(parts[:n]) for n in range(1, len(parts)))
    if any(is_taken(root, container) for container in inside) or is_taken(root, str(target)):
        raise FormatError(f"{place}: {target!r} lies inside another module, or is there twice.")
    put(root, str(target), value, saved=saved)


def _decode_provenance(data: Mapping[str, Any]) -> dict[str, Slice]:
    indices = [tuple(t.tolist()) for t in data["indices"]]
    return {
        str(key): Slice(str(source), tuple(None if i is None else indices[i] for i in index))
        for key, (source, index) in data["slices"].items()
    }
