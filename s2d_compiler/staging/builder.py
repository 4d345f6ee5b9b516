"""StageBuilder: thin layers, heads and norms on top of reading and emitting."""

from __future__ import annotations

import numpy as np
from torch import fx

from s2d_compiler.analysis.labels import VERSIONED
from s2d_compiler.computed import weight_shape
from s2d_compiler.layout import Layout, Positions, layout
from s2d_compiler.program import shape_of
from s2d_compiler.rules.layers import is_cut_between
from s2d_compiler.staging.reader import PartReader
from s2d_compiler.thin import head_module, place_slices, thin_layer_module, thin_per_channel_module


class StageBuilder(PartReader):
    """What rules and passes build stages with."""

    def _builder(self) -> StageBuilder:
        return self

    def thin_layer(self, node: fx.Node, where: Layout, stage: int) -> fx.Node:
        """A stage's slice of a weighted layer, reading what the assignment lets it read."""
        rows = where.array
        source = node.args[0]
        assert isinstance(source, fx.Node)
        module = self.program.module(node)
        columns, inputs, groups = self._layer_inputs(node, rows, stage)
        name, slices, build = thin_layer_module(self.program, node, rows, columns, groups)
        name = place_slices(self.graph_module, self._module_name(name, stage), slices, like=build)
        channel = 1 if len(weight_shape(module)) > 2 else len(shape_of(source)) - 1
        part = self._columns(source, channel, inputs, stage)
        created = self._layer_call(name, (part,), node, stage)
        created.meta["layer"] = node.name
        return created

    def _layer_inputs(
        self, node: fx.Node, rows: Positions, stage: int
    ) -> tuple[Positions | None, Positions, int]:
        """Columns of the weight, input channels to read for them, groups of the thin layer."""
        module = self.program.module(node)
        groups = int(getattr(module, "groups", 1))
        name = self.channels.layer_of[node.name]
        if groups == 1:
            alive = np.flatnonzero(self.assignment.columns_alive(name, stage, reuse=self.reuse))
            order = self._reading_order(node, alive, stage)
            return order, order, 1
        per_in, per_out = module.in_channels // groups, module.out_channels // groups
        if is_cut_between(module):
            chosen = np.unique(rows // per_out)
            inputs = (chosen[:, None] * per_in + np.arange(per_in)[None, :]).reshape(-1)
            return None, inputs, len(chosen)
        by_group = self.assignment.columns_alive(name, stage, reuse=self.reuse)
        inside = np.flatnonzero(by_group.reshape(groups, per_in).any(axis=0))
        inputs = (np.arange(groups)[:, None] * per_in + inside[None, :]).reshape(-1)
        return inside, inputs, groups

    def _reading_order(self, node: fx.Node, columns: Positions, stage: int) -> Positions:
        """Columns in the order in which the operand's sources hold them, so that reading them
        is one concatenation and no gather. The first call site decides for all."""
        first = self.program.by_name[
            self.channels.layers[self.channels.layer_of[node.name]].layer.nodes[0]
        ]
        source = first.args[0]
        assert isinstance(source, fx.Node)
        owner = self.assignment.owner_of(
            self.channels.layers[self.channels.layer_of[node.name]].columns[0]
        )
        rank = np.where(
            owner[columns] == VERSIONED, self.assignment.stages + 1, np.maximum(owner[columns], 0)
        )
        return columns[np.argsort(rank, kind="stable")]

    def _columns(self, source: fx.Node, channel: int, columns: Positions, stage: int) -> fx.Node:
        """Input channels of a layer; zero where this call site has a later stage's."""
        shape = shape_of(source)
        frame = tuple(n if d == channel else 1 for d, n in enumerate(shape))
        where = layout(frame, columns)
        own = self.labels(source).shape
        if own[channel] == 1:
            owner = int(self.owners(source).reshape(-1)[0])
            if owner > stage:
                return self._zeros(source, where, stage)
            return self.read(source, where, stage)
        return self._assemble(source, self.refined(source, where), stage, hide_later=True)

    def is_cut_between_groups(self, node: fx.Node) -> bool:
        """Whether a layer is a grouped convolution whose groups live in stages of their own."""
        module = self.program.module(node)
        return int(getattr(module, "groups", 1)) > 1 and is_cut_between(module)

    def head(self, node: fx.Node, stage: int) -> fx.Node:
        """A stage's own prediction layer, reading every stage up to it."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        module = self.program.module(node)
        channel = 1 if len(weight_shape(module)) > 2 else len(shape_of(source)) - 1
        columns = self.channels.layers[self.channels.layer_of[node.name]].columns[0]
        owner = self.assignment.owner_of(columns)
        readable = np.flatnonzero(owner <= stage)
        groups = int(getattr(module, "groups", 1))
        order = inputs = self._reading_order(node, readable, stage)
        if groups > 1:
            per_in = len(columns) // groups
            order = np.flatnonzero((owner <= stage).reshape(groups, per_in).any(axis=0))
            inputs = (np.arange(groups)[:, None] * per_in + order[None, :]).reshape(-1)
        name, slices, build = head_module(self.program, node, order, groups)
        name = place_slices(self.graph_module, f"stages.{stage - 1}.{name}", slices, like=build)
        part = self._columns(source, channel, inputs, stage)
        created = self._layer_call(name, (part,), node, stage)
        created.meta["head"] = True
        return created

    def thin_per_channel(
        self, node: fx.Node, source: fx.Node, where: Layout, stage: int, groups: int | None = None
    ) -> fx.Node:
        """A stage's slice of a module with one weight per channel."""
        if not where.dimensions:
            return self.whole_module(node, (source,), stage)
        positions = where.array
        name, slices, build = thin_per_channel_module(self.program, node, positions, groups)
        is_version = bool((self.owners(node).reshape(-1)[positions] == VERSIONED).any())
        owner = 0 if is_version and node.name not in self.channels.heads else stage
        name = place_slices(self.graph_module, self._module_name(name, owner), slices, like=build)
        return self._layer_call(name, (source,), node, stage)
