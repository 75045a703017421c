"""GMP: gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878)."""

from __future__ import annotations

from typing import Any

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity import options
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.pruning import MagnitudePruning, cut_to_target
from sparsepipe.sparsity.schedule import UpdateSchedule, cubic


class GMP(MagnitudePruning):
    """Train dense, and prune by magnitude along a cubic schedule until the target is reached.

        s_t = s (1 - (1 - (t - t_0) / (t_1 - t_0))^3)

    is the sparsity at step t from `start_at`, t_0, to `stop_at`, t_1; s is the target of each layer, or with `global`
    that of the network.

    Args:
        update_every: optimizer steps between two prunings.
        start_at: fraction of all steps at which pruning begins.
        stop_at: fraction of all steps at which the target is reached exactly.
        **shared: the options of `TargetMethod`.

    Raises:
        RecipeError: an option is out of range or of the wrong type, or `start_at` is not before `stop_at`.
    """

    name = "gmp"

    def __init__(
        self,
        *,
        update_every: int = 100,
        start_at: float = 0.0,
        stop_at: float = 0.75,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.update_every = options.count("update_every", update_every)
        self.start_at = options.number("start_at", start_at, high=1, below=True)
        self.stop_at = options.number("stop_at", stop_at, high=1)
        if not self.start_at < self.stop_at:
            raise RecipeError(f"'start_at' ({start_at}) must be less than 'stop_at' ({stop_at}).")

    def after_step(self, network: Network, step: int) -> None:
        start, stop = self._span(network)
        # The last pruning falls on the very step `stop`, whether or not that is a multiple of `update_every`.
        if step == stop or UpdateSchedule(self.update_every, start, stop).due(step):
            self.prune(network, cubic(1.0, start, stop)(step))

    def finalize(self, network: Network) -> None:
        cut_to_target(self, network)

    def masks_final(self, network: Network, step: int) -> bool:
        return step >= self._span(network)[1]

    def describe(self) -> dict[str, Any]:
        own = {"update_every": self.update_every, "start_at": self.start_at, "stop_at": self.stop_at}
        return {**super().describe(), **own}

    def _span(self, network: Network) -> tuple[int, int]:
        start, stop = (int(fraction * network.total_steps) for fraction in (self.start_at, self.stop_at))
        return start, max(stop, 1)
