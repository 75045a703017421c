"""GraNet: sparse training by gradual pruning with zero-cost regeneration (arXiv 2106.10404)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsepipe.sparsity import options
from sparsepipe.sparsity.drop_grow import GrowByGradient
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import cut_to_target
from sparsepipe.sparsity.schedule import cubic


class GraNet(GrowByGradient):
    """Start at `initial_sparsity`, prune by magnitude along a cubic schedule, and at each pruning drop and grow, too.

    s(t) = s_f + (s_i - s_f)(1 - t/t_p)^3, with s_i the initial and s_f the final sparsity, reached exactly at
    t_p = `prune_until`. What each update then drops by magnitude grows again by |gradient|, also after t_p.

    Args:
        initial_sparsity: s_i: 0.5 in the paper; 0 starts dense.
        prune_until: fraction of all steps at which the target is reached: 80 of 160 epochs in the paper.
        drop_fraction: 0.5 at first.
        drop_schedule: a cosine to 0.005, as in the paper's code.
        stop_at: fraction of all steps from which on the masks stay as they are; 1, in the code.
        **shared: the options of `DropGrow`. The paper prunes globally: `distribution = "global"`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "granet"

    def __init__(
        self,
        *,
        initial_sparsity: float = 0.5,
        prune_until: float = 0.5,
        drop_fraction: float = 0.5,
        drop_schedule: str = "cosine-floor",
        stop_at: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(drop_fraction=drop_fraction, drop_schedule=drop_schedule, stop_at=stop_at, **shared)
        self.initial_sparsity = options.number("initial_sparsity", initial_sparsity, high=1, below=True)
        self.prune_until = options.number("prune_until", prune_until, high=1)

    def describe(self) -> dict[str, Any]:
        own = {"initial_sparsity": self.initial_sparsity, "prune_until": self.prune_until}
        return {**super().describe(), **own}

    def first_counts(self, network: Network) -> dict[str, int]:
        return self.kept(network, self._progress(network, 0))

    def limits(self, network: Network, step: int) -> Mapping[str, int]:
        return self.kept(network, self._progress(network, step))

    def due(self, network: Network, step: int) -> bool:
        # The last pruning falls on the very step `prune_until`, whether or not that is a multiple of `update_every`.
        return super().due(network, step) or step == self._end(network)

    def finalize(self, network: Network) -> None:
        cut_to_target(self, network)

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self._end(network) and super().masks_final(network, step)

    def _end(self, network: Network) -> int:
        return max(int(self.prune_until * network.total_steps), 1)

    def _progress(self, network: Network, step: int) -> float:
        """Of the way from dense (0) to the target (1): s(t) / s_f."""
        first = min(self.initial_sparsity / self.target.sparsity, 1.0) if self.target.sparsity else 1.0
        return first + (1 - first) * cubic(1.0, 0, self._end(network))(step)
