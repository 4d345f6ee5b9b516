"""The plan: which channels belong to which stage, and what later stages reuse.

A plan is a small JSON object that people write and searches emit::

    {
      "version": 1,
      "stages": 3,
      "groups": 8,
      "default": {"split": [4, 6], "concat": "all"},
      "resolutions": {"32x32": {"split": [3, 5], "concat": [[3, 1], [3, 2]]}},
      "layers": {"layer1.*": {"concat": "none"}},
      "order": "l1",
      "input_shape": [3, 32, 32],
      "final": "original"
    }

Each family of channels is counted in ``groups`` groups; ``split`` holds the stages - 1 points at
which it is cut, so that [4, 6] of 8 gives the stages four, two and two groups. ``concat`` holds
the pairs [later, earlier] of stages, counted from 1, in which the later stage reads what the
earlier one computed; "all" and "none" stand for every pair and no pair. Pairs are not transitive.
A plan without ``version`` is of version 1. ``plan.schema.json`` beside this file says the same as
JSON Schema, for editors; what a schema cannot say, it lists.

Source: S2DNAS, section 3.2 (split and concat, one setting per resolution).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from s2d_compiler.output import atomic_write
from s2d_compiler.plan_rules import (
    EXAMPLES,
    PLAN_KEYS,
    PLAN_VERSION,
    SETTING_KEYS,
    Concat,
    Pair,
    Split,
    as_json,
    check_choice,
    check_counts,
    check_keys,
    check_pairs,
    check_resolution,
    check_split,
    check_version,
    fail,
    is_int,
    nearest,
    parse,
    positions,
    read_concat,
    read_file,
    read_input_shape,
    read_split,
    show,
)

if TYPE_CHECKING:
    import os

__all__ = ["Concat", "Pair", "Plan", "Setting", "Split"]


@dataclass(frozen=True, slots=True)
class Setting:
    """Where channels are cut and what later stages read; None inherits from the next wider rule.

    Lists are taken for tuples, and pairs are kept in ascending order, so that two settings that
    mean the same are equal.

    Args:
        split: the cut points, in groups, strictly increasing, one fewer than there are stages.
        concat: the pairs (later, earlier) of stages, or "all", or "none".
    """

    split: Split | None = None
    concat: Concat | None = None

    def __post_init__(self) -> None:
        if self.split is not None:
            object.__setattr__(self, "split", read_split(self.split, "split"))
        if self.concat is not None:
            object.__setattr__(self, "concat", read_concat(self.concat, "concat"))

    def __str__(self) -> str:
        parts = []
        if self.split is not None:
            parts.append(f"split {list(self.split)}")
        if self.concat is not None:
            parts.append(f"concat {self.to_dict()['concat']!s}")
        return ", ".join(parts) or "inherits all"

    def to_dict(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self.split is not None:
            result["split"] = list(self.split)
        if self.concat is not None:
            result["concat"] = (
                self.concat
                if isinstance(self.concat, str)
                else [list(pair) for pair in self.concat]
            )
        return result


class _Settings(Mapping[str, Setting]):
    """A mapping that cannot change, whose order counts, and that can be hashed and copied."""

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[tuple[str, Setting]] = ()) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Setting:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Settings):
            return tuple(self._items.items()) == tuple(other._items.items())
        return self._items == other

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to make of a network: its stages, and per layer who owns and who reads which channels.

    Validated when it is made, whichever way; `check_against` holds it against a model.

    Args:
        stages: how many stages, at least one.
        groups: in how many groups channels are counted; at least one per stage.
        default: the setting for all layers that no other names; both its parts are required.
        resolutions: settings by resolution, "32x32" or "49"; kept from large to small.
        layers: settings by pattern of module paths (``fnmatch``); a later pattern wins.
        order: channels are dealt out by position ("index") or heaviest first ("l1").
        input_shape: the shape of one input, without the batch, as in (3, 32, 32).
        final: the last stage gets the remaining channels ("cut"), or is the untouched network,
            run whole, whose answer is exactly the original's ("original").
        source: what to call this plan in messages, such as its file's name. Not compared.

    Raises:
        PlanError: naming the place, the value, the rule and the remedy.

    Example:
        >>> plan = Plan(3, 8, Setting((4, 6), "all"))
        >>> plan.split_for("32x32", ["conv1"])
        (4, 6)
    """

    stages: int
    groups: int
    default: Setting
    resolutions: Mapping[str, Setting] = field(default_factory=_Settings)
    layers: Mapping[str, Setting] = field(default_factory=_Settings)
    order: Literal["index", "l1"] = "index"
    input_shape: tuple[int, ...] | None = None
    final: Literal["cut", "original"] = "cut"
    source: str = field(default="plan", compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        check_counts(self.stages, self.groups, f"{self.source}: ")
        object.__setattr__(self, "stages", int(self.stages))
        object.__setattr__(self, "groups", int(self.groups))
        check_choice(self.order, ("index", "l1"), f"{self.source}: order")
        check_choice(self.final, ("cut", "original"), f"{self.source}: final")
        if self.final == "original" and self.stages < 2:
            fail(
                f"{self.source}: final",
                '"original" needs a thin stage before the untouched network; set stages to 2 or '
                'more, or final to "cut"',
            )
        if self.input_shape is not None:
            shape = read_input_shape(self.input_shape, f"{self.source}: input_shape")
            object.__setattr__(self, "input_shape", shape)
        self._check_default()
        resolutions = _freeze(self.resolutions, f"{self.source}: resolutions")
        for key in resolutions:
            check_resolution(key, f"{self.source}: resolutions")
        ordered = sorted(resolutions.items(), key=lambda item: positions(item[0]), reverse=True)
        object.__setattr__(self, "resolutions", _Settings(ordered))
        object.__setattr__(self, "layers", _freeze(self.layers, f"{self.source}: layers"))
        for place, setting in self._places():
            self._check_setting(setting, place)

    def _check_default(self) -> None:
        place = f"{self.source}: default"
        if not isinstance(self.default, Setting):
            fail(place, f"{show(self.default)} is no Setting; give Setting(split=..., concat=...)")
        for key in SETTING_KEYS:
            if getattr(self.default, key) is None:
                fail(place, f'"{key}" is missing; give it, e.g. {EXAMPLES[key]}')

    def _places(self) -> Iterator[tuple[str, Setting]]:
        yield f"{self.source}: default", self.default
        for key, setting in self.resolutions.items():
            yield f"{self.source}: resolutions.{key}", setting
        for key, setting in self.layers.items():
            yield f"{self.source}: layers[{as_json(key)}]", setting

    def _check_setting(self, setting: Setting, place: str) -> None:
        if setting.split is None and setting.concat is None:
            fail(place, "says nothing; give split, concat or both, or leave the entry out")
        if setting.split is not None:
            check_split(setting.split, self.stages, self.groups, f"{place}.split")
        if setting.concat is not None and not isinstance(setting.concat, str):
            check_pairs(setting.concat, self.stages, self.final, f"{place}.concat")

    @classmethod
    def uniform(
        cls,
        stages: int,
        groups: int = 8,
        split: Sequence[int] | None = None,
        concat: Concat = "none",
    ) -> Plan:
        """Give every layer the same setting; without ``split`` the stages are equally wide."""
        if split is None and is_int(stages) and is_int(groups) and 1 <= stages <= groups:
            split = [groups * stage // stages for stage in range(1, stages)]
        return cls(stages, groups, Setting(tuple(split or ()), concat))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "plan") -> Plan:
        """Build a plan from what its JSON holds; ``source`` names it in messages."""
        check_version(data, source)
        check_keys(data, PLAN_KEYS, ("stages", "groups", "default"), source, f"{source}: ")
        default = _read_setting(data["default"], f"{source}: default")
        for key in SETTING_KEYS:
            if getattr(default, key) is None:
                fail(f"{source}: default", f'"{key}" is missing; give it, e.g. {EXAMPLES[key]}')
        rest = {key: data[key] for key in ("order", "final") if key in data}
        if "input_shape" in data:
            rest["input_shape"] = read_input_shape(data["input_shape"], f"{source}: input_shape")
        if "resolutions" in data:
            rest["resolutions"] = _read_resolutions(data["resolutions"], f"{source}: resolutions")
        if "layers" in data:
            rest["layers"] = _read_layers(data["layers"], f"{source}: layers")
        return cls(data["stages"], data["groups"], default, **rest, source=source)

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Build a plan from JSON text; ``source`` names it in messages."""
        return cls.from_dict(parse(text, source), source)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a JSON file."""
        return cls.from_json(read_file(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON; ``from_dict`` gives the plan back."""
        result: dict[str, Any] = {
            "version": PLAN_VERSION,
            "stages": self.stages,
            "groups": self.groups,
            "default": self.default.to_dict(),
        }
        for key in ("resolutions", "layers"):
            if settings := getattr(self, key):
                result[key] = {name: setting.to_dict() for name, setting in settings.items()}
        result["order"] = self.order
        if self.input_shape is not None:
            result["input_shape"] = list(self.input_shape)
        result["final"] = self.final
        return result

    def to_json(self) -> str:
        """The plan as JSON text, a line for each setting."""
        lines = []
        for key, value in self.to_dict().items():
            if key in ("resolutions", "layers"):
                entries = [f"    {as_json(name)}: {as_json(item)}" for name, item in value.items()]
                lines.append(f"  {as_json(key)}: {{\n" + ",\n".join(entries) + "\n  }")
            else:
                lines.append(f"  {as_json(key)}: {as_json(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, whole or not at all."""
        content = self.to_json().encode()
        atomic_write(path, lambda file: file.write(content))

    def __str__(self) -> str:
        facts = [f"{self.stages} stages" if self.stages > 1 else "1 stage"]
        facts += [f"{self.groups} groups", f"order {self.order}", f"final {self.final}"]
        if self.input_shape is not None:
            facts.append(f"input {'x'.join(map(str, self.input_shape))}")
        rows = [("default", self.default), *self.resolutions.items(), *self.layers.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join([", ".join(facts), *(f"  {n:<{width}}  {setting}" for n, setting in rows)])

    def split_for(self, resolution: str, layers: Iterable[str]) -> Split:
        """The cut points of a family of channels.

        Args:
            resolution: the family's resolution.
            layers: the module paths of the layers that write it.
        """
        paths = tuple(layers)
        for setting in self._settings_for(resolution, paths):
            if setting.split is not None:
                return setting.split
        raise AssertionError("the default has a split")

    def reads(self, resolution: str, layer: str) -> frozenset[Pair]:
        """The pairs (later, earlier) of stages, from 1, in which a layer reads earlier stages.

        With ``final="original"`` the last stage is a network of its own and in no pair.

        Args:
            resolution: the resolution of the layer's input.
            layer: the layer's module path.
        """
        for setting in self._settings_for(resolution, (layer,)):
            if setting.concat is not None:
                return self._pairs(setting.concat)
        raise AssertionError("the default has a concat")

    def check_against(self, resolutions: Sequence[str], layers: Sequence[str]) -> None:
        """Hold the plan against a model.

        Args:
            resolutions: the model's resolutions.
            layers: the module paths of the model's layers.

        Raises:
            PlanError: for a resolution that the model does not have, or a pattern that matches
                none of its layers.
        """
        for resolution in self.resolutions:
            if resolution not in resolutions:
                fail(
                    f"{self.source}: resolutions.{resolution}",
                    f"the model has no such resolution; it has {', '.join(resolutions) or 'none'}",
                )
        for pattern in self.layers:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                fail(
                    f"{self.source}: layers[{as_json(pattern)}]",
                    "this pattern matches no layer of the model; " + nearest(pattern, layers),
                )

    def _settings_for(self, resolution: str, layers: Sequence[str]) -> Iterator[Setting]:
        """The settings that apply, the strongest first."""
        for pattern in reversed(tuple(self.layers)):
            if any(fnmatchcase(layer, pattern) for layer in layers):
                yield self.layers[pattern]
        if resolution in self.resolutions:
            yield self.resolutions[resolution]
        yield self.default

    def _pairs(self, concat: Concat) -> frozenset[Pair]:
        if concat == "none":
            return frozenset()
        if concat == "all":
            return _every_pair(self.stages - (self.final == "original"))
        return frozenset(concat)


@lru_cache(maxsize=8)
def _every_pair(stages: int) -> frozenset[Pair]:
    return frozenset((j, i) for j in range(2, stages + 1) for i in range(1, j))


def _freeze(settings: Mapping[str, Setting], place: str) -> _Settings:
    if not isinstance(settings, Mapping):
        fail(place, f"{show(settings)} is no mapping from names to settings; give a dict")
    for key, setting in settings.items():
        if not isinstance(key, str) or not key:
            fail(place, f"{show(key)} is no name; names are strings that are not empty")
        if not isinstance(setting, Setting):
            fail(
                f"{place}.{key}",
                f"{show(setting)} is no Setting; give Setting(split=..., concat=...)",
            )
    return _Settings(settings.items())


def _read_layers(data: Any, place: str) -> dict[str, Setting]:
    if not isinstance(data, Mapping):
        fail(
            place,
            f"{show(data)} is no object of settings by layer pattern; write one, e.g. "
            '{"layer1.*": {"concat": "all"}}',
        )
    return {key: _read_setting(value, f"{place}[{show(key)}]") for key, value in data.items()}


def _read_resolutions(data: Any, place: str) -> dict[str, Setting]:
    if not isinstance(data, Mapping):
        fail(
            place,
            f"{show(data)} is no object of settings by resolution; write one, e.g. "
            '{"32x32": {"concat": "all"}}',
        )
    for key in data:
        check_resolution(key, place)
    return {key: _read_setting(value, f"{place}.{key}") for key, value in data.items()}


def _read_setting(data: Any, place: str) -> Setting:
    check_keys(data, SETTING_KEYS, (), place, f"{place}.")
    split = read_split(data["split"], f"{place}.split") if "split" in data else None
    concat = read_concat(data["concat"], f"{place}.concat") if "concat" in data else None
    return Setting(split, concat)
