"""Batches and a loss, for methods that choose their masks before training by what the loss says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs of the model, labels) -> a scalar, the mean over the batch."""


@dataclass(frozen=True)
class Samples:
    """Some of the training batches of a model; scoring with them leaves no trace in the model."""

    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    loss: Loss
    average: Callable[[Sequence[Tensor]], None]
    """Replaces tensors by their means over the processes, each of which has batches of its own."""

    def losses(self, temperature: float = 1.0) -> Iterator[Tensor]:
        """The loss of each batch, as a share of the mean over all, with a graph; outputs are divided first."""
        for inputs, labels in self.batches:
            yield self.loss(self.model(inputs) / temperature, labels) / len(self.batches)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Track gradients; buffers, as batch statistics, and random state are put back when the block ends."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [buffer.device for buffer in self.model.parameters() if buffer.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
        for buffer, value in buffers:
            buffer.copy_(value)
