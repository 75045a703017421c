"""CSR: the nonzeros of each output row, with delta-encoded columns.

Components: `values` [nnz] in row-major order, and the index of rows.py over the matrix [O, I * taps].
"""

from __future__ import annotations

import numpy as np

from sparsepipe.formats import rows
from sparsepipe.formats.layout import (
    Array,
    Compressed,
    as_matrix,
    check,
    check_shape,
    check_values,
    empty_weight,
    fail,
    matrix_shape,
)

COMPONENTS = ("values", *rows.COMPONENTS)


def encode(dense: Array, *, where: str = "weight") -> Compressed:
    """Compress a weight [O, I, *kernel].

    Raises:
        FormatError: fewer than two dimensions, a dtype that cannot be compressed, or more than 2^32 - 1 nonzeros.
    """
    outputs, inputs, taps = as_matrix(dense, where).shape
    matrix = dense.reshape(outputs, inputs * taps)
    occupied = matrix != 0
    components = {"values": matrix[occupied], **rows.encode_rows(occupied, where)}
    weight = Compressed("csr", dense.shape, components, {})
    check_shape(weight.shape, weight.nbytes, where)
    return weight


def decode(weight: Compressed, *, where: str = "weight") -> Array:
    """The dense weight.

    Raises:
        FormatError: naming the component that is malformed, and how.
    """
    check(weight, COMPONENTS, {}, where)
    outputs, inputs, taps = matrix_shape(weight.shape)
    values = check_values(weight, None, where)
    if (zeros := np.flatnonzero(values == 0)).size:
        fail(f"Entry {zeros[0]} is zero; only nonzeros are stored.", where, "values")
    row, column = rows.decode_rows(weight, outputs, inputs * taps, values.size, where)
    dense = empty_weight(weight, values.dtype, where)
    dense.reshape(-1)[row * (inputs * taps) + column] = values
    return dense
