"""DSR: dynamic sparse reparameterization (arXiv 1902.05967)."""

from __future__ import annotations

from typing import Any

from sparsepipe.sparsity.drop_grow import GrowAtRandom


class DSR(GrowAtRandom):
    """Drop the lowest magnitudes of the whole network, grow at random, most in layers where most survived.

        K = floor(p_t sum_l nnz_l),   grown_l = K R_l / sum_i R_i

    p_t is the drop fraction, and R_l the number of weights of layer l that are left once the K lowest |w| have gone;
    grown_l is rounded such that the total is K.

    The paper drops below a threshold that it adjusts until about the wanted number falls; here exactly that number
    of lowest magnitudes is dropped.

    Args:
        drop_scope: see `DropGrow`.
        redistribution: see `DropGrow`.
        **shared: the options of `DropGrow`.
    """

    name = "dsr"

    def __init__(self, *, drop_scope: str = "global", redistribution: str = "nonzeros", **shared: Any) -> None:
        super().__init__(drop_scope=drop_scope, redistribution=redistribution, **shared)
