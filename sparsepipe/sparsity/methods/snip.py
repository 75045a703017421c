"""SNIP: single-shot network pruning by connection sensitivity (arXiv 1810.02340)."""

from __future__ import annotations

from torch import Tensor

from sparsepipe.sparsity import scores
from sparsepipe.sparsity.before import BeforeTraining
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.samples import Samples


class SNIP(BeforeTraining):
    """Keep the weights of largest |w dL/dw| over the whole network, once, before training."""

    name = "snip"

    def masks_of(self, network: Network, samples: Samples) -> dict[str, Tensor]:
        gradients = self.gradients(network, samples)
        sensitivity = {
            name: (scores.wide(weight) * scores.wide(gradients[name])).abs() for name, weight in network.tensors.items()
        }
        return self.chosen(network, sensitivity)
