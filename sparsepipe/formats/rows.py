"""The index that CSR and BSR share: which columns of a row are stored.

- `indptr` [rows + 1]: entries `indptr[r] : indptr[r + 1]` belong to row r, as in any CSR matrix.
- `deltas` [entries]: the first entry of a row holds its column, each further one its distance to the entry before.
  Distances are short where columns are numbers up to thousands, so one byte is mostly enough, and a kernel that walks
  a row adds them up as it goes.
"""

from __future__ import annotations

import numpy as np

from sparsepipe.formats.layout import INDEX_DTYPES, Array, Compressed, IntArray, check_vector, fail, narrow

COMPONENTS = ("deltas", "indptr")


def encode_rows(occupied: Array, where: str) -> dict[str, Array]:
    """The index of a bool matrix [rows, columns].

    Raises:
        FormatError: an index needs more than 32 bits.
    """
    row, column = np.nonzero(occupied)
    deltas = column.astype(np.int64)
    same_row = row[1:] == row[:-1]
    deltas[1:][same_row] -= column[:-1][same_row]
    indptr = np.zeros(occupied.shape[0] + 1, np.int64)
    np.cumsum(np.count_nonzero(occupied, axis=1), out=indptr[1:])
    return {"deltas": narrow(deltas, where, "deltas"), "indptr": narrow(indptr, where, "indptr")}


def decode_rows(weight: Compressed, rows: int, columns: int, entries: int, where: str) -> tuple[IntArray, IntArray]:
    """Row and column of every entry, as int64 [entries] each.

    Args:
        weight: holds the components of the index.
        rows: rows of the matrix.
        columns: columns of the matrix.
        entries: how many values are stored.
        where: name of the weight.

    Raises:
        FormatError: a wrong type or count, pointers that fall or do not cover the entries, an entry twice in a row,
            or a column outside the matrix.
    """
    indptr = check_vector(weight, "indptr", rows + 1, INDEX_DTYPES, where).astype(np.int64)
    steps = check_vector(weight, "deltas", entries, INDEX_DTYPES, where).astype(np.int64)
    if indptr[0] != 0:
        fail(f"The first row pointer is {indptr[0]}; it must be 0.", where, "indptr")
    counts = np.diff(indptr)
    if (falling := np.flatnonzero(counts < 0)).size:
        row = falling[0]
        fail(f"The pointers fall from {indptr[row]} to {indptr[row + 1]} at row {row}.", where, "indptr")
    if indptr[-1] != entries:
        fail(f"The last row pointer is {indptr[-1]}, but {entries} values are stored.", where, "indptr")

    # int64 cannot overflow: there would have to be 2^31 entries of 2^32 - 1.
    total = np.cumsum(steps)
    starts = indptr[:-1][counts > 0]
    column = total - np.repeat(total[starts] - steps[starts], counts[counts > 0])
    row_of_entry = np.repeat(np.arange(rows, dtype=np.int64), counts)

    further = np.ones(entries, bool)
    further[starts] = False
    if (repeated := np.flatnonzero(further & (steps == 0))).size:
        entry = repeated[0]
        fail(
            f"Entry {entry} is not ascending: column {column[entry]} of row {row_of_entry[entry]} comes twice.",
            where,
            "deltas",
        )
    if (outside := np.flatnonzero(column >= columns)).size:
        entry = outside[0]
        fail(
            f"Entry {entry} is out of range: column {column[entry]} of row {row_of_entry[entry]}, "
            f"where there are {columns} columns.",
            where,
            "deltas",
        )
    return row_of_entry, column
