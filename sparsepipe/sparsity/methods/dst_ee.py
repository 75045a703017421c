"""DST-EE: dynamic sparse training with an exploitation-exploration trade-off (arXiv 2211.16667)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.network import Network


class DSTEE(DropGrow):
    """Grow by |gradient| + c ln(t) / (N + eps), N the number of rounds in which a weight was active.

    The bonus is absolute: it must be of the size of the gradients to matter. Layers' mean |gradient| of 0.005-0.03
    are common, so c = 1e-5 hardly explores, 1e-3 balances and 1e-2 explores; a loss multiplied by k needs c times k.

    Args:
        c: weight of exploration; 0 makes the method equal to RigL bit for bit.
        eps: positive remainder; a small one puts never-active weights before all others.
        **shared: the options of `DropGrow`.
    """

    name = "dst-ee"

    def __init__(self, *, c: float = 1e-3, eps: float = 1.0, **shared: Any) -> None:
        super().__init__(**shared)
        self.c = options.number("c", c)
        self.eps = options.positive("eps", eps)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "c": self.c, "eps": self.eps}

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        return scores.acquisition(network.gradients[name], network.masks.counters[name], step, self.c, self.eps)
