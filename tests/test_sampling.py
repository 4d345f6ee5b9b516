"""Movement operators followed at a smaller size than their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from s2d_compiler import transform
from s2d_compiler.rules import movement
from s2d_compiler.rules.sampling import Sample, sample_of
from s2d_compiler.tracing import capture

PLAN = {"stages": 2, "groups": 4, "default": {"split": [2], "concat": "all"}, "order": "l1"}


class Moving(nn.Module):
    """Convolutions before and after something that moves elements."""

    def __init__(self, moves: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.moves = moves
        self.last = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.moves(self.first(x)).relu())
        return self.head(y.mean((2, 3)))


def windows(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1).roll((1, 2), (1, 2)).view(n, h // 4, 4, w // 4, 4, c)
    y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return y.permute(0, 3, 1, 2)


def heads(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    y = x.flatten(2).transpose(1, 2).reshape(n, h * w, 4, c // 4).permute(2, 0, 1, 3)
    return y.permute(1, 2, 0, 3).reshape(n, h, w, c).permute(0, 3, 1, 2)


def shuffle(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def other_way_round(x: torch.Tensor) -> torch.Tensor:
    """A permutation that one position per dimension could not tell from a reshape."""
    n, c, h, w = x.shape
    return x.permute(0, 1, 3, 2).reshape(n, c, w * h).view(n, c, h, w)


def cropped(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, 2:6].flip(3).unsqueeze(1).squeeze(1).narrow(3, 0, 4)


MOVES = (windows, heads, shuffle, other_way_round, cropped)


@pytest.mark.parametrize("moves", MOVES, ids=lambda f: str(f.__name__))
def test_the_same_network_as_with_proofs_at_full_size(
    moves: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Moving(moves).eval(), torch.randn(2, 3, 8, 8)

    def code() -> list[str]:
        dyn = transform(model, PLAN, (x,))
        return [s.code for s in dyn.modules() if isinstance(s, torch.fx.GraphModule)]

    small = code()
    smaller: list[Sample] = []

    def full(node: Any, source: Any, frame: Any, result: Any = None) -> Sample:
        shape = movement.shape_of(source)
        smaller.extend([s for s in [sample_of(node, source, frame, result)] if s.shape != shape])
        return Sample(shape)

    monkeypatch.setattr(movement, "sample_of", full)
    assert small == code()
    assert smaller


@pytest.mark.parametrize(
    ("shape", "result", "channels", "small", "small_result"),
    [
        ((6, 5, 8), (6, 5, 2, 4), 2, (2, 2, 8), (2, 2, 2, 4)),
        ((6, 8, 15), (6, 8, 3, 5), 1, (2, 8, 4), (2, 8, 2, 2)),
        ((6, 8, 15), (48, 15), 1, (6, 8, 2), (48, 2)),
        ((3, 1, 7, 8), (21, 8, 1), 3, (2, 1, 2, 8), (4, 8, 1)),
        ((4, 6, 8), (8, 3, 8), 2, (4, 6, 8), (8, 3, 8)),
    ],
    ids=["split channels", "split others", "merged with channels", "merged", "neither"],
)
def test_groups_of_dimensions_without_channels_shrink(
    shape: tuple[int, ...],
    result: tuple[int, ...],
    channels: int,
    small: tuple[int, ...],
    small_result: tuple[int, ...],
) -> None:
    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, *result[1:])

    program = capture(View(), [torch.zeros(shape)])
    node = next(n for n in program.nodes if n.op == "call_function" and n.target in movement.SIZED)
    source = next(n for n in program.nodes if n.op == "placeholder")
    for n, sizes in ((source, shape), (node, result)):
        n.meta["val"] = torch.empty(sizes, device="meta")
    frame = tuple(n if d == channels else 1 for d, n in enumerate(shape))
    assert sample_of(node, source, frame) == Sample(small, small_result)
