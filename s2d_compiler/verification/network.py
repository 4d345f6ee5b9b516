"""A staged network in terms: what its stages compute, read off their graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from s2d_compiler.attributes import find
from s2d_compiler.computed import ComputedLayer
from s2d_compiler.dynamic import DynamicModel
from s2d_compiler.errors import VerifyError, first_line
from s2d_compiler.program import Program
from s2d_compiler.provenance import Slice
from s2d_compiler.verification.arguments import Value
from s2d_compiler.verification.layers import Held, UnknownModuleError, apply_module
from s2d_compiler.verification.operators import Operators
from s2d_compiler.verification.static import released, terms_of
from s2d_compiler.verification.words import DAMAGED


@dataclass(frozen=True)
class StageRun:
    """What one stage computes.

    Attributes:
        values: Value of every node, in order, where they were asked for.
        leaves: Its exit's flat outputs.
        features: What it hands on.
        nodes: Number of nodes.
        terms: Number of numbers that they compute.
    """

    values: dict[fx.Node, Any]
    leaves: tuple[Any, ...]
    features: tuple[Any, ...]
    nodes: int
    terms: int


class Network:
    """Runs the stages of a network, one after the other.

    Args:
        dyn: The network.
        program: The original, for what is a parameter and what is not.
        operators: What operators do to terms.
        inputs: Terms of the inputs.
        heads: Tensors of heads that the original does not have, by name.
    """

    def __init__(
        self,
        dyn: DynamicModel,
        program: Program,
        operators: Operators,
        inputs: Sequence[Value],
        heads: Mapping[str, Slice],
    ):
        self.dyn = dyn
        self.program = program
        self.operators = operators
        self.inputs = inputs
        self.provenance = {**heads, **dyn.parts.provenance}
        self.features: dict[tuple[int, int], Any] = {}
        self.handed: set[tuple[int, int]] = set()
        self.read: set[tuple[int, int]] = set()

    def run(self, number: int, *, keep: bool = False) -> StageRun:
        """Run one stage, counted from 0.

        Args:
            number: The stage; all before it have run.
            keep: Return the values of all nodes.

        Raises:
            VerifyError: Its graph cannot be followed; the message names the node.
        """
        stage, interface = self.dyn.stages[number], self.dyn.parts.interfaces[number]
        assert isinstance(stage, fx.GraphModule)
        given = iter(interface.inputs)
        values: dict[fx.Node, Any] = {}
        after = {} if keep else released(stage.graph.nodes)
        nodes = terms = 0
        leaves: Any = ()
        handed: Any = ()
        for node in stage.graph.nodes:
            try:
                if node.op == "output":
                    leaves, handed = fx.map_arg(node.args[0], values.__getitem__)
                    break
                values[node] = self._value(stage, number, node, values, given)
                nodes += 1
                terms += sum(t.numel() for t in terms_of([values[node]]))
                for done in after.get(node, ()):
                    del values[done]
            except VerifyError:
                raise
            except UnknownModuleError as error:
                raise VerifyError(f"{place(number, node)}: {error}; {DAMAGED}") from error
            except (RuntimeError, TypeError, ValueError, LookupError, AttributeError,
                    AssertionError, StopIteration, NotImplementedError) as error:  # fmt: skip
                raise VerifyError(
                    f"{place(number, node)} cannot be followed: {first_line(error)}; {DAMAGED}"
                ) from error
        self.features.update({(number, k): value for k, value in enumerate(handed)})
        self.handed.update((number, k) for k in range(len(handed)))
        later = self.dyn.parts.read_after(number)
        self.features = {k: value for k, value in self.features.items() if k in later}
        return StageRun(values, tuple(leaves), tuple(handed), nodes, terms)

    def _value(
        self, stage: fx.GraphModule, number: int, node: fx.Node, values: dict[fx.Node, Any],
        given: Any,
    ) -> Any:  # fmt: skip
        if node.op == "placeholder":
            where = next(given)
            if where[0] == "input":
                return self.inputs[where[1]]
            self.read.add((where[1], where[2]))
            return self.features[where[1], where[2]]
        if node.op == "get_attr":
            return self._attribute(stage, number, str(node.target))
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(dict(node.kwargs), values.__getitem__)
        if node.op == "call_module":
            held = self._held(stage, number, str(node.target))
            if len(args) != 1 or kwargs:
                raise ValueError("a module takes one tensor")
            x: Any = args[0]
            return Value(apply_module(self.operators, held, x.terms))
        return self.operators.apply(node.target, args, kwargs)

    def _slice(self, number: int, target: str) -> Slice | None:
        return self.provenance.get(f"stages.{number}.{target}")

    def _attribute(self, stage: fx.GraphModule, number: int, target: str) -> Value:
        tensor = find(stage, target)
        if not isinstance(tensor, torch.Tensor):
            raise VerifyError(
                f"stage {number + 1}: {target!r} is a {type(tensor).__name__}, which the graph "
                f"reads as a tensor; {DAMAGED}"
            )
        where = self._slice(number, target)
        if where is None or where.source in self.program.buffers:
            if isinstance(tensor, nn.Parameter):
                raise VerifyError(
                    f"stage {number + 1}: parameter {target!r} is no slice of the original's, as "
                    f"all parameters are; {DAMAGED}"
                )
            return self.operators.value(tensor)
        return Value(self.operators.keys.elements(where, tuple(tensor.shape)))

    def _held(self, stage: fx.GraphModule, number: int, target: str) -> Held:
        module: Any = find(stage, target)
        if not isinstance(module, nn.Module):
            raise VerifyError(
                f"stage {number + 1}: {target!r} is a {type(module).__name__}, which the graph "
                f"calls as a module; {DAMAGED}"
            )
        if not _is_plain(module):
            raise UnknownModuleError(
                f"modules of class {type(module).__module__}.{type(module).__name__} have no known "
                "meaning"
            )
        slices: dict[str, Slice] = {}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            where = self._slice(number, f"{target}.{name}")
            if where is None and isinstance(tensor, nn.Parameter):
                raise VerifyError(
                    f"stage {number + 1}: parameter '{target}.{name}' is no slice of the "
                    f"original's, as all parameters are; {DAMAGED}"
                )
            if where is not None:
                slices[name] = where
        for name in ("weight", "bias"):
            if isinstance(getattr(module, name, None), torch.Tensor) and name not in slices:
                raise VerifyError(
                    f"stage {number + 1}: tensor '{target}.{name}' is no slice of the original's, "
                    f"as those of layers are; {DAMAGED}"
                )
        return Held(module, slices)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is of torch's own class, or a layer with a computed weight, and not of a
    class that overrides what it does."""
    kind = type(module)
    return kind is ComputedLayer or getattr(nn, kind.__name__, None) is kind


def place(number: int, node: fx.Node) -> str:
    """A node as messages name it."""
    kind = str(node.target) if node.op != "placeholder" else "input"
    return f"stage {number + 1}, node {node.name!r} ({kind})"
