"""``dyn.pt``: a staged network as data.

One ``torch.save`` of plain containers and tensors, read with torch's weights-only loader:

- ``format``, ``version``: what the file is;
- ``stages``: per stage its graph (operators by name), which modules and tensors it uses;
- ``modules``: class, arguments and tensors of every module, once;
- ``tensors``: every tensor once, with whether it is a parameter;
- ``provenance``: where each came from; ``owners``: the stage of every atom;
- ``input_spec``, ``output_spec``: the structure of inputs and outputs;
- ``plan``, ``cost``, ``report``, ``interfaces``, ``made_by``...: plain data;
- ``settings``: how it is to be run, such as its thresholds (since version 2).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler._version import FILE_FORMAT
from s2d_compiler.allowance import RefusedError
from s2d_compiler.archive import ArchiveError, check_data_only, check_members, require_end
from s2d_compiler.attributes import is_container, is_saved, read
from s2d_compiler.computed import ComputedLayer
from s2d_compiler.decoding import Allowed, decode_network
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import FormatError, S2DError, first_line
from s2d_compiler.fields import require_plain, shown
from s2d_compiler.graph_codec import encode_graph
from s2d_compiler.memory import explained
from s2d_compiler.module_codec import encode_module
from s2d_compiler.operator_names import needed_permission
from s2d_compiler.output import atomic_write
from s2d_compiler.provenance import Slice
from s2d_compiler.structure import encode_structure, foreign_types, types_by_name

__all__ = ["Allowed", "from_data", "load", "load_to_show", "permissions", "save", "to_data"]

log = logging.getLogger(__name__)

#: The version of what ``save`` writes. ``load`` reads this one and all before it: a change of what
#: is written raises it, and ``tests/formats`` gets a file of the new one.
VERSION = 2


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
    graphs = [stage.graph for stage in dyn.stages if isinstance(stage, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes}
    for module in dyn.modules():
        if isinstance(module, ComputedLayer):
            targets |= {step.target for step in module.expression.steps}
    operators = {name for target in targets if (name := needed_permission(target)) is not None}
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
        "settings": dyn.settings.to_dict(),
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
            kept = tensor.detach().resolve_conj().resolve_neg()
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


# -- reading -------------------------------------------------------------------------------------


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
        return from_data(_read(path), os.fspath(path), allowed, map_location)


def load_to_show(path: str | os.PathLike[str]) -> DynamicModel:
    """Read a staged network to look at it; what ``load`` would want allowed cannot be run."""
    with _reading(path):
        return from_data(_read(path), os.fspath(path), Allowed(None, None))


def _reading(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    return explained(f"reading {os.fspath(path)}", "check that the file is the one you mean")


def _is_operator_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and all(p.isidentifier() for p in f"{name}".split("::", 1))
        and ("::" in name)
    )


def _read(path: str | os.PathLike[str]) -> Any:
    name = os.fspath(path)
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            raise FormatError(f"{name} is a device or a pipe; name a plain file.")
        with open(path, "rb") as file:
            require_end(file)
            check_members(file)
            check_data_only(file)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except IsADirectoryError as error:
        raise FormatError(f"{name} is a directory; name the dyn.pt file inside it.") from error
    except FileNotFoundError as error:
        raise FormatError(
            f"{name}: no such file; compile one with s2d-compile MODEL --splits PLAN -o {name}."
        ) from error
    except RefusedError as error:
        raise FormatError(
            f"{name} is not a dyn.pt, or is damaged ({error}); it may be a model, which "
            f"s2d-compile {name} --splits PLAN -o OUTPUT turns into one."
        ) from error
    except ArchiveError as error:
        raise FormatError(
            f"{name} is not a dyn.pt, or is damaged ({error}); copy it again."
        ) from error
    except Exception as error:  # what torch's readers raise on damaged files is no fixed list
        log.debug("%s: %s", name, error)
        raise FormatError(
            f"{name} is not a dyn.pt, or is damaged: torch's weights-only loader refuses it. "
            f"If it is a model, compile it with s2d-compile {name} --splits PLAN -o OUTPUT."
        ) from error


def from_data(
    data: Any,
    name: str,
    allowed: Allowed | None = None,
    map_location: str | torch.device | None = None,
) -> DynamicModel:
    """The staged network that ``to_data`` described.

    Raises:
        FormatError: The data is none, or its tensors cannot be put where they are to go.
    """
    if type(data) is not dict or type(data.get("format")) is not str:
        data = {}
    if data.get("format") != FILE_FORMAT:
        raise FormatError(
            f"{name} is not a dyn.pt; it may be a model, which s2d-compile turns into one."
        )
    version = data.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(
            f"{name}: its format has version {shown(version)}, which is none (versions count from "
            "1); the file is damaged, compile the model again."
        )
    if version > VERSION:
        raise FormatError(
            f"{name}: its format has version {shown(version)}, and this package reads versions up "
            f"to {VERSION}; upgrade s2d-compiler."
        )
    device = _device(map_location)
    try:
        require_plain(data)
        return decode_network(data, allowed or Allowed(), device)
    except S2DError as error:
        raise FormatError(f"{name}: {error}") from error
    except Exception as error:  # every rule has a sentence of its own; this is for those missing
        raise FormatError(
            f"{name}: what it holds is no network ({type(error).__name__}: "
            f"{first_line(error)[:200]}); the file is damaged, compile the model again."
        ) from error


def _device(map_location: str | torch.device | None) -> torch.device | None:
    """Where tensors go, tried out with an empty one."""
    if map_location is None:
        return None
    try:
        device = torch.device(map_location)
        torch.empty(0).to(device)
    except Exception as error:
        raise FormatError(
            f"map_location: {map_location!r} is no device of this machine "
            f'({first_line(error)[:200]}); leave it at "cpu".'
        ) from error
    return device
