"""Which regular patterns the zeros of a weight happen to follow.

A block pattern r x c (outputs x input channels, at each kernel tap) holds where every block is all zero or all nonzero;
`channel` where that is so for whole outputs; n:m where no group of m consecutive input channels has more than n
nonzeros.
"""

from __future__ import annotations

import re

import numpy as np

from sparsepipe.formats.bsr import as_blocks
from sparsepipe.formats.layout import Array, as_matrix
from sparsepipe.formats.nm import as_groups

BLOCKS = ((2, 1), (4, 1), (1, 4), (2, 4), (4, 4))
GROUPS = (2, 4, 8)


def followed(dense: Array, *, where: str = "weight") -> list[str]:
    """Names of the patterns that a weight [O, I, *kernel] follows; none for one without zeros or without nonzeros.

    Any weight that is sparse enough follows some n:m by chance. One is named where it leaves out half of the weights or
    more, where its groups are at least half full on average, and where no other one implies it, as 2:4 implies 4:8, and
    1:4 implies 1:2.

    Raises:
        FormatError: fewer than two dimensions, or a dtype that cannot be compressed.
    """
    nonzero = as_matrix(dense, where) != 0
    if nonzero.all() or not nonzero.any():
        return []
    outputs, inputs, _ = nonzero.shape
    found = [f"{r}x{c}" for r, c in BLOCKS if outputs >= r and inputs >= c and _in_blocks(nonzero, r, c)]
    if _uniform(nonzero.reshape(outputs, -1)):
        found.append("channel")
    nnz = int(np.count_nonzero(nonzero))
    groups = [(n, m) for n, m in narrowest_groups(dense, where=where) if 2 * n <= m and 2 * nnz * m >= n * nonzero.size]
    return found + [f"{n}:{m}" for n, m in groups if not any(_implies(other, (n, m)) for other in groups)]


def narrowest_groups(dense: Array, *, where: str = "weight") -> list[tuple[int, int]]:
    """For each m of GROUPS, the smallest n with which n:m holds, as (n, m); left out where that is m, or m > I.

    Raises:
        FormatError: fewer than two dimensions, or a dtype that cannot be compressed.
    """
    nonzero = as_matrix(dense, where) != 0
    most = [
        (max(1, int(np.count_nonzero(as_groups(nonzero, m), axis=1).max(initial=0))), m)
        for m in GROUPS
        if m <= nonzero.shape[1]
    ]
    return [(n, m) for n, m in most if n < m]


def block_of(pattern: str) -> tuple[int, int] | None:
    """(r, c) of a pattern written as `4x1`, None for any other."""
    found = re.fullmatch(r"(\d+)x(\d+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def group_of(pattern: str) -> tuple[int, int] | None:
    """(n, m) of a pattern written as `2:4`, None for any other."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(found[1]), int(found[2])) if found else None


def _in_blocks(nonzero: Array, r: int, c: int) -> bool:
    # Only the elements of the weight count in a block that reaches over its edge.
    blocks = as_blocks(nonzero, r, c).reshape(-1, r * c)
    elements = as_blocks(np.ones_like(nonzero), r, c).reshape(-1, r * c)
    filled = np.count_nonzero(blocks, axis=1)
    return bool(((filled == 0) | (filled == np.count_nonzero(elements, axis=1))).all())


def _implies(known: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one n:m implies another one of groups twice (or half, ...) as long."""
    (known_n, known_m), (n, m) = known, other
    return n * known_m >= known_n * m if known_m < m else known_m > m and n >= known_n


def _uniform(rows: Array) -> bool:
    return bool((rows.all(axis=1) | ~rows.any(axis=1)).all())
