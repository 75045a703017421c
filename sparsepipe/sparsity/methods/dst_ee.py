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
        relative_c: take `c` in units of the layer's mean |gradient| at the update, so that neither the scale of the
            loss nor that of a layer matters; an extension, not in the paper.
        **shared: the options of `DropGrow`.
    """

    name = "dst-ee"

    def __init__(self, *, c: float = 1e-3, eps: float = 1.0, relative_c: bool = False, **shared: Any) -> None:
        super().__init__(**shared)
        self.c = options.number("c", c)
        self.eps = options.positive("eps", eps)
        self.relative_c = options.flag("relative_c", relative_c)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "c": self.c, "eps": self.eps, "relative_c": self.relative_c}

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        gradient = network.gradients[name]
        c = self.c * float(scores.gradient(gradient).mean()) if self.relative_c else self.c
        return scores.acquisition(gradient, network.masks.counters[name], step, c, self.eps)
