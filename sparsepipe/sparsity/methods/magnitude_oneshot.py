"""One-shot magnitude pruning with fine-tuning (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from typing import Any

from sparsepipe.sparsity import options
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import MagnitudePruning


class MagnitudeOneShot(MagnitudePruning):
    """Train dense, prune once by magnitude, fine-tune inside the masks.

    Args:
        prune_at: fraction of all steps after which to prune; the rest is fine-tuning.
        **shared: the options of `TargetMethod`.

    Raises:
        RecipeError: an option is out of range or of the wrong type.
    """

    name = "magnitude-oneshot"

    def __init__(
        self,
        *,
        prune_at: float = 0.5,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.prune_at = options.number("prune_at", prune_at, high=1)

    def after_step(self, network: Network, step: int) -> None:
        if step == self._prune_step(network):
            self.prune(network)

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self._prune_step(network)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "prune_at": self.prune_at}

    def _prune_step(self, network: Network) -> int:
        return max(int(self.prune_at * network.total_steps), 1)
