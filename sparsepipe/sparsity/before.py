"""Masks that are chosen once, before training, by scores of the weights as they were initialised."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options
from sparsepipe.sparsity.method import TargetMethod
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.samples import Samples
from sparsepipe.sparsity.selection import top_k


class BeforeTraining(TargetMethod):
    """Keep the weights of highest score, over the whole network unless `distribution` says otherwise.

    Args:
        batches: training batches to score with; in one's own loop, `Sparsifier(..., samples=...)` gives them.
        distribution: see `TargetMethod`; `global` compares scores over all layers.
        **shared: the options of `TargetMethod`.

    Raises:
        RecipeError: an option is out of range or of the wrong type. When the Sparsifier is made: it got no samples.
    """

    def __init__(self, *, batches: int = 1, distribution: str | Mapping[str, float] = "global", **shared: Any) -> None:
        super().__init__(distribution=distribution, **shared)
        self.batches = options.count("batches", batches)

    @property
    def samples_needed(self) -> int:
        return self.batches

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "batches": self.batches}

    @abstractmethod
    def masks_of(self, network: Network, samples: Samples) -> dict[str, Tensor]:
        """The mask of each weight that does not stay dense."""

    def attach(self, network: Network) -> None:
        network.plan(self.target)
        if network.samples is None:
            raise RecipeError(
                f"The method '{self.name}' looks at some training batches before training.",
                where="samples",
                advice="Give them to the Sparsifier: samples=[(inputs, labels), ...], and the loss, if it is another "
                "than the cross-entropy.",
            )
        with network.samples.scoring():
            masks = self.masks_of(network, network.samples)
        network.start(masks)

    def chosen(self, network: Network, scores: Mapping[str, Tensor], progress: float = 1.0) -> dict[str, Tensor]:
        """Masks of the highest scores, on the way from dense (0) to the target (1)."""
        masks = {}
        for name, kept in self.target.kept(network.layers, scores, progress).items():
            layer = network.layers[name]
            if kept < layer.groups:
                score = layer.pattern.scores(scores[name])
                counts = torch.full((layer.rows,), kept, device=score.device)
                rows = top_k(score, counts, torch.ones_like(score, dtype=torch.bool))
                masks[name] = layer.pattern.unfold(rows, layer.shape)
            elif progress == 1:
                self.note_full(network, name)
        return masks

    def gradients(self, network: Network, samples: Samples, temperature: float = 1.0) -> dict[str, Tensor]:
        """Of the mean loss of all samples and processes; zero where a weight has no part in it."""
        tensors = network.tensors
        total = {name: torch.zeros_like(weight) for name, weight in tensors.items()}
        for loss in samples.losses(temperature):
            found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
            for name, gradient in zip(tensors, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
        samples.average(list(total.values()))
        return total
