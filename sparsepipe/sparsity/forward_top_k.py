"""Methods that compute with the largest weights alone, while the others keep their values until training ends."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsepipe.sparsity import scores
from sparsepipe.sparsity.method import TargetMethod
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer


class ForwardTopK(TargetMethod):
    """Forward passes see w * M, M = top-k |w|; nothing is masked before `end`.

    `transform_weight` has to say what gradient the others get; `network.memory["mask"]` holds M until the end.
    """

    def attach(self, network: Network) -> None:
        network.plan(self.target)
        network.memory["mask"] = {}
        self.choose(network)

    def choose(self, network: Network) -> None:
        """Choose M anew."""
        for name, kept in self.kept(network).items():
            if not self.stays_full(network, name, kept):
                network.memory["mask"][name] = largest(network, network.layers[name], kept)

    def end(self, network: Network) -> None:
        """Make M the masks, for good."""
        for name, mask in network.memory["mask"].items():
            if mask.all():
                self.note_full(network, name)
            else:
                network.change(name, mask)
        network.memory["mask"] = {}
        network.masks.count()

    def transforms(self, network: Network) -> Collection[str]:
        return [*network.memory["mask"]]

    def computed(self, network: Network) -> Mapping[str, Tensor]:
        return network.memory["mask"]

    def finalize(self, network: Network) -> None:
        if network.memory["mask"]:
            self.end(network)

    def metrics(self, network: Network, step: int) -> dict[str, Any]:
        masks = {name: network.memory["mask"].get(name, mask) for name, mask in network.masks.items()}
        nnz = sum(int(mask.count_nonzero()) for mask in masks.values())
        density = {name: int(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}
        return {"sparsity": 1 - nnz / network.masks.size, "density": density}


def largest(network: Network, layer: Layer, kept: int) -> Tensor:
    """Mask of the `kept` groups of highest magnitude in each row of a layer."""
    score = layer.pattern.scores(scores.magnitude(network.weights[layer.name].parameter))
    counts = torch.full((layer.rows,), kept, device=score.device)
    return layer.pattern.unfold(top_k(score, counts, torch.ones_like(score, dtype=torch.bool)), layer.shape)
