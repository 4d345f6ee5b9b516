"""Parts of values in memory: frames, boxes, packed parts, and how they are taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2d_compiler.layout import (
    Frame,
    box_positions,
    channel_dimensions,
    coordinates,
    layout,
    packing,
    take,
)


@st.composite
def frames(draw: st.DrawFn, least: int = 0) -> Frame:
    """Frames of rank 1 to 5 with at least ``least`` channel dimensions."""
    rank = draw(st.integers(max(1, least), 5))
    sizes = [draw(st.sampled_from([1, 1, 2, 3, 4])) for _ in range(rank)]
    for d in draw(st.permutations(range(rank)))[:least]:
        sizes[d] = max(2, sizes[d])
    return tuple(sizes)


@st.composite
def chosen(draw: st.DrawFn, least: int = 1) -> tuple[Frame, np.ndarray]:
    """A frame and some of its positions, in any order."""
    frame = draw(frames(least))
    count = int(np.prod(frame))
    positions = draw(st.permutations(range(count)))[: draw(st.integers(1, count))]
    return frame, np.asarray(positions, dtype=np.int64)


def full_value(frame: Frame) -> torch.Tensor:
    """A value with a batch of positions in every dimension without channels."""
    shape = [size if size > 1 else 2 for size in frame]
    return torch.arange(int(np.prod(shape))).reshape(shape)


def wanted_rows(value: torch.Tensor, frame: Frame, positions: np.ndarray) -> torch.Tensor:
    """(positions, everything else): the slice of a value at every position."""
    rows = []
    for position in positions.tolist():
        index = tuple(
            int(c) if size > 1 else slice(None)
            for c, size in zip(np.unravel_index(position, frame), frame, strict=True)
        )
        rows.append(value[index].reshape(-1))
    return torch.stack(rows)


# -- units ---------------------------------------------------------------------------------


def test_one_channel_dimension_is_always_a_box() -> None:
    where = layout((1, 8, 1, 1), np.asarray([5, 0, 3]))
    assert where.is_box
    assert where.lists == ((5, 0, 3),)
    assert where.dimensions == (1,)
    assert where.shape((2, 8, 6, 6)) == (2, 3, 6, 6)
    # There is no difference between the two layouts then.
    assert layout((1, 8, 1, 1), np.asarray([5, 0, 3]), packed=True) == where


def test_no_channel_dimension() -> None:
    where = layout((1, 1, 1), np.zeros(1, dtype=np.int64))
    assert where.is_box
    assert where.dimensions == ()
    assert where.shape((2, 7, 3)) == (2, 7, 3)
    value = torch.randn(2, 7, 3)
    assert torch.equal(take(value, where), value)


def test_a_product_of_lists_is_a_box_and_anything_else_is_packed() -> None:
    frame = (1, 2, 4)
    box = layout(frame, np.asarray([1, 3, 5, 7]))
    assert box.lists == ((0, 1), (1, 3))
    assert box.shape((5, 2, 4)) == (5, 2, 2)
    other = layout(frame, np.asarray([1, 3, 5]))
    assert other.lists is None
    assert other.shape((5, 2, 4)) == (5, 3, 1)
    unordered = layout(frame, np.asarray([1, 5, 3, 7]))
    assert unordered.lists is None, "a product in another order is no box"
    forced = layout(frame, np.asarray([1, 3, 5, 7]), packed=True)
    assert forced.lists is None


def test_packing_brings_channels_together() -> None:
    # (N, heads, tokens, width): heads and width carry channels.
    order, merged, final = packing((2, 3, 5, 4), (1, 3))
    assert order == [0, 1, 3, 2]
    assert merged == [2, 12, 5]
    assert final == [2, 12, 5, 1]


def test_taking_positions_of_two_dimensions() -> None:
    value = torch.arange(24).reshape(2, 3, 4)
    where = layout((1, 3, 4), np.asarray([0, 5, 11]))
    assert take(value, where).tolist() == [[[0], [5], [11]], [[12], [17], [23]]]


@pytest.mark.parametrize(
    ("frame", "wanted"), [((), ()), ((1, 1), ()), ((4,), (0,)), ((1, 3, 1, 2), (1, 3))]
)
def test_channel_dimensions(frame: Frame, wanted: tuple[int, ...]) -> None:
    assert channel_dimensions(frame) == wanted


def test_coordinates_of_a_value_without_dimensions() -> None:
    assert coordinates((), np.zeros(1, dtype=np.int64)) == ()


# -- properties ----------------------------------------------------------------------------


@given(chosen())
def test_taking_a_part_takes_its_positions_in_order(case: tuple[Frame, np.ndarray]) -> None:
    frame, positions = case
    value = full_value(frame)
    wanted = wanted_rows(value, frame, positions)
    for packed in (False, True):
        where = layout(frame, positions, packed=packed)
        part = take(value, where)
        assert tuple(part.shape) == where.shape(tuple(value.shape))
        # The positions run along the channel dimensions, in row-major order.
        dimensions = where.dimensions if where.is_box else where.dimensions[:1]
        others = [d for d in range(part.dim()) if d not in dimensions]
        rows = part.permute(*dimensions, *others).reshape(len(positions), -1)
        assert torch.equal(rows, wanted)


@given(chosen(least=2))
def test_a_box_packs_into_its_packed_form(case: tuple[Frame, np.ndarray]) -> None:
    frame, positions = case
    where = layout(frame, positions)
    if not where.is_box:
        return
    value = full_value(frame)
    part = take(value, where)
    order, merged, final = packing(tuple(part.shape), where.dimensions)
    packed = part.permute(order).reshape(merged).reshape(final)
    assert torch.equal(packed, take(value, layout(frame, positions, packed=True)))
    inverse = [order.index(d) for d in range(part.dim())]
    back = packed.reshape([part.shape[d] for d in order]).permute(inverse)
    assert torch.equal(back, part)


@given(st.data())
def test_every_product_of_lists_is_found_to_be_a_box(data: st.DataObject) -> None:
    frame = data.draw(frames(least=1))
    lists = tuple(
        tuple(data.draw(st.permutations(range(frame[d]))))[: data.draw(st.integers(1, frame[d]))]
        for d in channel_dimensions(frame)
    )
    positions = box_positions(frame, lists)
    where = layout(frame, positions)
    assert where.lists == lists
    assert where.positions == tuple(positions.tolist())
    assert len(set(where.positions)) == len(where.positions)


@given(chosen())
def test_coordinates_name_the_positions(case: tuple[Frame, np.ndarray]) -> None:
    frame, positions = case
    coords = coordinates(frame, positions)
    assert len(coords) == len(frame)
    assert np.array_equal(np.ravel_multi_index(coords, frame), positions)
