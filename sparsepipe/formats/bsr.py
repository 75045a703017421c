"""BSR: blocks of r consecutive outputs x c consecutive input channels, each at one kernel tap.

The weight [O, I, *kernel] is cut into blocks along O and I; taps are never mixed, so each tap has its own blocks.
Block row R covers outputs R*r .. R*r + r-1. Block column C = J * taps + tap covers input channels J*c .. J*c + c-1 at
`tap`: the column order of CSR, with groups of c channels in the place of channels. So a block n x 1 shares one CSR
column among n outputs: one broadcast input, n consecutive values.

Components: `values` [blocks, r, c], each block in C order, and the index of rows.py over the matrix of
ceil(O / r) x (ceil(I / c) * taps) blocks. Blocks that reach over the edge of the weight hold +0.0 there.
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
    positive_zeros,
)

COMPONENTS = ("values", *rows.COMPONENTS)
PARAMETERS = {"r": (1, 256), "c": (1, 256)}


def encode(dense: Array, *, r: int, c: int, where: str = "weight") -> Compressed:
    """Compress a weight [O, I, *kernel] in blocks of r outputs x c input channels (1 to 256 each).

    Raises:
        FormatError: fewer than two dimensions, a dtype that cannot be compressed, a side outside its range, or more
            than 2^32 - 1 blocks.
    """
    for name, side in (("r", r), ("c", c)):
        low, high = PARAMETERS[name]
        if not low <= side <= high:
            fail(f"A block of {r}x{c} is not possible: sides go from {low} to {high}.", where)
    blocks = as_blocks(as_matrix(dense, where), r, c)
    occupied = (blocks != 0).any(axis=(2, 3))
    components = {"values": positive_zeros(blocks[occupied]), **rows.encode_rows(occupied, where)}
    weight = Compressed("bsr", dense.shape, components, {"r": r, "c": c})
    check_shape(weight.shape, weight.nbytes, where)
    return weight


def decode(weight: Compressed, *, where: str = "weight") -> Array:
    """The dense weight.

    Raises:
        FormatError: naming the component that is malformed, and how.
    """
    check(weight, COMPONENTS, PARAMETERS, where)
    outputs, inputs, taps = matrix_shape(weight.shape)
    r, c = weight.parameters["r"], weight.parameters["c"]
    blocks = (*weight.components["values"].shape, 0)[0]
    values = check_values(weight, (blocks, r, c), where)
    if (zeros := np.flatnonzero(~(values != 0).any(axis=(1, 2)))).size:
        fail(f"Block {zeros[0]} is all zero; only blocks with a nonzero are stored.", where, "values")
    row, column = rows.decode_rows(weight, -(-outputs // r), -(-inputs // c) * taps, blocks, where)

    output = (row * r)[:, None, None] + np.arange(r)[:, None]
    channel = (column // max(taps, 1) * c)[:, None, None] + np.arange(c)
    inside = (output < outputs) & (channel < inputs)
    if (beyond := np.argwhere(~inside & (values != 0))).size:
        fail(f"Block {beyond[0][0]} holds a value beyond the edge of the weight.", where, "values")
    position = (output * inputs + channel) * taps + (column % max(taps, 1))[:, None, None]
    dense = empty_weight(weight, values.dtype, where)
    dense.reshape(-1)[position[inside]] = values[inside]
    return dense


def as_blocks(matrix: Array, r: int, c: int) -> Array:
    """View or copy [O, I, taps] as blocks [ceil(O / r), ceil(I / c) * taps, r, c], padded with zeros at the edges."""
    outputs, inputs, taps = matrix.shape
    down, across = -(-outputs // r), -(-inputs // c)
    padded = np.pad(matrix, ((0, down * r - outputs), (0, across * c - inputs), (0, 0)))
    split = padded.reshape(down, r, across, c, taps)
    return split.transpose(0, 2, 4, 1, 3).reshape(down, across * taps, r, c)
