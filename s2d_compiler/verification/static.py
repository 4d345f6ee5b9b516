"""The model as it is, in terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from s2d_compiler.errors import VerifyError, first_line
from s2d_compiler.program import Program, place
from s2d_compiler.provenance import Slice
from s2d_compiler.verification.arguments import Value
from s2d_compiler.verification.layers import Held, UnknownModuleError, apply_module
from s2d_compiler.verification.operators import Operators
from s2d_compiler.verification.terms import Terms

Environment = dict[fx.Node, Any]


class StaticRun:
    """Runs a program in terms.

    Args:
        program: The captured model.
        operators: What operators do to terms.
        inputs: Terms of the program's inputs.
    """

    def __init__(self, program: Program, operators: Operators, inputs: Sequence[Value]):
        self.program = program
        self.operators = operators
        self.inputs = inputs
        self.before: Environment = {}  #: of the stage before, for nodes that are still to come
        self.leaves = {v for v in program.output_leaves if isinstance(v, fx.Node)}
        self.after = released(program.nodes)

    def static(self, *, keep: bool = False) -> Environment:
        """Values of the model as it is: of its outputs, or with ``keep`` of all nodes."""
        return self.run(self._plain, lambda node: keep)

    def run(
        self,
        evaluate: Callable[[fx.Node, Environment], Any],
        is_kept: Callable[[fx.Node], bool],
    ) -> Environment:
        """Values of the outputs, and of the nodes that are kept.

        Args:
            evaluate: What a node computes, from the values so far.
            is_kept: Whether to return a node's value.
        """
        found: Environment = {}
        given = iter(self.inputs)
        for node in self.program.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                found[node] = next(given)
            elif node.op == "get_attr":
                found[node] = self._attribute(node)
            else:
                found[node] = self._followed(node, found, evaluate)
            self.before.pop(node, None)
            for done in self.after.get(node, ()):
                if done not in self.leaves and not is_kept(done):
                    del found[done]
        return found

    def _followed(
        self, node: fx.Node, found: Environment, evaluate: Callable[[fx.Node, Environment], Any]
    ) -> Any:
        try:
            return evaluate(node, found)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError,
                AssertionError, StopIteration, UnknownModuleError) as error:  # fmt: skip
            raise VerifyError(
                f"{place(node)} of the model cannot be followed: {first_line(error)}; this is no "
                "word on the network: rely on the self-check of s2d-compile instead."
            ) from error

    # -- one node ----------------------------------------------------------------------------------

    def _attribute(self, node: fx.Node) -> Value:
        target = str(node.target)
        tensor = self.program.attribute(node)
        source = self.program.sources.get(target)
        if source is None or source in self.program.buffers or not _is_parameter(tensor):
            return self.operators.value(tensor)
        whole = Slice(source, (None,) * tensor.dim())
        return Value(self.operators.keys.elements(whole, tuple(tensor.shape)))

    def _plain(self, node: fx.Node, found: Environment) -> Any:
        args = fx.map_arg(node.args, found.__getitem__)
        kwargs = fx.map_arg(dict(node.kwargs), found.__getitem__)
        if node.op == "call_module":
            x: Any = args[0]
            return self._module(self._held(node), x)
        return self.operators.apply(node.target, args, kwargs)

    def _module(self, held: Held, x: Value) -> Value:
        operators = self.operators
        return Value(apply_module(operators, held, x.terms))

    def _held(self, node: fx.Node, alive: torch.Tensor | None = None) -> Held:
        module, path = self.program.module(node), str(node.target)
        slices = {
            name: Slice(self.program.sources.get(f"{path}.{name}", f"{path}.{name}"),
                        (None,) * tensor.dim())
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if name not in module._non_persistent_buffers_set  # constants, whose numbers count
        }  # fmt: skip
        return Held(module, slices, alive)


def released(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Per node, the values that nothing reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for operand in node.all_input_nodes:
            last[operand] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, at in last.items():
        found.setdefault(at, []).append(node)
    return found


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def terms_of(values: Sequence[Any]) -> list[Terms]:
    """All terms of some values."""
    leaves = tree_leaves(list(values), is_leaf=lambda v: isinstance(v, Value))
    return [v.terms for v in leaves if isinstance(v, Value)]
