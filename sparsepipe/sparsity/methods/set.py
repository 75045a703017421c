"""SET: sparse evolutionary training (doi 10.1038/s41467-018-04316-3)."""

from __future__ import annotations

from torch import Tensor

from sparsepipe.sparsity import scores
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.network import Network


class SET(DropGrow):
    """Grow at random; needs no dense gradient."""

    name = "set"
    grows_by_gradient = False

    def grow_score(self, network: Network, name: str, step: int) -> Tensor:
        return scores.random(network.weights[name].parameter, network.seed, name, step)
