"""From a state dict to a network: building the architecture that is named, and filling it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from s2d_compiler.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["build", "fill", "importing_from_here"]

logger = logging.getLogger(__name__)

_ARCH = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(\.\w+)*)")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What wrappers put before every key: DataParallel, torch.compile, training frameworks."""


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Let modules of the current directory be imported, as ``python -m`` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def build(arch: str, arch_kwargs: Mapping[str, Any]) -> nn.Module:
    """Call the function that builds a network.

    Args:
        arch: ``module:function``, such as ``torchvision.models:resnet18``; modules of the
            current directory are found too.
        arch_kwargs: the function's keyword arguments.

    Raises:
        ModelFileError: saying what is missing, or what the function raised.
    """
    match = _ARCH.fullmatch(arch)
    if match is None:
        raise ModelFileError(
            f"--arch {arch!r}: not of the form module:function, such as torchvision.models:resnet18"
        )
    if not all(isinstance(key, str) for key in arch_kwargs):
        raise ModelFileError(
            f"--arch-kwargs {dict(arch_kwargs)}: the keys must be strings, names of arguments; "
            "rename them"
        )
    with importing_from_here(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        function = _find(arch, match["module"], match["name"])
        arguments = _without_downloads(function, arch_kwargs)
        try:
            model = function(**arguments)
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arch_kwargs.items())
            raise ModelFileError(
                f"--arch {arch}: {match['name']}({given}) raised {_describe(error)}; its "
                "arguments are given with --arch-kwargs"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelFileError(
            f"--arch {arch}: it returned a {type(model).__name__}, not a torch.nn.Module; name a "
            "function that builds the network and returns it"
        )
    return model


def _find(arch: str, module_name: str, name: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ModelFileError(f"--arch {arch}: {_explain_import(module_name, error)}") from error
    path = module_name
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=3)
            hint = f"near it are {', '.join(near)}" if near else "name a function that it has"
            raise ModelFileError(f"--arch {arch}: {path} has no {part!r}; {hint}")
        found, path = getattr(found, part), f"{path}.{part}"
    if isinstance(found, nn.Module) or not callable(found):
        raise ModelFileError(
            f"--arch {arch}: this is a {type(found).__name__}, not a function that builds a "
            "network; name a function or a class"
        )
    return found


def _explain_import(module_name: str, error: BaseException) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f"{module_name}.".startswith(f"{missing}."):
        return (
            f"there is no module {missing!r}, neither installed nor in the current directory; "
            "install it, or run this from the folder that holds it"
        )
    return f"importing {module_name} raised {_describe(error)}; correct that module"


def _without_downloads(function: Any, arch_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The weights come from the file, so a backbone's must not come from the network."""
    arguments = dict(arch_kwargs)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return arguments
    if "weights_backbone" in parameters:
        arguments.setdefault("weights_backbone", None)
    return arguments


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def fill(model: nn.Module, state: Mapping[str, Any], path: str, arch: str) -> None:
    """Load a state dict into a network, in the precision in which it is stored.

    Prefixes that wrappers put before the keys are taken off. Every key must find its place.

    Raises:
        ModelFileError: naming the first keys that do not fit.
    """
    expected = model.state_dict()
    found = _unwrap(state, expected)
    if problem := _compare(expected, found):
        if "--arch-kwargs" not in problem:
            problem += "; name the function that built it, and its arguments with --arch-kwargs"
        raise ModelFileError(f"{path} does not fit --arch {arch}: {problem}")
    for key in expected.keys() - found.keys():
        found[key] = expected[key]
    try:
        _adopt_precision(model, found)
        model.load_state_dict(found)
    except Exception as error:
        raise ModelFileError(
            f"{path} does not fit --arch {arch}: loading raised {_describe(error)}; save the state "
            "dict again"
        ) from error


def _unwrap(state: Mapping[str, Any], expected: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Take wrappers' prefixes off the keys, and off the paths of the layers' format versions."""
    found = OrderedDict(state)
    versions = dict(getattr(state, "_metadata", None) or {})
    if "n_averaged" not in expected:
        found.pop("n_averaged", None)  # a counter of torch.optim.swa_utils.AveragedModel
    for old in _prefixes(found, expected):
        found = OrderedDict((key.replace(old, "", 1), value) for key, value in found.items())
        versions = {f"{path}.".replace(old, "", 1)[:-1]: kept for path, kept in versions.items()}
    found._metadata = versions or expected._metadata  # type: ignore[attr-defined]
    return found


def _prefixes(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """What to take off all keys, from the outermost wrapper to the innermost."""
    keys = list(found)
    while keys and set(keys) != expected.keys():
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in keys) and not all(
                key.startswith(prefix) for key in expected
            ):
                keys = [key.removeprefix(prefix) for key in keys]
                yield prefix
                break
        else:
            break
    compiled = "_orig_mod."  # torch.compile may also wrap inner modules
    while any(compiled in key for key in keys) and not any(compiled in key for key in expected):
        keys = [key.replace(compiled, "", 1) for key in keys]
        yield compiled


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """What differs between two state dicts, or None."""
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    parts = []
    if missing := [key for key in expected if key not in found and key not in counters]:
        parts.append(f"it lacks {_list(missing)}")
    if unexpected := [key for key in found if key not in expected]:
        parts.append(f"it has {_list(unexpected)} beyond the architecture")
    shapes = {
        key: (tuple(found[key].shape), tuple(expected[key].shape))
        for key in found
        if _has_shape(expected.get(key)) and _has_shape(found[key])
    }
    if wrong := [key for key, (stored, built) in shapes.items() if stored != built]:
        stored, built = shapes[wrong[0]]
        rest = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        parts.append(f"{wrong[0]} is {list(stored)} where {list(built)} belongs{rest}")
        if not missing and not unexpected and (hint := _class_hint(wrong, shapes, list(expected))):
            parts.append(hint)
    return "; ".join(parts) or None


def _has_shape(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(
        value, nn.UninitializedParameter | nn.UninitializedBuffer
    )


def _list(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _class_hint(
    wrong: list[str], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], keys: list[str]
) -> str | None:
    """Whether only the number of outputs of the last layer differs."""
    last = keys[-1].rpartition(".")[0]
    if any(key.rpartition(".")[0] != last for key in wrong):
        return None
    if any(stored[1:] != built[1:] for stored, built in map(shapes.__getitem__, wrong)):
        return None
    classes = shapes[wrong[0]][0][0]
    return (
        "only the number of classes differs: give it to the function, often with "
        f"--arch-kwargs '{{\"num_classes\": {classes}}}'"
    )


def _adopt_precision(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Where all stored weights have one precision, the network takes it."""
    stored = {
        value.dtype
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if len(stored) == 1:
        model.to(stored.pop())
