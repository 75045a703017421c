"""Extrapolation: gradients at a point a little ahead of the weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.network import Network

KIND = "extrapolation"


class Extrapolation(Modifier):
    """Extrapolated SGD ("EXTRAP-SGD", arXiv 2006.05720).

        w' = w - rate * lr * zeta        g = gradient at w'        w <- optimizer(w, g)

    zeta is the gradient of the step before (`past`, no further pass), or that of the same batch at w (`current`, the
    extragradient method, one more forward and backward pass). rate = 0 is the optimizer alone, bit for bit. Forward
    passes in evaluation mode compute with w. Inactive weights are not shifted, as their zeta is zero.

    Only the weights that methods can mask are shifted: biases and normalisation parameters stay. Where several
    processes train together, zeta is each one's own gradient (the paper's local extrapolation): every process computes
    at another point, and the average of their gradients is that of a smoother loss.

    Args:
        rate: the inner learning rate, relative to lr, the optimizer's for that weight at the step that zeta is of: it
            follows schedules, so that rates below 1 stay below the step itself. `current` with momentum diverges for
            rates near 1; it takes the learning rate that the loop has set, not that of another modifier or the method.
        gradient: `past` or `current`; `current` needs a loop that asks `Sparsifier.transform_batch`, and the loss that
            the Sparsifier was given.
        local: false takes the average of the past gradients of all processes; for `past`, and for a loss that is
            scaled (fp16), of which the processes' own gradients cannot be told.

    Raises:
        RecipeError: an option is out of range. When the Sparsifier is made: the method transforms weights in forward
            passes, and zeta would be taken before the chain rule (`current`, and `local` in several processes).
    """

    name: ClassVar[str] = "extrapolation"
    local_memory: ClassVar[tuple[str, ...]] = (KIND,)

    def __init__(self, *, rate: float = 0.1, gradient: str = "past", local: bool = True) -> None:
        self.rate = options.number("rate", rate)
        self.gradient = options.choice("gradient", gradient, ("past", "current"))
        self.local = options.flag("local", local)

    def needs_local_gradients(self, network: Network) -> bool:
        return self.local and self.gradient == "past" and network.processes > 1

    def check_fit(self, network: Network, method: Method) -> None:
        if method.transforms(network) and (self.gradient == "current" or self.needs_local_gradients(network)):
            raise RecipeError(
                f"The gradients that extrapolation takes here are not those of weights, but of what '{method.name}' "
                "makes of them.",
                where="modifiers.extrapolation",
                advice='Set gradient = "past" and local = false.',
            )

    def transforms(self, network: Network) -> Collection[str]:
        return network.weights.keys()

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        zeta = network.memory.get(KIND, {}).get(name)
        if zeta is None or not training:
            return weight
        return weight - self.rate * zeta

    def transform_batch(
        self, network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        if self.gradient == "current":
            network.memory.pop(KIND, None)
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            own = {name: each for name, each in network.tensors.items() if each.requires_grad}
            with torch.enable_grad():
                loss = network.loss(model(inputs), labels)
                found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
            with torch.no_grad():
                for buffer, before in buffers:  # batch statistics count a batch once
                    buffer.copy_(before)
            self._remember(network, dict(zip(own, found, strict=True)))
        return inputs, labels

    def before_step(self, network: Network, step: int) -> None:
        if self.gradient == "current":
            return
        if network.local_gradients:
            self._remember(network, network.local_gradients)
            return
        scale = getattr(network.optimizer, "grad_scale", None)  # fused optimizers unscale in the step itself
        self._remember(
            network,
            {
                name: each.grad if each.grad is None or scale is None else each.grad / scale
                for name, each in network.tensors.items()
            },
        )

    def after_step(self, network: Network, step: int) -> None:
        if self.gradient == "current":
            network.memory.pop(KIND, None)
            return
        for name, zeta in network.memory.get(KIND, {}).items():
            if name in network.masks.counters:  # weights that this step dropped stay where they are, at zero
                zeta.mul_(network.masks[name])

    @staticmethod
    def _remember(network: Network, gradients: Mapping[str, Tensor | None]) -> None:
        """Keep lr * zeta: the learning rate of the step to come is not known before the loop and the method set it."""
        masks = network.masks
        network.memory[KIND] = {
            name: network.lr(name) * (gradient * masks[name] if name in masks.counters else gradient).detach()
            for name, gradient in gradients.items()
            if gradient is not None
        }

    def describe(self) -> dict[str, Any]:
        return {"rate": self.rate, "gradient": self.gradient, "local": self.local}
