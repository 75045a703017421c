"""SET-ITOP: SET with few, large updates to the very end of training (arXiv 2102.02887)."""

from __future__ import annotations

from typing import Any

from sparsepipe.sparsity.drop_grow import GrowAtRandom


class SETITOP(GrowAtRandom):
    """Grow at random, seldom, half of the active weights at first and until training ends.

    In-time over-parameterization: what counts is how many different weights were active at any time, and that each
    was long enough in the network to be judged.

    Args:
        update_every: 1500 steps in the paper.
        drop_fraction: 0.5 at first.
        drop_schedule: a cosine to 0.005, as in the paper's code.
        stop_at: 1: updates never stop.
        **shared: the options of `DropGrow`.
    """

    name = "set-itop"

    def __init__(
        self,
        *,
        update_every: int = 1500,
        drop_fraction: float = 0.5,
        drop_schedule: str = "cosine-floor",
        stop_at: float = 1.0,
        **shared: Any,
    ) -> None:
        super().__init__(
            update_every=update_every,
            drop_fraction=drop_fraction,
            drop_schedule=drop_schedule,
            stop_at=stop_at,
            **shared,
        )
