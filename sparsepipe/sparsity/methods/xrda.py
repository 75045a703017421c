"""xRDA: adaptively weighted l1 by generalised regularised dual averaging (arXiv 2008.09661)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch

from sparsepipe.sparsity import options
from sparsepipe.sparsity.emergent import Emergent
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.proximal import soft_threshold

MILESTONES = tuple((60 + 40 * index) / 450 for index in range(10))
"""Fractions of all steps at which the stepped schedule halves the step size; the paper's epochs 60, 100, ... of 450."""


class XRDA(Emergent):
    """Moves the weights itself, by the proximal step of an l1 penalty that spares large weights.

        R <- e^(-s/m) R + (1 - e^(-s/m)) |p|        running magnitude
        c  = M / (1 + (M - 1) R / max R)            weight of the penalty, in [1, M]
        B <- a B + s c                              threshold, accumulated
        q <- a q + (1 - a) p
        v <- e^(-s/m) v + (1 - e^(-s/m)) (g + wd p)
        q <- q - s v,   p <- soft_threshold(q, lam B)

    a = 0 is proximal SGD, a near 1 dual averaging. step_size = 1 and momentum_time = 9.5 are SGD with momentum 0.9 and
    learning rate 0.1. The optimizer trains what is no masked weight, with its own schedule. The sparsity cannot be set:
    it grows with `lam`.

    Args:
        lam: strength of the penalty.
        step_size: s at first.
        momentum_time: m.
        maximum_factor: M; 1 is the ordinary l1 norm.
        weight_decay: wd.
        schedule: `cosine`: s = s0 (1 + cos(pi x)) / 2 and a = (1 - cos(pi x)) / 2, x the progress; `stepped`: s and
            1 - a are halved at ten milestones.
        averaging: multiplies a; 0 keeps a = 0.
        **shared: the options of `Emergent`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "xrda"

    def __init__(
        self,
        *,
        lam: float = 1e-6,
        step_size: float = 1.0,
        momentum_time: float = 9.5,
        maximum_factor: float = 500.0,
        weight_decay: float = 5e-4,
        schedule: str = "cosine",
        averaging: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.lam = options.number("lam", lam)
        self.step_size = options.positive("step_size", step_size)
        self.momentum_time = options.positive("momentum_time", momentum_time)
        self.maximum_factor = options.number("maximum_factor", maximum_factor, low=1)
        self.weight_decay = options.number("weight_decay", weight_decay)
        self.schedule = options.choice("schedule", schedule, ("cosine", "stepped"))
        self.averaging = options.number("averaging", averaging, high=1)

    def attach(self, network: Network) -> None:
        super().attach(network)
        weights = {name: network.weights[name].parameter for name in self.sparse_layers(network)}
        network.memory["q"] = {name: weight.detach().clone() for name, weight in weights.items()}
        for kind in ("magnitude", "threshold", "velocity"):
            network.memory[kind] = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def owned(self, network: Network) -> Collection[str]:
        return self.sparse_layers(network)

    def sizes(self, progress: float) -> tuple[float, float]:
        """Step size s and averaging a at a progress in [0, 1]."""
        if self.schedule == "cosine":
            share = (1 + math.cos(math.pi * progress)) / 2
        else:
            share = 0.5 ** sum(progress >= milestone for milestone in MILESTONES)
        return self.step_size * share, self.averaging * (1 - share)

    def after_step(self, network: Network, step: int) -> None:
        size, averaging = self.sizes((step - 1) / network.total_steps)
        keep = math.exp(-size / self.momentum_time)
        for name in self.owned(network):
            gradient = network.gradients.get(name)
            if gradient is None:
                continue
            weight = network.weights[name].parameter
            q, magnitude, threshold, velocity = (
                network.memory[kind][name] for kind in ("q", "magnitude", "threshold", "velocity")
            )
            magnitude.lerp_(weight.abs(), 1 - keep)
            factor = self.maximum_factor
            relative = magnitude / magnitude.max().clamp(min=torch.finfo(magnitude.dtype).tiny)
            threshold.mul_(averaging).add_(size * factor / (1 + (factor - 1) * relative))
            q.lerp_(weight, 1 - averaging)
            velocity.lerp_(gradient + self.weight_decay * weight, 1 - keep)
            q.sub_(velocity, alpha=size)
            weight.copy_(soft_threshold(q, self.lam * threshold))

    def describe(self) -> dict[str, Any]:
        own = ("lam", "step_size", "momentum_time", "maximum_factor", "weight_decay", "schedule", "averaging")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}
