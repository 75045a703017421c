"""An exponential moving average of a network while it is trained, as sparse as the network."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sparsepipe.errors import ModelError
from sparsepipe.plugins import failure
from sparsepipe.sparsity.sparsifier import Sparsifier


class Average:
    """average <- d * average + (1 - d) * network after each step, over weights, biases and batch statistics.

    d = min(decay, (1 + n) / (10 + n)) after n steps, so that a short training does not average its random start; as
    in `tf.train.ExponentialMovingAverage` with `num_updates`. Where a mask changes, dropped and grown weights become
    zero in the average as in the network.

    Args:
        network: in its memory format and on its device; not a wrapper of it.
        sparsifier: of `network`.
        decay: in (0, 1).

    Raises:
        ModelError: the network cannot be copied.
    """

    def __init__(self, network: nn.Module, sparsifier: Sparsifier, decay: float) -> None:
        try:
            self.network = deepcopy(network).requires_grad_(False)
        except Exception as error:  # tensors that are computed from others, or whatever the user's code raises
            raise ModelError(
                f"The network cannot be copied, which an average of its weights needs: {failure(error)}.",
                where="train.ema",
                advice="Set train.ema = 0.",
            ) from error
        sparsifier.follow(self.network)
        self._decay = decay
        self._updates = 0
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network as it is after a step."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        averages, values = zip(*self._floats, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        for counted, value in self._others:
            counted.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "network": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._updates = int(state["updates"])
        self.network.load_state_dict(state["network"])


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
