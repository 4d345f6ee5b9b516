"""Checkpoints: everything that a training is, in one file that is data only."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from s2d_compiler.archive import check_data_only, check_members, require_end
from s2d_compiler.errors import CheckpointError, FormatError, S2DError, first_line
from s2d_compiler.fields import require_plain, shown
from s2d_compiler.memory import explained, let_through
from s2d_compiler.output import atomic_write

__all__ = ["read_checkpoint", "require_like", "require_same_run", "tensors_of", "write_checkpoint"]

FORMAT = "s2d-compiler training"
VERSION = 1


def write_checkpoint(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a checkpoint: whole, or the one before stays.

    Raises:
        OutputError: The file cannot be written.
    """
    whole = {"format": FORMAT, "version": VERSION, **data}
    with explained(f"writing {os.fspath(path)}", "close other programs"):
        atomic_write(path, lambda file: torch.save(whole, file))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``write_checkpoint`` wrote; None where there is no file. Nothing in it is executed.

    Raises:
        CheckpointError: It is damaged, newer, or no checkpoint.
    """
    name = os.fspath(path)
    if not Path(path).exists():
        return None
    if not Path(path).is_file():
        raise CheckpointError(f"{name} is no plain file; name another for the checkpoint.")
    try:
        with open(path, "rb") as file:
            require_end(file)
            check_members(file)
            check_data_only(file)
        data = torch.load(path, map_location="cpu", weights_only=True)
        require_plain(data)
    except Exception as error:  # what torch's readers raise on damaged files is no fixed list
        let_through(error)
        reason = first_line(error).partition("; the file is damaged")[0][:200]
        raise CheckpointError(
            f"{name} is no checkpoint of a training, or is damaged ({reason}); remove it to begin "
            "anew, or name another file."
        ) from error
    if type(data) is not dict or data.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} is no checkpoint of a training; name another file for the checkpoint."
        )
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{name}: its format has version {shown(data.get('version'))}, and this package reads "
            f"version {VERSION}; remove it to begin anew, or use the package that wrote it."
        )
    return data


_WHAT = {
    "network": ("a network of other layers", "the network that it began with"),
    "start": ("a network with other weights", "the network that it began with"),
    "data": ("other data, or data preprocessed otherwise", "the data that it began with"),
    "teacher": ("another teacher", "the teacher that it began with"),
    "form": ("the other form of the network", "the form that it began with"),
    "processes": ("another number of processes", "as many processes as it began with"),
}


def require_same_run(path: str, found: Any, run: Mapping[str, Any]) -> None:
    """Require that a checkpoint is of this training.

    Args:
        path: The file, for messages.
        found: What identifies its training.
        run: What identifies this one.

    Raises:
        CheckpointError: It is of another; the message says what differs.
    """
    if type(found) is not dict or set(found) != set(run) or type(found["recipe"]) is not dict:
        raise CheckpointError(f"{path}: run: it is incomplete; remove the file to begin anew.")
    for name, value in run["recipe"].items():
        there = found["recipe"].get(name)
        if there != value:
            raise CheckpointError(
                f"{path}: recipe.{name} is {shown_any(there)} there and {shown_any(value)} here, "
                "and a training goes on only as it began; give what it began with, or name "
                "another file."
            )
    for name, value in run.items():
        if found[name] != value and name != "recipe":
            what, remedy = _WHAT.get(name, (f"another {name}", "what it began with"))
            raise CheckpointError(
                f"{path}: {name}: it is of {what}, and a training goes on only as it began; give "
                f"{remedy}, or name another file."
            )


def shown_any(value: Any) -> str:
    """A setting in a message."""
    return str(value)[:60] if type(value) in (list, tuple) else shown(value)


def require_like(found: Any, pattern: Any, place: str) -> None:
    """Require the same kinds, keys, shapes and types as in a pattern, all the way down.

    Raises:
        CheckpointError: naming the first place that differs.
    """
    if type(found) is not type(pattern):
        damaged(place, f"{shown(found)} stands where {_kind(pattern)} belongs")
    if type(pattern) is dict:
        if set(found) != set(pattern):
            odd = sorted(map(str, set(found) ^ set(pattern)))[0]
            damaged(place, f"{shown(odd)} is missing there or does not belong there")
        for key, value in pattern.items():
            require_like(found[key], value, f"{place}.{key}")
    elif isinstance(pattern, Tensor) and (
        found.shape != pattern.shape or found.dtype != pattern.dtype
    ):
        damaged(
            place,
            f"numbers of shape {tuple(found.shape)} and type {found.dtype}, not "
            f"{tuple(pattern.shape)} and {pattern.dtype}",
        )


def damaged(place: str, problem: str) -> None:
    """Refuse a checkpoint."""
    raise CheckpointError(f"{place}: {problem}; the file is damaged, remove it to begin anew.")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


# -- what stands in it ---------------------------------------------------------------------------


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, saved or not, by name, each once."""
    return {
        name: tensor.detach()
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]
    }


def take(network: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a network the numbers of a checkpoint."""
    with torch.no_grad():
        for name, tensor in tensors_of(network).items():
            tensor.copy_(found[name])


def hash_of(tensors: Mapping[str, Tensor], *, numbers: bool = True) -> str:
    """A hash of names, shapes and types, and of the numbers."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if numbers:
            plain = tensor.detach().cpu().contiguous().flatten()
            digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that networks and data sets draw from."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "python_gauss": [random.getstate()[2]],
        "numpy": torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)),
        "numpy_rest": [str(kind), int(position), int(has_gauss), float(gauss)],
    }


def set_random_states(found: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators into the states of a checkpoint.

    Raises:
        CheckpointError: They are none.
    """
    try:
        torch.set_rng_state(found["torch"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(found["device"], device)
        (gauss,) = found["python_gauss"]
        random.setstate((3, tuple(found["python"].tolist()), gauss))
        kind, *rest = found["numpy_rest"]
        keys = found["numpy"].numpy().astype(numpy.uint32)
        numpy.random.set_state((kind, keys, *rest))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        damaged("random", f"these are no states of generators ({first_line(error)[:100]})")


def load_optimizer(optimizer: torch.optim.Optimizer, found: Any) -> None:
    """Put an optimiser into the state of a checkpoint.

    Raises:
        CheckpointError: It is none of this optimiser.
    """
    require_like(_settings(found), _settings(optimizer.state_dict()), "optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, row in found["state"].items():
        place = f"optimizer.state[{shown(number)}]"
        if type(number) is not int or not 0 <= number < len(parameters) or type(row) is not dict:
            damaged(place, "this is no state of a parameter")
        for name, value in row.items():
            shape = parameters[number].shape
            if not isinstance(value, Tensor) or value.shape not in (shape, torch.Size(())):
                damaged(f"{place}.{name}", f"this is no tensor of shape {tuple(shape)}")
    try:
        optimizer.load_state_dict(found)
    except (S2DError, FormatError):
        raise
    except Exception as error:
        let_through(error)
        damaged("optimizer", f"torch refuses it ({first_line(error)[:120]})")


def _settings(state: Any) -> Any:
    if type(state) is not dict or type(state.get("param_groups")) is not list:
        damaged("optimizer", "its groups are missing")
    if type(state.get("state")) is not dict:
        damaged("optimizer", "its state is missing")
    groups = {str(k): dict(row) for k, row in enumerate(state["param_groups"])}
    return {k: {n: v for n, v in row.items() if n != "lr"} for k, row in groups.items()}
