"""Bring your own network and your own data: both are functions, named as `module:function`.

cd examples
sparsepipe run quickstart.toml --out ../runs/own --set model=own_network:network --set data=own_network:dataset
"""

from __future__ import annotations

import numpy as np
from torch import nn


def network(input_shape: tuple[int, ...], classes: int, width: int = 32) -> nn.Module:
    """A small convolutional network.

    Args:
        input_shape: (C, H, W) of one sample.
        classes: number of classes.
        width: channels of the first convolution; set it with --set model.width=64.
    """
    return nn.Sequential(
        nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def dataset(samples: int = 2000) -> dict[str, np.ndarray]:
    """Images of horizontal and vertical stripes under noise, as arrays: uint8 [N, H, W, C] and int64 [N]."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, samples)
    stripes = np.where(np.arange(16) % 4 < 2, 200, 50)
    images = np.where(labels[:, None, None] == 0, stripes[None, :, None], stripes[None, None, :])
    noisy = np.clip(images + generator.normal(0, 60, (samples, 16, 16)), 0, 255).astype(np.uint8)[..., None]
    test = samples // 5
    return {
        "x_train": noisy[test:],
        "y_train": labels[test:],
        "x_test": noisy[:test],
        "y_test": labels[:test],
    }
