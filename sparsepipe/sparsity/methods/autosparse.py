"""AutoSparse: learned thresholds with gradient annealing (arXiv 2304.06941); STR (arXiv 2002.03231) without it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from sparsepipe.sparsity import options
from sparsepipe.sparsity.emergent import Emergent
from sparsepipe.sparsity.forward_top_k import ForwardTopK
from sparsepipe.sparsity.network import Network


def annealed(alpha: float, progress: float, stop: float = 1.0) -> float:
    """alpha max(cosine, sigmoid decay), x the progress: (1 + cos pi x) / 2 and 1 - sigm(12 x - 6); 0 from `stop` on."""
    if progress >= stop:
        return 0.0
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return alpha * max(cosine, 1 - 1 / (1 + math.exp(6 - 12 * progress)))


def annealed_relu(x: Tensor, alpha: float) -> Tensor:
    """max(x, 0), whose derivative is 1 where x > 0 and `alpha` elsewhere."""
    leaky = torch.where(x > 0, x, alpha * x)
    return leaky + (relu(x) - leaky).detach()


class AutoSparse(Emergent):
    """Compute with sign(w) relu(|w| - sigmoid(s)), s learned; what is zero gets alpha_t times its gradient.

    alpha_t falls from `alpha` to 0, by the larger of a cosine and a sigmoid, so that masked weights can come back
    early on and stay out at the end. On `freeze` the weights become what was computed with. The sparsity cannot be set:
    it grows with `threshold_decay` and falls with `alpha`.

    Args:
        alpha: share of the gradient that masked weights get at first.
        alpha_stop: fraction of all steps from which on they get none.
        threshold_init: first s; -5 is a threshold of 0.0067.
        threshold_decay: weight decay of s, which pulls the threshold towards 0.5.
        granularity: `channel`, one s for each output channel, or `layer`.
        threshold_lr: learning rate of s, relative to the optimizer's first group; momentum is 0.9.
        **shared: the options of `Emergent`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "autosparse"

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        alpha_stop: float = 0.9,
        threshold_init: float = -5.0,
        threshold_decay: float = 0.0,
        granularity: str = "channel",
        threshold_lr: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.alpha = options.number("alpha", alpha, high=1)
        self.alpha_stop = options.number("alpha_stop", alpha_stop, high=1)
        self.threshold_init = options.number("threshold_init", threshold_init, low=-1e5)
        self.threshold_decay = options.number("threshold_decay", threshold_decay)
        self.granularity = options.choice("granularity", granularity, ("channel", "layer"))
        self.threshold_lr = options.number("threshold_lr", threshold_lr)

    def attach(self, network: Network) -> None:
        super().attach(network)
        for name in self.sparse_layers(network):
            weight = network.weights[name]
            kept = weight.output_axis if self.granularity == "channel" else None
            shape = [size if axis == kept else 1 for axis, size in enumerate(weight.shape)]
            network.variables[name] = nn.Parameter(weight.parameter.new_full(shape, self.threshold_init))
        thresholds = {"params": list(network.variables.values()), "relative_lr": self.threshold_lr}
        network.own_optimizer = torch.optim.SGD([thresholds], lr=0.1, momentum=0.9, weight_decay=self.threshold_decay)

    def transforms(self, network: Network) -> Collection[str]:
        return self.sparse_layers(network)

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        sign = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
        alpha = annealed(self.alpha, (step - 1) / network.total_steps, self.alpha_stop)
        return sign * annealed_relu(weight * sign - torch.sigmoid(network.variables[name]), alpha)

    def effective(self, network: Network, name: str) -> Tensor:
        return self.transform_weight(network, name, network.weights[name].parameter, network.total_steps, False)

    def describe(self) -> dict[str, Any]:
        own = ("alpha", "alpha_stop", "threshold_init", "threshold_decay", "granularity", "threshold_lr")
        return {**super().describe(), **{key: getattr(self, key) for key in own}}


class STR(AutoSparse):
    """Soft threshold reparametrisation: AutoSparse with alpha = 0, one threshold for each layer, and a decay on it.

    Args:
        alpha: see `AutoSparse`.
        threshold_decay: see `AutoSparse`.
        granularity: see `AutoSparse`.
        **shared: the options of `AutoSparse`.
    """

    name = "str"

    def __init__(
        self, *, alpha: float = 0.0, threshold_decay: float = 5e-4, granularity: str = "layer", **shared: Any
    ) -> None:
        super().__init__(alpha=alpha, threshold_decay=threshold_decay, granularity=granularity, **shared)


class AutoSparseTopK(ForwardTopK):
    """Compute with the weights of largest magnitude, chosen anew at each step; the others get alpha_t of the gradient.

    The form of AutoSparse for a given sparsity, which it has in every step: w * M, M = top-k |w|.

    Args:
        alpha: as of `AutoSparse`; 1 is a straight-through estimator.
        alpha_stop: as of `AutoSparse`.
        **shared: the options of `TargetMethod`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "autosparse-top-k"

    def __init__(self, *, alpha: float = 0.5, alpha_stop: float = 0.9, **shared: Any) -> None:
        super().__init__(**shared)
        self.alpha = options.number("alpha", alpha, high=1)
        self.alpha_stop = options.number("alpha_stop", alpha_stop, high=1)

    @property
    def dense_gradient_every(self) -> int | None:
        return 0

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        alpha = annealed(self.alpha, (step - 1) / network.total_steps, self.alpha_stop)
        mask = network.memory["mask"][name]
        inactive = torch.where(mask, 0.0, weight) * alpha
        return torch.where(mask, weight, 0.0) + (inactive - inactive.detach())

    def after_step(self, network: Network, step: int) -> None:
        self.choose(network)

    def masks_final(self, network: Network, step: int) -> bool:
        return False

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "alpha": self.alpha, "alpha_stop": self.alpha_stop}
