"""Changes to a staged network, made in the data of its file.

A mutation takes the data of a ``dyn.pt`` and a source of random choices, changes the data in place
and says what it did, or returns None where there is nothing of the kind to change. Some change what
the network computes; those in ``BENIGN`` change nothing of it by construction.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

Data = dict[str, Any]
Mutation = Callable[[Data, random.Random], str | None]


def copied(data: Data) -> Data:
    """A copy whose containers and tensors can be changed."""
    return copy.deepcopy(data)


# -- what there is ---------------------------------------------------------------------------------


def _rows(data: Data, kind: str | None = None) -> list[tuple[int, dict[str, Any]]]:
    return [
        (number, row)
        for number, stage in enumerate(data["stages"])
        for row in stage["graph"]
        if kind is None or row["op"] == kind
    ]


def _operands(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Where in the arguments of a node other nodes stand."""
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            yield path, content
        elif isinstance(content, list):
            for k, item in enumerate(content):
                yield from _operands(item, (*path, kind, k))


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if isinstance(content, list):
            for k, item in enumerate(content):
                yield from _numbers(item, (*path, kind, k))
    elif isinstance(value, bool | int | float):
        yield path, value


def _put(row: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    at = row["args"]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value


def _is_cat(row: dict[str, Any]) -> bool:
    return row["op"] == "call_function" and row["target"].startswith("aten.cat.")


def _owner(data: Data, key: str) -> tuple[dict[str, Any], str] | None:
    """The row of ``tensors`` that a provenance key names, with the key's module."""
    _, number, *rest = key.split(".")
    stage, name = data["stages"][int(number)], ".".join(rest)
    if name in stage["attributes"]:
        return data["tensors"][stage["attributes"][name]["tensor"]], name
    module, _, leaf = name.rpartition(".")
    if module in stage["modules"]:
        held = data["modules"][stage["modules"][module]]["tensors"]
        if leaf in held:
            return data["tensors"][held[leaf]["tensor"]], name
    return None


def _slices(data: Data) -> list[tuple[str, dict[str, Any]]]:
    found = ((key, _owner(data, key)) for key in data["provenance"]["slices"])
    return [(key, owner[0]) for key, owner in found if owner is not None]


def _pick(choices: list[Any], rng: random.Random) -> Any:
    return rng.choice(choices) if choices else None


# -- graphs ----------------------------------------------------------------------------------------


def swap_operands(data: Data, rng: random.Random) -> str | None:
    """Two operands of one node change places."""
    found = []
    for _, row in _rows(data, "call_function"):
        operands = list(_operands(row["args"]))
        pairs = [(a, b) for a in operands for b in operands if a[0] < b[0] and a[1] != b[1]]
        if pairs:
            found.append((row, rng.choice(pairs)))
    if (chosen := _pick(found, rng)) is None:
        return None
    row, ((path_a, a), (path_b, b)) = chosen
    _put(row, path_a, {"node": b})
    _put(row, path_b, {"node": a})
    return f"{row['name']}: {a} and {b} swapped"


def another_operand(data: Data, rng: random.Random) -> str | None:
    """A node reads another value."""
    number = rng.randrange(len(data["stages"]))
    rows = data["stages"][number]["graph"]
    at = rng.randrange(1, len(rows))
    operands = list(_operands(rows[at]["args"]))
    earlier = [row["name"] for row in rows[:at]]
    if not operands:
        return None
    path, old = rng.choice(operands)
    new = rng.choice(earlier)
    if new == old:
        return None
    _put(rows[at], path, {"node": new})
    return f"stage {number + 1}, {rows[at]['name']}: {old} became {new}"


_SIBLINGS = [
    ["aten.relu.default", "aten.sigmoid.default", "aten.tanh.default", "aten.neg.default",
     "aten.hardswish.default", "aten.silu.default", "aten.abs.default", "aten.exp.default"],
    ["aten.add.Tensor", "aten.sub.Tensor"],
    ["aten.mul.Tensor", "aten.div.Tensor", "aten.maximum.default", "aten.minimum.default"],
    ["aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default"],
    ["aten.softmax.int", "aten.log_softmax.int"],
    ["aten.gelu.default", "aten.relu.default"],
    ["aten.matmul.default", "aten.add.Tensor", "aten.mul.Tensor"],
    ["aten.adaptive_avg_pool2d.default", "aten.adaptive_max_pool2d.default"],
    ["aten.upsample_nearest2d.vec", "aten.upsample_bilinear2d.vec"],
]  # fmt: skip


def another_operator(data: Data, rng: random.Random) -> str | None:
    """A node computes something else from the same operands."""
    found = [
        (row, [name for name in family if name != row["target"]])
        for _, row in _rows(data, "call_function")
        for family in _SIBLINGS
        if row["target"] in family
    ]
    if (chosen := _pick(found, rng)) is None:
        return None
    row, names = chosen
    old, row["target"] = row["target"], rng.choice(names)
    return f"{row['name']}: {old} became {row['target']}"


def another_number(data: Data, rng: random.Random) -> str | None:
    """A setting of a node is one more or less, or the other way round."""
    found = [
        (row, path, value)
        for _, row in _rows(data, "call_function")
        for path, value in _numbers(row["args"])
        if path
    ]
    if (chosen := _pick(found, rng)) is None:
        return None
    row, path, value = chosen
    new = not value if isinstance(value, bool) else value + rng.choice([-1, 1])
    _put(row, path, new)
    return f"{row['name']}: {value} became {new}"


def cat_loses(data: Data, rng: random.Random) -> str | None:
    """A concatenation loses a part: a reuse is dropped."""
    return _changed_cat(data, rng, lambda items: items[:-1] if rng.random() < 0.5 else items[1:])


def cat_repeats(data: Data, rng: random.Random) -> str | None:
    """A concatenation takes a part twice: a reuse too many."""
    return _changed_cat(data, rng, lambda items: [*items, rng.choice(items)])


def cat_reordered(data: Data, rng: random.Random) -> str | None:
    """The parts of a concatenation stand in another order."""
    return _changed_cat(data, rng, lambda items: items[1:] + items[:1])


def cat_replaced(data: Data, rng: random.Random) -> str | None:
    """One part of a concatenation stands in another's place."""
    return _changed_cat(data, rng, lambda items: [items[0]] * len(items))


def _changed_cat(
    data: Data, rng: random.Random, change: Callable[[list[Any]], list[Any]]
) -> str | None:
    found = [
        row for _, row in _rows(data) if _is_cat(row) and len(row["args"]["tuple"][0]["list"]) > 1
    ]
    if (row := _pick(found, rng)) is None:
        return None
    items = row["args"]["tuple"][0]["list"]
    row["args"]["tuple"][0]["list"] = change(list(items))
    return f"{row['name']}: {len(items)} parts became others"


def left_out(data: Data, rng: random.Random) -> str | None:
    """A node is left out: its users read its operand."""
    number = rng.randrange(len(data["stages"]))
    rows = data["stages"][number]["graph"]
    found = [r for r in rows if r["op"] in ("call_function", "call_module")
             and list(_operands(r["args"]))]  # fmt: skip
    if (row := _pick(found, rng)) is None:
        return None
    _, operand = next(_operands(row["args"]))
    _redirect(rows, row["name"], operand)
    rows.remove(row)
    return f"stage {number + 1}: {row['name']} left out"


def put_in(data: Data, rng: random.Random) -> str | None:
    """Something is computed in between that was not there."""
    name = rng.choice(["aten.relu.default", "aten.neg.default", "aten.mul.Scalar"])
    args: list[Any] = [1.25] if name.endswith("Scalar") else []
    return _inserted(data, rng, name, args)


def _inserted(data: Data, rng: random.Random, name: str, args: list[Any]) -> str | None:
    number = rng.randrange(len(data["stages"]))
    rows = data["stages"][number]["graph"]
    found = [k for k, r in enumerate(rows) if r["op"] in ("call_function", "call_module")]
    if (at := _pick(found, rng)) is None:
        return None
    operand = rows[at]["name"]
    _redirect(rows[at + 1 :], operand, "put_in")
    rows.insert(
        at + 1,
        {"name": "put_in", "op": "call_function", "target": name,
         "args": {"tuple": [{"node": operand}, *args]}},
    )  # fmt: skip
    return f"stage {number + 1}: {name} after {operand}"


def _redirect(rows: list[dict[str, Any]], old: str, new: str) -> None:
    for row in rows:
        for path, name in list(_operands(row["args"])):
            if name == old:
                _put(row, path, {"node": new})
        for key, value in row.get("kwargs", {}).items():
            if value == {"node": old}:
                row["kwargs"][key] = {"node": new}


def another_exit(data: Data, rng: random.Random) -> str | None:
    """A stage returns another value than its exit's."""
    number = rng.randrange(len(data["stages"]))
    rows = data["stages"][number]["graph"]
    leaves = rows[-1]["args"]["tuple"][0]["tuple"][0]["tuple"]
    k, new = rng.randrange(len(leaves)), rng.choice(rows[:-1])["name"]
    if leaves[k] == {"node": new}:
        return None
    leaves[k] = {"node": new}
    return f"stage {number + 1}, exit {k + 1}: {new}"


# -- interfaces ------------------------------------------------------------------------------------


def another_feature(data: Data, rng: random.Random) -> str | None:
    """A stage reads another feature, or an input instead."""
    number = rng.randrange(len(data["stages"]))
    inputs = data["interfaces"][number]["inputs"]
    known = [["feature", t, k] for t in range(number)
             for k in range(data["interfaces"][t]["features"])] + [["input", 0]]  # fmt: skip
    if not inputs:
        return None
    k, new = rng.randrange(len(inputs)), rng.choice(known)
    if new == list(inputs[k]):
        return None
    old, inputs[k] = inputs[k], new
    return f"stage {number + 1}, operand {k + 1}: {old} became {new}"


def features_swapped(data: Data, rng: random.Random) -> str | None:
    """A stage hands on two features in each other's place."""
    found = [stage for stage in data["stages"]
             if len(stage["graph"][-1]["args"]["tuple"][0]["tuple"][1]["tuple"]) > 1]  # fmt: skip
    if (stage := _pick(found, rng)) is None:
        return None
    handed = stage["graph"][-1]["args"]["tuple"][0]["tuple"][1]["tuple"]
    a, b = rng.sample(range(len(handed)), 2)
    handed[a], handed[b] = handed[b], handed[a]
    return f"features {a + 1} and {b + 1} swapped"


# -- weights ---------------------------------------------------------------------------------------


def another_slice(data: Data, rng: random.Random) -> str | None:
    """A tensor holds another slice of its source, and says so: rows or columns shifted."""
    found = [(key, row) for key, row in _slices(data) if row["data"].dim() and row["data"].numel()]
    if (chosen := _pick(found, rng)) is None:
        return None
    key, row = chosen
    table = data["provenance"]
    source, index = table["slices"][key]
    d = rng.randrange(row["data"].dim())
    if index[d] is None:
        positions = torch.arange(row["data"].shape[d], dtype=torch.int32)
    else:
        positions = table["indices"][index[d]]
    if len(positions) < 2:
        return None
    order = torch.roll(torch.arange(len(positions)), rng.randrange(1, len(positions)))
    if rng.random() < 0.5:  # two of them only
        order = torch.arange(len(positions))
        order[[0, -1]] = order[[-1, 0]]
    _own(data, key)
    row, _ = _owner(data, key)  # type: ignore[misc]
    row["data"] = row["data"].index_select(d, order)
    table["indices"].append(positions[order])
    table["slices"][key] = [source, [*index[:d], len(table["indices"]) - 1, *index[d + 1 :]]]
    return f"{key}: dimension {d} in another order"


def off_by_one(data: Data, rng: random.Random) -> str | None:
    """The positions that a tensor says it holds are one further; its numbers stay."""
    found = [(key, d) for key, (_, index) in data["provenance"]["slices"].items()
             for d, p in enumerate(index) if p is not None]  # fmt: skip
    if (chosen := _pick(found, rng)) is None:
        return None
    key, d = chosen
    table = data["provenance"]
    source, index = table["slices"][key]
    table["indices"].append(table["indices"][index[d]] + 1)
    table["slices"][key] = [source, [*index[:d], len(table["indices"]) - 1, *index[d + 1 :]]]
    return f"{key}: positions of dimension {d} plus 1"


def another_source(data: Data, rng: random.Random) -> str | None:
    """Two tensors of the same shape change places, with where they come from."""
    by_shape: dict[Any, list[str]] = {}
    for key, row in _slices(data):
        by_shape.setdefault((tuple(row["data"].shape), row["parameter"]), []).append(key)
    groups = [keys for keys in by_shape.values() if len(keys) > 1]
    if (keys := _pick(groups, rng)) is None:
        return None
    a, b = rng.sample(keys, 2)
    _own(data, a)
    _own(data, b)
    one, two = _owner(data, a)[0], _owner(data, b)[0]  # type: ignore[index]
    one["data"], two["data"] = two["data"], one["data"]
    slices = data["provenance"]["slices"]
    if slices[a] == slices[b]:
        return None
    slices[a], slices[b] = slices[b], slices[a]
    return f"{a} and {b} swapped"


def _own(data: Data, key: str) -> None:
    """Give a tensor that other keys share a row of its own."""
    _, number, *rest = key.split(".")
    stage, name = data["stages"][int(number)], ".".join(rest)
    row, _ = _owner(data, key)  # type: ignore[misc]
    data["tensors"].append(dict(row))
    new = len(data["tensors"]) - 1
    if name in stage["attributes"]:
        stage["attributes"][name] = {**stage["attributes"][name], "tensor": new}
        return
    module, _, leaf = name.rpartition(".")
    held = copy.deepcopy(data["modules"][stage["modules"][module]])
    held["tensors"][leaf]["tensor"] = new
    data["modules"].append(held)
    stage["modules"][module] = len(data["modules"]) - 1


def another_value(data: Data, rng: random.Random) -> str | None:
    """One number of a tensor differs: a weight, a statistic, a constant, an index."""
    found = [row for row in data["tensors"] if row["data"].numel()]
    if (row := _pick(found, rng)) is None:
        return None
    flat = row["data"].clone().reshape(-1)
    k = rng.randrange(flat.numel())
    if flat.dtype == torch.bool:
        flat[k] = ~flat[k]
    else:
        flat[k] += 1 if not flat.is_floating_point() else 0.5
    row["data"] = flat.reshape(row["data"].shape)
    return f"element {k} of a tensor {tuple(row['data'].shape)}"


def constants_permuted(data: Data, rng: random.Random) -> str | None:
    """A tensor of integers or booleans stands in another order."""
    found = [row for row in data["tensors"]
             if not row["data"].is_floating_point() and row["data"].numel() > 1]  # fmt: skip
    if (row := _pick(found, rng)) is None:
        return None
    flat = row["data"].reshape(-1)
    row["data"] = torch.roll(flat, rng.randrange(1, flat.numel())).reshape(row["data"].shape)
    return f"a constant {tuple(row['data'].shape)} rolled"


# -- modules ---------------------------------------------------------------------------------------


def another_setting(data: Data, rng: random.Random) -> str | None:
    """A module has another setting."""
    found = [
        (row, key)
        for row in data["modules"]
        for key in row["arguments"]
        if key in ("eps", "stride", "padding", "dilation", "num_groups", "groups",
                   "track_running_stats", "output_padding", "kernel_size")
    ]  # fmt: skip
    if (chosen := _pick(found, rng)) is None:
        return None
    row, key = chosen
    old = row["arguments"][key]
    if isinstance(old, list):
        k = rng.randrange(len(old))
        new: Any = [v + (d == k) for d, v in enumerate(old)]
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, float):
        new = old * 1000
    elif isinstance(old, int):
        new = old + 1
    else:
        return None
    row["arguments"] = {**row["arguments"], key: new}
    return f"{row['class']}: {key} {old} became {new}"


def modules_swapped(data: Data, rng: random.Random) -> str | None:
    """Two modules of one kind stand in each other's place; where they come from goes with them."""
    found = []
    for number, stage in enumerate(data["stages"]):
        names = sorted(stage["modules"])
        for k, a in enumerate(names):
            for b in names[k + 1 :]:
                one, two = (data["modules"][stage["modules"][n]] for n in (a, b))
                if one is not two and one["class"] == two["class"]:
                    found.append((number, a, b))
    if (chosen := _pick(found, rng)) is None:
        return None
    number, a, b = chosen
    modules = data["stages"][number]["modules"]
    modules[a], modules[b] = modules[b], modules[a]
    slices = data["provenance"]["slices"]
    changed = {}
    for key in list(slices):
        for old, new in ((a, b), (b, a)):
            if key.startswith(f"stages.{number}.{old}."):
                tail = key.removeprefix(f"stages.{number}.{old}.")
                changed[f"stages.{number}.{new}.{tail}"] = slices.pop(key)
                break
    slices.update(changed)
    return f"stage {number + 1}: {a} and {b} swapped"


# -- what is said of it ----------------------------------------------------------------------------


def another_cost(data: Data, rng: random.Random) -> str | None:
    """A stage or a layer is said to cost something else."""
    cost = data["cost"]
    stage = rng.choice(cost["stages"])
    where = rng.choice(["macs", "cumulative_macs", "original", "layer"])
    if where == "original":
        cost["original_macs"] += 1
    elif where == "layer":
        layer = _pick(stage["layers"], rng)
        if layer is None:
            return None
        layer["macs"] += 1
    else:
        stage[where] += 1
    return where


def another_owner(data: Data, rng: random.Random) -> str | None:
    """A channel is said to be in another stage."""
    owners = data["owners"].clone()
    found = torch.nonzero(owners > 0).flatten().tolist()
    if not found or len(data["stages"]) < 2:
        return None
    k = rng.choice(found)
    owners[k] = owners[k] % len(data["stages"]) + 1
    data["owners"] = owners
    return f"channel {k}"


# -- nothing changes -------------------------------------------------------------------------------


def nothing(data: Data, rng: random.Random) -> str | None:
    """The file as it is."""
    return "nothing"


def renamed(data: Data, rng: random.Random) -> str | None:
    """Nodes have other names."""
    for stage in data["stages"]:
        names = {row["name"]: f"v{k}" for k, row in enumerate(stage["graph"])
                 if row["op"] not in ("placeholder", "output")}  # fmt: skip
        for old, new in names.items():
            _redirect(stage["graph"], old, f"new_{new}")
        for row in stage["graph"]:
            row["name"] = f"new_{names[row['name']]}" if row["name"] in names else row["name"]
    return "all nodes renamed"


def reordered(data: Data, rng: random.Random) -> str | None:
    """Nodes that do not need each other stand in another order."""
    for stage in data["stages"]:
        rows = stage["graph"]
        fixed = [row for row in rows if row["op"] == "placeholder"]
        left = [row for row in rows if row["op"] not in ("placeholder", "output")]
        done, names = list(fixed), {row["name"] for row in fixed}
        while left:
            ready = [r for r in left if set(_names(r)) <= names]
            row = rng.choice(ready)
            left.remove(row)
            done.append(row)
            names.add(row["name"])
        stage["graph"] = [*done, rows[-1]]
    return "nodes reordered"


def _names(row: dict[str, Any]) -> list[str]:
    found = [name for _, name in _operands(row["args"])]
    return found + [v["node"] for v in row.get("kwargs", {}).values()
                    if isinstance(v, dict) and "node" in v]  # fmt: skip


def copy_put_in(data: Data, rng: random.Random) -> str | None:
    """A value is copied on its way."""
    return _inserted(data, rng, "aten.clone.default", [])


#: What operators are called that cost MACs.
_COUNTED = ("mm", "matmul", "product", "conv", "einsum", "linear")


def computed_twice(data: Data, rng: random.Random) -> str | None:
    """An operator is run twice, and the last of its users reads the second result."""
    number = rng.randrange(len(data["stages"]))
    rows = data["stages"][number]["graph"]
    found = [k for k, r in enumerate(rows) if r["op"] == "call_function"
             and not any(word in r["target"] for word in _COUNTED)]  # fmt: skip
    if (at := _pick(found, rng)) is None:
        return None
    again = {**copy.deepcopy(rows[at]), "name": "once_more"}
    user = next((r for r in reversed(rows[at + 1 :]) if rows[at]["name"] in _names(r)), None)
    if user is None:
        return None
    _redirect([user], rows[at]["name"], "once_more")
    rows.insert(at + 1, again)
    return f"stage {number + 1}: {rows[at]['name']} computed twice"


def tensors_apart(data: Data, rng: random.Random) -> str | None:
    """A tensor that several modules share is stored for one of them alone."""
    if (chosen := _pick(_slices(data), rng)) is None:
        return None
    key, _ = chosen
    _own(data, key)
    return f"{key} stored apart"


MUTATIONS: tuple[Mutation, ...] = (
    swap_operands, another_operand, another_operator, another_number, cat_loses, cat_repeats,
    cat_reordered, cat_replaced, left_out, put_in, another_exit, another_feature, features_swapped,
    another_slice, off_by_one, another_source, another_value, constants_permuted, another_setting,
    modules_swapped,
)  # fmt: skip
#: What is said of a network, which must be right though nothing computes with it.
CLAIMS: tuple[Mutation, ...] = (another_cost, another_owner)
BENIGN: tuple[Mutation, ...] = (
    nothing, renamed, reordered, copy_put_in, computed_twice, tensors_apart,
)  # fmt: skip
