"""DynamicModel: the staged network that a transform returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from s2d_compiler.analysis.cost import Cost
from s2d_compiler.errors import InputShapeError
from s2d_compiler.plan import Plan
from s2d_compiler.provenance import Slice
from s2d_compiler.report import Report


@dataclass(frozen=True, slots=True)
class Interface:
    """What one stage takes and hands on.

    Attributes:
        inputs: Per placeholder of the stage ``("input", k)`` for the k-th input of the
            network, or ``("feature", stage, position)`` for a feature of an earlier stage
            (stages as indices into ``DynamicModel.stages``).
        features: Number of features that it hands on.
    """

    inputs: tuple[tuple[Any, ...], ...]
    features: int


@dataclass(frozen=True)
class DynamicParts:
    """Everything that a staged network is made of besides its modules.

    Attributes:
        plan: The plan.
        cost: Cost per stage.
        report: What was cut and why.
        provenance: State-dict key -> slice of the original.
        interfaces: Per stage, what it takes and hands on.
        owners: Stage of every atom of the original, from 1.
        input_shapes: Shape of each input without the batch.
        batch: None, or the only batch size that the network takes.
        output_spec: pytree structure of the original's output; None for one tensor.
        made_by: Versions, command, hash of the model and seed.
    """

    plan: Plan
    cost: Cost
    report: Report
    provenance: Mapping[str, Slice]
    interfaces: tuple[Interface, ...]
    owners: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    batch: int | None
    output_spec: Any
    made_by: Mapping[str, Any]


class DynamicModel(nn.Module):
    """A network of several stages, each with an exit.

    Calling it runs every stage and returns a tuple with one output per stage, each of the
    original's structure. ``stages`` is a ``nn.ModuleList`` of ``torch.fx.GraphModule``; each
    returns ``(outputs, features)``: its exit's flat outputs and what later stages read.

    Args:
        stages: The stage subgraphs.
        parts: Everything else.
    """

    def __init__(self, stages: list[fx.GraphModule], parts: DynamicParts):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.parts = parts

    @property
    def plan(self) -> Plan:
        """The plan that made it."""
        return self.parts.plan

    @property
    def cost(self) -> Cost:
        """MACs and parameters per stage."""
        return self.parts.cost

    @property
    def report(self) -> Report:
        """What was cut, left whole, coupled, unknown, and why."""
        return self.parts.report

    @property
    def provenance(self) -> Mapping[str, Slice]:
        """State-dict key -> where the tensor came from in the original."""
        return MappingProxyType(dict(self.parts.provenance))

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Run all stages.

        Args:
            inputs: What the original takes, ``(N, C, H, W)`` for an image model.

        Returns:
            One output per stage, each of the original's structure.
        """
        return tuple(self.exits(*inputs))

    def exits(self, *inputs: Any) -> Iterator[Any]:
        """Run stage by stage: a stage runs when its output is asked for.

        Stop iterating, and the later stages never run. Features that no later stage reads are
        let go.

        Yields:
            The output of each stage, of the original's structure.

        Raises:
            InputShapeError: The inputs are not of the shape the network was compiled for.
        """
        self._check_inputs(inputs)
        features: dict[tuple[int, int], torch.Tensor] = {}
        for number, (stage, interface) in enumerate(
            zip(self.stages, self.parts.interfaces, strict=True)
        ):
            arguments = [
                inputs[where[1]] if where[0] == "input" else features[where[1], where[2]]
                for where in interface.inputs
            ]
            leaves, handed = stage(*arguments)
            del arguments
            features.update({(number, k): value for k, value in enumerate(handed)})
            needed = self._read_after(number)
            features = {k: value for k, value in features.items() if k in needed}
            yield self._structured(leaves)

    def _read_after(self, number: int) -> set[tuple[int, int]]:
        """Features that stages after this one read."""
        return {
            (where[1], where[2])
            for interface in self.parts.interfaces[number + 1 :]
            for where in interface.inputs
            if where[0] == "feature"
        }

    def _structured(self, leaves: tuple[Any, ...]) -> Any:
        spec = self.parts.output_spec
        return leaves[0] if spec is None else pytree.tree_unflatten(list(leaves), spec)

    def _check_inputs(self, inputs: tuple[Any, ...]) -> None:
        tensors = [v for v in inputs if isinstance(v, torch.Tensor)]
        expected = self.parts.input_shapes
        if len(tensors) != len(expected):
            raise InputShapeError(
                f"the network takes {len(expected)} input(s), got {len(tensors)}."
            )
        for tensor, shape in zip(tensors, expected, strict=True):
            if tuple(tensor.shape[1:]) != shape:
                raise InputShapeError(
                    f"input of shape {tuple(tensor.shape)}: the network was compiled for "
                    f"(N, {', '.join(map(str, shape))}); resize the input, or compile again with "
                    '"input_shape" in the plan.'
                )
        if self.parts.batch is not None and tensors and tensors[0].shape[0] != self.parts.batch:
            raise InputShapeError(
                f"batch of {tensors[0].shape[0]}: the original fixes its batch size, so this "
                f"network takes batches of {self.parts.batch} only."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``dyn.pt``: data without code; see ``s2d_compiler.format``.

        Raises:
            OutputError: The file cannot be written; nothing is left behind.
        """
        from s2d_compiler.format import save

        save(self, path)


def interfaces_of(network: fx.GraphModule) -> tuple[Interface, ...]:
    """Read the stages' interfaces off the graph that calls them."""
    where: dict[fx.Node, tuple[Any, ...]] = {}
    found: list[Interface] = []
    placeholders = 0
    for node in network.graph.nodes:
        if node.op == "placeholder":
            where[node] = ("input", placeholders)
            placeholders += 1
        elif node.op == "call_module":
            inputs = tuple(where[a] for a in node.args if isinstance(a, fx.Node))
            where[node] = ("stage", len(found))
            stage = network.get_submodule(str(node.target))
            assert isinstance(stage, fx.GraphModule)
            output = next(n for n in stage.graph.nodes if n.op == "output")
            found.append(Interface(inputs, len(output.args[0][1])))
        elif node.op == "call_function":
            source, position = node.args
            assert isinstance(source, fx.Node)
            base = where[source]
            if base[0] == "stage":
                where[node] = ("outputs", base[1]) if position == 0 else ("features", base[1])
            else:
                where[node] = ("feature", base[1], position)
    return tuple(found)
