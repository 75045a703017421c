"""Methods whose sparsity emerges: weights become zero by themselves, and the masks are what training left."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.target import Target

log = logging.getLogger("sparsepipe")


class Emergent(Method):
    """Nothing is masked until `finalize`, which makes the weights what evaluation computes with, zeros and all.

    Args:
        overrides: tables of `layers` (a glob) and `dense = true`: layers that the method leaves alone.
        first_conv: `dense` or `sparse`; `auto` is `sparse`.
        last_linear: `dense` or `sparse`.

    Raises:
        RecipeError: an option is of the wrong type, or an override asks for a sparsity or a pattern.
    """

    def __init__(
        self,
        *,
        overrides: Iterable[Mapping[str, Any]] = (),
        first_conv: str = "auto",
        last_linear: str = "sparse",
    ) -> None:
        self.target = Target.of(0.0, "erk", "unstructured", overrides, first_conv, last_linear)
        for override in self.target.overrides:
            if not override.dense:
                raise RecipeError(
                    f"The method '{self.name}' finds the sparsity of each layer itself, so '{override.layers}' cannot "
                    "be given one.",
                    where="overrides",
                    advice="Leave the override out, or set dense = true to keep the layer as it is.",
                )

    @property
    def dense_gradient_every(self) -> int | None:
        return 0

    def effective(self, network: Network, name: str) -> Tensor:
        """The weight that evaluation computes with."""
        return network.weights[name].parameter

    def attach(self, network: Network) -> None:
        network.plan(self.target)

    def sparse_layers(self, network: Network) -> list[str]:
        """Names of the weights that the method works on."""
        return [name for name, layer in network.layers.items() if not layer.dense_because]

    def finalize(self, network: Network) -> None:
        for name in self.sparse_layers(network):
            weight = network.weights[name].parameter
            weight.copy_(self.effective(network, name))
            network.change(name, weight != 0)
            if not network.masks.nnz_of(name):
                log.warning("'%s' has no weight left: what comes after it is constant.", name)
        network.masks.count()

    def masks_final(self, network: Network, step: int) -> bool:
        return False

    def metrics(self, network: Network, step: int) -> dict[str, Any]:
        density = dict.fromkeys(network.weights, 1.0)
        nnz = {name: weight.parameter.numel() for name, weight in network.weights.items()}
        for name in self.sparse_layers(network):
            nnz[name] = int(self.effective(network, name).count_nonzero())
            density[name] = nnz[name] / network.weights[name].parameter.numel()
        return {"sparsity": 1 - sum(nnz.values()) / network.masks.size, "density": density}

    def describe(self) -> dict[str, Any]:
        overrides = [entry.layers for entry in self.target.overrides]
        policies = {"first_conv": self.target.first_conv, "last_linear": self.target.last_linear}
        return {**super().describe(), "overrides": overrides, **policies}
