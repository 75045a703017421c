"""SNFS: sparse networks from scratch, or sparse momentum (arXiv 1907.04840)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.network import Network


class SNFS(DropGrow):
    """Grow by |momentum|, a running mean of the dense gradient, and give each layer in proportion to its mean.

    It takes the dense gradient of every step until the masks are final, and four bytes for each sparse weight.

    Args:
        momentum: share beta of the old mean in m = beta m + (1 - beta) g.
        redistribution: see `DropGrow`; `score` is the paper's, the mean |momentum| of a layer's active weights.
        **shared: the options of `DropGrow`.
    """

    name = "snfs"

    def __init__(self, *, momentum: float = 0.9, redistribution: str = "score", **shared: Any) -> None:
        super().__init__(redistribution=redistribution, **shared)
        self.momentum = options.number("momentum", momentum, high=1, below=True)

    @property
    def dense_gradient_every(self) -> int | None:
        return 0

    def needs_gradients(self, network: Network, step: int) -> bool:
        return not self.masks_final(network, step - 1)

    def after_step(self, network: Network, step: int) -> None:
        for name, gradient in network.gradients.items():
            wide = scores.wide(gradient)
            if name in network.averages:
                network.averages[name].lerp_(wide, 1 - self.momentum)
            else:
                network.averages[name] = wide * (1 - self.momentum)
        super().after_step(network, step)
        if self.masks_final(network, step):
            network.averages.clear()

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        return network.averages[name].abs()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "momentum": self.momentum}
