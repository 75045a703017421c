"""Directional pruning by generalised regularised dual averaging, gRDA (arXiv 2006.09358), and its group form."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparsepipe.sparsity import options
from sparsepipe.sparsity.emergent import Emergent
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.proximal import group_soft_threshold, soft_threshold


class Directional(Emergent):
    """Plain SGD on a hidden copy of the weights, which are its soft thresholds.

        v <- v - lr g
        t <- t + c lr^(mu + 1/2) (n^mu - (n - 1)^mu)     c lr^(mu + 1/2) n^mu for a constant lr
        w  = sign(v) max(|v| - t, 0)

    v is not thresholded, so weights come back. It prunes in the flat directions around where SGD goes, without leaving
    its valley. The learning rate is the loop's, and one that suits SGD without momentum; the optimizer's momentum and
    weight decay act on other parameters alone. The sparsity cannot be set: it grows with `c` and `mu`.

    Args:
        mu: in (0.5, 1) for the theory to hold.
        c: strength; tune it by a few epochs. 0 is plain SGD.
        **shared: the options of `Emergent`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "directional"

    def __init__(self, *, mu: float = 0.51, c: float = 5e-3, **shared: Any) -> None:
        super().__init__(**shared)
        self.mu = options.number("mu", mu, high=1)
        self.c = options.number("c", c)

    def attach(self, network: Network) -> None:
        super().attach(network)
        weights = {name: network.weights[name].parameter for name in self.sparse_layers(network)}
        network.memory["hidden"] = {name: weight.detach().clone() for name, weight in weights.items()}
        network.memory["threshold"] = {f"{name} threshold": torch.zeros((), dtype=torch.float64) for name in weights}

    def owned(self, network: Network) -> Collection[str]:
        return self.sparse_layers(network)

    def after_step(self, network: Network, step: int) -> None:
        for name, hidden in network.memory["hidden"].items():
            if name in network.gradients:
                lr = network.lr(name)
                threshold = network.memory["threshold"][f"{name} threshold"]
                hidden.sub_(network.gradients[name], alpha=lr)
                threshold.add_(self.c * lr ** (self.mu + 0.5) * (step**self.mu - (step - 1) ** self.mu))
                network.weights[name].parameter.copy_(self.shrunk(hidden, float(threshold)))

    def shrunk(self, hidden: Tensor, threshold: float) -> Tensor:
        """The weight that belongs to a hidden copy."""
        return soft_threshold(hidden, threshold)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "mu": self.mu, "c": self.c}


class StructuredDirectional(Directional):
    """The same for whole output channels: w_g = v_g max(0, 1 - t sqrt(|g|) / ||v_g||), g a row of the weight.

    The group form of gRDA, in the sense of structured directional pruning (arXiv 2107.05328), whose own solver it does
    not claim to be.

    Args:
        last_linear: `dense` by default, as the rows of the last layer are the classes.
        **shared: the options of `Directional`.
    """

    name = "structured-directional"

    def __init__(self, *, last_linear: str = "dense", **shared: Any) -> None:
        super().__init__(last_linear=last_linear, **shared)

    def shrunk(self, hidden: Tensor, threshold: float) -> Tensor:
        return group_soft_threshold(hidden, threshold)
