"""Top-KAST: top-K always sparse training (arXiv 2106.03517)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepipe.sparsity import options
from sparsepipe.sparsity.forward_top_k import ForwardTopK, largest
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.schedule import UpdateSchedule


class TopKAST(ForwardTopK):
    """Compute with the largest weights A; update a larger set B of large weights, so that others can grow into A.

    A = top-k |w|, and B holds `backward` times as many. The gradient of the weights in B that are not in A is that of
    computing with them; weights outside of B keep their first or last values, whatever the optimizer does. Every step
    adds `penalty` times the gradient of |w|^2 / 2 in A, and of |w|^2 / (2 D) in the rest of B, D the density of A in
    that layer: what explores without success shrinks below the weights outside, which then take its place.

    No gradient outside of B is needed; the FLOPs that `train` tells count only that in A. From `stop_at` on A is the
    mask, and the other weights are zero.

    Args:
        backward: weights in B for each in A; at most all of a layer. The paper's 80% and 50% sparse are 2.5.
        penalty: strength of the regularisation, beside the optimizer's weight decay, which acts in B alone.
        update_every: optimizer steps between two choices of A and B.
        stop_at: fraction of all steps from which on the masks stay as they are.
        **shared: the options of `TargetMethod`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "top-kast"

    def __init__(
        self,
        *,
        backward: float = 2.0,
        penalty: float = 1e-4,
        update_every: int = 100,
        stop_at: float = 0.75,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.backward = options.number("backward", backward, low=1)
        self.penalty = options.number("penalty", penalty)
        self.update_every = options.count("update_every", update_every)
        self.stop_at = options.number("stop_at", stop_at, high=1)

    def attach(self, network: Network) -> None:
        network.memory["backward"] = {}
        super().attach(network)
        # The last value of each weight that was in B, which it goes back to when it is in it no more.
        network.memory["held"] = {name: network.tensors[name].clone() for name in network.memory["mask"]}

    def choose(self, network: Network) -> None:
        super().choose(network)
        kept = self.kept(network)
        for name in network.memory["mask"]:
            layer = network.layers[name]
            number = min(round(kept[name] * self.backward), layer.groups)
            network.memory["backward"][name] = largest(network, layer, number)

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        if name not in network.memory["mask"]:
            return weight
        mask = network.memory["mask"][name]
        exploring = torch.where(network.memory["backward"][name] & ~mask, weight, 0.0)
        return torch.where(mask, weight, 0.0) + (exploring - exploring.detach())

    def extra_loss(self, network: Network, step: int) -> Tensor | None:
        losses = []
        for name, mask in network.memory["mask"].items():
            squares = network.weights[name].parameter.square()
            exploring = torch.where(network.memory["backward"][name] & ~mask, squares, 0.0).sum()
            losses.append(torch.where(mask, squares, 0.0).sum() + exploring * (mask.numel() / mask.count_nonzero()))
        return self.penalty / 2 * torch.stack(losses).sum() if losses and self.penalty else None

    def after_step(self, network: Network, step: int) -> None:
        for name, held in network.memory["held"].items():
            weight = network.weights[name].parameter
            held.copy_(torch.where(network.memory["backward"][name], weight, held))
            weight.copy_(held)
        if network.memory["mask"] and step >= self._stop(network):
            self.end(network)
            network.memory["backward"], network.memory["held"] = {}, {}
        elif network.memory["mask"] and UpdateSchedule(self.update_every, 1, self._stop(network)).due(step):
            self.choose(network)

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self._stop(network)

    def describe(self) -> dict[str, Any]:
        own = ("backward", "penalty", "update_every", "stop_at")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}

    def _stop(self, network: Network) -> int:
        return max(int(self.stop_at * network.total_steps), 1)
