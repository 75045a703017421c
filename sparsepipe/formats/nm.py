"""N:M: at most n of every m consecutive input channels are nonzero, at each output and each kernel tap.

Groups are ordered by output, group of m channels, tap (the last group is cut short where m does not divide I).

Components:
- `values` [groups, n]: a group's nonzeros by ascending channel; where there are fewer, the lowest free channels fill up
  with zeros, so every group has exactly n entries at n different channels.
- `positions` uint8: the channel of each entry within its group, in b = max(1, ceil(log2 m)) bits, lowest bit first,
  packed without gaps into bytes from the lowest bit up.
"""

from __future__ import annotations

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
    matrix_shape,
    positive_zeros,
)

COMPONENTS = ("values", "positions")
PARAMETERS = {"n": (1, 255), "m": (2, 256)}


def encode(dense: Array, *, n: int, m: int, where: str = "weight") -> Compressed:
    """Compress a weight [O, I, *kernel] whose zeros follow n:m along the input channels (1 <= n < m <= 256).

    Raises:
        FormatError: a group has more than n nonzeros; n or m is out of range; the weight cannot be compressed.
    """
    if not 1 <= n < m <= PARAMETERS["m"][1]:
        fail(f"The pattern {n}:{m} is not possible: 1 <= n < m <= {PARAMETERS['m'][1]} is needed.", where)
    matrix = as_matrix(dense, where)
    groups = as_groups(matrix, m)
    nonzero = groups != 0
    if (over := np.flatnonzero(np.count_nonzero(nonzero, axis=1) > n)).size:
        fail(f"{over.size} of {len(groups)} groups of {m} inputs hold more than {n} nonzeros.", where)
    # A stable sort puts the nonzeros first, then the zeros, each by ascending position.
    chosen = np.sort(np.argsort(~nonzero, axis=1, kind="stable")[:, :n], axis=1)
    bits = (chosen[..., None] >> np.arange(_bits(m))) & 1
    components = {
        "values": positive_zeros(np.take_along_axis(groups, chosen, axis=1)),
        "positions": np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little"),
    }
    weight = Compressed("nm", dense.shape, components, {"n": n, "m": m})
    check_shape(weight.shape, weight.nbytes, where)
    return weight


def decode(weight: Compressed, *, where: str = "weight") -> Array:
    """The dense weight.

    Raises:
        FormatError: naming the component that is malformed, and how.
    """
    check(weight, COMPONENTS, PARAMETERS, where)
    n, m = weight.parameters["n"], weight.parameters["m"]
    if n >= m:
        fail(f"The pattern {n}:{m} is not possible: n must be smaller than m.", where)
    outputs, inputs, taps = matrix_shape(weight.shape)
    across = -(-inputs // m)
    groups = outputs * across * taps
    values = check_values(weight, (groups, n), where)
    bits = check_packed(weight, "positions", groups * n * _bits(m), where)
    chosen = bits.reshape(groups, n, _bits(m)).astype(np.int64) @ (1 << np.arange(_bits(m), dtype=np.int64))
    if (large := np.argwhere(chosen >= m)).size:
        group, entry = large[0]
        fail(f"Group {group} is out of range: position {chosen[group, entry]} of {m}.", where, "positions")
    if (repeated := np.argwhere(np.diff(chosen, axis=1) <= 0)).size:
        fail(f"The positions of group {repeated[0][0]} are not ascending.", where, "positions")

    group = np.arange(groups, dtype=np.int64)[:, None]
    output, channel = group // max(across * taps, 1), group // max(taps, 1) % max(across, 1) * m + chosen
    inside = channel < inputs
    if (beyond := np.argwhere(~inside & (values != 0))).size:
        fail(f"Group {beyond[0][0]} holds a value beyond the last of {inputs} input channels.", where, "values")
    position = (output * inputs + channel) * taps + group % max(taps, 1)
    dense = empty_weight(weight, values.dtype, where)
    dense.reshape(-1)[position[inside]] = values[inside]
    return dense


def as_groups(matrix: Array, m: int) -> Array:
    """View or copy [O, I, taps] as groups [O * ceil(I / m) * taps, m], padded with zeros."""
    outputs, inputs, taps = matrix.shape
    across = -(-inputs // m)
    padded = np.pad(matrix, ((0, 0), (0, across * m - inputs), (0, 0)))
    split = padded.reshape(outputs, across, m, taps)
    return split.transpose(0, 1, 3, 2).reshape(outputs * across * taps, m)


def _bits(m: int) -> int:
    return max(1, (m - 1).bit_length())
