"""What a whole model from a file may hold: layers, tensors and plain settings, in their places.

A pickle fills an instance's ``__dict__`` as it likes. The classes are from a fixed list, but their
code takes for granted that hooks are hooks and layers are layers, and finds what lies in an
instance before what its class defines. So every module is looked through before any of its code
runs.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterator
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import ReferenceType

import torch
from torch import nn

from s2d_compiler.fields import shown

__all__ = ["UnsoundError", "check_sound"]

_TABLES = ("_parameters", "_buffers", "_modules")
_TENSORS = (
    torch.Tensor,
    nn.Parameter,
    nn.Buffer,
    nn.UninitializedParameter,
    nn.UninitializedBuffer,
)
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, slice, range),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    *(torch.UntypedStorage, torch.TypedStorage, torch.qscheme),
    ReferenceType,  # recurrent layers make these of their own weights
)
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, frozenset)
#: What instances may hold in place of what torch's classes define: tables that a module fills.
_OWN = frozenset(nn.Module().__dict__) | frozenset(
    "_forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks_with_kwargs "
    "_state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks "
    "_is_full_backward_hook _non_persistent_buffers_set _backward_pre_hooks".split()
)
_DEEPEST = 100


class UnsoundError(Exception):
    """Something lies where it does not belong; the message says what and where."""


def check_sound(content: Any) -> None:
    """Look through a model, or a checkpoint, without running any code of its classes.

    Raises:
        UnsoundError: naming the first place that holds what no saved model has there.
    """
    if isinstance(content, nn.Module):
        _check_model(content)
    else:
        _check_value(content, "the file", 0, set())


def _check_model(model: nn.Module) -> None:
    looked_at: set[int] = set()
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module, int]] = [("", model, 0)]
    while stack:
        path, module, depth = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if depth > _DEEPEST:
            raise UnsoundError(f"more than {_DEEPEST} layers lie in one another at {path[:60]}")
        for name, child in _check_module(path, module, looked_at):
            stack.append((f"{path}.{name}".strip("."), child, depth + 1))
    _check_no_cycle(model)


def _check_module(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    held: dict[str, Any] = vars(module)
    place = path or "the model"
    for table in _TABLES:
        entries: Any = held.get(table)
        if type(entries) not in (dict, OrderedDict):
            raise UnsoundError(f"{place} is damaged or incomplete, it has no {table}")
        if type(entries) is OrderedDict and vars(entries):
            raise UnsoundError(f"{place}: its table {table} has attributes")
        for key in entries:
            if type(key) is not str or not key or "." in key:
                raise UnsoundError(f"{place}: {table} has the name {shown(key)}, which is none")
            if _is_code(getattr(type(module), key, None)):
                raise UnsoundError(
                    f"{_below(path, key)} hides what {type(module).__name__} defines"
                )
    for name, child in held["_modules"].items():
        if child is not None and not isinstance(child, nn.Module):
            raise UnsoundError(f"{_below(path, name)} is no layer")
        if child is not None:
            yield name, child
    for table, kinds in (("_parameters", nn.Parameter), ("_buffers", torch.Tensor)):
        for name, tensor in dict(held[table]).items():
            if tensor is not None and not isinstance(tensor, kinds):
                raise UnsoundError(f"{_below(path, name)} is no {kinds.__name__.lower()}")
            _check_value(tensor, _below(path, name), 0, seen)
    for name, value in held.items():
        if name not in _TABLES:
            _check_attribute(module, name, value, _below(path, str(name)[:60]), seen)


def _below(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _check_attribute(module: nn.Module, name: Any, value: Any, place: str, seen: set[int]) -> None:
    if type(name) is not str:
        raise UnsoundError(f"{place}: an attribute has a name that is no text")
    if "_hooks" in name and value:
        raise UnsoundError(f"{place}: it holds a hook, which runs code; remove it before saving")
    if name.startswith("__") and name.endswith("__"):
        raise UnsoundError(f"{place} is a name that Python uses itself")
    if name not in _OWN and _is_code(getattr(type(module), name, None)):
        raise UnsoundError(f"{place} hides what {type(module).__name__} defines under that name")
    _check_value(value, place, 0, seen)


def _is_code(defined: Any) -> bool:
    """Whether a class's attribute is a method, a property or the like."""
    return callable(defined) or hasattr(type(defined), "__get__")


def _check_value(value: Any, place: str, depth: int, seen: set[int]) -> None:
    """Plain data, tensors, layers (looked through elsewhere), and functions from the list."""
    if depth > _DEEPEST:
        raise UnsoundError(f"{place}: more than {_DEEPEST} lists or dicts lie in one another")
    kind = type(value)
    if kind in _PLAIN or isinstance(value, Enum | FunctionType | BuiltinFunctionType | type):
        return  # functions, classes and enumerations come from the list of what may be read
    if id(value) in seen:
        return
    seen.add(id(value))
    if kind in _TENSORS:
        _check_attributes(value, place, depth, seen)
    elif kind in _CONTAINERS:
        if kind is OrderedDict:
            _check_attributes(value, place, depth, seen)
        for key in value:
            _check_value(key, place, depth + 1, seen)
        for item in value.values() if isinstance(value, dict) else ():
            _check_value(item, place, depth + 1, seen)
    elif kind is functools.partial:
        for part in (value.func, value.args, value.keywords):
            _check_value(part, place, depth + 1, seen)
        _check_attributes(value, place, depth, seen)
    elif kind is Namespace:
        _check_attributes(value, place, depth, seen)
    elif isinstance(value, nn.Module):
        _check_elsewhere(value, place, depth, seen)
    elif kind not in torch.serialization.get_safe_globals():
        raise UnsoundError(
            f"{place} is a {kind.__module__}.{kind.__qualname__}, which is no setting"
        )


def _check_elsewhere(module: nn.Module, place: str, depth: int, seen: set[int]) -> None:
    """A layer that lies in an attribute or a list, not among the layers of its parent."""
    if depth > _DEEPEST // 4:
        raise UnsoundError(f"{place}: layers lie in one another too deeply")
    for name, child in _check_module(place, module, seen):
        if id(child) not in seen:
            seen.add(id(child))
            _check_elsewhere(child, _below(place, name), depth + 1, seen)


def _check_attributes(value: Any, place: str, depth: int, seen: set[int]) -> None:
    for name, item in vars(value).items():
        if type(name) is not str or hasattr(type(value), name):
            raise UnsoundError(f"{place} hides what its class defines under {shown(name)}")
        _check_value(item, place, depth + 1, seen)


def _check_no_cycle(model: nn.Module) -> None:
    """A layer inside itself would never end; one in two places is fine."""
    done: set[int] = set()
    open_: list[tuple[nn.Module, Iterator[Any]]] = [(model, iter(model._modules.values()))]
    inside = {id(model)}
    while open_:
        module, children = open_[-1]
        child = next(children, open_)
        if child is open_:
            open_.pop()
            inside.discard(id(module))
            done.add(id(module))
        elif isinstance(child, nn.Module) and id(child) not in done:
            if id(child) in inside:
                raise UnsoundError(f"a {type(child).__name__} lies inside itself")
            inside.add(id(child))
            open_.append((child, iter(child._modules.values())))
