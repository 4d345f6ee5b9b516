"""Which pickled models may be read without trust, and nothing more.

A pickle is a program: it names classes and functions, and calls them. ``torch.load`` with
``weights_only=True`` runs only what is on a list. A whole model needs the list to hold the
classes of its layers, and torch lets a pickle both make an empty instance of a listed class and
call the class with any arguments. The first is all that a saved model needs, so the pickle is
followed symbolically first, without running anything, and refused if it calls anything but
torch's own tensor builders and the few functions below.
"""

from __future__ import annotations

import importlib
import pickletools
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

__all__ = ["RefusedError", "check_calls", "check_data", "resolve"]

PREFIXES = (
    "torch.nn.modules",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
)
"""Where the classes that may be read are defined."""

EXTRAS = {
    # Keeps a layer class and its arguments (vision transformers' norm_layer); calls nothing
    # itself, and what is in it comes from this list.
    "functools.partial",
    # Activations that layers keep as functions; they compute on tensors and have no other effect.
    "torch.nn.functional.relu",
    "torch._C._nn.gelu",
    "timm.layers.activations.gelu",
    # An enumeration of tensor layouts, looked up by its value.
    "timm.layers.format.Format",
    # The command line of a training script, which checkpoints keep beside their weights: a bag
    # of attributes.
    "argparse.Namespace",
}
"""What saved models refer to besides classes of layers, found by saving one of each kind."""

_CALLABLE_EXTRAS = {"functools.partial": None, "timm.layers.format.Format": 1}
"""The extras that a pickle may call, and with how many arguments (None: any number)."""

_BUILDERS = {
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_parameter"), 4),
    **dict.fromkeys(("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_qtensor"), 8),
    **dict.fromkeys(("torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_sparse_tensor"), 8),
    "torch._utils._rebuild_parameter_with_state": 4,
    "torch._utils._rebuild_meta_tensor_no_storage": 4,
    "torch.serialization._get_layout": 1,
    **dict.fromkeys(("torch.Size", "torch.device", "_codecs.encode", "builtins.complex"), 2),
    **dict.fromkeys(("builtins.set", "builtins.bytearray"), 1),
    **dict.fromkeys(("collections.OrderedDict", "collections.Counter"), 1),
}
"""What of torch's own list a pickle may call, and with how many arguments at most."""

_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


class RefusedError(Exception):
    """The pickle is not harmless, or damaged; the message says why."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A class or function that the pickle names."""

    name: str


def resolve(names: Iterable[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Find the classes that a pickle wants beyond torch's own list.

    Only modules under `PREFIXES` are imported, and only classes that are layers and are defined
    there are taken, or one of `EXTRAS`.

    Returns:
        pairs of an object and its name in the pickle, as ``torch.serialization.safe_globals``
        takes them.

    Raises:
        RefusedError: naming everything that is not allowed, or the package that is missing.
    """
    refused = sorted(name for name in names if not _is_allowed(name))
    if refused:
        shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if refused[5:] else "")
        raise RefusedError(f"reading it would use {shown}")
    return [(_find(name), name) for name in sorted(names)]


def _is_allowed(name: str) -> bool:
    if name in EXTRAS:
        return True
    return _PLAIN_NAME.fullmatch(name) is not None and name.startswith(
        tuple(f"{prefix}." for prefix in PREFIXES)
    )


def _find(name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old module names that the packages still accept
        try:
            found = vars(importlib.import_module(module_name))[attribute]
        except (ImportError, KeyError) as error:
            raise RefusedError(_explain_missing(name)) from error
    if name not in EXTRAS and not _is_layer(found):
        raise RefusedError(f"reading it would use {name}, which is no class of a layer")
    return found


def _explain_missing(name: str) -> str:
    package = name.partition(".")[0]
    try:
        version = getattr(importlib.import_module(package), "__version__", "")
    except ImportError:
        return f"it holds {name}, and {package} is not installed (pip install {package})"
    return (
        f"it holds {name}, which the installed {package} {version} does not have "
        f"(another version of {package} wrote it)"
    )


def _is_layer(found: object) -> bool:
    """Layers are plain classes; graph and script modules bring their own code with them."""
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        return False
    if issubclass(found, torch.fx.GraphModule | torch.jit.ScriptModule):
        return False
    return f"{found.__module__}.".startswith(tuple(f"{prefix}." for prefix in PREFIXES))


def check_calls(pickle: bytes, listed: Iterable[str]) -> None:
    """Follow a pickle without running it, and refuse calls that no saved model makes.

    Args:
        pickle: the pickle's bytes.
        listed: the names in it that are not on torch's own list.

    Raises:
        RefusedError: for a call of anything but torch's tensor builders and a few extras, or if
            the pickle is damaged.
    """
    _follow(pickle, _Machine(frozenset(listed)))


def check_data(
    pickle: bytes, names: Collection[str], builders: Mapping[str, int], empty: str
) -> None:
    """Follow a pickle without running it, and refuse all but plain containers and tensors.

    Args:
        pickle: the pickle's bytes.
        names: what it may name.
        builders: which of them it may call, with how many arguments.
        empty: one more that it may call, with none.

    Raises:
        RefusedError: for anything else, or if the pickle is damaged.
    """
    _follow(pickle, _DataMachine(frozenset(names), {**builders, empty: 0}))


def _follow(pickle: bytes, machine: _Machine) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            machine.step(opcode.name, argument)
    except RefusedError:
        raise
    except Exception as error:
        reason = str(error)[:60] or type(error).__name__  # it may quote the pickle
        raise RefusedError(f"its pickle is damaged ({reason})") from error


@dataclass(slots=True)
class _Made:
    """An instance that the pickle made, and what it called for that."""

    by: str
    is_filled: bool = False


class _Machine:
    """The stack of an unpickler on which names stand for themselves, and all else for nothing."""

    def __init__(self, listed: frozenset[str]) -> None:
        self.listed = listed
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        if opcode == "GLOBAL":
            self.stack.append(_Global(self._name(argument)))
        elif opcode == "REDUCE":
            arguments, function = self.stack.pop(), self.stack.pop()
            self._check_call(function, arguments)
            self.stack.append(_Made(function.name if isinstance(function, _Global) else ""))
        elif opcode == "NEWOBJ":
            arguments, created = self.stack.pop(), self.stack.pop()
            self._check_new(created, arguments)
            self.stack.append(_Made(""))
        elif opcode == "BUILD":
            self.stack.pop()
            self._check_build(self.stack[-1])
        elif opcode in _MEMO_PUT:
            self.memo[argument] = self.stack[-1]
        elif opcode in _MEMO_GET:
            self.stack.append(self.memo[argument])
        elif opcode == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif opcode in _TO_MARK:
            items, self.stack = self.stack, self.below.pop()
            if opcode == "TUPLE":
                self.stack.append(tuple(items))
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            if len(self.stack) < count:
                raise RefusedError("its pickle is damaged (a tuple lacks items)")
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif opcode in _POPS:
            for _ in range(_POPS[opcode]):
                self.stack.pop()
        elif opcode in _CONSTANTS:
            self.stack.append(() if opcode == "EMPTY_TUPLE" else argument)
        elif opcode == "BINPERSID":
            self.stack[-1] = None
        elif opcode not in ("PROTO", "STOP"):
            raise RefusedError(
                f"its pickle has the instruction {opcode}, which torch.save does not write "
                "(save it again, with the default pickle protocol)"
            )

    def _name(self, argument: str) -> str:
        """The name that torch makes of an instruction's two parts."""
        module, _, name = argument.partition(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return f"{module}.{name}"

    def _check_call(self, function: object, arguments: object) -> None:
        if not isinstance(function, _Global):
            raise RefusedError("its pickle calls something that it computed itself")
        name = function.name
        given = arguments if isinstance(arguments, tuple) else (None,) * 99
        count = _CALLABLE_EXTRAS.get(name, -1)
        if name == "torch._tensor._rebuild_from_type_v2":
            self._check_rebuild(arguments)
        elif name in self.listed and (count is None or count == len(given)):
            return
        elif name in self.listed or name not in _BUILDERS or len(given) > _BUILDERS[name]:
            raise RefusedError(f"its pickle calls {name}, which saving a model never writes")
        elif name == "builtins.bytearray" and any(isinstance(size, int) for size in given):
            raise RefusedError("its pickle makes room for bytes that it does not hold")

    def _check_rebuild(self, arguments: object) -> None:
        """torch calls the first argument, so it has to be one of its own tensor builders."""
        builder = arguments[0] if isinstance(arguments, tuple) and arguments else None
        if not isinstance(builder, _Global) or not builder.name.startswith("torch._utils._rebuild"):
            raise RefusedError("its pickle rebuilds a tensor with something else than torch does")

    def _check_new(self, created: object, arguments: object) -> None:
        if not isinstance(created, _Global):
            raise RefusedError("its pickle makes an instance of something that it computed itself")
        if created.name not in self.listed or arguments != ():
            raise RefusedError(
                f"its pickle makes a {created.name} with arguments, which saving never writes"
            )

    def _check_build(self, made: object) -> None:
        """Filling an instance twice would call what it was filled with first."""
        if not isinstance(made, _Made) or made.is_filled or made.by.startswith("torch."):
            raise RefusedError("its pickle fills something that is no new instance of a layer")
        made.is_filled = True


class _DataMachine(_Machine):
    """The same for a file of plain containers and tensors, which makes no instances."""

    def __init__(self, names: frozenset[str], builders: Mapping[str, int]) -> None:
        super().__init__(names)
        self.builders = builders

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _NOT_DATA:
            raise RefusedError(f"its pickle has the instruction {opcode}, which no data needs")
        super().step(opcode, argument)

    def _name(self, argument: str) -> str:
        name = super()._name(argument)
        if name not in self.listed:
            raise RefusedError(f"reading it would use {name!a:.80}")
        return name

    def _check_call(self, function: object, arguments: object) -> None:
        if not isinstance(function, _Global) or function.name not in self.builders:
            raise RefusedError("its pickle calls something that builds no tensor")
        count = self.builders[function.name]
        if not isinstance(arguments, tuple) or len(arguments) != count:
            raise RefusedError(
                f"its pickle calls {function.name} with other than {count} arguments"
            )


_NOT_DATA = {"BUILD", "NEWOBJ", "EMPTY_SET", "SHORT_BINSTRING"}
_MEMO_PUT = {"BINPUT", "LONG_BINPUT"}
_MEMO_GET = {"BINGET", "LONG_BINGET"}
_TO_MARK = {"TUPLE", "APPENDS", "SETITEMS"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_POPS = {"APPEND": 1, "SETITEM": 2}
_CONSTANTS = set(
    "NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 "
    "BINFLOAT BINUNICODE SHORT_BINSTRING LONG1".split()
)
"""The instructions of torch's weights-only reader; it refuses all others as well."""
