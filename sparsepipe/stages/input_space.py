"""In what space an attack on a network searches, from what is known of its preprocessing."""

from __future__ import annotations

from collections.abc import Sequence

from sparsepipe.sparsity.attacks import InputSpace
from sparsepipe.spec import Preprocessing


def input_space(preprocessing: Preprocessing, input_shape: Sequence[int]) -> InputSpace:
    """Where the inputs of a network lie: scaled pixels are in [0, 1], features have no bounds."""
    if len(input_shape) == 3:
        return InputSpace(preprocessing.mean, preprocessing.std, 0.0, 1.0)
    return InputSpace(preprocessing.mean, preprocessing.std)
