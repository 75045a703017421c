"""How well scores rank positive samples before negative ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu


def roc_auc(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> float | None:
    """Area under the ROC curve: how often a positive sample scores higher than a negative one, ties counting half.

    That is the statistic U of Mann and Whitney over the number of pairs (Hanley and McNeil, doi
    10.1148/radiology.143.1.7063747).

    Args:
        scores: [N].
        labels: [N], 1 for positive samples and 0 for negative ones.

    Returns:
        None where one of the two classes has no samples, or a score is NaN.
    """
    positive, negative = scores[labels == 1], scores[labels == 0]
    if not len(positive) or not len(negative) or np.isnan(scores).any():
        return None
    # The exact p-value, which nobody asked for, would take minutes.
    above = mannwhitneyu(positive, negative, method="asymptotic").statistic
    return float(above) / (len(positive) * len(negative))
