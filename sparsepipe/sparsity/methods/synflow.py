"""SynFlow: pruning without any data by iteratively conserving synaptic flow (arXiv 2006.05467)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from sparsepipe.sparsity import options
from sparsepipe.sparsity.before import BeforeTraining
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.samples import Samples


class SynFlow(BeforeTraining):
    """Keep the weights of largest |w dR/dw|, R the sum of the outputs of the network |w| for an input of ones.

    In `iterations` rounds: after round k of n the density is target^(k/n), and the rest is scored again. In double
    precision and evaluation mode. Of the samples only the shape of an input is used.

    Args:
        iterations: 100 in the paper.
        **shared: the options of `BeforeTraining`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "synflow"

    def __init__(self, *, iterations: int = 100, **shared: Any) -> None:
        super().__init__(**shared)
        self.iterations = options.count("iterations", iterations)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "iterations": self.iterations}

    def masks_of(self, network: Network, samples: Samples) -> dict[str, Tensor]:
        model = deepcopy(samples.model).double().eval()
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.dtype != torch.bool:
                    tensor.abs_()
        parameters = dict(model.named_parameters())
        weights = {name: parameters[name] for name in network.tensors}
        ones = torch.ones_like(samples.batches[0][0][:1], dtype=torch.float64)
        masks: dict[str, Tensor] = {}
        sparsity = self.target.sparsity
        for round_ in range(1, self.iterations + 1):
            flow = model(ones).sum()
            found = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
            scores = {
                name: torch.zeros_like(weight) if each is None else (weight.detach() * each).abs()
                for (name, weight), each in zip(weights.items(), found, strict=True)
            }
            for name, mask in masks.items():
                scores[name] = torch.where(mask, scores[name], -1.0)  # what is gone never comes back
            share = round_ / self.iterations
            progress = (1 - (1 - sparsity) ** share) / sparsity if sparsity and share < 1 else 1.0
            masks = self.chosen(network, scores, progress)
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].mul_(mask)
        return masks
