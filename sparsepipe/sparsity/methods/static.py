"""Static sparse training: random masks that never change (a baseline of arXiv 1911.11134)."""

from __future__ import annotations

from sparsepipe.sparsity.method import SparseFromStart


class Static(SparseFromStart):
    """Train inside random masks of the target's exact counts: the baseline of every method that moves them."""

    name = "static"
