"""Optimizers with the parameter groups that weight decay needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsepipe.errors import RecipeError


def create(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    decay_norms: bool,
) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters of `model`.

    Args:
        name: sgd or adamw.
        model: the network.
        lr: base learning rate.
        weight_decay: L2 penalty (sgd) or decoupled decay (adamw).
        momentum: sgd only.
        nesterov: sgd only; has no meaning without momentum.
        betas: adamw only.
        decay_norms: whether the decay also acts on parameters with fewer than two dimensions: biases and norms.

    Raises:
        RecipeError: the name is unknown.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not decay_norms:
        groups = [
            {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
            {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
        ]
    if name == "sgd":
        return torch.optim.SGD(
            groups, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov and momentum > 0
        )
    if name == "adamw":
        # On a CPU the other forms take square roots by a library that is slow at zero: a step of a sparse network then
        # costs 1.6 times that of a dense one. The fused one is four times faster for both.
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)
    raise RecipeError(f"There is no optimizer '{name}'.", where="optimizer", advice="Known: sgd, adamw.")
