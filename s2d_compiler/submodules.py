"""A part of a network, named by its module path."""

from __future__ import annotations

import difflib

from torch import nn

from s2d_compiler.errors import UsageError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def part_of(model: nn.Module, path: str | None) -> nn.Module:
    """The submodule at a path, or the model itself where there is none.

    Raises:
        UsageError: There is no such submodule, or it is one that cannot be called.
    """
    if path is None:
        return model
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if path not in modules:
        raise UsageError(
            f"submodule {path!r}: {type(model).__name__} has no such submodule; "
            f"{_known(path, modules)}"
        )
    found: nn.Module = modules[path]
    if isinstance(found, _CONTAINERS) or type(found) is nn.Module:
        raise UsageError(
            f"submodule {path!r}: it is a {type(found).__name__}, which holds weights but computes "
            f"nothing by itself; name a module with a forward method. {_why(model)}".rstrip()
        )
    return found


def _known(path: str, modules: dict[str, nn.Module]) -> str:
    """Names that the user may have meant: a close one, else what lies beside it."""
    close = difflib.get_close_matches(path, modules, n=1, cutoff=0.75)
    if close:
        return f"did you mean {close[0]}?"
    parent = path
    while parent and parent not in modules:
        parent = parent.rpartition(".")[0]
    before = f"{parent}." if parent else ""
    beside = [n for n in modules if n.startswith(before) and "." not in n.removeprefix(before)]
    where = f"{parent} has" if parent else "it has"
    return f"{where} {', '.join(beside[:20]) or 'none'}{' ...' if len(beside) > 20 else ''}"


def _why(model: nn.Module) -> str:
    if any(type(module) is nn.Module for module in model.modules()):
        return "An exported program is one graph, whose parts cannot be taken out."
    return ""
