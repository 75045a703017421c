"""SET: sparse evolutionary training (doi 10.1038/s41467-018-04316-3)."""

from __future__ import annotations

from sparsepipe.sparsity.drop_grow import GrowAtRandom


class SET(GrowAtRandom):
    """Drop the lowest |w|, grow at random; needs no dense gradient.

    The paper drops the smallest positive and the largest negative weights, 0.3 of them after each epoch; the defaults
    here are those of `DropGrow`.
    """

    name = "set"
