"""Residual networks (He et al., arXiv 1512.03385) for CIFAR-sized images and for ImageNet.

Parameters are named as in torchvision, so its ResNet-50 checkpoints fit `resnet50`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from sparsepipe.models.common import image_shape, initialise


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """A 1x1 projection where the shape changes (option B of the paper), else None for the identity."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the stride is in the 3x3 one."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        result: Tensor = self.relu(self.bn3(self.conv3(x)) + shortcut)
        return result


class ResNet(nn.Module):
    """A stem, stages of residual blocks (the first keeps the resolution, each later one halves it), a linear head."""

    def __init__(
        self,
        channels: int,
        classes: int,
        block: type[Basic] | type[Bottleneck],
        counts: Sequence[int],
        width: int,
        *,
        large_images: bool = False,
        stem_stride: int = 1,
        head_bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 7, 2) if large_images else _conv(channels, width, 3, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large_images else nn.Identity()
        inputs = width
        self.stages = [f"layer{number}" for number in range(1, len(counts) + 1)]
        for number, count in enumerate(counts):
            blocks = []
            for position in range(count):
                stride = 2 if number > 0 and position == 0 else 1
                blocks.append(block(inputs, width * 2**number, stride))
                inputs = width * 2**number * block.expansion
            self.add_module(self.stages[number], nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes, bias=head_bias)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _cifar(
    depth: int, /, *, input_shape: tuple[int, ...], classes: int, width: int = 16, stem_stride: int = 1
) -> ResNet:
    """Three stages of basic blocks; `stem_stride` 2 halves the resolution of all of them, for a quarter of the work."""
    channels, _, _ = image_shape(f"resnet{depth}", input_shape)
    return ResNet(channels, classes, Basic, [(depth - 2) // 6] * 3, width, stem_stride=stem_stride)


resnet8 = partial(_cifar, 8)
resnet14 = partial(_cifar, 14)
resnet20 = partial(_cifar, 20)
resnet32 = partial(_cifar, 32)
resnet56 = partial(_cifar, 56)


def resnet50_cifar(*, input_shape: tuple[int, ...], classes: int, width: int = 64) -> ResNet:
    """ResNet-50 for small images: 3x3 stem without stride or pooling, classifier without bias (GraNet's variant)."""
    channels, _, _ = image_shape("resnet50-cifar", input_shape)
    return ResNet(channels, classes, Bottleneck, (3, 4, 6, 3), width, head_bias=False)


def resnet50(*, input_shape: tuple[int, ...], classes: int, width: int = 64) -> ResNet:
    """ResNet-50 for ImageNet: 7x7 stem with stride 2 and max-pooling, stride of a block in its 3x3 convolution."""
    channels, _, _ = image_shape("resnet50", input_shape)
    return ResNet(channels, classes, Bottleneck, (3, 4, 6, 3), width, large_images=True)
