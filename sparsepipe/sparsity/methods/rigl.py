"""RigL: rigging the lottery (arXiv 1911.11134)."""

from __future__ import annotations

from sparsepipe.sparsity.drop_grow import GrowByGradient


class RigL(GrowByGradient):
    """Drop the lowest |w|, grow the largest |dL/dw|, every 100 steps.

        alpha_t = alpha / 2 (1 + cos(pi t / T_end)),   n_l = floor(alpha_t nnz_l)

    At each update layer l drops the n_l active weights of lowest |w| and grows the n_l inactive ones of largest
    |dL/dw|; alpha is 0.3, and T_end three quarters of the training. The paper's update takes the place of a gradient
    step; here it follows one.
    """

    name = "rigl"
