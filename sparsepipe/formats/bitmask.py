"""Bitmask: one bit per weight and the nonzeros.

Components: `bits` uint8 [ceil(size / 8)], bit k of byte j says whether element 8j + k in C order is nonzero (unused
bits of the last byte are 0), and `values` [nnz] in the same order.
"""

from __future__ import annotations

import math

import numpy as np

from sparsepipe.formats.layout import (
    Array,
    Compressed,
    as_matrix,
    check,
    check_packed,
    check_shape,
    check_values,
    empty_weight,
    fail,
)

COMPONENTS = ("bits", "values")


def encode(dense: Array, *, where: str = "weight") -> Compressed:
    """Compress a weight [O, I, *kernel].

    Raises:
        FormatError: fewer than two dimensions, or a dtype that cannot be compressed.
    """
    flat = as_matrix(dense, where).reshape(-1)
    nonzero = flat != 0
    components = {"bits": np.packbits(nonzero, bitorder="little"), "values": flat[nonzero]}
    weight = Compressed("bitmask", dense.shape, components, {})
    check_shape(weight.shape, weight.nbytes, where)
    return weight


def decode(weight: Compressed, *, where: str = "weight") -> Array:
    """The dense weight.

    Raises:
        FormatError: naming the component that is malformed, and how.
    """
    check(weight, COMPONENTS, {}, where)
    values = check_values(weight, None, where)
    if (zeros := np.flatnonzero(values == 0)).size:
        fail(f"Entry {zeros[0]} is zero; only nonzeros are stored.", where, "values")
    nonzero = check_packed(weight, "bits", math.prod(weight.shape), where).astype(bool)
    if (count := np.count_nonzero(nonzero)) != values.size:
        fail(f"{count} bits are set, but {values.size} values are stored.", where, "bits")
    dense = empty_weight(weight, values.dtype, where)
    dense.reshape(-1)[nonzero] = values
    return dense
