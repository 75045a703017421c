"""Networks for trainings that are to be killed, or to fail in one of their processes."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn


class Slow(nn.Sequential):
    """A perceptron that takes a moment for each training batch."""

    calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
            self.calls += 1
        logits: Tensor = super().forward(inputs)
        return logits


class Failing(Slow):
    """Its loss becomes infinite in the fifth batch of process 1."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = super().forward(inputs)
        fails = self.training and self.calls == 5 and os.environ.get("RANK") == "1"
        return logits * torch.inf if fails else logits


def slow(input_shape: tuple[int, ...], classes: int, dropout: float = 0.0) -> nn.Module:
    hidden = 32
    return Slow(
        nn.Flatten(), nn.Linear(64, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 10)
    )


def failing(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Failing(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
