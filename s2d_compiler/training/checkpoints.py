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
from s2d_compiler.errors import CheckpointError, FormatError, first_line
from s2d_compiler.fields import as_number, damaged, require_plain, shown
from s2d_compiler.memory import explained, let_through
from s2d_compiler.output import atomic_write

__all__ = ["read_checkpoint", "require_same_run", "require_state", "tensors_of", "write_checkpoint"]

FORMAT = "s2d-compiler training 1"


def write_checkpoint(path: str | os.PathLike[str], data: Mapping[str, Any]) -> None:
    """Write a checkpoint: whole, or the one before stays.

    Raises:
        OutputError: The file cannot be written.
    """
    whole = {"format": FORMAT, **data}
    with explained(f"writing {os.fspath(path)}", "close other programs"):
        atomic_write(path, lambda file: torch.save(whole, file))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``write_checkpoint`` wrote; None where there is no file. Nothing in it is executed.

    Raises:
        CheckpointError: It is damaged, of another version, or no checkpoint.
    """
    name = os.fspath(path)
    if not Path(path).exists():
        return None
    try:
        with open(path, "rb") as file:
            require_end(file)
            check_members(file)
            check_data_only(file)
        data = torch.load(path, map_location="cpu", weights_only=True)
        require_plain(data)
    except Exception as error:  # what torch's readers raise on damaged files is no fixed list
        let_through(error)
        reason = first_line(error).partition("; ")[0][:200]
        raise CheckpointError(
            f"{name} is no checkpoint of a training, or is damaged ({reason}); remove it to begin "
            "anew, or name another file."
        ) from error
    if type(data) is not dict or data.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{name} is not of the format {FORMAT!r}, which this package reads; remove it to begin "
            "anew, or name another file."
        )
    return data


_WHAT = {
    "network": "a network of other layers",
    "start": "a network that began with other weights",
    "data": "other images or labels, or other preprocessing",
    "teacher": "another teacher, or none",
    "form": "another form of the network",
    "processes": "another number of processes",
    "frozen": "a network in which other parameters were frozen",
    "validation": "other validation data",
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
    there = found if type(found) is dict else {}
    recipe = there.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    differing = [
        f"recipe.{name} is {_setting(recipe.get(name))} there and {_setting(value)} here"
        for name, value in run["recipe"].items()
        if recipe.get(name) != value
    ]
    differing += [
        f"it is of {what}" for key, what in _WHAT.items() if there.get(key) != run.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{path}: {differing[0]}, and a training goes on only as it began; give what it began "
            "with, or name another file."
        )


def _setting(value: Any) -> str:
    return str(value)[:60] if type(value) in (list, tuple) else shown(value)


def require_state(
    path: str, found: Mapping[str, Any], fresh: Mapping[str, Any], epochs: int, steps: int
) -> None:
    """Require that a checkpoint of this training holds all that belongs into it, and no more.

    Args:
        path: The file.
        found: What is in it.
        fresh: The state of this training at its beginning, with all that an optimiser may keep.
        epochs: The most epochs that may be over.
        steps: The most steps of an epoch that may be over.

    Raises:
        CheckpointError: It does not; the message names the place.
    """
    try:
        epoch = as_number(found.get("epoch"), "epoch", 0, epochs)
        as_number(found.get("step"), "step", 0, steps)
        slots = fresh["optimizer"]
        kept = found.get("optimizer")
        wanted = {
            **fresh,
            "history": fresh["history"].new_zeros(epoch, fresh["history"].shape[1]),
            "best": fresh["weights"] if found.get("best") else {},
            "optimizer": {k: v for k, v in slots.items() if type(kept) is not dict or k in kept},
        }
        _require_like(found, wanted, "")
    except FormatError as error:
        problem = str(error).partition("; the file is damaged")[0]
        raise CheckpointError(
            f"{path}: {problem}; the file is damaged, remove it to begin anew."
        ) from error


def _require_like(found: Any, pattern: Any, place: str) -> None:
    """Require the kinds, keys, lengths and shapes of a pattern, all the way down."""
    if type(found) is not type(pattern):
        damaged(place, f"{shown(found)} stands where a {type(pattern).__name__} belongs")
    if type(pattern) is dict:
        if odd := sorted(map(str, set(found) ^ set(pattern))):
            damaged(place, f"{shown(odd[0])} is missing there, or does not belong there")
        for key, value in pattern.items():
            _require_like(found[key], value, f"{place}.{key}".strip("."))
    elif type(pattern) is list:
        if len(found) != len(pattern):
            damaged(place, f"{len(found)} values, where {len(pattern)} belong")
        for number, value in enumerate(pattern):
            _require_like(found[number], value, f"{place}[{number}]")
    elif isinstance(pattern, Tensor) and _form(found) != _form(pattern):
        damaged(place, f"{_form(found)}, where {_form(pattern)} belongs")


def _form(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)} and type {tensor.dtype}"


# -- what stands in it ---------------------------------------------------------------------------


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, saved or not, by name, each once."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def take(network: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give a network the numbers of a checkpoint."""
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


#: What optimisers keep for each parameter, and whether it is a single number.
_SLOTS = {"momentum_buffer": False, "exp_avg": False, "exp_avg_sq": False, "step": True}


def slots_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser keeps, by number of the parameter and name."""
    return {
        f"{number}.{name}": value
        for number, parameter in enumerate(_parameters_of(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def possible_slots_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What it may come to keep, with any numbers."""
    return {
        f"{number}.{name}": torch.zeros(()) if is_single else parameter.detach()
        for number, parameter in enumerate(_parameters_of(optimizer))
        for name, is_single in _SLOTS.items()
    }


def set_slots(optimizer: torch.optim.Optimizer, found: Mapping[str, Tensor]) -> None:
    """Give it back what it kept."""
    parameters = _parameters_of(optimizer)
    for key, value in found.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        kept = value.clone() if _SLOTS[name] else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][name] = kept


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that networks and data sets draw from."""
    _, words, gauss = random.getstate()
    state: Any = numpy.random.get_state(legacy=False)
    rest = [state["state"]["pos"], state["has_gauss"], state["gauss"], gauss is not None, gauss]
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)
    return {
        "torch": torch.get_rng_state(),
        "device": on_device,
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(state["state"]["key"].astype(numpy.int64)),
        "rest": torch.tensor([float(value or 0) for value in rest], dtype=torch.float64),
    }


def set_random_states(found: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators into states that ``random_states`` returned."""
    position, has_gauss, gauss, has_second, second = found["rest"].tolist()
    torch.set_rng_state(found["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(found["device"], device)
    random.setstate((3, tuple(found["python"].tolist()), second if has_second else None))
    keys = found["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
