"""The CIFAR networks that the papers transform.

Source: S2DNAS, Table 1. The residual networks follow He et al., "Deep residual learning for
image recognition", section 4.2; VGG16 follows the usual CIFAR form, one linear layer after the
convolutions; MobileNetV2 keeps 32x32 in its stem and in its 24-channel stage.

From the command line: ``--arch examples.cifar_models:resnet56 --arch-kwargs
'{"shortcut": "padded"}'``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CifarMobileNetV2",
    "CifarResNet",
    "CifarVGG",
    "PaddedShortcut",
    "Shortcut",
    "mobilenet_v2",
    "resnet20",
    "resnet56",
    "resnet110",
    "vgg16_bn",
]

Shortcut = Literal["projection", "padded"]


class PaddedShortcut(nn.Module):
    """Take every second row and column and append channels of zeros (He et al., option A)."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + new_channels, H / 2, W / 2)."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def _shortcut(inputs: int, outputs: int, kind: Shortcut) -> nn.Module:
    """Build the shortcut of a block: only where the width grows is it more than the identity."""
    if inputs == outputs:
        return nn.Identity()
    if kind == "padded":
        return PaddedShortcut(outputs - inputs)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(outputs)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, shortcut: Shortcut) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A residual network of 6 * blocks + 2 layers, ``width``, twice and four times as wide."""

    def __init__(self, blocks: int, shortcut: Shortcut, num_classes: int, width: int = 16) -> None:
        super().__init__()
        if shortcut not in ("projection", "padded"):
            raise ValueError(f"shortcut is {shortcut!r}; use 'projection' or 'padded'")
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _residual_layer(width, width, blocks, shortcut)
        self.layer2 = _residual_layer(width, 2 * width, blocks, shortcut)
        self.layer3 = _residual_layer(2 * width, 4 * width, blocks, shortcut)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.fc(x)
        return logits


def _residual_layer(inputs: int, outputs: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, shortcut)
    return nn.Sequential(
        first, *(BasicBlock(outputs, outputs, shortcut) for _ in range(blocks - 1))
    )


def resnet20(
    shortcut: Shortcut = "projection", num_classes: int = 10, width: int = 16
) -> CifarResNet:
    """Build ResNet-20; the papers' is 16 channels wide."""
    return CifarResNet(3, shortcut, num_classes, width)


def resnet56(shortcut: Shortcut = "projection", num_classes: int = 10) -> CifarResNet:
    """Build ResNet-56."""
    return CifarResNet(9, shortcut, num_classes)


def resnet110(shortcut: Shortcut = "projection", num_classes: int = 10) -> CifarResNet:
    """Build ResNet-110."""
    return CifarResNet(18, shortcut, num_classes)


class CifarVGG(nn.Module):
    """VGG16's thirteen convolutions with batch norm, and one linear layer."""

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for widths in self.WIDTHS:
            for width in widths:
                convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def vgg16_bn(num_classes: int = 10) -> CifarVGG:
    """Build VGG16 with batch norm."""
    return CifarVGG(num_classes)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """List a convolution without bias, which keeps the size at stride 1, and its batch norm."""
    padding = kernel // 2
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=False
    )
    return [convolution, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; add the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [*_convolution(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        self.layers = nn.Sequential(
            *widen,
            *_convolution(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.ReLU6(),
            *_convolution(hidden, outputs, 1),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images."""

    # expansion, output channels, blocks, stride of the first block
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_convolution(3, 32, 3), nn.ReLU6()]
        inputs = 32
        for expansion, outputs, blocks, stride in self.STAGES:
            for block in range(blocks):
                stride_here = stride if block == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, expansion, stride_here))
                inputs = outputs
        layers += [*_convolution(inputs, 1280, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        features = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(features)
        return logits


def mobilenet_v2(num_classes: int = 10) -> CifarMobileNetV2:
    """Build MobileNetV2."""
    return CifarMobileNetV2(num_classes)
