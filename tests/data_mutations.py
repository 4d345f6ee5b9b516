"""Random changes to plain data, tensors and archives, as a damaged or hostile file has them."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

Place = tuple[Any, Any]
"""A container and the key or position in it."""

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, -(2**31), 2**62, 2**63, 2**64),
    *(10**9, -(10**9), 10**30, 10**500, True, False, 0.5, -0.5, 1e308, 1e-320, -0.0),
    *(float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    *("", " ", ".", "..", "a.b", ".a", "a.", "a" * 300, "0", "-1", "é", "\x00", "\ud800", "class"),
    *("__class__", "__dict__", "__init__", "_modules", "_parameters", "forward", "training"),
    *("self", "torch", "stages", "parts", "code", "graph", "_code", "import os", "a\nb", "a;b"),
    *(
        "None",
        "inf",
        "nan",
        "__import__('os').abort()",
        "{}",
        "%s%n",
        "../../etc/passwd",
        "/dev/zero",
    ),
    *("input", "feature", "node", "tensor", "list", "tuple", "slice", "dtype", "device", "layout"),
    *("cuda", "meta", "cpu:7", "mps", "xla:0", "vulkan", "float16", "complex64", "quint8", "int1"),
    *("dict", "deque", "defaultdict", "namedtuple", "OrderedDict", "same", "valid", "all", "l1"),
]
OPERATORS = sorted(
    name.replace("::", ".") if "." in name else f"{name.replace('::', '.')}.default"
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(
        ("aten::", "torchvision::", "prims::", "prim::", "profiler::", "quantized::")
    )
)


def deep(levels: int) -> Any:
    """Lists in one another."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def _bag(pick: random.Random) -> Any:
    bag = OrderedDict(a=1)
    bag.__dict__.update({pick.choice(["items", "keys", "get", "values", "__len__"]): set})
    return bag


ODD: list[Callable[[random.Random], Any]] = [
    lambda pick: pick.choice(NUMBERS),
    lambda pick: pick.choice(TEXTS),
    lambda pick: None,
    lambda pick: [],
    lambda pick: {},
    lambda pick: (),
]
"""Values that JSON has too (a tuple is a list there)."""

ODD_IN_FILES: list[Callable[[random.Random], Any]] = [
    *ODD,
    lambda pick: pick.choice(OPERATORS),
    lambda pick: set(),
    lambda pick: b"bytes",
    lambda pick: bytearray(3),
    lambda pick: 1j,
    lambda pick: torch.Size([2, 3]),
    lambda pick: torch.float16,
    lambda pick: torch.device("cpu"),
    lambda pick: OrderedDict(a=1),
    _bag,
    lambda pick: deep(pick.choice([3, 30, 150])),
    lambda pick: odd_tensor(pick, torch.randn(3, 2)),
    lambda pick: {pick.choice(NUMBERS): pick.choice(TEXTS)},
    lambda pick: {pick.choice(["node", "list", "tuple", "slice", "device"]): pick.choice(TEXTS)},
]


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of 8-bit numbers with a scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are going out of use
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def odd_tensor(pick: random.Random, tensor: torch.Tensor) -> Any:
    """A tensor that is not the given one: other numbers, sizes, strides, kinds."""
    dense = tensor.detach().clone()
    with torch.no_grad():
        return pick.choice(_TENSORS)(pick, dense)


_DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool,
           torch.complex64, torch.uint8, torch.uint16, torch.float8_e4m3fn]  # fmt: skip
_TENSORS: list[Callable[[random.Random, torch.Tensor], Any]] = [
    lambda pick, t: t.to(pick.choice(_DTYPES)),
    lambda pick, t: torch.full_like(t, pick.choice([0, 1, -1])),
    lambda pick, t: t.double() * float("nan"),
    lambda pick, t: t.flatten()[: t.numel() // 2],
    lambda pick, t: t[..., None],
    lambda pick, t: t.transpose(0, -1) if t.ndim else t,
    lambda pick, t: torch.zeros(()).expand(pick.choice([(2,), (10**9,), (10**5, 10**6)])),
    lambda pick, t: torch.zeros(1).as_strided((2, 2), (0, 0)),
    lambda pick, t: t.to_sparse(),
    lambda pick, t: t.to("meta"),
    lambda pick, t: torch.empty((10**6, 10**6), device="meta"),
    lambda pick, t: quantized(t),
    lambda pick, t: torch.nn.Parameter(t.float()),
    lambda pick, t: torch.zeros(0),
    lambda pick, t: torch.zeros(3, 0, 2),
    lambda pick, t: torch.tensor(3),
    lambda pick, t: torch.tensor([10**9, -1, 2**40]),
    lambda pick, t: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda pick, t: torch.complex(t.float(), t.float()).conj(),
    lambda pick, t: torch.zeros(4, dtype=torch.complex64).imag,
]


# -- containers ----------------------------------------------------------------------------------


def places(data: Any, seen: set[int] | None = None) -> Iterator[Place]:
    """Every container in nested data with every key or position in it."""
    seen = set() if seen is None else seen
    stack = [data]
    while stack:
        value = stack.pop()
        if not isinstance(value, dict | list) or id(value) in seen:
            continue
        seen.add(id(value))
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            stack.append(value[key])


def mutated(data: Any, pick: random.Random, *, in_file: bool) -> Any:
    """A copy of nested data with one to four changes.

    Args:
        data: Dicts and lists of anything.
        pick: The source of choices.
        in_file: Take values beyond JSON's too.
    """
    root = [copy_containers(data)]
    for _ in range(pick.choice([1, 1, 1, 2, 2, 3, 4])):
        found = list(places(root[0])) or [(root, 0)]
        _mutate(*pick.choice(found), found, pick, in_file)
    return root[0]


def copy_containers(data: Any) -> Any:
    """Containers anew; tensors and other leaves as they are."""
    if type(data) is dict:
        return {key: copy_containers(value) for key, value in data.items()}
    if type(data) is list:
        return [copy_containers(value) for value in data]
    return data


def _mutate(at: Any, key: Any, found: list[Place], pick: random.Random, in_file: bool) -> None:
    value = at[key]
    if in_file and isinstance(value, torch.Tensor) and pick.random() < 0.7:
        at[key] = odd_tensor(pick, value)
        return
    if in_file and key in ("target", "class") and pick.random() < 0.5:
        at[key] = pick.choice(OPERATORS)
        return
    how = pick.choice(
        "odd odd other other near near delete duplicate swap nest rename loop".split()
    )
    if how == "odd":
        at[key] = pick.choice(ODD_IN_FILES if in_file else ODD)(pick)
    elif how == "other":
        other, position = pick.choice(found)
        at[key] = other[position] if in_file else copy.deepcopy(other[position])
    elif how == "near":
        at[key] = _near(value, pick)
    elif how == "delete":
        del at[key]
    elif how == "duplicate" and isinstance(at, list):
        at.insert(pick.randrange(len(at) + 1), value)
    elif how == "swap":
        other = pick.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at[key], at[other] = at[other], at[key]
    elif how == "nest":
        at[key] = pick.choice([[value], {"a": value}, [[value]], {"tuple": [value]}])
    elif how == "rename" and isinstance(at, dict):
        name = pick.choice([*TEXTS, *(k for _, k in found)]) if in_file else pick.choice(TEXTS)
        at[name] = at.pop(key)
    elif how == "loop" and in_file and pick.random() < 0.3:
        at[key] = at  # a container in itself
    else:
        at[key] = None


def _near(value: Any, pick: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        change: Callable[[Any], Any] = pick.choice(
            [lambda v: v + 1, lambda v: v - 1, lambda v: -v, lambda v: v * 2, lambda v: v * 10**9,
             float if isinstance(value, float) or abs(value) < 1e300 else str, str]
        )  # fmt: skip
        return change(value)
    if isinstance(value, str):
        return pick.choice([value[:-1], value + "0", value.upper(), f"_{value}", f"{value}.a", ""])
    if isinstance(value, list):
        return pick.choice([value[::-1], value[:-1], value * 2, dict.fromkeys(range(len(value)))])
    return list(value.items()) if isinstance(value, dict) else [value]


# -- bytes ---------------------------------------------------------------------------------------


def mutated_archive(content: bytes, pick: random.Random) -> bytes:
    """A file with bytes changed: anywhere, or in its pickle under a checksum that is right."""
    how = pick.choice(["bits", "cut", "bytes", "pickle", "pickle", "pickle", "members"])
    if how == "cut":
        return content[: pick.randrange(len(content))]
    if how == "bits":
        return _with_bits(content, pick, pick.choice([1, 1, 2, 8]))
    if how == "bytes":
        at = pick.randrange(len(content))
        return content[:at] + pick.randbytes(pick.randrange(9)) + content[at + pick.randrange(9) :]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(e.filename, archive.read(e), e.compress_type) for e in archive.infolist()]
    if how == "pickle":
        members = [
            (n, _mutated_pickle(c, pick) if n.endswith("data.pkl") else c, k) for n, c, k in members
        ]
    else:
        at = pick.randrange(len(members))
        name, data, kind = members[at]
        folder = name.partition("/")[0]
        members[at] = pick.choice(
            [
                (name, data[: len(data) // 2], kind),
                (name, data * 2, kind),
                (f"{folder}/../{name}", data, kind),
                (f"/{name}", data, kind),
                (name, bytes(1 << 20), zipfile.ZIP_DEFLATED),
                (members[pick.randrange(len(members))][0], data, kind),
            ]
        )
    return archive_of(members)


def archive_of(members: list[tuple[str, bytes, int]]) -> bytes:
    """A zip archive of members: name, content, kind of compression."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members of one name
        for name, content, kind in members:
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return stream.getvalue()


def _with_bits(content: bytes, pick: random.Random, count: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
    return bytes(changed)


_GLOBALS = [
    *(b"cos\nsystem\n", b"cbuiltins\ngetattr\n", b"ctorch\nload\n", b"cbuiltins\nset\n"),
    *(b"ccollections\nOrderedDict\n", b"ctorch.nn.parameter\nParameter\n", b"ctorch\nSize\n"),
    *(b"ctorch._utils\n_rebuild_tensor\n", b"ctorch._utils\n_rebuild_sparse_tensor\n"),
    *(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", b"ctorch\nTensor\n"),
    *(b"ctorch._utils\n_rebuild_wrapper_subclass\n", b"ctorch.nn.modules.linear\nLinear\n"),
]
_CODES = [
    *(b"R", b"b", b"\x81", b"Q", b"0", b"2", b"t", b"\x85", b"\x86", b")", b"}", b"]", b"("),
    *(b"h\x00", b"h\x05", b"q\x00", b"N", b"K\x01", b"e", b"u", b"s", b"a", b"i", b"o", b"P", b"."),
    *(b"r\xff\xff\xff\xff", b"j\x00\x00\x00\x00", b"\x93", b"\x82\x01", b"\x95" + bytes(8)),
]


def _mutated_pickle(content: bytes, pick: random.Random) -> bytes:
    for _ in range(pick.choice([1, 1, 2, 4])):
        how = pick.choice(["bits", "code", "global", "remove", "copy", "number"])
        at = pick.randrange(2, len(content))
        if how == "bits":
            content = _with_bits(content, pick, 1)
        elif how == "code":
            content = content[:at] + pick.choice(_CODES) + content[at + pick.choice([0, 1]) :]
        elif how == "global":
            names = [i for i in range(len(content)) if content.startswith(b"ctorch", i)]
            if names:
                at = pick.choice(names)
                end = content.find(b"\n", content.find(b"\n", at) + 1) + 1
                content = content[:at] + pick.choice(_GLOBALS) + content[end or at :]
        elif how == "remove":
            content = content[:at] + content[at + pick.randrange(1, 12) :]
        elif how == "copy":
            start = pick.randrange(len(content))
            content = content[:at] + content[start : start + pick.randrange(1, 40)] + content[at:]
        else:
            small = [i for i in range(len(content) - 1) if content[i : i + 1] == b"K"]
            if small:
                at = pick.choice(small)
                number = pick.choice([0, 2**31 - 1, -1, 2**16]).to_bytes(4, "little", signed=True)
                content = content[:at] + b"J" + number + content[at + 2 :]
    return content


def as_json(data: Any) -> str:
    """JSON text; what it cannot hold as text."""
    return json.dumps(data, default=str)
