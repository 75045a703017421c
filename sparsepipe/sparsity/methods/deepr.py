"""DeepR: deep rewiring (Bellec, Kappel, Maass, Legenstein, arXiv 1711.05136)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.method import SparseFromStart
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.selection import top_k


class DeepR(SparseFromStart):
    """Each active weight has a fixed sign s; one that crosses zero is dropped, and another grows at random.

    With theta = s w, after each step of the optimizer: theta <- theta - lr l1 + sqrt(2 lr T) nu, nu ~ N(0, 1).
    Where theta < 0 the weight is dropped, and as many of all inactive ones grow at 0 with random signs. In patterns,
    theta is summed over a group. The defaults are ours: those of the paper belong to its tasks.

    Args:
        l1: drift of every active weight towards zero.
        temperature: T, of the random walk; 0 leaves it out.
        update_every: optimizer steps between two rewirings: 1 in the paper.
        stop_at: fraction of all steps from which on the masks stay as they are, without drift and noise.
        **shared: the options of `SparseFromStart`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "deepr"

    def __init__(
        self,
        *,
        l1: float = 1e-4,
        temperature: float = 1e-8,
        update_every: int = 1,
        stop_at: float = 0.75,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.l1 = options.number("l1", l1)
        self.temperature = options.number("temperature", temperature)
        self.update_every = options.count("update_every", update_every)
        self.stop_at = options.number("stop_at", stop_at, high=1)

    def describe(self) -> dict[str, Any]:
        own = ("l1", "temperature", "update_every", "stop_at")
        return {**super().describe(), **{option: getattr(self, option) for option in own}}

    def attach(self, network: Network) -> None:
        super().attach(network)
        network.memory["sign"] = {
            name: torch.where(network.tensors[name] < 0, -1, 1).to(torch.int8) for name in network.masks.counters
        }

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= int(self.stop_at * network.total_steps)

    def after_step(self, network: Network, step: int) -> None:
        if self.masks_final(network, step):
            network.memory.pop("sign", None)
            return
        for name in network.masks.counters:
            self._drift(network, name, step)
            if step % self.update_every == 0:
                self._rewire(network, name, step)
        if step % self.update_every == 0:
            network.masks.count()

    def _drift(self, network: Network, name: str, step: int) -> None:
        weight, mask, lr = network.tensors[name], network.masks[name], network.lr(name)
        move = network.memory["sign"][name].to(weight.dtype) * (-lr * self.l1)
        if self.temperature:
            # Two uniform scores make a normal one, so that the noise is a function of seed, name and step.
            radius, angle = (scores.random(weight, network.seed, f"{name}/{part}", step) for part in "ra")
            normal = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
            move = move + math.sqrt(2 * lr * self.temperature) * normal.to(weight.dtype)
        weight.add_(move * mask)

    def _rewire(self, network: Network, name: str, step: int) -> None:
        weight, sign, layer = network.tensors[name], network.memory["sign"][name], network.layers[name]
        pattern = layer.pattern
        theta: Tensor = pattern.scores(scores.wide(weight) * sign)
        active = pattern.rows(network.masks[name])
        dropped = active & (theta < 0)
        if not dropped.any():
            return
        kept = active & ~dropped
        grown = top_k(scores.random(theta, network.seed, name, step), dropped.sum(dim=1), ~kept)
        born = pattern.unfold(grown, layer.shape)
        signs = torch.where(scores.random(weight, network.seed, f"{name}/sign", step) < 0.5, -1, 1)
        sign.copy_(torch.where(born, signs, sign))
        network.change(name, pattern.unfold(kept | grown, layer.shape))
        weight.masked_fill_(born, 0)  # also what was dropped and grown at once
