"""Weights that are no numbers: a NaN or an infinity in a network makes all that it computes one."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from sparsepipe.formats.layout import Array

ADVICE = (
    "The training diverged, or the file is damaged: take an earlier checkpoint, or train with a lower learning rate."
)


def not_finite(tensors: Iterable[tuple[str, Array]], weights: Collection[str] | None = None) -> str | None:
    """Which tensors hold values that are not finite, as a sentence; None where none does.

    A tensor of zeros and infinities passes, because it is a mask that is added to scores, and so does a single
    infinity, a bound. Tensors of other than floating-point types are passed over.

    Args:
        tensors: names and values.
        weights: names of the tensors that are weights; others may hold any infinities. None takes all for weights.
    """
    found = [
        (name, count, array.size)
        for name, array in tensors
        if (count := _count(array, is_weight=weights is None or name in weights))
    ]
    if not found:
        return None
    name, count, size = found[0]
    others = f" Other tensors with such values: {len(found) - 1}." if len(found) > 1 else ""
    return f"'{name}' holds {count} of {size} values that are not finite (NaN or infinite).{others}"


def _count(array: Array, *, is_weight: bool) -> int:
    if array.dtype.kind not in "fV":  # V: bfloat16 and the like
        return 0
    good = np.isfinite(array)
    count = array.size - int(np.count_nonzero(good))
    mask = good.any() or array.size == 1
    harmless = not is_weight or (mask and not array[good].any())
    return 0 if harmless and not np.isnan(array).any() else count
