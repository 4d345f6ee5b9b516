"""What the design says about who owns what, derived from the original and the plan alone.

``expected_owners`` works out families, cuts and orders without looking at the compiler's
result; ``violations`` compares a result's provenance with that and with the rules that hold
whatever the assignment is (partition, ties, gates, alive weights, values).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from tests.reference import (
    NOBODY,
    VERSION_OWNER,
    VERSIONED,
    WEIGHT,
    Assignment,
    DynamicLike,
    Layer,
    Structure,
    bound,
    computed_sources,
    evaluate_with,
    kind_of,
    name_of,
    parameters_and_buffers,
    read_assignment,
    stage_of_key,
    weights_of,
)

if TYPE_CHECKING:
    from s2d_compiler import Plan


@dataclass(frozen=True)
class Family:
    """Atoms with the same writers and readers, in index order; an atom is a set of ids."""

    writers: tuple[str, ...]
    readers: frozenset[str]
    resolution: str
    atoms: tuple[frozenset[int], ...]


def families(structure: Structure) -> list[Family]:
    """The families of the network's atoms; rows of prediction layers are in none."""
    if "families" not in structure.memo:
        structure.memo["families"] = _families(structure)
    found: list[Family] = structure.memo["families"]
    return found


def _families(structure: Structure) -> list[Family]:
    heads = set(structure.prediction_layers())
    members: dict[int, set[int]] = defaultdict(set)
    writers: dict[int, dict[str, int]] = defaultdict(dict)
    readers: dict[int, set[str]] = defaultdict(set)
    for path, layer in structure.layers.items():
        for call in layer.columns:
            for column in call:
                if column > VERSIONED:
                    readers[structure.ties.find(column)].add(path)
        if path in heads:
            continue
        for position, row in enumerate(layer.rows):
            atom = structure.ties.find(row)
            members[atom].add(row)
            writers[atom].setdefault(path, position)
    order = list(structure.layers)
    grouped: dict[tuple[tuple[str, ...], frozenset[str]], list[int]] = defaultdict(list)
    for atom in members:
        key = (tuple(sorted(writers[atom], key=order.index)), frozenset(readers[atom]))
        grouped[key].append(atom)
    result = []
    for (written_by, read_by), atoms in grouped.items():
        atoms.sort(key=lambda atom: writers[atom][written_by[0]])
        outputs = [r for p in written_by for r in structure.layers[p].output_resolutions]
        largest = max(outputs, key=_count)
        ordered = tuple(frozenset(members[atom]) for atom in atoms)
        result.append(Family(written_by, read_by, largest, ordered))
    return result


def _count(resolution: str) -> int:
    product = 1
    for part in resolution.split("x"):
        product *= int(part)
    return product


def expected_owners(structure: Structure, plan: Plan) -> Tensor:
    """Per id the stage that the plan gives it; ``VERSION_OWNER`` for heads' rows."""
    owner = torch.zeros(structure._next_id, dtype=torch.int64)
    owner[NOBODY], owner[VERSIONED] = 0, VERSION_OWNER
    for path in structure.prediction_layers():
        owner[structure.layers[path].rows] = VERSION_OWNER
    for family in families(structure):
        atoms = list(family.atoms)
        if plan.order == "l1":
            scores = [_l1(structure, atom) for atom in atoms]
            ranked = sorted(range(len(atoms)), key=lambda i: (-scores[i], i))
            atoms = [atoms[i] for i in ranked]
        split = plan.split_for(family.resolution, family.writers)
        bounds = [max(1, len(atoms) * cut // plan.groups) for cut in split]
        for position, atom in enumerate(atoms):
            stage = 1 + sum(position >= bound for bound in bounds)
            owner[list(atom)] = stage
    return owner


def _l1(structure: Structure, atom: frozenset[int]) -> float:
    total = 0.0
    for layer in structure.layers.values():
        rows = [row - layer.rows[0] for row in atom if layer.rows[0] <= row <= layer.rows[-1]]
        if rows:
            total += float(layer.weight[sorted(rows)].double().abs().sum())
    return total


def empty_stages(structure: Structure, plan: Plan) -> list[int]:
    """Stages, from 1, that add no channel anywhere: such a plan is an error.

    One stage is the whole network, whatever there is to cut.
    """
    if plan.stages == 1:
        return []
    owner = expected_owners(structure, plan)
    thin = plan.stages - 1 if plan.final == "original" else plan.stages
    return [stage for stage in range(1, thin + 1) if not bool((owner == stage).any())]


def alive(structure: Structure, plan: Plan, layer: Layer, owner: Tensor, stage: int) -> Tensor:
    """Which weights (rows, columns) of a layer that is no head stage ``stage`` stores."""
    shape = layer.weight.shape
    tall = shape[0] // layer.groups
    mine = owner[layer.rows] == stage
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    for ids, resolution in zip(layer.columns, layer.input_resolutions, strict=True):
        seen = owner[ids]
        reads = {early for late, early in plan.reads(resolution, layer.path) if late == stage}
        readable = (seen <= 0) | (seen == stage)
        for early in reads:
            readable |= seen == early
        if not bool(readable.any()):
            nearest = max((s for s in seen.tolist() if s < stage), default=0)
            readable = seen == nearest
        per_group = readable.view(layer.groups, shape[1])
        mask |= mine[:, None] & per_group.repeat_interleave(tall, 0)
    return mask


def planned_assignment(
    structure: Structure, plan: Plan, found: Assignment | None = None
) -> Assignment:
    """The assignment that follows from the plan alone, dead rows included.

    Where one of many channels gates others the design does not say how its family is cut, but
    that the gate is in stage 1; such families are taken from ``found``.
    """
    thin = plan.stages - 1 if plan.final == "original" else plan.stages
    owner = expected_owners(structure, plan).clamp(max=thin + 1)
    for family in families(structure):
        if found is None or not has_free_cut(structure, family):
            continue
        for atom in family.atoms:
            stages = {int(found.owner[item]) for item in atom} - {thin + 1}
            owner[list(atom)] = min(stages, default=thin + 1)
    heads = structure.prediction_layers()
    masks = {
        path: [
            _head_mask(layer, owner, stage)
            if path in heads
            else alive(structure, plan, layer, owner, stage)
            for stage in range(1, thin + 1)
        ]
        for path, layer in structure.layers.items()
    }
    present = [_present(structure, masks, stage) for stage in range(1, thin + 1)]
    return Assignment(thin, masks, heads, owner, present)


def _present(structure: Structure, masks: dict[str, list[Tensor]], stage: int) -> dict[str, Tensor]:
    """Elements of the parameters of computed weights that a stage's alive weights are made of."""
    tensors = parameters_and_buffers(structure.model)
    names = computed_sources(structure)
    found = {n: torch.zeros(tensors[n].shape, dtype=torch.bool) for n in names}
    for path, layer in structure.layers.items():
        mask = masks[path][stage - 1]
        kernel = mask.view(*mask.shape, *[1] * (layer.weight.dim() - 2)).expand(layer.weight.shape)
        for node in layer.nodes:
            weight, *biases = weights_of(node)
            if structure.is_computed(weight):
                _made_of(structure, weight, layer.oriented(kernel), found)
            for bias in biases:
                if structure.is_computed(bias):
                    _made_of(structure, bias, mask.any(1), found)
    for tensor in found.values():
        if not bool(tensor.any()):  # it enters by its statistics alone
            tensor.fill_(True)
    return found


def _made_of(structure: Structure, node: fx.Node, wanted: Tensor, found: dict[str, Tensor]) -> None:
    """Follow wanted elements back to parameters, but for what is a statistic of many."""
    if structure.origin[node] != WEIGHT:
        return
    if node.op == "placeholder":
        found[structure.name_of_input[node]] |= wanted
        return
    kind, name = kind_of(node), name_of(node)
    if kind == "elementwise":
        for source in node.all_input_nodes:
            _made_of(structure, source, _narrowed(structure, source, wanted), found)
    elif name == "getitem":
        _made_of(structure, node.args[0], wanted, found)  # type: ignore[arg-type]
    elif kind == "moving":
        source = node.all_input_nodes[0]
        value = structure.constants[source]
        numbers = torch.arange(value.numel()).view(value.shape)
        values = fx.map_arg((node.args, dict(node.kwargs)), lambda n: structure.constants[n])
        args, kwargs = values
        moved = evaluate_with(node, (numbers, *args[1:]), kwargs)
        back = torch.zeros(value.numel(), dtype=torch.bool)
        back[moved[wanted]] = True
        _made_of(structure, source, back.view(value.shape), found)
    elif kind == "norm" or name == "_weight_norm_interface":
        _made_of(structure, node.args[0], wanted, found)  # type: ignore[arg-type]
        if kind == "norm":
            wanted = wanted.movedim(1, 0).flatten(1).any(1)
        for key in ("weight", "bias", "g"):
            scale = bound(node).get(key)
            if isinstance(scale, fx.Node):
                _made_of(structure, scale, _narrowed(structure, scale, wanted), found)


def _narrowed(structure: Structure, source: fx.Node, wanted: Tensor) -> Tensor:
    """Undo broadcasting: an element is wanted where any of its copies is."""
    shape = structure.constants[source].shape
    extra = wanted.dim() - len(shape)
    for _ in range(extra):
        wanted = wanted.any(0)
    for d, size in enumerate(shape):
        if size == 1:
            wanted = wanted.any(d, keepdim=True)
    return wanted


def has_free_cut(structure: Structure, family: Family) -> bool:
    """Whether a gate is among several atoms of the family."""
    gates = {structure.ties.find(gate) for gate in structure.gates}
    pinned = any(structure.ties.find(min(atom)) in gates for atom in family.atoms if gates)
    return pinned and len(family.atoms) > 1


def _head_mask(layer: Layer, owner: Tensor, stage: int) -> Tensor:
    readable = owner[layer.columns[0]] <= stage
    return readable.view(layer.groups, -1).repeat_interleave(len(layer.rows) // layer.groups, 0)


def missing_rows(structure: Structure, assignment: Assignment) -> dict[str, Tensor]:
    """Per layer, which rows no thin stage stores."""
    return {
        path: ~torch.stack([mask.any(1) for mask in masks]).any(0)
        for path, masks in assignment.masks.items()
        if masks
    }


def violations(model: nn.Module, structure: Structure, dyn: DynamicLike, plan: Plan) -> list[str]:
    """Every rule of ownership that the provenance of ``dyn`` breaks, in words.

    A row may be in no stage, if nothing that is read depends on it; that this is so shows in
    the outputs of the masked form of ``planned_assignment``, which has all rows.
    """
    assignment = read_assignment(structure, dyn)
    planned = planned_assignment(structure, plan, assignment)
    return [
        *_values(model, dyn),
        *_partition(structure, dyn, assignment),
        *_ties(structure, assignment),
        *_alive(structure, plan, assignment, planned),
        *_cuts(structure, assignment, planned),
    ]


def _values(model: nn.Module, dyn: DynamicLike) -> Iterator[str]:
    """Every stored tensor is what its provenance says, and has one."""
    sources = parameters_and_buffers(model)
    state = dyn.state_dict()  # type: ignore[attr-defined]
    for key in state:
        if key not in dyn.provenance:
            yield f"{key} has no provenance"
    for key, entry in dyn.provenance.items():
        if key not in state:
            yield f"provenance of {key}, which is not in the state dict"
            continue
        wanted = sources[entry.source].detach()
        if len(entry.index) != wanted.dim():
            yield f"{key}: {len(entry.index)} indices for {entry.source} {tuple(wanted.shape)}"
            continue
        for dim, index in enumerate(entry.index):
            if index is not None:
                wanted = wanted.index_select(dim, torch.tensor(index, dtype=torch.int64))
        if not torch.equal(state[key], wanted) or state[key].dtype != wanted.dtype:
            yield f"{key} is not {entry.source} at its index"


def _partition(structure: Structure, dyn: DynamicLike, assignment: Assignment) -> Iterator[str]:
    """No element is stored twice but in heads and behind them; heads have all rows."""
    sources = parameters_and_buffers(structure.model)
    state = dyn.state_dict()  # type: ignore[attr-defined]
    head_tensors = structure.behind_heads()
    seen: set[tuple[int, int]] = set()
    counts: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    for key, entry in dyn.provenance.items():
        source = sources[entry.source]
        whole = stage_of_key(key) > assignment.stages
        if whole or key not in state or id(source) in head_tensors:
            continue
        shared = (id(source), state[key].data_ptr())
        if shared in seen or source.dim() == 0:
            continue
        seen.add(shared)
        count = counts.setdefault(id(source), torch.zeros(source.shape, dtype=torch.int8))
        names[id(source)] = entry.source
        block = torch.ones([1] * source.dim(), dtype=torch.int8)
        for d, index in enumerate(entry.index):
            if index is not None:
                line = torch.zeros(source.shape[d], dtype=torch.int8)
                line.index_add_(
                    0,
                    torch.tensor(index, dtype=torch.int64),
                    torch.ones(len(index), dtype=torch.int8),
                )
                block = block * line.view([-1 if e == d else 1 for e in range(source.dim())])
        count += block
    for identity, count in counts.items():
        if bool((count > 1).any()):
            yield f"{names[identity]}: {int((count > 1).sum())} elements are stored twice"
    for path, masks in assignment.masks.items():
        held = torch.stack([mask.any(1) for mask in masks]) if masks else torch.zeros(0, 1)
        if path in assignment.heads and not bool(held.all()):
            yield f"{path}: rows in several stages, but not all of them in every stage"
    if assignment.stages > 1:
        expected = structure.prediction_layers()
        if set(expected) != set(assignment.heads):
            yield f"heads {assignment.heads} where prediction layers are {expected}"


def _ties(structure: Structure, assignment: Assignment) -> Iterator[str]:
    broken: dict[str, int] = defaultdict(int)
    nowhere = assignment.stages + 1
    for first, second, why in structure.ties.pairs:
        stages = {int(assignment.owner[first]), int(assignment.owner[second])} - {nowhere}
        if len(stages) > 1:
            broken[why] += 1
    for why, times in broken.items():
        yield f"{why}: {times} pairs of tied positions in different stages"
    for gate in structure.gates:
        if int(assignment.owner[gate]) not in (1, nowhere, VERSION_OWNER):
            yield f"a value broadcast against channels is in stage {int(assignment.owner[gate])}"


def _alive(
    structure: Structure, plan: Plan, assignment: Assignment, planned: Assignment
) -> Iterator[str]:
    stored_somewhere = assignment.owner <= assignment.stages
    owner = torch.where(stored_somewhere, assignment.owner, planned.owner)
    missing = missing_rows(structure, assignment)
    for path, masks in assignment.masks.items():
        layer = structure.layers[path]
        for stage, mask in enumerate(masks, 1):
            if path in assignment.heads:
                expected = _head_mask(layer, owner, stage)
            else:
                expected = alive(structure, plan, layer, owner, stage)
                expected = expected & ~missing[path][:, None]
            if not torch.equal(mask, expected):
                stored, wanted = int(mask.sum()), int(expected.sum())
                yield f"{path}, stage {stage}: {stored} weights are stored, {wanted} are alive"


def _cuts(structure: Structure, assignment: Assignment, planned: Assignment) -> Iterator[str]:
    """Every family is cut where the plan says, in the plan's order."""
    nowhere = assignment.stages + 1
    for family in families(structure):
        got, wanted = [], []
        for atom in family.atoms:
            stages = {int(assignment.owner[item]) for item in atom} - {nowhere}
            if stages:
                got.append(min(stages))
                wanted.append(int(planned.owner[min(atom)]))
        if got != wanted:
            yield (
                f"family written by {', '.join(family.writers)} and read by "
                f"{', '.join(sorted(family.readers))} at {family.resolution}: "
                f"stages {got} where the plan says {wanted}"
            )
