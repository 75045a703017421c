"""MEST: memory-economic sparse training (arXiv 2110.14032)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options, scores
from sparsepipe.sparsity.drop_grow import GrowAtRandom
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import cut_to_target
from sparsepipe.sparsity.schedule import halved
from sparsepipe.sparsity.selection import top_k

VARIANTS = ("em", "em&s")


class MEST(GrowAtRandom):
    """Drop the lowest |w| + gradient_weight |dL/dw|, grow at random: no gradient of an inactive weight is needed.

    `em` (elastic mutation) keeps the number of weights. `em&s` (and soft memory bound) trains with more than the
    target: each update cuts to the target, then grows to (1 + soft_bound) times as many; half of the surplus from three
    quarters of the way on, none at the stop. A pattern that fixes the density leaves no room for a surplus.

    Args:
        variant: `em` or `em&s`.
        gradient_weight: lambda in the drop score. The published code's default is 0, which is SET; 1 here.
        soft_bound: surplus of `em&s` at first, as a share of the target: 0.5 is a sparsity of 0.85 on the way to 0.9.
        drop_fraction: of `em`: 0.2 at first.
        drop_schedule: of `em`: `halved`, as in the paper's code, where 0.92 -> 0.9 becomes 0.91 -> 0.9.
        **shared: the options of `DropGrow`.

    Raises:
        RecipeError: an option is out of range or of the wrong type, the pattern leaves no room for `em&s`, or `em&s` is
            to drop or grow across layers.
    """

    name = "mest"

    def __init__(
        self,
        *,
        variant: str = "em",
        gradient_weight: float = 1.0,
        soft_bound: float = 0.5,
        drop_fraction: float = 0.2,
        drop_schedule: str = "halved",
        **shared: Any,
    ) -> None:
        super().__init__(drop_fraction=drop_fraction, drop_schedule=drop_schedule, **shared)
        self.variant = options.choice("variant", variant, VARIANTS)
        self.gradient_weight = options.number("gradient_weight", gradient_weight)
        self.soft_bound = options.number("soft_bound", soft_bound)
        if self.variant == "em&s" and self.target.pattern.density is not None:
            raise RecipeError(
                f"'em&s' needs room for more weights than the target, but {self.target.pattern} fixes their number.",
                where="variant",
                advice="Choose variant = 'em', or another pattern.",
            )
        if self.variant == "em&s" and (self.drop_scope, self.redistribution) != ("layer", "none"):
            raise RecipeError(
                "'em&s' cuts every layer to its own target: it has no use for 'drop_scope' and 'redistribution'.",
                where="variant",
                advice="Choose variant = 'em', or leave both options out.",
            )

    def describe(self) -> dict[str, Any]:
        own = ("variant", "gradient_weight", "soft_bound")
        return {**super().describe(), **{option: getattr(self, option) for option in own}}

    def first_counts(self, network: Network) -> dict[str, int]:
        counts = super().first_counts(network)
        return self._with_surplus(network, counts, 0) if self.variant == "em&s" else counts

    def needs_gradients(self, network: Network, step: int) -> bool:
        return self.due(network, step) and self.gradient_weight > 0

    def due(self, network: Network, step: int) -> bool:
        # The surplus has to go, whether or not the stop is a multiple of `update_every`.
        return super().due(network, step) or (self.variant == "em&s" and step == self._end(network))

    def finalize(self, network: Network) -> None:
        cut_to_target(self, network)

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self._end(network) if self.variant == "em&s" else super().masks_final(network, step)

    def metrics(self, network: Network, step: int) -> dict[str, float]:
        if self.variant == "em":
            return super().metrics(network, step)
        # What the next update cuts is the surplus that the last one left.
        updated = step if step >= self._end(network) else step - step % self.update_every
        surplus = self._surplus(network, updated)
        return {"drop_fraction": surplus / (1 + surplus)}

    def drop_score(self, network: Network, name: str) -> Tensor:
        salience = super().drop_score(network, name)
        if name in network.gradients:
            salience = salience.add_(scores.gradient(network.gradients[name]), alpha=self.gradient_weight)
        return salience

    def after_step(self, network: Network, step: int) -> None:
        if self.variant == "em":
            super().after_step(network, step)
        elif self.due(network, step):
            self._resize(network, step)
            network.masks.count()

    def _end(self, network: Network) -> int:
        return max(self._updates(network).stop, 1)

    def _surplus(self, network: Network, step: int) -> float:
        """Share of the target that there is more of after an update at `step`."""
        return halved(self.soft_bound, self._end(network))(step)

    def _with_surplus(self, network: Network, targets: dict[str, int], step: int) -> dict[str, int]:
        share = 1 + self._surplus(network, step)
        return {
            name: target if layer.pattern.density is not None else min(round(target * share), layer.groups)
            for name, target in targets.items()
            for layer in [network.layers[name]]
        }

    def _resize(self, network: Network, step: int) -> None:
        """Cut every sparse layer to its target, then grow the surplus of this step at random."""
        targets = self.kept(network)
        sizes = self._with_surplus(network, targets, step)
        for name in network.masks.counters:
            layer = network.layers[name]
            active = layer.pattern.rows(network.masks[name])
            drop = layer.pattern.scores(self.drop_score(network, name))
            kept = top_k(drop, active.sum(dim=1).clamp(max=targets[name]), active)
            grow = layer.pattern.scores(self.grow_score(network, name, step))
            if self.exclude_just_dropped:
                grow = torch.where(active, -1.0, grow)  # below all others: where nothing else is left
            grown = top_k(grow, sizes[name] - kept.sum(dim=1), ~kept)
            network.change(name, layer.pattern.unfold(kept | grown, layer.shape))
