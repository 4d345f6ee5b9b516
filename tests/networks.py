"""Random small networks, convolutional and with attention, as ordinary eager modules.

``network(pick)`` builds one from a source of choices; ``seeded(seed)`` and the hypothesis
strategy ``networks()`` are two such sources. ``settle`` gives a network weights and
statistics with which its outputs depend on its input.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

T = TypeVar("T")


class Pick(Protocol):
    """A source of choices. The first option, and the low end, are the simplest."""

    def one(self, options: Sequence[T]) -> T: ...
    def number(self, low: int, high: int) -> int: ...


class SeededPick:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)


class DrawnPick:
    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw

    def one(self, options: Sequence[T]) -> T:
        chosen: T = self.draw(st.sampled_from(list(options)))
        return chosen

    def number(self, low: int, high: int) -> int:
        chosen: int = self.draw(st.integers(low, high))
        return chosen


# --------------------------------------------------------------------------------------
# Blocks

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "relu6_": lambda: nn.ReLU6(inplace=True),
    "silu": nn.SiLU,
    "hardswish_": lambda: nn.Hardswish(inplace=True),
    "gelu": nn.GELU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
    "prelu": nn.PReLU,
    "identity": nn.Identity,
}


class ConvBlock(nn.Sequential):
    """Convolution, batch norm if ``norm``, activation."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
        bias: bool = False,
        act: str = "relu",
    ) -> None:
        conv = nn.Conv2d(
            channels, out, kernel, stride, kernel // 2, groups=groups, bias=bias or not norm
        )
        layers: list[nn.Module] = [conv]
        if norm:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.PReLU(out) if act == "prelu per channel" else ACTIVATIONS[act]())
        super().__init__(*layers)


class Residual(nn.Module):
    """x + f(x), with a projection where the shape changes; pre-activation if ``scale``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: str, *, scale: int = 0) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, ACTIVATIONS[act]()
        self.scale = nn.Parameter(torch.zeros(1, scale, 1, 1)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.scale is not None:
            out = out * self.scale
        out += self.shortcut(x)
        result: Tensor = self.act(out)
        return result


class PaddedShortcut(nn.Module):
    """The parameter-free shortcut of CIFAR ResNets: subsample, pad channels with zeros."""

    def __init__(self, body: nn.Module, low: int, high: int, stride: int) -> None:
        super().__init__()
        self.body, self.low, self.high, self.stride = body, low, high, stride

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(self.body(x) + F.pad(short, (0, 0, 0, 0, self.low, self.high)))


class Dense(nn.Module):
    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for step in self.steps:
            features.append(step(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Branches(nn.Module):
    """Inception: parallel paths, concatenated."""

    def __init__(self, paths: Sequence[nn.Module]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(paths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([path(x) for path in self.paths], 1)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass by, then the halves are shuffled."""

    def __init__(self, branch: nn.Module, groups: int) -> None:
        super().__init__()
        self.branch, self.groups = branch, groups

    def forward(self, x: Tensor) -> Tensor:
        kept, used = x.chunk(2, dim=1)
        return shuffled(torch.cat((kept, self.branch(used)), dim=1), self.groups)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return shuffled(x, self.groups)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation by 1x1 convolutions or, if ``linear``, by linear layers."""

    def __init__(self, channels: int, middle: int, *, linear: bool, hard: bool) -> None:
        super().__init__()
        self.linear = linear
        if linear:
            self.down: nn.Module = nn.Linear(channels, middle)
            self.up: nn.Module = nn.Linear(middle, channels)
        else:
            self.down = nn.Conv2d(channels, middle, 1)
            self.up = nn.Conv2d(middle, channels, 1)
        self.gate: nn.Module = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            s = x.mean((2, 3))
            s = self.gate(self.up(F.relu(self.down(s))))
            out: Tensor = x * s.view(x.size(0), -1, 1, 1)
            return out
        s = F.adaptive_avg_pool2d(x, 1)
        result: Tensor = self.gate(self.up(F.relu(self.down(s)))) * x
        return result


class Res2(nn.Module):
    """Res2Net: four slices, each convolved with what the one before it gave, added up."""

    def __init__(self, width: int, act: str) -> None:
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList([ConvBlock(width, width, act=act) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        slices = torch.split(x, self.width, 1)
        outs = []
        last = slices[0]
        for i, conv in enumerate(self.convs):
            last = conv(last if i == 0 else last + slices[i])
            outs.append(last)
        outs.append(slices[3])
        return torch.cat(outs, 1)


class SpatialGate(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class ChannelStatisticGate(nn.Module):
    """CBAM's spatial attention, from the channels' mean and maximum."""

    def __init__(self, *, conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        if self.conv is None:
            return x * torch.sigmoid(mean)
        most = torch.max(x, dim=1, keepdim=True)[0]
        result: Tensor = x * torch.sigmoid(self.conv(torch.cat([mean, most], 1)))
        return result


class SoftGate(nn.Module):
    """Every channel by its share among the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + x.softmax(1))


class Resized(nn.Module):
    """A path at half the resolution, brought back and added or concatenated."""

    def __init__(self, path: nn.Module, mode: str, *, add: bool) -> None:
        super().__init__()
        self.path, self.mode, self.add = path, mode, add

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.path(x), size=x.shape[2:], mode=self.mode)
        return x + y if self.add else torch.cat([x, y], 1)


class SlicedGate(nn.Module):
    """One of the channels themselves gates the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.last = channels - 1

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.last] * torch.sigmoid(x[:, self.last :])


class SliceChannels(nn.Module):
    """Convolve some channels and pass the others by (FasterNet), or drop them."""

    def __init__(self, body: nn.Module, count: int, *, keep: bool) -> None:
        super().__init__()
        self.body, self.count, self.keep = body, count, keep

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x[:, : self.count])
        if self.keep:
            return torch.cat([out, x[:, self.count :]], dim=1)
        return out


class Halves(nn.Module):
    """The two halves of the channels added, multiplied (a linear unit's gate) or compared."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(x, 2, 1)
        if self.how == "add":
            return a + b
        if self.how == "gate":
            return a * torch.sigmoid(b)
        return torch.maximum(a, b)


class Twice(nn.Module):
    """One block called two times: its weights serve both."""

    def __init__(self, body: nn.Module, *, add: bool) -> None:
        super().__init__()
        self.body, self.add = body, add

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x) if self.add else self.body(x)
        out: Tensor = x + self.body(x)
        return out


class Unruly(nn.Module):
    """An operator across channels that has no rule."""

    def __init__(self, how: str, *, mixed: bool) -> None:
        super().__init__()
        self.how, self.mixed = how, mixed

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cumsum":
            y = torch.cumsum(x, dim=1) * 0.3
        elif self.how == "sort":
            y = torch.sort(x, dim=1)[0]
        elif self.how == "cummax":
            y = torch.cummax(x, 1)[0]
        else:
            y = F.local_response_norm(x, 3, alpha=0.5)
        return x + y if self.mixed else y


class SplitAttention(nn.Module):
    """ResNeSt, two splits: attention over splits, per channel."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.down = nn.Conv2d(channels, middle, 1)
        self.up = nn.Conv2d(middle, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = F.relu(self.conv(x)).view(n, 2, self.channels, h, w)
        a = y.sum(1).mean((2, 3), keepdim=True)
        a = torch.sigmoid(self.up(F.relu(self.down(a)))).view(n, 2, self.channels, 1, 1)
        return (y * a).sum(dim=1)


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ChannelNorm(nn.Module):
    """Layer or RMS norm over the channels of (N, C, H, W), as ConvNeXt does it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class ChannelsLast(nn.Module):
    """Linear layers, scales and norms over the last dimension: ConvNeXt's block."""

    def __init__(self, channels: int, middle: int, *, bias: bool, norm: bool) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.up = nn.Linear(channels, middle, bias=bias)
        self.down = nn.Linear(middle, channels, bias=bias)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class PositionTable(nn.Module):
    """A number for every pair of tokens and head, by how far apart the tokens are."""

    index: Tensor

    def __init__(self, tokens: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * tokens - 1, heads))
        places = torch.arange(tokens)
        self.register_buffer("index", places[:, None] - places[None, :] + tokens - 1)

    def forward(self) -> Tensor:
        count = self.index.shape[0]
        return self.table[self.index.view(-1)].view(count, count, -1).permute(2, 0, 1)


class Attention(nn.Module):
    """Self-attention over (N, T, C) in one of the ways in which people write it."""

    def __init__(self, channels: int, heads: int, tokens: int, how: str) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        if how.startswith("module"):
            first = how == "module batch first"
            self.whole = nn.MultiheadAttention(channels, heads, batch_first=first)
            return
        self.qkv = nn.Linear(channels, 3 * channels, bias=how != "einsum")
        self.proj = nn.Linear(channels, channels)
        if how == "table":
            self.position = PositionTable(tokens, heads)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "module batch first":
            return self.whole(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        if self.how == "module":
            y = x.transpose(0, 1)
            return self.whole(y, y, y)[0].transpose(0, 1)  # type: ignore[no-any-return]
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            a = torch.einsum("nhtd,nhsd->nhts", q, k) * 0.3
            y = torch.einsum("nhts,nhsd->nhtd", a.softmax(-1), v)
        else:
            a = (q * 0.3) @ k.transpose(-2, -1)
            if self.how == "table":
                a = a + self.position()
            y = a.softmax(dim=-1) @ v
        out: Tensor = self.proj(y.transpose(1, 2).reshape(n, t, c))
        return out


class CrossCovariance(nn.Module):
    """Attention between the channels of a head (XCiT)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv[0], qkv[1], qkv[2]
        a = (q @ k.transpose(-2, -1) * 0.2).softmax(dim=-1)
        out: Tensor = self.proj((a @ v).permute(0, 3, 1, 2).reshape(n, t, c))
        return out


class TokenMixing(nn.Module):
    """A linear layer over the tokens, by which every channel is treated alike (MLP-Mixer)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.up = nn.Linear(tokens, 2 * tokens)
        self.down = nn.Linear(2 * tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return out


class Transformer(nn.Module):
    """Pixels as tokens with a position embedding, perhaps a class token, and one block."""

    def __init__(
        self,
        channels: int,
        tokens: int,
        mixer: nn.Module,
        middle: int,
        *,
        norm: Callable[[int], nn.Module],
        class_token: bool,
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, channels)) if class_token else None
        self.position = nn.Parameter(torch.zeros(1, tokens + class_token, channels))
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.mixer = mixer
        self.mlp = nn.Sequential(
            nn.Linear(channels, middle), nn.GELU(), nn.Linear(middle, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        if self.first is not None:
            y = torch.cat([self.first.expand(n, -1, -1), y], dim=1)
        y = y + self.position
        y = y + self.mixer(self.norm1(y))
        y = y + self.mlp(self.norm2(y))
        if self.first is not None:
            y = y[:, 1:] + y[:, :1]
        out: Tensor = y.transpose(1, 2).reshape(n, c, h, w)
        return out


class Windows(nn.Module):
    """Attention inside shifted windows over channels-last pixels, padded and masked (Swin)."""

    def __init__(self, channels: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads, size * size, "table")

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x.permute(0, 2, 3, 1))
        low, right = -h % self.size, -w % self.size
        y = F.pad(y, (0, 0, 0, right, 0, low))
        high, wide = h + low, w + right
        mask = y.new_zeros((high, wide))
        mask[-self.size :, :] = 0.5  # written in place into a constant
        y = y * (1 + mask)[None, :, :, None]
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        rows, columns = high // self.size, wide // self.size
        y = y.view(n, rows, self.size, columns, self.size, c).permute(0, 1, 3, 2, 4, 5)
        y = self.attention(y.reshape(n * rows * columns, self.size**2, c))
        y = y.view(n, rows, columns, self.size, self.size, c).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(n, high, wide, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        out: Tensor = x + y[:, :h, :w].permute(0, 3, 1, 2)
        return out


class ComputedConv(nn.Conv2d):
    """A convolution whose weight is computed from parameters at every call."""

    def __init__(self, channels: int, out: int, kernel: int, how: str) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2)
        self.how = how
        self.gain = nn.Parameter(torch.ones(out, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w, bias = self.weight, self.bias
        if self.how == "standardised":
            mean = w.mean((1, 2, 3), keepdim=True)
            var = w.var((1, 2, 3), keepdim=True, unbiased=False)
            w = (w - mean) / torch.sqrt(var + 1e-5) * self.gain
        elif self.how == "batch norm":
            flat = w.reshape(1, len(w), -1)
            gain = self.gain.view(-1) * 0.4
            w = F.batch_norm(flat, None, None, weight=gain, training=True).reshape_as(w)
        elif self.how == "normed":
            w = self.gain * w / w.square().sum((1, 2, 3), keepdim=True).sqrt()
        elif self.how == "scaled":
            w = w * self.gain
        else:  # a bias of which the first half is switched off in place
            assert bias is not None
            bias = bias.clone()
            bias[: len(bias) // 2].zero_()
        return F.conv2d(x, w, bias, padding=self.padding)


class MatrixOfItsOwn(nn.Module):
    """A linear layer written as a product with a parameter."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, out))

    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) @ self.weight).permute(0, 3, 1, 2)


# --------------------------------------------------------------------------------------
# Drawing a network


@dataclass(frozen=True)
class Shape:
    width: int
    size: int


def _conv(pick: Pick, width: int, out: int, stride: int = 1) -> ConvBlock:
    return ConvBlock(
        width,
        out,
        pick.one([3, 1]) if stride == 1 else 3,
        stride=stride,
        norm=pick.one([True, True, False]),
        bias=pick.one([False, True]),
        act=pick.one([*ACTIVATIONS, "prelu per channel"]),
    )


def _stride(pick: Pick, at: Shape) -> int:
    return pick.one([1, 2]) if at.size >= 4 else 1


def _after(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _width(pick: Pick, low: int = 4, high: int = 40) -> int:
    return pick.number(low, high)


def _plain(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    out, stride = _width(pick), _stride(pick, at)
    return _conv(pick, at.width, out, stride), Shape(out, _after(at.size, stride))


def _residual(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    projects = pick.one([False, True])
    out = _width(pick) if projects else at.width
    stride = _stride(pick, at) if projects else 1
    middle = _width(pick)
    body = nn.Sequential(
        _conv(pick, at.width, middle, stride),
        ConvBlock(middle, out, act="identity", norm=pick.one([True, False])),
    )
    shortcut: nn.Module = nn.Identity()
    if projects:
        shortcut = ConvBlock(at.width, out, 1, stride=stride, act="identity")
    scale = out if pick.one([False, False, True]) else 0
    act = pick.one(["relu", "relu_", "identity"])
    return Residual(body, shortcut, act, scale=scale), Shape(out, _after(at.size, stride))


def _padded(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    stride = _stride(pick, at)
    low, high = pick.number(0, 5), pick.number(1, 9)
    out = at.width + low + high
    body = nn.Sequential(_conv(pick, at.width, out, stride), ConvBlock(out, out, act="identity"))
    return PaddedShortcut(body, low, high, stride), Shape(out, _after(at.size, stride))


def _dense(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    growth, count = _width(pick, 4, 12), pick.number(1, 3)
    steps = [_conv(pick, at.width + i * growth, growth) for i in range(count)]
    out = at.width + count * growth
    if out <= 40:
        return Dense(steps), Shape(out, at.size)
    narrow = _width(pick)
    return nn.Sequential(Dense(steps), _conv(pick, out, narrow)), Shape(narrow, at.size)


def _branches(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    widths = [_width(pick, 4, 14) for _ in range(pick.number(2, 3))]
    paths: list[nn.Module] = [_conv(pick, at.width, w) for w in widths]
    if pick.one([False, True]):
        pooled = _width(pick, 4, 8)
        widths.append(pooled)
        pool = nn.AvgPool2d(3, 1, 1) if pick.one([False, True]) else nn.MaxPool2d(3, 1, 1)
        paths.append(nn.Sequential(pool, ConvBlock(at.width, pooled, 1)))
    return Branches(paths), Shape(sum(widths), at.size)


def _even(pick: Pick, at: Shape, multiple: int = 2) -> tuple[nn.Module, int]:
    """A way to a width that ``multiple`` divides."""
    if at.width % multiple == 0:
        return nn.Identity(), at.width
    out = multiple * pick.number(max(1, 4 // multiple), 40 // multiple)
    return _conv(pick, at.width, out), out


def _shuffle(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    entry, width = _even(pick, at)
    half = width // 2
    branch = nn.Sequential(
        ConvBlock(half, half, 1),
        ConvBlock(half, half, groups=half, act="identity"),
        ConvBlock(half, half, 1, act=pick.one(["relu", "relu_"])),
    )
    units = [ShuffleUnit(branch, 2)]
    return nn.Sequential(entry, *units), Shape(width, at.size)


def _depthwise(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    """MobileNetV2's inverted residual, or a bare depthwise convolution with a multiplier."""
    multiplier = pick.one([1, 1, 2, 3])
    if pick.one([False, True]) and at.width * multiplier <= 40:
        out = at.width * multiplier
        return ConvBlock(at.width, out, groups=at.width), Shape(out, at.size)
    middle, stride = _width(pick, 4, 20), _stride(pick, at)
    out = at.width if stride == 1 and pick.one([True, False]) else _width(pick)
    body = nn.Sequential(
        ConvBlock(at.width, middle, 1, act=pick.one(["relu6_", "silu", "hardswish_"])),
        ConvBlock(middle, middle * multiplier, groups=middle, stride=stride, act="relu6_"),
        ConvBlock(middle * multiplier, out, 1, act="identity"),
    )
    if stride == 1 and out == at.width:
        return Residual(body, nn.Identity(), "identity"), at
    return body, Shape(out, _after(at.size, stride))


def _grouped(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    groups = pick.one([2, 4, 8, 3, 10])
    entry, width = _even(pick, at, groups)
    out = groups * pick.number(1, 40 // groups)
    body = [ConvBlock(width, out, pick.one([3, 1]), groups=groups, bias=pick.one([False, True]))]
    if pick.one([False, True]):
        body.append(Shuffle(groups))  # type: ignore[arg-type]
    if pick.one([False, True]):
        again = groups * pick.number(1, 40 // groups)
        body.append(ConvBlock(out, again, groups=groups))
        out = again
    block: nn.Module = nn.Sequential(*body)
    if out == width and pick.one([True, False]):
        block = Residual(block, nn.Identity(), "relu")
    return nn.Sequential(entry, block), Shape(out, at.size)


def _squeeze(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    gate = SqueezeExcite(
        at.width,
        pick.number(1, 12),
        linear=pick.one([False, True]),
        hard=pick.one([False, True]),
    )
    return gate, at


def _res2(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    width = pick.number(1, 10)
    entry = _conv(pick, at.width, 4 * width)
    body = nn.Sequential(entry, Res2(width, pick.one(["relu", "relu_", "silu"])))
    if pick.one([False, True]):
        body.append(ConvBlock(4 * width, at.width, 1, act="identity"))
        return Residual(body, nn.Identity(), "relu"), at
    return body, Shape(4 * width, at.size)


def _gate(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    how = pick.one(["conv", "cbam", "mean", "softmax"])
    if how == "softmax":
        return SoftGate(), at
    if how == "conv":
        return SpatialGate(at.width, pick.one([1, 3])), at
    return ChannelStatisticGate(conv=how == "cbam"), at


def _sliced_gate(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    return SlicedGate(at.width), Shape(at.width - 1, at.size)


def _slice(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    count, keep = pick.number(1, at.width - 1), pick.one([True, False])
    out = count if keep else _width(pick)
    body = _conv(pick, count, out)
    return SliceChannels(body, count, keep=keep), Shape(at.width if keep else out, at.size)


def _halves(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    entry, width = _even(pick, at)
    if width < 8:
        entry, width = _conv(pick, at.width, 16), 16
    how = pick.one(["add", "gate", "max"])
    return nn.Sequential(entry, Halves(how)), Shape(width // 2, at.size)


def _scale(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    return LayerScale(at.width), at


def _pool(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    if at.size < 4:
        return nn.MaxPool2d(3, 1, 1), at
    how = pick.one(["max", "avg", "adaptive", "overlap"])
    if how == "max":
        return nn.MaxPool2d(2), Shape(at.width, at.size // 2)
    if how == "avg":
        return nn.AvgPool2d(2, ceil_mode=True), Shape(at.width, -(-at.size // 2))
    if how == "adaptive":
        size = pick.number(2, at.size - 1)
        pool = nn.AdaptiveAvgPool2d(size) if pick.one([True, False]) else nn.AdaptiveMaxPool2d(size)
        return pool, Shape(at.width, size)
    return nn.MaxPool2d(3, 2, 1), Shape(at.width, _after(at.size, 2))


def _twice(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    body = _conv(pick, at.width, at.width)
    return Twice(body, add=pick.one([True, False])), at


def _unruly(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    how = pick.one(["cumsum", "sort", "cummax", "lrn"])
    return Unruly(how, mixed=pick.one([False, True])), at


def _attention(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    return SplitAttention(at.width, pick.number(2, 10)), at


def _resized(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    add = pick.one([True, False])
    out = at.width if add else _width(pick, 4, 12)
    path = ConvBlock(at.width, out, stride=2, act="silu")
    mode = pick.one(["nearest", "bilinear"])
    return Resized(path, mode, add=add), Shape(at.width if add else at.width + out, at.size)


def _pixels(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    """Pixels to channels instead of a stride, as in YOLO's first layer."""
    if at.size % 2:
        return _plain(pick, at)
    out = _width(pick)
    body = [nn.PixelUnshuffle(2), _conv(pick, 4 * at.width, out)]
    return nn.Sequential(*body), Shape(out, at.size // 2)


def _norm_over_channels(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    how = pick.one(["layer", "rms", "group", "groups"])
    if how == "groups":
        groups = pick.one([2, 4, 8, 3])
        entry, width = _even(pick, at, groups)
        return nn.Sequential(entry, nn.GroupNorm(groups, width)), Shape(width, at.size)
    if how == "group":
        return nn.GroupNorm(1, at.width), at
    norm = nn.LayerNorm(at.width) if how == "layer" else nn.RMSNorm(at.width, eps=1e-5)
    return ChannelNorm(norm), at


def _channels_last(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    bias, norm = pick.one([True, False]), pick.one([True, False])
    return ChannelsLast(at.width, _width(pick), bias=bias, norm=norm), at


def _few_tokens(pick: Pick, at: Shape) -> tuple[list[nn.Module], Shape, int]:
    """A way to so many heads and so few pixels that every pixel can be a token."""
    heads = pick.one([4, 2, 3, 1, 8])
    entry, width = _even(pick, at, heads)
    way = [entry]
    if at.size > 5:
        way.append(nn.AdaptiveAvgPool2d(4))
    return way, Shape(width, 4 if at.size > 5 else at.size), heads


def _transformer(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    way, at, heads = _few_tokens(pick, at)
    class_token = pick.one([False, True])
    tokens = at.size**2
    how = pick.one(["fused", "plain", "table", "einsum", "module batch first", "module"])
    mixer = Attention(at.width, heads, tokens + class_token, how)
    norm: Callable[[int], nn.Module] = pick.one([nn.LayerNorm, nn.RMSNorm])
    middle = _width(pick)
    block = Transformer(at.width, tokens, mixer, middle, norm=norm, class_token=class_token)
    return nn.Sequential(*way, block), at


def _token_mixing(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    way, at, heads = _few_tokens(pick, at)
    mixer = CrossCovariance(at.width, heads) if pick.one([False, True]) else TokenMixing(at.size**2)
    block = Transformer(
        at.width, at.size**2, mixer, _width(pick), norm=nn.LayerNorm, class_token=False
    )
    return nn.Sequential(*way, block), at


def _windows(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    heads = pick.one([2, 4, 3, 1])
    entry, width = _even(pick, at, heads)
    size = pick.number(2, 3)
    shift = pick.number(0, size - 1)
    return nn.Sequential(entry, Windows(width, heads, size, shift)), Shape(width, at.size)


def _computed(pick: Pick, at: Shape) -> tuple[nn.Module, Shape]:
    out, kernel = _width(pick), pick.one([3, 1])
    how = pick.one(["standardised", "batch norm", "normed", "scaled", "bias", "matrix"])
    if how == "matrix":
        return nn.Sequential(MatrixOfItsOwn(at.width, out), nn.GELU()), Shape(out, at.size)
    conv = ComputedConv(at.width, out, kernel, how)
    return nn.Sequential(conv, nn.SiLU()), Shape(out, at.size)


BLOCKS: dict[str, Callable[[Pick, Shape], tuple[nn.Module, Shape]]] = {
    "plain": _plain,
    "residual": _residual,
    "padded": _padded,
    "dense": _dense,
    "branches": _branches,
    "shuffle": _shuffle,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "squeeze": _squeeze,
    "res2": _res2,
    "gate": _gate,
    "sliced_gate": _sliced_gate,
    "slice": _slice,
    "halves": _halves,
    "scale": _scale,
    "pool": _pool,
    "twice": _twice,
    "unruly": _unruly,
    "attention": _attention,
    "resized": _resized,
    "pixels": _pixels,
    "norm_over_channels": _norm_over_channels,
    "channels_last": _channels_last,
    "transformer": _transformer,
    "token_mixing": _token_mixing,
    "windows": _windows,
    "computed": _computed,
}


class Net(nn.Module):
    """Blocks in a row and a classifier; ``returns`` decides the form of the output."""

    def __init__(self, blocks: nn.Module, classifier: nn.Module, returns: str) -> None:
        super().__init__()
        self.blocks, self.classifier, self.returns = blocks, classifier, returns

    def forward(self, x: Tensor) -> Any:
        features = self.blocks(x)
        out = self.classifier(features)
        if self.returns == "tuple":
            return out, features
        if self.returns == "dict":
            return {"features": features, "logits": out}
        return out


def _classifier(pick: Pick, at: Shape) -> nn.Module:
    classes = pick.one([10, 1])
    how = pick.one(["pooled", "hidden", "flat", "flat hidden", "conv", "none", "pool only"])
    pool = nn.AdaptiveAvgPool2d(1)
    if how == "pooled":
        return nn.Sequential(pool, nn.Flatten(), nn.Dropout(0.2), nn.Linear(at.width, classes))
    if how == "hidden":
        middle = _width(pick)
        return nn.Sequential(
            pool, nn.Flatten(), nn.Linear(at.width, middle), nn.ReLU(inplace=True),
            nn.Dropout(0.5), nn.Linear(middle, classes),
        )  # fmt: skip
    if how == "flat":
        return nn.Sequential(
            nn.AdaptiveAvgPool2d(min(2, at.size)),
            nn.Flatten(),
            nn.Linear(at.width * min(2, at.size) ** 2, classes),
        )
    if how == "flat hidden":
        middle = _width(pick)
        return nn.Sequential(
            nn.Flatten(), nn.Dropout(0.5), nn.Linear(at.width * at.size**2, middle), nn.ReLU(),
            nn.Linear(middle, classes, bias=pick.one([True, False])),
        )  # fmt: skip
    if how == "conv":
        # a single class behind a ReLU would often be dead
        act = nn.ReLU(inplace=True) if classes > 1 else nn.LeakyReLU(0.2)
        return nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(at.width, classes, 1), act, pool, nn.Flatten()
        )
    return nn.Identity() if how == "none" else nn.Sequential(pool, nn.Flatten())


@dataclass(frozen=True)
class Drawn:
    """A network and the shape (C, H, W) of its input."""

    model: nn.Module
    input_shape: tuple[int, int, int]
    kinds: tuple[str, ...]

    def batch(self, count: int = 8, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.input_shape, generator=generator, dtype=torch.float64)


def network(pick: Pick, kinds: Sequence[str] | None = None) -> Drawn:
    """One random network; ``kinds`` fixes which blocks, in order."""
    channels, size = pick.one([3, 1, 4]), pick.number(6, 16)
    at = Shape(_width(pick, 4, 24), size)
    blocks: list[nn.Module] = [_conv(pick, channels, at.width)]
    if kinds is None:
        kinds = [pick.one(list(BLOCKS)) for _ in range(pick.number(1, 7))]
    for kind in kinds:
        if at.width > 48 or at.width < 4:
            narrow = _width(pick)
            blocks.append(_conv(pick, at.width, narrow))
            at = Shape(narrow, at.size)
        block, at = BLOCKS[kind](pick, at)
        blocks.append(block)
    classifier = _classifier(pick, at)
    returns = pick.one(["tensor", "tensor", "tensor", "tensor", "tuple", "dict"])
    model = Net(nn.Sequential(*blocks), classifier, returns)
    return Drawn(model, (channels, size, size), tuple(kinds))


def seeded(seed: int, kinds: Sequence[str] | None = None) -> Drawn:
    """The network that ``seed`` stands for."""
    return network(SeededPick(seed), kinds)


@st.composite
def networks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Drawn:
    """Random networks, unsettled."""
    return network(DrawnPick(draw))


# --------------------------------------------------------------------------------------
# Weights that make a test mean something


def settle(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Give ``model`` random weights and the batch-norm statistics of ``x``, in float64.

    Everything is random, zero-initialised scales too, so that nothing hides behind a zero;
    magnitudes keep activations of order one.

    Args:
        model: changed in place.
        x: (N, C, H, W), float64.

    Returns:
        The model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _randomise(module, name, parameter, generator)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average, for those that are called twice
            norm.train()
        model(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


def _randomise(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if name in ("weight", "in_proj_weight") and parameter.dim() >= 2:
        fan_in = parameter[0].numel()
        parameter.uniform_(-1, 1, generator=generator).mul_((6 / fan_in) ** 0.5)
    elif name in ("bias", "in_proj_bias", "position", "first", "table"):
        parameter.uniform_(-0.3, 0.3, generator=generator)
    else:  # scales of norms and layers
        parameter.uniform_(0.5, 1.5, generator=generator)
