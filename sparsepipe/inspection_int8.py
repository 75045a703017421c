"""What blocks cost and save a weight on the int8 operators, by its zeros alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsepipe.formats.layout import Array
from sparsepipe.native.quantized import QUAD
from sparsepipe.quantization.rewrite import FEWEST_INPUTS, FEWEST_VALUES, FIXED, PAYS_BELOW, RELATIVE


def int8_blocks(weight: Array) -> dict[str, Any] | None:
    """The blocks in which the int8 operators would run a weight fastest.

    Args:
        weight: [O, I, *kernel].

    Returns:
        `block` (outputs x inputs), `stored_zeros` (share of the stored values that are zeros, because blocks are not
        full), `time` (expected, in times of dense int8) and `eligible` (whether an export would take it); None where
        the weight is empty or all zeros.
    """
    nnz = int(np.count_nonzero(weight))
    if not nnz:
        return None
    found = []
    for block, relative in RELATIVE.items():
        if len(weight) % block == 0:
            stored = _stored(weight != 0, block)
            found.append((FIXED + relative * stored / weight.size, block, stored))
    time, block, stored = min(found)
    large = weight.size >= FEWEST_VALUES and (weight.ndim == 2 or weight.shape[1] >= FEWEST_INPUTS)
    return {
        "block": f"{block}x{QUAD}",
        "stored_zeros": 1 - nnz / stored,
        "time": time,
        "eligible": large and time < PAYS_BELOW,
    }


def _stored(mask: np.ndarray[Any, np.dtype[np.bool_]], block: int) -> int:
    """Values of the blocks of `block` outputs by four inputs that hold any."""
    out, channels = mask.shape[:2]
    padded = np.pad(mask.reshape(out, channels, -1), ((0, 0), (0, -channels % QUAD), (0, 0)))
    held = padded.reshape(out // block, block, -1, QUAD, padded.shape[2]).any(axis=(1, 3))
    return int(held.sum()) * block * QUAD
