"""RigL: rigging the lottery (arXiv 1911.11134)."""

from __future__ import annotations

from sparsepipe.sparsity.drop_grow import GrowByGradient


class RigL(GrowByGradient):
    """Drop the lowest |w|, grow the largest |dL/dw|; 0.3 of the active weights at first, every 100 steps.

    The share falls along a cosine to 0 at three quarters of the training. The paper's update takes the place of a
    gradient step; here it follows one.
    """

    name = "rigl"
