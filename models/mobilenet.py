"""MobileNetV1 (Howard et al., arXiv 1704.04861)."""

from __future__ import annotations

from torch import Tensor, nn

from sparsepipe.models.common import image_shape, initialise

# Output channels and stride of the 13 separable convolutions, table 1 of the paper.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
_LARGE = 64
"""Images of at least this side, in pixels, are halved by the stem, as in the paper."""


class Separable(nn.Module):
    """A depthwise 3x3 convolution and a pointwise one, each with norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.depthwise(x)))
        result: Tensor = self.relu(self.bn2(self.pointwise(x)))
        return result


class MobileNetV1(nn.Module):
    def __init__(self, channels: int, classes: int, stem_stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        blocks: list[nn.Module] = []
        inputs = 32
        for outputs, stride in _BLOCKS:
            blocks.append(Separable(inputs, outputs, stride))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, C, H, W]."""
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def mobilenet_v1(*, input_shape: tuple[int, ...], classes: int) -> MobileNetV1:
    """MobileNetV1 of full width; on small images the stem keeps the resolution."""
    channels, height, width = image_shape("mobilenet-v1", input_shape)
    return MobileNetV1(channels, classes, stem_stride=2 if min(height, width) >= _LARGE else 1)
