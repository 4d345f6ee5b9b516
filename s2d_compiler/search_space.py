"""The search space: what a plan may choose for a model, and what each choice is about.

`s2d_compiler.inspecting.inspect_model` returns a `SearchSpace` for a model: the resolutions that a
plan may set, what lies in each, what cannot be cut and why, and how many plans there are. A
search draws settings from it and gets plans back::

    space = inspect_model(model, input_shape=(3, 32, 32))
    plan = space.plan({"32x32": Setting((3, 5), "all")})    # the rest as in the starter plan
    plan = space.random_plan(random.Random(0))

Source: S2DNAS, section 3.2 (one setting for all layers of a resolution).
"""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from s2d_compiler.analysis.channels import (
    UnknownUse,
)
from s2d_compiler.plan import Concat, Pair, Plan, Setting, Split
from s2d_compiler.plan_rules import fail, is_list, show
from s2d_compiler.program import Dropped
from s2d_compiler.report import FALLBACKS, CoupledUse, FallbackUse, grouped, section

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ResolutionGroup", "SearchSpace", "SpaceLayer"]


@dataclass(frozen=True, slots=True)
class SpaceLayer:
    """One weighted layer, or one operator that multiplies without weights.

    Attributes:
        name: Module path; how plans name a layer.
        operator: Module class or operator.
        role: ``cut`` (its output channels can be dealt out to the stages), ``prediction`` (every
            stage gets its own), ``follows`` (an operator without weights on channels that are
            dealt out), or ``whole``.
        reason: Why it stays whole, else empty.
        split_by: Resolution whose split cuts its output channels, or empty.
        concat_by: Resolution whose concat says what it reads, or empty.
        channels: Output channels.
        atoms: How many of them can be told apart.
        macs: MACs per sample in the original.
    """

    name: str
    operator: str
    role: str
    reason: str = ""
    split_by: str = ""
    concat_by: str = ""
    channels: int = 0
    atoms: int = 0
    macs: int = 0


@dataclass(frozen=True, slots=True)
class ResolutionGroup:
    """What one entry of a plan's ``resolutions`` is about.

    Attributes:
        resolution: Its name in plans.
        has_split: Whether a split of this resolution changes anything.
        has_concat: Whether a concat of this resolution changes anything.
        layers: Layers whose output channels its split cuts.
        readers: Layers whose reading its concat settles.
        families: How many families of channels its split cuts.
        channels: Output channels of ``layers``.
        atoms: How many channels can be told apart (a residual stream counts once).
        macs: MACs per sample of ``layers`` in the original.
    """

    resolution: str
    has_split: bool
    has_concat: bool
    layers: tuple[str, ...]
    readers: tuple[str, ...]
    families: int
    channels: int
    atoms: int
    macs: int


@dataclass(frozen=True)
class SearchSpace:
    """The plans of one model for a number of stages and groups; prints as a table.

    Attributes:
        stages: How many stages the plans have.
        groups: In how many groups they count channels.
        groups_by_resolution: What each resolution's setting is about, largest first.
        layers: Everything that has weights or MACs, in program order.
        coupled: Operators that mix channels without weights and run once per stage.
        unknown: Operators without a rule, which run once per stage at full size.
        dropped: What evaluation-mode capture leaves out.
        notes: Sentences about the capture.
        input_shape: Shape of the one input without the batch; None if there are several.
        misfit: Why the starter plan cannot be compiled, else empty.
    """

    stages: int
    groups: int
    groups_by_resolution: tuple[ResolutionGroup, ...]
    layers: tuple[SpaceLayer, ...]
    coupled: tuple[CoupledUse, ...]
    unknown: tuple[UnknownUse, ...]
    dropped: Dropped
    notes: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    misfit: str = ""

    # What is in it

    @property
    def resolutions(self) -> tuple[str, ...]:
        """The resolutions that a plan may set, largest first."""
        return tuple(group.resolution for group in self.groups_by_resolution)

    @property
    def macs(self) -> int:
        """MACs per sample of the original."""
        return sum(layer.macs for layer in self.layers)

    @property
    def predictions(self) -> tuple[SpaceLayer, ...]:
        """Layers of which every stage gets its own."""
        return tuple(layer for layer in self.layers if layer.role == "prediction")

    @property
    def whole(self) -> tuple[SpaceLayer, ...]:
        """What no plan can cut, the costliest first."""
        found = [layer for layer in self.layers if layer.role == "whole"]
        return tuple(sorted(found, key=lambda layer: -layer.macs))

    @property
    def cut_share(self) -> float:
        """Share of the original's MACs in what is not left whole."""
        return 1.0 - sum(layer.macs for layer in self.whole) / self.macs if self.macs else 1.0

    @property
    def choices(self) -> int:
        """Settings of one resolution: C(groups - 1, stages - 1) * 2^(stages (stages - 1) / 2)."""
        return self._split_choices * self._concat_choices

    @property
    def size(self) -> int:
        """Number of plans: one setting for each resolution, each chosen freely."""
        return math.prod(self.choices for _ in self.groups_by_resolution)

    @property
    def distinct_size(self) -> int:
        """Number of plans that differ in settings that change anything in this model."""
        return math.prod(
            (self._split_choices if group.has_split else 1)
            * (self._concat_choices if group.has_concat else 1)
            for group in self.groups_by_resolution
        )

    @property
    def _split_choices(self) -> int:
        return math.comb(self.groups - 1, self.stages - 1)

    @property
    def _concat_choices(self) -> int:
        return 1 << math.comb(self.stages, 2)

    # What there is to choose

    def splits(self) -> Iterator[Split]:
        """Every split, in lexical order."""
        yield from itertools.combinations(range(1, self.groups), self.stages - 1)

    def concats(self) -> Iterator[Concat]:
        """Every set of pairs, from "none" to "all"."""
        pairs = self._pairs
        for size in range(len(pairs) + 1):
            for chosen in itertools.combinations(pairs, size):
                yield _named(chosen, pairs)

    def settings(self, resolution: str) -> Iterator[Setting]:
        """Every setting of one resolution that changes something, one at a time.

        Raises:
            PlanError: The model does not have this resolution.
        """
        group = self._group(resolution)
        for split in self.splits() if group.has_split else (None,):
            for concat in self.concats() if group.has_concat else (None,):
                yield Setting(split, concat)

    def _group(self, resolution: str) -> ResolutionGroup:
        for group in self.groups_by_resolution:
            if group.resolution == resolution:
                return group
        fail(
            f"resolutions.{resolution}",
            f"the model has no such resolution; it has {', '.join(self.resolutions) or 'none'}",
        )

    @property
    def _pairs(self) -> tuple[Pair, ...]:
        return tuple((j, i) for j in range(2, self.stages + 1) for i in range(1, j))

    # Plans

    def starter_plan(self) -> Plan:
        """A plan to edit: half the channels first, the rest evenly, and everything reused."""
        return self.plan({})

    def plan(self, settings: Mapping[str, Setting | tuple[Split, Concat]]) -> Plan:
        """The plan of these settings; a resolution or part that is left out is the starter's.

        Args:
            settings: By resolution, a ``Setting`` or a pair of split and concat.

        Raises:
            PlanError: A resolution that the model does not have, or a setting that breaks a rule.
        """
        chosen = {
            self._group(name).resolution: _setting(name, value) for name, value in settings.items()
        }
        default = Setting(starter_split(self.stages, self.groups), self._starter_concat)
        rows = {
            group.resolution: _completed(chosen.get(group.resolution, Setting()), default, group)
            for group in self.groups_by_resolution
        }
        listed = {name: setting for name, setting in rows.items() if setting != Setting()}
        return Plan(self.stages, self.groups, default, listed, input_shape=self.input_shape)

    @property
    def _starter_concat(self) -> Concat:
        return "all" if self.stages > 1 else "none"

    def random_plan(self, generator: random.Random) -> Plan:
        """A plan drawn uniformly from those that differ (``distinct_size`` many)."""
        return self.plan(
            {
                group.resolution: Setting(
                    self._random_split(generator) if group.has_split else None,
                    self._random_concat(generator) if group.has_concat else None,
                )
                for group in self.groups_by_resolution
            }
        )

    def _random_split(self, generator: random.Random) -> Split:
        return tuple(sorted(generator.sample(range(1, self.groups), self.stages - 1)))

    def _random_concat(self, generator: random.Random) -> Concat:
        pairs = self._pairs
        return _named(tuple(pair for pair in pairs if generator.getrandbits(1)), pairs)

    # Presentation

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; a size that is too long to write has its logarithm alone."""
        return {
            "stages": self.stages,
            "groups": self.groups,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "macs": self.macs,
            "cut_share": self.cut_share,
            "size": _printable(self.size),
            "size_log10": math.log10(self.size),
            "distinct_size": _printable(self.distinct_size),
            "resolutions": [
                {**asdict(group), "share": self._share(group.macs)}
                for group in self.groups_by_resolution
            ],
            "layers": [asdict(layer) for layer in self.layers],
            "predictions": [layer.name for layer in self.predictions],
            "coupled": [asdict(use) for use in self.coupled],
            "unknown": [asdict(use) for use in self.unknown],
            "dropped": asdict(self.dropped),
            "notes": list(self.notes),
            "misfit": self.misfit,
            "starter_plan": self.starter_plan().to_dict(),
        }

    def _share(self, macs: int) -> float:
        return macs / self.macs if self.macs else 0.0

    def table(self) -> Table:
        """One row for each resolution, and one for what no resolution settles."""
        from rich.table import Table

        table = Table()
        _add_columns(table, ("resolution", "settings"))
        _add_columns(table, ("layers", "channels", "atoms", "MACs", "share"), numbers=True)
        for group in self.groups_by_resolution:
            counts = (len(group.layers), group.channels, group.atoms)
            named = (group.resolution, _named_settings(group))
            table.add_row(*named, *map(str, counts), *self._price(group.macs))
        heads = sum(layer.macs for layer in self.predictions)
        rest = self.macs - heads - sum(group.macs for group in self.groups_by_resolution)
        if self.predictions:
            count = str(len(self.predictions))
            table.add_row("prediction", "", count, "", "", *self._price(heads))
        if rest:
            table.add_row("elsewhere", "", "", "", "", *self._price(rest))
        return table

    def _price(self, macs: int) -> tuple[str, str]:
        return f"{macs:,}", f"{self._share(macs):.1%}"

    def layer_table(self) -> Table:
        """One row for each layer."""
        from rich.table import Table

        table = Table()
        _add_columns(table, ("layer", "operator", "", "split by", "concat by"))
        _add_columns(table, ("channels", "atoms", "MACs", "share"), numbers=True)
        for layer in self.layers:
            counts = (str(layer.channels or ""), str(layer.atoms or ""))
            names = (layer.name, layer.operator, layer.role, layer.split_by, layer.concat_by)
            table.add_row(*names, *counts, *self._price(layer.macs))
        return table

    def remarks(self) -> str:
        """The size of the space, what cannot be cut, and the rest that a user should know."""
        text = io.StringIO()
        text.write(
            f"{self._size()}\n"
            f"{self.cut_share:.1%} of {self.macs:,} MACs per sample are in layers that can be cut\n"
        )
        heads = ", ".join(layer.name for layer in self.predictions)
        text.write(f"exit heads from: {heads or 'none (the output is the features)'}\n")
        whole = [f"{row.name}: {row.reason} ({row.macs:,} MACs)" for row in self.whole]
        more = self.stages - 1
        uses = [
            FallbackUse(**asdict(u), runs=more + 1, extra_macs=more * u.macs) for u in self.unknown
        ]
        coupled = [f"{use.operator} in {use.path!r}" for use in self.coupled]
        section(text, "whole in every plan", whole)
        section(text, FALLBACKS, [group.text(self.macs) for group in grouped(uses)])
        section(text, "coupled, run once per stage", coupled)
        gone = [*self.dropped.modules, *self.dropped.unused]
        section(text, "not in the graph (not run in evaluation mode on such an input)", gone)
        section(text, "notes", [*self.notes, *([f"starter {self.misfit}"] if self.misfit else [])])
        return text.getvalue().rstrip()

    def _size(self) -> str:
        count = len(self.groups_by_resolution)
        if not count:
            return "1 plan: the model has no channels that can be cut"
        where = "1 resolution" if count == 1 else f"each of {count} resolutions"
        text = f"{_short(self.size)} plans: {_short(self.choices)} settings for {where}"
        if self.distinct_size != self.size:
            text += f"; {_short(self.distinct_size)} of them differ in this model"
        return text

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=100, no_color=True).print(self.table())
        return f"{text.getvalue().rstrip()}\n{self.remarks()}"


def starter_split(stages: int, groups: int) -> Split:
    """Half of the groups to the first stage, the rest as evenly as it goes.

    Example:
        >>> starter_split(3, 8)
        (4, 6)
    """
    if stages == 1:
        return ()
    rest = stages - 1
    first = max(1, min(groups // 2, groups - rest))
    return tuple(first + (groups - first) * stage // rest for stage in range(rest))


def _setting(name: str, value: Any) -> Setting:
    if isinstance(value, Setting):
        return value
    if not is_list(value) or len(value) != 2:
        fail(
            f"resolutions.{name}",
            f"{show(value)} is neither a Setting nor (split, concat); give one of these",
        )
    return Setting(*value)


def _completed(setting: Setting, default: Setting, group: ResolutionGroup) -> Setting:
    """A setting with the parts that it leaves out, where they change anything."""
    split = default.split if group.has_split else None
    concat = default.concat if group.has_concat else None
    return Setting(
        split if setting.split is None else setting.split,
        concat if setting.concat is None else setting.concat,
    )


def _named(chosen: tuple[Pair, ...], pairs: tuple[Pair, ...]) -> Concat:
    """A set of pairs as people write it."""
    if not chosen:
        return "none"
    return "all" if chosen == pairs else chosen


def _named_settings(group: ResolutionGroup) -> str:
    names = [name for name in ("split", "concat") if getattr(group, f"has_{name}")]
    return ", ".join(names) or "none"


def _add_columns(table: Table, titles: Sequence[str], *, numbers: bool = False) -> None:
    for title in titles:
        justify: Literal["left", "right"] = "right" if numbers else "left"
        table.add_column(title, justify=justify, no_wrap=True)


def _printable(number: int) -> int | None:
    """A number that Python writes out; it refuses beyond 4300 digits."""
    return number if number < 10**4000 else None


def _short(number: int) -> str:
    """A count as people read it."""
    if number < 10**9:
        return f"{number:,}"
    exponent = math.floor(math.log10(number))
    return f"{number // 10 ** (exponent - 2) / 100:.2f}e{exponent}"
