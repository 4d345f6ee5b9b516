"""The contract of a pass, and the pipeline that runs them."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from s2d_compiler.errors import PassError
from s2d_compiler.verifier import verify_graph

log = logging.getLogger(__name__)

#: Whether pipelines verify the graph after every pass, to tell which one broke it. Otherwise
#: the passes that are part of this package share the verification of what they make together.
VERIFY_ALWAYS = bool(os.environ.get("S2D_VERIFY_ALWAYS"))


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns.

    Attributes:
        graph_module: The rewritten graph.
        changed: Whether it differs from what was handed in.
    """

    graph_module: fx.GraphModule
    changed: bool


#: Forms of a graph, in the order in which passes bring it there (``meta["form"]``).
EMPTY, SPLIT, EXITS, STAGES = "empty", "split", "with exits", "in stages"


def require_form(graph_module: fx.GraphModule, name: str, form: str) -> None:
    """Refuse a graph that the passes before this one have not made.

    Raises:
        PassError: The graph has another form.
    """
    found = graph_module.meta.get("form", "of no known form")
    if found != form:
        makers = {EMPTY: "new_staged_graph", SPLIT: "split-channels", EXITS: "add-exits"}
        raise PassError(
            f"{name} needs a graph that is {form}, this one is {found}; "
            f"run it after {makers.get(form, 'extract-stages')}"
        )


def fingerprint(graph_module: fx.GraphModule) -> list[tuple[object, ...]]:
    """What a rewrite changes, of all graphs of a graph module, those of its stages included."""
    return [
        (node, node.name, node.op, node.target, node.args, node.kwargs)
        for module in graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    ]


def remove_unused(graph: fx.Graph) -> None:
    """Take out what nobody reads, in one walk; modules of staged graphs have no side effects."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module" or not node.is_impure():
            graph.erase_node(node)


class Pass(ABC):
    """One rewrite of a staged graph.

    A pass is a small frozen dataclass: its fields are its parameters. ``run`` checks what it
    requires, calls it, verifies the graph and checks what it ensures.
    """

    #: Name on command lines and in messages.
    name: ClassVar[str]
    #: Whether a pipeline verifies the graph right after the pass, or leaves it to the next one
    #: that does (see ``VERIFY_ALWAYS``).
    verified: ClassVar[bool] = True

    def requires(self, graph_module: fx.GraphModule) -> None:  # noqa: B027 - nothing by default
        """Raise ``PassError`` if the pass cannot run on this graph."""

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph."""

    def ensures(self, graph_module: fx.GraphModule) -> None:  # noqa: B027 - nothing by default
        """Raise ``PassError`` if the rewritten graph is not what the pass promises."""

    def run(
        self, graph_module: fx.GraphModule, *, recompile: bool = True, verify: bool = True
    ) -> PassResult:
        """Run the pass under its contract.

        Args:
            graph_module: The graph to rewrite.
            recompile: Whether the result must run; a pipeline recompiles once, at its end.
            verify: Whether to verify the graph, and that a pass that says so changed nothing.

        Raises:
            PassError: A condition does not hold; a note says which pass was running.
        """
        before = fingerprint(graph_module) if verify else []
        try:
            self.requires(graph_module)
            result = self.call(graph_module)
            if verify:
                if not result.changed and fingerprint(result.graph_module) != before:
                    raise PassError(
                        f"{self.name} changed the graph and said that it did not; return "
                        "PassResult(graph_module, changed=True)"
                    )
                result.graph_module.graph.lint()
                verify_graph(result.graph_module)
            self.ensures(result.graph_module)
            if recompile:
                result.graph_module.recompile()
        except Exception as error:
            error.add_note(f"while running {self!r}"[:400])
            raise
        return result


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in order. Pipelines are values: the methods return new ones."""

    passes: tuple[Pass, ...]

    def run(
        self,
        graph_module: fx.GraphModule,
        between: Callable[[Pass, fx.GraphModule], None] | None = None,
    ) -> fx.GraphModule:
        """Run all passes.

        Args:
            graph_module: The graph to rewrite.
            between: Called after each pass with the pass and its result (to print it, say).
        """
        watched = VERIFY_ALWAYS or between is not None
        for each in self.passes:
            result = each.run(
                graph_module,
                recompile=between is not None,
                verify=each.verified or each is self.passes[-1] or watched,
            )
            graph_module = result.graph_module
            log.debug("%s: %s", each.name, "changed" if result.changed else "unchanged")
            if between is not None:
                between(each, graph_module)
        graph_module.recompile()
        return graph_module

    def index(self, name: str) -> int:
        """Position of the pass of this name.

        Raises:
            PassError: There is none.
        """
        names = [each.name for each in self.passes]
        if name not in names:
            raise PassError(f"no pass is named {name!r}; the pipeline has {', '.join(names)}")
        return names.index(name)

    def insert_after(self, name: str, *added: Pass) -> Pipeline:
        """A pipeline with passes put after the named one."""
        return self._inserted(self.index(name) + 1, added)

    def insert_before(self, name: str, *added: Pass) -> Pipeline:
        """A pipeline with passes put before the named one."""
        return self._inserted(self.index(name), added)

    def _inserted(self, place: int, added: Sequence[Pass]) -> Pipeline:
        passes: Iterable[Pass] = (*self.passes[:place], *added, *self.passes[place:])
        return replace(self, passes=tuple(passes))
