"""Random pruning before training, layer by layer the same: the baseline of all that choose masks before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsepipe.sparsity.method import SparseFromStart


class Random(SparseFromStart):
    """Train inside random masks of the same density in every layer (baseline in arXiv 2202.02643).

    Args:
        distribution: see `TargetMethod`; uniform, which keeps the first convolution dense, as RigL's experiments do.
            The other layers do not make up for it, so networks with one are less sparse than `sparsity`.
        **shared: the options of `SparseFromStart`.
    """

    name = "random"

    def __init__(self, *, distribution: str | Mapping[str, float] = "uniform", **shared: Any) -> None:
        super().__init__(distribution=distribution, **shared)
