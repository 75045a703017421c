"""SRigL: RigL with constant fan-in and neuron ablation (arXiv 2305.02299)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepipe.sparsity import options
from sparsepipe.sparsity.drop_grow import GrowByGradient
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pattern import ConstantFanIn, Pattern
from sparsepipe.sparsity.selection import top_k
from sparsepipe.sparsity.target import Layer


class SRigL(GrowByGradient):
    """Every neuron keeps equally many weights, and one that has few worth keeping loses all of them, for good.

    In each layer with n active weights in neurons of fan-in k, K = fraction n. Salient are the n - K active weights of
    largest magnitude and the K inactive ones of largest |gradient|. Neurons with fewer than
    max(1, `min_salient` k) salient weights are ablated, and the others get the fan-in floor(n_target / live neurons).
    Then the K weights of lowest magnitude are dropped, and each live neuron grows by |gradient| up to that fan-in.

    The floor leaves less than one weight for each live neuron unused, so the target is not met exactly.

    Args:
        min_salient: gamma_sal: 0.3 in the paper; 0 ablates only neurons without any salient weight.
        ablation: whether to ablate neurons at all.
        pattern: `constant-fan-in`; layers that an override gives another pattern follow RigL.
        **shared: the options of `DropGrow`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "srigl"

    def __init__(
        self,
        *,
        min_salient: float = 0.3,
        ablation: bool = True,
        pattern: str | Pattern = "constant-fan-in",
        **shared: Any,
    ) -> None:
        super().__init__(pattern=pattern, **shared)
        self.min_salient = options.number("min_salient", min_salient, high=1)
        self.ablation = options.flag("ablation", ablation)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "min_salient": self.min_salient, "ablation": self.ablation}

    def attach(self, network: Network) -> None:
        super().attach(network)
        # Ablation lowers the count, and `global` would spread it anew by the weights of each moment.
        network.memory["budget"] = {name: torch.tensor(network.masks.nnz_of(name)) for name in network.masks.counters}

    def _update(
        self, network: Network, layers: Sequence[Layer], fraction: float, step: int, limits: Mapping[str, int]
    ) -> None:
        neurons = [layer for layer in layers if self.ablation and isinstance(layer.pattern, ConstantFanIn)]
        if others := [layer for layer in layers if layer not in neurons]:
            super()._update(network, others, fraction, step, limits)
        for layer in neurons:
            magnitude = layer.pattern.scores(self.drop_score(network, layer.name))
            gradient = layer.pattern.scores(self.grow_score(network, layer.name, step))
            active = layer.pattern.rows(network.masks[layer.name])
            budget = int(network.memory["budget"][layer.name])
            rows = self._rewired(magnitude, gradient, active, fraction, budget)
            network.change(layer.name, layer.pattern.unfold(rows, layer.shape))

    def _rewired(self, magnitude: Tensor, gradient: Tensor, active: Tensor, fraction: float, budget: int) -> Tensor:
        """The groups [neurons, inputs] that are active after the update."""
        live, nnz = active.any(dim=1), int(active.sum())
        changing = min(int(nnz * fraction), int((~active & live[:, None]).sum()))
        kept = _best(magnitude, active, nnz - changing)
        salient = (kept | _best(gradient, ~active & live[:, None], changing)).sum(dim=1)
        enough = live & (salient >= max(1.0, self.min_salient * nnz / int(live.sum())))
        if enough.any():  # a layer without any neuron would cut the network in two
            live = enough
        kept = kept & live[:, None]
        fan_in = min(budget // int(live.sum()), active.shape[1])
        missing = (fan_in - kept.sum(dim=1)).clamp(min=0) * live
        if self.exclude_just_dropped:
            gradient = torch.where(active, -1.0, gradient)  # below all others: where nothing else is left
        return kept | top_k(gradient, missing, ~kept & live[:, None])


def _best(score: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` candidates of highest score in the whole layer."""
    flat = candidates.reshape(1, -1)
    counts = flat.sum(dim=1).clamp(max=count)
    return top_k(score.reshape(1, -1), counts, flat).reshape(candidates.shape)
