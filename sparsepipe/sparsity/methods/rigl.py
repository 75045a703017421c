"""RigL: rigging the lottery (arXiv 1911.11134)."""

from __future__ import annotations

from torch import Tensor

from sparsepipe.sparsity import scores
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.network import Network


class RigL(DropGrow):
    """Grow by the magnitude of the dense gradient."""

    name = "rigl"

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        return scores.gradient(network.gradients[name])
