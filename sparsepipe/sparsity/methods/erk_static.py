"""Random pruning before training with ERK densities (arXiv 1911.11134): `static` under the name that tables give it."""

from __future__ import annotations

from sparsepipe.sparsity.method import SparseFromStart


class ERKStatic(SparseFromStart):
    """Train inside random masks of ERK densities; good random pruning is a strong baseline (arXiv 2202.02643)."""

    name = "erk-static"
