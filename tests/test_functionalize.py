"""Graphs without writes compute what the eager model, with its writes, computes.

Every model writes in place somewhere; the captured program must agree with it in float64, at
another batch size than the one it was captured at, and must leave its input alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d_compiler.errors import CaptureError
from s2d_compiler.functionalize import written_argument
from s2d_compiler.tracing import capture

Body = Callable[[Tensor, Tensor], Tensor]


class Model(nn.Module):
    """A convolution, and what ``body`` makes of the input and its result ``(N, 8, 6, 6)``."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.conv(x))


CASES: dict[str, Body] = {}


def case(body: Body) -> Body:
    CASES[body.__name__] = body
    return body


# -- writes through views ------------------------------------------------------------------


@case
def slice_of_channels(x: Tensor, y: Tensor) -> Tensor:
    y[:, :2] += 1
    return y


@case
def every_second_channel(x: Tensor, y: Tensor) -> Tensor:
    y[:, ::2].mul_(2)
    return y


@case
def view_of_the_whole(x: Tensor, y: Tensor) -> Tensor:
    v = y.view(y.shape[0], 2, 4, 6, 6)
    v.add_(1)
    return y


@case
def whole_read_through_a_view(x: Tensor, y: Tensor) -> Tensor:
    v = y.view(y.shape[0], 2, 4, 6, 6)
    y.add_(1)
    return v


@case
def view_of_a_view_taken_before(x: Tensor, y: Tensor) -> Tensor:
    v = y[:, :2]  # two slices: the outer one has no reader after the write but the inner
    z = v * 3
    y.add_(1)
    return z + v


@case
def expanded_view_taken_before(x: Tensor, y: Tensor) -> Tensor:
    g = y[:, :1].expand_as(y)
    y.add_(1)
    return y * g


@case
def overlapping_views(x: Tensor, y: Tensor) -> Tensor:
    a, b = y[:, :4], y[:, 2:6]
    a.add_(1)
    c = b * 2
    b.mul_(3)
    return a + b + c + y.sum((1, 2, 3), keepdim=True)


@case
def one_view_written_twice(x: Tensor, y: Tensor) -> Tensor:
    a = y[:, :4]
    a.add_(1)
    a.relu_()
    return a + y[:, :4] + y[:, 4:]


@case
def slices_of_slices(x: Tensor, y: Tensor) -> Tensor:
    y[:, 2:6][:, 1:3][:, :, ::2] += 1
    return y


@case
def selected_channels(x: Tensor, y: Tensor) -> Tensor:
    y[:, 3] = x[:, 0]
    y.select(2, -1).zero_()
    return y


@case
def transposed(x: Tensor, y: Tensor) -> Tensor:
    y.transpose(1, 2)[:, 0] = 0
    y.swapaxes(1, 3)[:, 1:3] *= 2
    y.mT[..., 0] = 1
    return y


@case
def permuted(x: Tensor, y: Tensor) -> Tensor:
    y.permute(0, 2, -1, 1)[..., :2].mul_(3)
    y.movedim(1, -1)[..., 0].add_(1)
    return y


@case
def narrowed(x: Tensor, y: Tensor) -> Tensor:
    y.narrow(1, 2, 3).mul_(2)
    return y


@case
def diagonal(x: Tensor, y: Tensor) -> Tensor:
    y.diagonal(dim1=2, dim2=3).zero_()
    return y


@case
def unsqueezed_and_unflattened(x: Tensor, y: Tensor) -> Tensor:
    y.unsqueeze(1).add_(1)
    y.unflatten(1, (2, 4))[:, 0].mul_(2)
    return y


@case
def recurrence_over_channels(x: Tensor, y: Tensor) -> Tensor:
    for i in range(4):
        y[:, i] = y[:, i] * 2 + y[:, i + 1]
    return y


@case
def view_read_before_a_new_value(x: Tensor, y: Tensor) -> Tensor:
    z = y[:, 2:4]
    y = y * 2  # not the memory of z
    z.add_(1)
    return y + z.sum((1, 2, 3), keepdim=True)


# -- pieces --------------------------------------------------------------------------------


@case
def pieces_of_chunk_then_whole(x: Tensor, y: Tensor) -> Tensor:
    a, b = y.chunk(2, -3)
    a.add_(1)
    b.relu_()
    return y


@case
def pieces_of_split_then_whole(x: Tensor, y: Tensor) -> Tensor:
    a, b = y.split([3, 5], 1)
    a.add_(1)
    b.relu_()
    y.split(3, dim=1)[-1].mul_(3)
    return y * 2


@case
def piece_of_unbind_then_whole(x: Tensor, y: Tensor) -> Tensor:
    y.unbind(1)[3].add_(1)
    return y * 2


@case
def whole_then_pieces(x: Tensor, y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    y.add_(1)
    return a * b


@case
def piece_of_a_piece(x: Tensor, y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    c, d = a.chunk(2, 1)
    d.add_(1)
    b.mul_(2)
    return y * torch.cat([c, d, b], 1)


@case
def list_of_pieces(x: Tensor, y: Tensor) -> Tensor:
    parts = list(y.chunk(4, 1))
    parts[1] = parts[1] + parts[0]
    parts[2].add_(parts[1])
    return torch.cat(parts, 1)


# -- what is memory of its own and what is not ---------------------------------------------


@case
def after_dropout(x: Tensor, y: Tensor) -> Tensor:
    d = F.dropout(y, 0.5, training=False)  # the very tensor in evaluation mode
    d.relu_()
    return y + d


@case
def contiguous_of_contiguous(x: Tensor, y: Tensor) -> Tensor:
    y.contiguous().add_(1)
    return y


@case
def contiguous_of_transposed(x: Tensor, y: Tensor) -> Tensor:
    y.transpose(1, 2).contiguous().add_(1)  # a copy: the write is lost
    return y


@case
def reshape_that_copies(x: Tensor, y: Tensor) -> Tensor:
    y = y.transpose(1, 2)
    y.reshape(y.shape[0], -1).add_(1)
    return y


@case
def reshape_of_a_slice_that_does_not_copy(x: Tensor, y: Tensor) -> Tensor:
    y[:, :4].reshape(y.shape[0], 2, 2, 6, 6).add_(1)
    return y


@case
def flatten_of_a_slice(x: Tensor, y: Tensor) -> Tensor:
    z = y[:, :4]
    z.flatten(2).add_(1)
    z.flatten(1).mul_(2)
    return y


@case
def same_type_is_no_copy(x: Tensor, y: Tensor) -> Tensor:
    y.to(torch.float64).add_(1)
    y.to(torch.float32).add_(1)
    return y


@case
def clone_is_a_copy(x: Tensor, y: Tensor) -> Tensor:
    z = y.clone()
    y.mul_(2)
    z.add_(1)
    return y - z


@case
def value_read_before_the_write(x: Tensor, y: Tensor) -> Tensor:
    z = y + 0
    y.mul_(2)
    return y + z


# -- buffers that are filled ---------------------------------------------------------------


@case
def zeros_filled_with_features(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 12, 6, 6, dtype=x.dtype)
    out[:, :8] = y
    out[:, 8:] = x
    return out


@case
def empty_filled_with_features(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], 12, 6, 6)
    out[:, :8] = y
    out[:, 8:] = x
    return out


@case
def zeros_like_filled(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :4] = x
    out[:, 4:] = 1
    return out * y


@case
def broadcast_into_a_slice(x: Tensor, y: Tensor) -> Tensor:
    y[:, :4] = x[:, :1]
    y[:, 4:6] = x[:, 0, 0, 0, None, None, None]
    y[:, 6] = y.mean()
    return y


@case
def filled_from_another_type(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 8, 6, 6)
    out.copy_(y)
    y[:, 0] = torch.tensor(3)
    y[:, 1] = x.float().mean()
    return out.double() + y


# -- constants -----------------------------------------------------------------------------


@case
def constant_mask(x: Tensor, y: Tensor) -> Tensor:
    mask = torch.zeros(1, 8, 6, 6, dtype=x.dtype)
    mask[:, 2:5] = 1
    mask[:, :, ::2] = 0.5
    return y * mask


@case
def constant_written_with_data(x: Tensor, y: Tensor) -> Tensor:
    mask = torch.zeros(1, 8, 6, 6, dtype=x.dtype)
    mask[:, 2:5] = 1
    before, view = mask * 2, mask[:, 1:3]
    mask[:] = x.mean()
    mask[:, 0] = 7
    return y * mask + before + view.sum()


@case
def a_constant_per_turn_of_a_loop(x: Tensor, y: Tensor) -> Tensor:
    for i in range(6):
        mask = torch.zeros(1, 8, 1, 1, dtype=x.dtype)
        mask[:, i] = i
        y = y + mask
        mask[:] = x.mean()
        y = y * mask
    return y


# -- operators -----------------------------------------------------------------------------


@case
def activations(x: Tensor, y: Tensor) -> Tensor:
    y.clamp_(-1, 1)
    y.clamp_min_(-0.5)
    z = F.hardtanh_(y.clone()) + F.elu_(y.clone()) + F.leaky_relu_(y.clone())
    z = z + F.silu(y.clone(), inplace=True) + F.hardswish(y.clone(), inplace=True)
    return z.sigmoid_() + F.relu6(y, inplace=True)


@case
def arithmetic(x: Tensor, y: Tensor) -> Tensor:
    y += y
    y *= x[:, :1]
    y.abs_().add_(0.1).pow_(0.5).neg_().exp_()
    y.pow_(y.clone())
    y.addcmul_(y, y, value=0.5)
    y.lerp_(y * 2, 0.3)
    y.sub_(1, alpha=2).div_(3)
    return y


@case
def type_of_the_memory_is_kept(x: Tensor, y: Tensor) -> Tensor:
    z = y.float()
    z.mul_(x.mean() * torch.ones(6, dtype=torch.float64))  # float64 written to float32
    return z * 2


@case
def indexed(x: Tensor, y: Tensor) -> Tensor:
    y[:, [0, 3]] = 1.0
    y[y < 0] = 0
    y.masked_fill_(y > 0.5, 0.1)
    return y


@pytest.mark.parametrize("name", CASES)
def test_captured_program_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    model = Model(CASES[name]).double().eval()
    program = capture(model, (torch.randn(2, 4, 6, 6, dtype=torch.float64),))
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    given = x.clone()
    with torch.no_grad():
        (found,) = program.graph_module(given)
        wanted = model(x)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not [n for n in program.nodes if written_argument(n) is not None]
    torch.testing.assert_close(given, x, rtol=0, atol=0)
    assert not program.notes


def test_a_write_into_the_input_is_not_kept() -> None:
    model = Model(lambda x, y: x).double().eval()
    model.body = lambda x, y: model.conv(x.mul_(2)) + y
    program = capture(model, (torch.randn(2, 4, 6, 6, dtype=torch.float64),))
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    given = x.clone()
    with torch.no_grad():
        (found,) = program.graph_module(given)
        wanted = model(x.clone())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(given, x)
    (note,) = program.notes
    assert "the write is not kept" in note


def _strided(x: Tensor, y: Tensor) -> Tensor:
    v = y.as_strided((2, 8), (288, 36))
    v.add_(1)
    return y


def test_a_write_that_cannot_be_followed_is_refused() -> None:
    model = Model(_strided).double().eval()
    with pytest.raises(CaptureError, match="Write to a copy instead") as caught:
        capture(model, (torch.randn(2, 4, 6, 6, dtype=torch.float64),))
    assert "as_strided" in str(caught.value)
