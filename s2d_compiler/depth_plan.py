"""The plan of exits along depth: after which of a network's values they stand.

A depth plan is a small JSON object beside the plan that cuts channels (``plan.py``)::

    {
      "version": 1,
      "exits": ["layer1", "layer2.1", 0.75],
      "head": "linear",
      "input_shape": [3, 224, 224]
    }

An exit is a module path, whose output its head reads, or a fraction of depth: the share of the
static network's MACs that has run by then. ``"preset": "ddi"`` chooses the exits itself, at a
quarter and three quarters of every resolution. The last stage is the rest of the network, whose
exit is the original's own. ``depth-plan.schema.json`` beside this file says the same as JSON
Schema.

Sources: S2DNAS, section 4 (Naive: global average pooling and a fully-connected layer);
BranchyNet (convolutions before it); DDI, section 3.2 (the preset).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from s2d_compiler.output import atomic_write
from s2d_compiler.plan_rules import (
    PLAN_VERSION,
    as_json,
    check_choice,
    check_keys,
    check_version,
    fail,
    is_int,
    is_list,
    parse,
    read_file,
    read_input_shape,
    show,
)

if TYPE_CHECKING:
    import os

__all__ = ["HEADS", "Depth", "DepthPlan"]

#: A module path, or a fraction of depth.
Depth: TypeAlias = str | float

#: Kinds of heads, and how many convolutions each has before its linear layer.
HEADS: Mapping[str, int] = {"linear": 0, "branchynet": 1, "branchynet-2": 2, "branchynet-3": 3}
PRESETS = ("ddi",)
#: Channels of a head's convolutions, where the plan does not say.
WIDTH = 128
DEPTH_KEYS = (
    "exits", "head", "width", "preset", "seed", "input_shape", "version", "$schema",
)  # fmt: skip
_MAX_EXITS = 256
_MAX_SEED = 2**31


@dataclass(frozen=True, slots=True)
class DepthPlan:
    """Where along a network's depth exits stand, and what their heads are.

    Validated when it is made; whether the places exist shows when it meets a model.

    Args:
        exits: module paths and fractions of depth, in the order in which they are reached.
            Empty with a preset, which then chooses them when it meets a model.
        head: the kind of every exit's head, or one kind per exit: "linear", "branchynet",
            "branchynet-2" or "branchynet-3". With a preset that chooses them, None.
        width: channels of a head's convolutions; None for those of what it reads, 128 at most.
        preset: "ddi", or None.
        seed: of the random weights that heads start with.
        input_shape: the shape of one input, without the batch, as in (3, 32, 32).
        source: what to call this plan in messages, such as its file's name. Not compared.

    Raises:
        PlanError: naming the place, the value, the rule and the remedy.

    Example:
        >>> DepthPlan(("layer1", 0.5)).stages
        3
    """

    exits: tuple[Depth, ...] = ()
    head: str | tuple[str, ...] | None = None
    width: int | None = None
    preset: Literal["ddi"] | None = None
    seed: int = 0
    input_shape: tuple[int, ...] | None = None
    source: str = field(default="plan", compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        exits = _read_exits(self.exits, f"{self.source}: exits")
        object.__setattr__(self, "exits", exits)
        if self.preset is not None:
            check_choice(self.preset, PRESETS, f"{self.source}: preset")
        if not exits and self.preset is None:
            fail(
                f"{self.source}: exits",
                'there are none; name module paths or fractions of depth, e.g. ["layer2", 0.5], or '
                'say "preset": "ddi"',
            )
        if self.head is None and self.preset is None:
            object.__setattr__(self, "head", "linear")
        if self.head is not None:
            object.__setattr__(self, "head", self._read_head())
        if self.width is not None and (not is_int(self.width) or not 1 <= self.width <= 65536):
            fail(
                f"{self.source}: width",
                f"{show(self.width)} is no number of channels from 1 to 65536; give one, e.g. 64",
            )
        if not is_int(self.seed) or not 0 <= self.seed < _MAX_SEED:
            fail(
                f"{self.source}: seed",
                f"{show(self.seed)} is no whole number from 0 to {_MAX_SEED - 1}; give one, e.g. 0",
            )
        if self.input_shape is not None:
            shape = read_input_shape(self.input_shape, f"{self.source}: input_shape")
            object.__setattr__(self, "input_shape", shape)

    def _read_head(self) -> str | tuple[str, ...]:
        place = f"{self.source}: head"
        if isinstance(self.head, str) or not is_list(self.head):
            check_choice(self.head, tuple(HEADS), place, " or a list of these, one per exit")
            assert isinstance(self.head, str)
            return self.head
        assert self.head is not None
        for number, kind in enumerate(self.head):
            check_choice(kind, tuple(HEADS), f"{place}[{number}]")
        if len(self.head) != len(self.exits):
            fail(
                place,
                f"{len(self.head)} kinds for {len(self.exits)} exits; give one per exit, or one "
                "word for all",
            )
        return tuple(self.head)

    @property
    def stages(self) -> int:
        """Number of stages: the exits and the rest of the network."""
        return len(self.exits) + 1

    @property
    def heads(self) -> tuple[str, ...]:
        """The kind of every exit's head."""
        kind = self.head or "linear"
        return (kind,) * len(self.exits) if isinstance(kind, str) else kind

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "plan") -> DepthPlan:
        """Build a plan from what its JSON holds; ``source`` names it in messages."""
        check_version(data, source)
        required = () if isinstance(data, Mapping) and "preset" in data else ("exits",)
        check_keys(data, DEPTH_KEYS, required, source, f"{source}: ")
        given = {key: data[key] for key in DEPTH_KEYS[:-2] if key in data}
        for key in ("head", "width", "preset", "input_shape"):
            if key in given and given[key] is None:
                fail(f"{source}: {key}", "null says nothing; give a value or leave the key out")
        if isinstance(given.get("head"), list):
            given["head"] = tuple(given["head"])
        return cls(**given, source=source)

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> DepthPlan:
        """Build a plan from JSON text; ``source`` names it in messages."""
        return cls.from_dict(parse(text, source), source)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DepthPlan:
        """Read a plan from a JSON file."""
        return cls.from_json(read_file(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, ready for JSON; ``from_dict`` gives the plan back."""
        result: dict[str, Any] = {"version": PLAN_VERSION}
        if self.exits:
            result["exits"] = list(self.exits)
        if self.head is not None:
            result["head"] = self.head if isinstance(self.head, str) else list(self.head)
        for key in ("width", "preset"):
            if getattr(self, key) is not None:
                result[key] = getattr(self, key)
        result["seed"] = self.seed
        if self.input_shape is not None:
            result["input_shape"] = list(self.input_shape)
        return result

    def to_json(self) -> str:
        """The plan as JSON text."""
        lines = [f"  {as_json(key)}: {as_json(value)}" for key, value in self.to_dict().items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, whole or not at all."""
        content = self.to_json().encode()
        atomic_write(path, lambda file: file.write(content))

    def with_exits(self, exits: Sequence[Depth], head: str | tuple[str, ...]) -> DepthPlan:
        """The same plan with the exits that its preset chose."""
        return replace(self, exits=tuple(exits), head=head, source=self.source)

    def __str__(self) -> str:
        facts = ["1 exit" if len(self.exits) == 1 else f"{len(self.exits)} exits along depth"]
        if not self.exits:
            facts = ["exits along depth"]
        facts += [f"preset {self.preset}"] if self.preset is not None else []
        facts += [f"seed {self.seed}"]
        if self.input_shape is not None:
            facts.append(f"input {'x'.join(map(str, self.input_shape))}")
        pairs = zip(self.exits, self.heads, strict=True)
        rows = [f"  after {depth_text(exit_)}: {head}" for exit_, head in pairs]
        return "\n".join([", ".join(facts), *rows])


def depth_text(exit_: Depth) -> str:
    """A module path, or a fraction with four digits."""
    return exit_ if isinstance(exit_, str) else f"{exit_:.4g}"


def _read_exits(value: Any, place: str) -> tuple[Depth, ...]:
    if not is_list(value):
        fail(
            place,
            f"{show(value)} is no list; write module paths and fractions of depth, e.g. "
            '["layer2", 0.5]',
        )
    if len(value) > _MAX_EXITS:
        fail(place, f"{len(value)} exits are too many; give {_MAX_EXITS} at most")
    found: list[Depth] = []
    for number, item in enumerate(value):
        here = f"{place}[{number}]"
        if isinstance(item, str):
            if not item.strip():
                fail(here, "an empty path names no module; write one, e.g. layer2.1")
        elif isinstance(item, bool) or not isinstance(item, int | float):
            fail(
                here,
                f"{show(item)} is neither a module path nor a fraction of depth; write e.g. "
                '"layer2.1" or 0.5',
            )
        elif not 0 < item < 1:
            fail(
                here,
                f"{show(item)} is no fraction of depth: these lie between 0 and 1, both left out; "
                "write e.g. 0.5",
            )
        if item in found:
            fail(here, f"{show(item)} stands here twice; drop one")
        found.append(item if isinstance(item, str) else float(item))
    fractions = [item for item in found if isinstance(item, float)]
    if fractions != sorted(fractions):
        fail(place, f"the fractions {show(fractions)} go back; write exits in the order of depth")
    return tuple(found)
