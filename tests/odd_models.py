"""Small models, each with one thing that networks in the wild do and textbooks do not.

Every class takes images ``(N, 3, 8, 8)``. They are written as people write them, not as the
compiler would like them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Odd(nn.Module):
    """A stem of 16 channels, a body, and a linear classifier over the mean."""

    features = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.build()
        self.fc = nn.Linear(self.features, 10)

    def build(self) -> None:
        pass

    def body(self, x: Tensor) -> Tensor:
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))


class SpatialAttention(Odd):
    """CBAM: mean and maximum over channels, a convolution, a gate."""

    def build(self) -> None:
        self.gate = nn.Conv2d(2, 1, 7, padding=3)
        self.conv = nn.Conv2d(16, 16, 3)

    def body(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.conv(x * torch.sigmoid(self.gate(pooled)))


class ExpandedGate(Odd):
    """A one-channel gate, expanded to all channels before it is used."""

    def build(self) -> None:
        self.gate = nn.Conv2d(16, 1, 1)
        self.conv = nn.Conv2d(16, 16, 3)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x * torch.sigmoid(self.gate(x)).expand_as(x))


class GroupNorms(Odd):
    """Group norms with few, one and many groups."""

    def build(self) -> None:
        self.few, self.one, self.many = (nn.GroupNorm(g, 16) for g in (4, 1, 8))
        self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.many(self.b(self.one(self.a(self.few(x)))))


class LocalResponse(Odd):
    """An operator that looks along channels: no rule."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm = nn.LocalResponseNorm(5)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class ChannelsLastNorm(Odd):
    """Layer norm over channels in a permuted layout."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm = nn.LayerNorm(16)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class SplitAttention(Odd):
    """ResNeSt: softmax over the splits of every channel."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 32, 3, groups=2)
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, _, h, w = y.shape
        y = y.view(n, 2, 16, h, w)
        weight = self.b(F.relu(self.a(y.sum(1).mean((2, 3), keepdim=True)))).view(n, 2, 16, 1, 1)
        return (y * weight.softmax(1)).sum(1)


class SelectiveKernels(Odd):
    """SKNet: stacked branches weighted per channel."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 5, padding=2)
        self.squeeze, self.excite = nn.Linear(16, 8), nn.Linear(8, 32)

    def body(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], 1)
        weight = self.excite(F.relu(self.squeeze(branches.sum(1).mean((2, 3)))))
        return (branches * weight.view(-1, 2, 16).softmax(1)[:, :, :, None, None]).sum(1)


class MovedChannels(Odd):
    """Shuffled, flipped and rolled channels before a grouped convolution."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 1, groups=4)

    def body(self, x: Tensor) -> Tensor:
        return self.b(torch.roll(F.channel_shuffle(self.a(x), 3).flip(1), 5, 1))


class PixelShuffled(Odd):
    """Channels that become pixels."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 64, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class PixelsToChannels(Odd):
    """YOLO's focus: pixels that become channels."""

    def build(self) -> None:
        self.conv = nn.Conv2d(64, 16, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class Flattened(Odd):
    """Flatten before the classifier."""

    features = 16 * 64

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class FlattenedChannelsLast(Odd):
    """Flatten with the channels last."""

    features = 16 * 64

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1))


class PaddedChannels(Odd):
    """Zero channels around the real ones."""

    def build(self) -> None:
        self.conv = nn.Conv2d(24, 16, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 1, 1, 1, 4, 4)))


class RawParameters(Odd):
    """Parameters used without a layer: scale, shift, position table."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.shift = nn.Parameter(torch.zeros(16))
        self.table = nn.Parameter(torch.zeros(1, 16, 8, 8))
        self.conv = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x * F.softplus(self.scale) + self.shift.view(1, -1, 1, 1) + self.table)


class SharedScalar(Odd):
    """One learned number for all channels, used by every stage."""

    def build(self) -> None:
        self.temperature = nn.Parameter(torch.ones(()))
        self.conv = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(x / self.temperature.exp())


class AwkwardNames(nn.Module):
    """Submodules and parameters whose names torch.fx uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.code = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.shared = nn.Sequential(nn.Conv2d(16, 16, 1))
        self.stages = nn.ModuleList([nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)])
        self.meta = nn.Linear(16, 10)
        self.recompile = nn.Parameter(torch.ones(16, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        x = self.shared(self.code(self.graph(input)) * self.recompile)
        for conv in self.stages:
            x = conv(x).relu()
        return self.meta(x.mean((2, 3)))


class BlurredPooling(Odd):
    """A fixed filter per channel, kept in a buffer that is not saved."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        filters = (kernel[:, None] * kernel / 16).repeat(16, 1, 1, 1)
        self.register_buffer("filters", filters, persistent=False)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(F.relu(self.conv(x)), self.filters, stride=2, groups=16))


class StandardizedConvolution(Odd):
    """A convolution whose weight is computed from another tensor: no rule yet."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        weight = self.a.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std(
            (1, 2, 3), keepdim=True
        )
        return self.b(F.conv2d(x, weight, self.a.bias, padding=1))


class TransposedConvolutions(Odd):
    """Dense, grouped and depthwise transposed convolutions."""

    def build(self) -> None:
        self.a = nn.ConvTranspose2d(16, 12, 2, 2)
        self.b = nn.ConvTranspose2d(12, 16, 3, groups=4)
        self.c = nn.ConvTranspose2d(16, 16, 3, groups=16)

    def body(self, x: Tensor) -> Tensor:
        return self.c(F.interpolate(self.b(self.a(x)), scale_factor=2))


class SeveralOutputs(Odd):
    """A dict with a tuple inside: the classifier and the features."""

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        return {"classes": self.head(y), "features": (y, y.mean((2, 3)))}


class MixedOutputs(Odd):
    """Outputs that are no tensors: a missing loss, a number, the batch size."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "loss": None, "classes": 10, "count": x.shape[0]}


class CalledTwice(Odd):
    """One convolution at two places and resolutions."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(F.max_pool2d(x, 2))))


class ImageBeside(Odd):
    """The image concatenated to features, through one batch norm."""

    def build(self) -> None:
        self.norm = nn.BatchNorm2d(19)
        self.conv = nn.Conv2d(19, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.conv(self.norm(torch.cat([x, self.stem(x)], 1))))


class RunningSum(Odd):
    """cumsum over an odd number of channels: no rule."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 13, 3, padding=1), nn.Conv2d(13, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.b(torch.cumsum(self.a(x), 1))


class Ghost(Odd):
    """GhostNet: cheap features made from others by a depthwise convolution."""

    def build(self) -> None:
        self.a = nn.Conv2d(16, 8, 1)
        self.cheap = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.cat([y, self.cheap(y)], 1))


class ChannelAttention1d(Odd):
    """ECA: a 1-D convolution along the channels."""

    def build(self) -> None:
        self.along = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(16, 16, 3)

    def body(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3), keepdim=True).squeeze(-1).transpose(-1, -2)
        return self.conv(x * self.along(y).transpose(-1, -2).unsqueeze(-1).sigmoid())


class WrittenSlices(Odd):
    """In-place writes into slices of activations and of a fresh tensor."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :4] += x[:, :4]
        z = torch.zeros_like(y)
        z[:, ::2] = y[:, 1::2]
        z[:, 1::2] = y[:, ::2]
        return F.leaky_relu_(z + x)


class FeaturesOut(Odd):
    """No classifier: the features are the output, and not a multiple of anything."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 21, 3, padding=1), nn.Conv2d(21, 21, 3, groups=21)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(self.stem(x)))


class LearnedActivations(Odd):
    """PReLU with one and with many slopes, reflected padding."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.many, self.one = nn.PReLU(16), nn.PReLU()

    def body(self, x: Tensor) -> Tensor:
        return self.one(self.many(self.conv(x)))


class TokenMixing(Odd):
    """MLP-Mixer: a linear layer over positions, one over channels."""

    def build(self) -> None:
        self.tokens, self.channels = nn.Linear(64, 64), nn.Linear(16, 16)

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return (
            self.channels(self.tokens(x.flatten(2)).transpose(1, 2))
            .transpose(1, 2)
            .reshape(n, c, h, w)
        )


class Attention(Odd):
    """A transformer layer after a stem: attention has no rule yet."""

    def build(self) -> None:
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, h, w)


class Resized(Odd):
    """A pyramid: features resized to the size of others and concatenated."""

    def build(self) -> None:
        self.down, self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Conv2d(32, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        up = F.interpolate(self.down(x), size=x.shape[-2:], mode="bilinear")
        return self.conv(torch.cat([x, up], 1))


class DepthwiseOnImage(Odd):
    """A depthwise convolution with a multiplier straight on the image."""

    def build(self) -> None:
        self.a = nn.Conv2d(3, 6, 3, groups=3, padding=1)
        self.b = nn.Conv2d(22, 16, 1)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.b(torch.cat([self.a(x), self.stem(x)], 1)))


class PooledByMaximum(Odd):
    """Adaptive maximum pooling, which returns indices beside the values."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_max_pool2d(self.conv(x), 1).flatten(1))


class Einsum(Odd):
    """A channel mix written as an einsum: no rule yet, but a price."""

    def build(self) -> None:
        self.mix = nn.Parameter(torch.randn(12, 16))
        self.conv = nn.Conv2d(12, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(torch.einsum("oc,nchw->nohw", self.mix, x))


class ReusedTensors(Odd):
    """Weights of layers used a second time, by themselves."""

    def build(self) -> None:
        self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def head(self, x: Tensor) -> Tensor:
        y = self.fc(self.norm(self.conv(x)).mean((2, 3)))
        return y + self.fc.weight.sum() + self.norm.weight.sum() + self.conv.bias.sum()


class MixedParameters(Odd):
    """Parameters that are normalised, sorted, repeated and summed before they scale channels."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.randn(16))

    def body(self, x: Tensor) -> Tensor:
        w = self.scale
        table = w.softmax(0) * w.sort()[0] + w.repeat(2)[8:24] + torch.outer(w, w).sum(1)
        return x * table.view(-1, 1, 1)


class ReadNumbers(Odd):
    """Numbers read from activations: an index, and a factor."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(self.stem(x))
        return self.head(y * y.mean().item()), x[y.sum((1, 2, 3)).argmax(0)]


class VectorQuantised(Odd):
    """Rows of a table looked up by what the features are closest to."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 1)
        self.table = nn.Parameter(torch.randn(20, 16))

    def head(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return self.fc(y + self.table[(y[:, None] - self.table).pow(2).sum(-1).argmin(-1)])


class TiedDecoder(Odd):
    """A convolution's weight used the other way round."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 12, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.conv(x).relu(), self.conv.weight, padding=1)


class MixedAxes(Odd):
    """Channels added to pixels."""

    def build(self) -> None:
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y + y.transpose(1, 2))


class WrittenByIndex(Odd):
    """A write into a list of channels."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, [1, 3]] = x[:, [2, 4]] * 2
        return self.conv(x)


class OddNames(nn.Module):
    """Names of submodules that no identifier could be."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module('q"x', nn.Conv2d(3, 16, 1))
        self.add_module("class", nn.Conv2d(16, 16, 1))
        self.add_module("fc", nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.children()
        return last(second(first(x)).mean((2, 3)))


class Recurrent(Odd):
    """An LSTM over the pixels: no rule, but a price."""

    features = 8

    def build(self) -> None:
        self.lstm = nn.LSTM(16, 8, batch_first=True)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x.flatten(2).transpose(1, 2))[0][:, -1])


class ConstantOutput(Odd):
    """A constant and a sum over everything beside the prediction."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.ones(1, 3, dtype=x.dtype), x.sum()


class Normalised(Odd):
    """Features of unit length over their channels."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(F.normalize(self.conv(x), dim=1))


class GatedVersions(Odd):
    """A one-channel gate on what an operator without a rule returns."""

    def build(self) -> None:
        self.gate, self.conv = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 16, 1)

    def body(self, x: Tensor) -> Tensor:
        y = torch.cumsum(x, 1)
        return self.conv(y * torch.sigmoid(self.gate(y)))


class Maxout(Odd):
    """The larger of two halves."""

    def build(self) -> None:
        self.conv = nn.Conv2d(16, 32, 1)

    def body(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return torch.maximum(a, b)


class FixedBatch(Odd):
    """A batch size written into the source."""

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)).view(5, 16))


MODELS: dict[str, type[nn.Module]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, nn.Module) and value is not Odd
}
