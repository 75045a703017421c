"""Wide residual networks with pre-activation (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from sparsepipe.models.common import image_shape, initialise


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


class PreActivation(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; a 1x1 convolution as shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _conv(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        result: Tensor = self.conv2(self.relu(self.bn2(self.conv1(activated)))) + shortcut
        return result


class WideResNet(nn.Module):
    """Depth 6n+4: three stages of n blocks, 16, 32 and 64 channels times `factor`."""

    def __init__(self, channels: int, classes: int, depth: int, factor: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, 16, 3)
        blocks: list[nn.Module] = []
        inputs = 16
        for number in range(3):
            outputs = 16 * factor * 2**number
            for position in range((depth - 4) // 6):
                blocks.append(PreActivation(inputs, outputs, 2 if number > 0 and position == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W]."""
        x = self.relu(self.bn(self.blocks(self.conv1(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def _wide_resnet(depth: int, factor: int, /, *, input_shape: tuple[int, ...], classes: int) -> WideResNet:
    channels, _, _ = image_shape(f"wrn-{depth}-{factor}", input_shape)
    return WideResNet(channels, classes, depth, factor)


wrn_22_2 = partial(_wide_resnet, 22, 2)
