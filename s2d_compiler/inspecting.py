"""Find out what a plan may choose for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from s2d_compiler.analysis.assignment import assign
from s2d_compiler.analysis.channels import (
    ChannelAnalysis,
    LayerChannels,
    analyse_channels,
    cut_resolutions,
)
from s2d_compiler.analysis.cost import static_macs
from s2d_compiler.analysis.labels import has_atoms
from s2d_compiler.errors import PlanError
from s2d_compiler.plan_rules import check_counts
from s2d_compiler.program import Program, operator_name, path_of
from s2d_compiler.report import CoupledUse
from s2d_compiler.rules.layers import is_cut_between, is_layer
from s2d_compiler.search_space import ResolutionGroup, SearchSpace, SpaceLayer
from s2d_compiler.submodules import part_of
from s2d_compiler.tracing import capture


def inspect_model(
    model: nn.Module | Program,
    example_inputs: Sequence[Any] | None = None,
    input_shape: Sequence[int] | None = None,
    stages: int = 3,
    groups: int = 8,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    submodule: str | None = None,
) -> SearchSpace:
    """Find out what a plan may choose for a model; the model is left untouched.

    Args:
        model: Any ``nn.Module`` that ``torch.export`` can capture, or a ``Program``.
        example_inputs: Positional inputs with a batch in dimension 0.
        input_shape: Shape of one input without the batch, used when there are no examples.
        stages: How many stages the plans are to have.
        groups: In how many groups they count channels.
        example_kwargs: Keyword inputs, likewise.
        submodule: Path of the part to look at, such as ``"backbone"``.

    Raises:
        PlanError: Fewer groups than stages, or counts out of range.
        UsageError: There is no such submodule.
        InputShapeError, CaptureError: The model cannot be captured.
    """
    check_counts(stages, groups, "")
    program = model
    if not isinstance(program, Program):
        part = part_of(program, submodule)
        program = capture(part, example_inputs, input_shape, example_kwargs)
    channels = analyse_channels(program)
    layers = _layers(program, channels, stages)
    space = SearchSpace(
        stages=stages,
        groups=groups,
        groups_by_resolution=_resolution_groups(channels, layers),
        layers=layers,
        coupled=tuple(
            CoupledUse(name, operator_name(program.by_name[name]), path_of(program.by_name[name]))
            for name in channels.coupled
        ),
        unknown=tuple(sorted(channels.unknown, key=lambda use: -use.macs)),
        dropped=program.dropped,
        notes=program.notes,
        input_shape=program.input_shapes[0] if len(program.input_shapes) == 1 else None,
    )
    try:
        assign(program, channels, space.starter_plan())
    except PlanError as error:
        return replace(space, misfit=str(error))
    return space


def _layers(program: Program, channels: ChannelAnalysis, stages: int) -> tuple[SpaceLayer, ...]:
    found: dict[str, SpaceLayer] = {}
    for node in program.nodes:
        if node.op not in ("call_module", "call_function"):
            continue
        macs = static_macs(program, node)
        name = channels.layer_of.get(node.name)
        if name is None:
            if macs or is_layer(node):
                found[node.name] = _operator(program, channels, node, macs)
        elif name in found:
            found[name] = replace(found[name], macs=found[name].macs + macs)
        elif node.name in channels.predictions:
            found[name] = SpaceLayer(name, operator_name(node), "prediction", macs=macs)
        else:
            found[name] = _layer(program, channels, name, stages, macs)
    return tuple(found.values())


def _layer(
    program: Program, channels: ChannelAnalysis, name: str, stages: int, macs: int
) -> SpaceLayer:
    """A layer whose output channels have owners."""
    layer = channels.layers[name]
    atoms = set(layer.rows.tolist())
    families = [family for family in channels.families if name in family.writers]
    pinned = {atom for family in families for atom in family.atoms[: family.pinned]} & atoms
    apart = len(atoms - pinned) + bool(pinned)
    reason = ""
    if apart < stages:
        reason = f"{apart} of its {len(layer.rows)} channels can be told apart, fewer than stages"
    return SpaceLayer(
        name=name,
        operator=operator_name(program.by_name[layer.layer.nodes[0]]),
        role="whole" if reason else "cut",
        reason=reason,
        split_by=_largest({family.resolution for family in families}, channels),
        concat_by=layer.resolution if _reads_channels(program, layer) else "",
        channels=len(layer.rows),
        atoms=len(atoms),
        macs=macs,
    )


def _operator(program: Program, channels: ChannelAnalysis, node: fx.Node, macs: int) -> SpaceLayer:
    """A product without weights, or a layer whose channels the analysis does not follow."""
    role, reason = "follows", ""
    refused = [use.reason for use in channels.unknown if use.node == node.name]
    if refused:
        role, reason = "whole", refused[0]
    elif not has_atoms(channels.labels[node.name]):
        role, reason = "whole", "it has no channels of its own"
    path = str(node.target) if node.op == "call_module" else path_of(node) or node.name
    return SpaceLayer(path, operator_name(node), role, reason, macs=macs)


def _largest(resolutions: set[str], channels: ChannelAnalysis) -> str:
    return next(name for name in cut_resolutions(channels) if name in resolutions)


def _reads_channels(program: Program, layer: LayerChannels) -> bool:
    """Whether a layer mixes channels that have owners, so that it matters which it reads."""
    module = program.module(program.by_name[layer.layer.nodes[0]])
    depthwise = hasattr(module, "groups") and is_cut_between(module)
    return not depthwise and any(has_atoms(columns) for columns in layer.columns)


def _resolution_groups(
    channels: ChannelAnalysis, layers: Sequence[SpaceLayer]
) -> tuple[ResolutionGroup, ...]:
    result = []
    for name in cut_resolutions(channels):
        families = [family for family in channels.families if family.resolution == name]
        members = [layer for layer in layers if layer.split_by == name]
        readers = tuple(layer.name for layer in layers if layer.concat_by == name)
        result.append(
            ResolutionGroup(
                resolution=name,
                has_split=any(len(f.atoms) > max(1, f.pinned) for f in families),
                has_concat=bool(readers),
                layers=tuple(layer.name for layer in members),
                readers=readers,
                families=len(families),
                channels=sum(layer.channels for layer in members),
                atoms=sum(len(family.atoms) for family in families),
                macs=sum(layer.macs for layer in members),
            )
        )
    return tuple(result)
