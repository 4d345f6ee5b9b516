"""The structure of a network's inputs and outputs as plain data, and back.

torch's own reader of such structures imports modules that the text names, so it is not used on
files. Here tuples, lists, dicts and their kin come back as they were, a named tuple as a named
tuple of the same name and fields, and any other class only if the caller hands it in.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree

from s2d_compiler.errors import FormatError
from s2d_compiler.fields import Fields, as_number, damaged, shown
from s2d_compiler.program import is_plain_name

_KEYED: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict}
_PLAIN: dict[str, Any] = {"tuple": tuple, "list": list, **_KEYED, "deque": deque}
_NAMES = {kind: name for name, kind in _PLAIN.items()}
#: What a defaultdict may make of a missing key.
_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str)},
}
#: What torch's own operators return: ``torch.max(x, 1)`` and its kin.
_TORCH = {f"torch.return_types.{t.__name__}": t for t in torch.return_types.all_return_types}
_SMALL = (str, int, float, bool, type(None))


def class_name(kind: type) -> str:
    """Module and name of a class, as a file writes it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def encode_structure(spec: Any) -> Any:
    """Plain data for a pytree structure; None for a leaf.

    Raises:
        FormatError: A class keeps something beside its tensors that is no plain data.
    """
    if spec.is_leaf():
        return None
    kind, context = spec.type, spec._context
    row: dict[str, Any] = {"children": [encode_structure(child) for child in spec._children]}
    if kind in _NAMES:
        row |= {"kind": _NAMES[kind], "context": _plain(context, kind)}
    elif kind is defaultdict:
        factory, keys = context
        name = next((n for n, known in _FACTORIES.items() if known is factory), None)
        if name is None:
            raise FormatError(
                f"the network returns a defaultdict of {factory!r}, which a dyn.pt cannot hold "
                "(it holds data, no code); return a plain dict."
            )
        row |= {"kind": "defaultdict", "context": [name, _plain(keys, kind)]}
    elif kind is namedtuple or hasattr(kind, "_fields"):
        made = context if kind is namedtuple else kind
        row |= {"kind": "namedtuple", "class": class_name(made), "context": list(made._fields)}
    else:
        row |= {"kind": "class", "class": class_name(kind), "context": _plain(context, kind)}
    return row


def _plain(value: Any, kind: type) -> Any:
    if type(value) in _SMALL:
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(v, kind) for v in value)
    if type(value) is dict:
        return {_plain(k, kind): _plain(v, kind) for k, v in value.items()}
    raise FormatError(
        f"the network takes or returns a {class_name(kind)} with a {type(value).__name__} beside "
        "its tensors, which a dyn.pt cannot hold (it holds text and numbers); use tuples, lists "
        "and dicts of tensors with text or numbers as keys."
    )


def decode_structure(row: Fields, types: Mapping[str, type] | None) -> Any:
    """The structure that ``encode_structure`` stored.

    Args:
        row: The data; a leaf's is None.
        types: Classes that it may contain, by ``class_name``. None where the structure is only
            looked at: a tuple then stands in for any class.

    Raises:
        FormatError: It is no structure, or contains a class that is not among ``types``.
    """
    children = [
        pytree.treespec_leaf() if child is None else decode_structure(Fields(child, place), types)
        for number, child in enumerate(row.items("children"))
        for place in [f"{row.at('children')}[{number}]"]
    ]
    kind, context = row.text("kind"), _plain(row.value("context"), tuple)
    if kind in _KEYED:
        _check_keys(context, len(children), row)
        return pytree.TreeSpec(_KEYED[kind], context, children)
    if kind == "deque":
        if context is not None and context != len(children):
            as_number(context, row.at("context"), len(children))
        return pytree.TreeSpec(deque, context, children)
    if kind in _PLAIN:
        if context is not None:
            damaged(row.at("context"), f"{shown(context)} stands where nothing belongs")
        return pytree.TreeSpec(_PLAIN[kind], None, children)
    if kind == "defaultdict":
        if type(context) is not list or len(context) != 2 or context[0] not in (*_FACTORIES,):
            damaged(row.at("context"), f"{shown(context)} is no factory of values and keys")
        _check_keys(context[1], len(children), row)
        return pytree.TreeSpec(defaultdict, [_FACTORIES[context[0]], context[1]], children)
    if kind not in ("namedtuple", "class"):
        damaged(row.at("kind"), f"{shown(kind)} is no kind of structure")
    name = row.text("class")
    if kind == "namedtuple" and name not in (types or ()):
        return pytree.TreeSpec(namedtuple, _named_tuple(name, context, len(children)), children)
    if types is None:
        return pytree.TreeSpec(tuple, None, children)
    return _of_class(name, kind, context, children, types)


def _check_keys(keys: Any, count: int, row: Fields) -> None:
    if type(keys) is not list or len(keys) != count or not all(type(k) in _SMALL for k in keys):
        damaged(row.at("context"), "it has not one key per value")
    if len({*keys}) != count:
        damaged(row.at("context"), "two values have one key")


def _of_class(
    name: str, kind: str, context: Any, children: list[Any], types: Mapping[str, type]
) -> Any:
    """A structure of a class that is handed in, or torch's own."""
    found = types.get(name) or _TORCH.get(name)
    if found is None:
        raise FormatError(
            f"the network takes or returns a {shown(name)}, and a file may not choose which "
            "classes are used; import that class and hand it in: "
            f"load(path, types=[{shown(name.split('.')[-1])[1:-1]}])."
        )
    if kind == "namedtuple" and found not in pytree.SUPPORTED_NODES:
        if list(getattr(found, "_fields", ())) != context or len(context) != len(children):
            raise FormatError(
                f"types: {name} has not the fields {shown(str(context))} that the file's class "
                "had; hand in the class that the model was compiled with."
            )
        return pytree.TreeSpec(namedtuple, found, children)
    if found not in pytree.SUPPORTED_NODES:
        raise FormatError(
            f"{name} is not registered with torch.utils._pytree in this process; import what "
            "registers it first."
        )
    return pytree.TreeSpec(found, found if kind == "namedtuple" else context, children)


def _named_tuple(name: Any, fields: Any, count: int) -> Any:
    """A named tuple made anew: its names are identifiers, and nothing else is taken."""
    short = str(name).rpartition(".")[2]
    if not isinstance(fields, list) or len(fields) != count:
        damaged(f"the named tuple {shown(short)}", "it has not one field per value")
    names = [f for f in (short, *fields) if isinstance(f, str) and is_plain_name(f)]
    if len(names) != count + 1 or any("." in f or f.startswith("_") for f in names[1:]):
        damaged(f"the named tuple {shown(short)}", "it has a name that is no identifier")
    if len({*fields}) != count:
        damaged(f"the named tuple {shown(short)}", "two of its fields have one name")
    return namedtuple(short, fields)


def foreign_types(row: Any) -> set[str]:
    """Names of the classes in an encoded structure that its reader has to hand in."""
    if row is None:
        return set()
    own = {row["class"]} if row["kind"] == "class" and row["class"] not in _TORCH else set()
    return own.union(*(foreign_types(child) for child in row["children"]))


def types_by_name(types: Collection[type]) -> dict[str, type]:
    """Classes by the names that files use.

    Raises:
        FormatError: One is no class.
    """
    for kind in types:
        if not isinstance(kind, type):
            raise FormatError(f"types: {kind!r} is no class; hand in the class itself.")
    return {class_name(kind): kind for kind in types}
