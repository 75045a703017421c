"""GraSP: picking winning tickets by preserving gradient flow (arXiv 2002.07376)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.before import BeforeTraining
from sparsepipe.sparsity.curvature import hessian_times
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.samples import Samples


class GraSP(BeforeTraining):
    """Keep the weights of largest w (H g): without those of largest -w (H g) the gradient keeps most of its norm.

    g is the gradient and H the Hessian of the loss at the start; H g comes from a second pass through the graph. Scores
    over all layers can leave the last layer of a small network almost nothing; `distribution="erk"` prevents that.

    Args:
        temperature: outputs are divided by it before the loss: 200 in the paper's code.
        **shared: the options of `BeforeTraining`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "grasp"

    def __init__(self, *, temperature: float = 200.0, **shared: Any) -> None:
        super().__init__(**shared)
        self.temperature = options.positive("temperature", temperature)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "temperature": self.temperature}

    def masks_of(self, network: Network, samples: Samples) -> dict[str, Tensor]:
        tensors = network.tensors
        flow = self.gradients(network, samples, self.temperature)
        losses = samples.losses(self.temperature)
        found = hessian_times(losses, list(tensors.values()), [flow[name] for name in tensors])
        products = dict(zip(tensors, found, strict=True))
        samples.average(list(products.values()))
        return self.chosen(
            network,
            {name: scores.wide(weight) * scores.wide(products[name]) for name, weight in tensors.items()},
        )
