"""A network of which int8 after training loses much: one channel of its activations is far larger than the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Uneven(nn.Module):
    """Convolutions with batch normalisations, a residual sum, and a channel blown up between the layers."""

    def __init__(self, channels: int, classes: int, largest: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.side = nn.Conv2d(16, 16, 1, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(64, classes)
        with torch.no_grad():  # as much of the blown up channel as of the others
            self.bn1.weight[0] = largest
            for layer in (self.conv, self.side):
                layer.weight[:, 0] /= largest

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        x = self.relu(self.bn2(self.conv(x)) + self.side(x))
        y: Tensor = self.head(self.flat(self.pool(x)))
        return y


def uneven(input_shape: tuple[int, ...], classes: int, largest: float = 300.0) -> nn.Module:
    return Uneven(input_shape[0], classes, largest)


def even(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Uneven(input_shape[0], classes, 1.0)
