"""Models for the masked form: hard ones, and some of torchvision and timm, small inputs, float64.

A plain run tries a few of them, another one every day; ``S2D_ZOO=all`` tries all.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s2d_compiler  # makes torchvision importable  # noqa: F401

import timm  # isort: skip
import torchvision  # isort: skip
from tests import odd_models
from tests.networks import settle

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Segmenter(nn.Module):
    """A U-Net whose two outputs lie in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)
        self.norm, self.up = nn.BatchNorm2d(32), nn.ConvTranspose2d(32, 16, 2, 2)
        self.out, self.fc = nn.Conv2d(32, 4, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = F.relu(self.first(x))
        b = F.relu(self.norm(self.down(a)))
        return {"map": self.out(torch.cat([a, self.up(b)], 1)), "class": (self.fc(b.mean((2, 3))),)}


class ImageAndVector(nn.Module):
    """Two inputs, one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(7, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, image: Tensor, *, vector: Tensor) -> Tensor:
        found = F.gelu(self.conv(image)).mean((2, 3)) + self.embed(vector)
        return self.head(self.norm(found))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A GRU or LSTM between linear layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        self.rnn = getattr(nn, kind)(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])  # type: ignore[no-any-return]


class TiedWords(nn.Module):
    """Word vectors that are the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        x = x + self.narrow(F.gelu(self.wide(x)))
        return x @ self.words.weight.t()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((1, 2, 3), keepdim=True),
    "sum": lambda x: x.sum((1, 2), keepdim=True),
    "amax": lambda x: x.amax((1, 3), keepdim=True),
    "amin": lambda x: x.amin(1, keepdim=True),
    "prod": lambda x: x.prod(1, keepdim=True),
    "any": lambda x: (x > 0.5).any(1, keepdim=True),
    "all": lambda x: (x > 0.1).all(1, keepdim=True),
    "var": lambda x: x.var((1, 2), keepdim=True),
    "std": lambda x: x.std(1, unbiased=False, keepdim=True),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "vector norm": lambda x: torch.linalg.vector_norm(x, ord=3, dim=1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "argmax": lambda x: x.argmax(1, keepdim=True) * 0.1,
}


class Reduced(nn.Module):
    """Channels with a reduction of them."""

    def __init__(self, reduction: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1)
        self.head, self.reduction = nn.Linear(16, 5), reduction

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))  # 4 channels: with 8 groups some stage owns none
        x = torch.sigmoid(self.second(x + self.reduction(x)))
        return self.head((x + self.reduction(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _made(
    build: Callable[[], nn.Module], inputs: Callable[[], tuple[Tensor, ...]], **keywords: Tensor
) -> Made:
    return build().double(), inputs(), keywords


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _settled(build: Callable[[], nn.Module], size: int, batch: int = 4) -> Made:
    x = _numbers(batch, 3, size, size)
    return settle(build().double(), x), (x,), {}


def _torchvision(name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, num_classes=10, **options)
    return model


TORCHVISION = {
    "resnet18": 32, "mobilenet_v3_small": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 48,
    "mnasnet0_5": 32, "densenet121": 32, "regnet_y_400mf": 32, "vgg11_bn": 32, "googlenet": 64,
    "convnext_tiny": 32, "efficientnet_b0": 32, "swin_t": 32, "swin_v2_t": 32,
}  # fmt: skip
TIMM: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in """resnetv2_50 eca_nfnet_l0 res2net50_14w_8s ghostnet_100 regnetx_002
        poolformer_s12 cspresnet50 dla34 hrnet_w18_small gcresnext26ts resnest14d tinynet_e
        skresnet18 nf_resnet26 seresnet18 mobilevit_xxs edgenext_xx_small""".split()
    },
    **{
        name: {"img_size": 64}
        for name in """vit_tiny_patch16_224 cait_xxs24_224 mixer_s32_224 coat_lite_tiny
        xcit_nano_12_p16_224
        resmlp_12_224 visformer_tiny""".split()
    },
}

MODELS: dict[str, Callable[[], Made]] = {
    "segmenter": partial(_made, Segmenter, lambda: (_numbers(4, 3, 8, 8),)),
    "image and vector": lambda: _made(
        ImageAndVector, lambda: (_numbers(4, 3, 8, 8),), vector=_numbers(4, 7)
    ),
    "gru": partial(_made, partial(Recurrent, "GRU"), lambda: (_numbers(4, 5, 6),)),
    "lstm": partial(_made, partial(Recurrent, "LSTM"), lambda: (_numbers(4, 5, 6),)),
    "tied words": partial(_made, TiedWords, lambda: (torch.randint(0, 20, (4, 6)),)),
    **{
        name: partial(_made, partial(Reduced, function), lambda: (_numbers(4, 3, 6, 6),))
        for name, function in REDUCTIONS.items()
    },
    **{
        name: partial(_settled, build, 8, 5)
        for name, build in odd_models.MODELS.items()
        if name != "ReadNumbers"  # can be captured with random numbers only
    },
    **{n: partial(_settled, partial(_torchvision, n), size) for n, size in TORCHVISION.items()},
    **{
        n: partial(_settled, partial(timm.create_model, n, num_classes=10, **options), 64, 2)
        for n, options in TIMM.items()
    },
}
TRAINED_APART = {"ReusedTensors", "TiedDecoder", "VectorQuantised"}
"""They use a weight in two ways, of which the staged form makes two tensors."""

DAY = datetime.datetime.now(datetime.UTC).toordinal()
PARTS = 32
TRIED = list(MODELS) if os.environ.get("S2D_ZOO") == "all" else list(MODELS)[DAY % PARTS :: PARTS]
