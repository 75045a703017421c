"""One split of a dataset: labels at hand, samples loaded by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsepipe.errors import DataError

IntArray = NDArray[np.int64]
Raw = NDArray[Any]


class Split(Protocol):
    """Labelled samples. Anything with these members can stand in a `Dataset`."""

    @property
    def labels(self) -> IntArray:
        """int64 [N], each in 0..classes-1."""
        ...

    def __len__(self) -> int: ...

    def load(self, indices: IntArray) -> Raw:
        """The samples at `indices`: uint8 [n, H, W, C] (images) or float32 [n, F] (features), contiguous."""
        ...

    def subset(self, indices: IntArray) -> Split:
        """The split that holds only the samples at `indices`, in that order."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split whose samples are in memory. Subsets share the array of samples.

    Args:
        inputs: uint8 [M, H, W, C] or float32 [M, F].
        labels: int64 [N].
        rows: int64 [N], the row of `inputs` of each sample; None means all rows in order (N = M).
    """

    inputs: Raw
    labels: IntArray
    rows: IntArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: IntArray) -> Raw:
        chosen = indices if self.rows is None else self.rows[indices]
        return np.ascontiguousarray(self.inputs[chosen])

    def subset(self, indices: IntArray) -> ArraySplit:
        rows = np.asarray(indices, np.int64)
        return ArraySplit(self.inputs, self.labels[rows], rows if self.rows is None else self.rows[rows])


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide a split at random, with the same share of each class on both sides as nearly as counts allow.

    The number held out is `fraction` of all samples, rounded; classes share it by largest remainder. Each class keeps
    at least one sample in the rest, so tiny classes can make the number smaller. Both parts keep the samples' order.
    The division depends on the labels, `fraction` and `seed` only, and on no numpy version.

    Returns:
        (rest, held_out).

    Raises:
        DataError: `fraction` is not between 0 and 1, or it leaves one side empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"The fraction to hold out is {fraction}; it must lie between 0 and 1.")
    labels = np.asarray(split.labels)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = _shares(np.array([len(rows) for rows in members]), fraction)
    if not 0 < counts.sum() < len(labels):
        raise DataError(
            f"Holding out {fraction:g} of {len(labels)} samples leaves one side without samples.",
            advice="Choose another fraction, or give more data.",
        )
    # RandomState's streams are frozen; those of numpy's newer generators may change with the version.
    random = np.random.RandomState(seed)
    held = np.zeros(len(labels), bool)
    for rows, count in zip(members, counts, strict=True):
        held[random.permutation(rows)[:count]] = True
    return split.subset(np.flatnonzero(~held)), split.subset(np.flatnonzero(held))


def _shares(sizes: IntArray, fraction: float) -> IntArray:
    """How many of each class to hold out: largest remainder, at most size - 1."""
    exact = sizes * fraction
    shares: IntArray = np.minimum(np.floor(exact), sizes - 1).astype(np.int64)
    missing = round(float(sizes.sum() * fraction)) - int(shares.sum())
    for index in np.argsort(shares - exact, kind="stable"):
        if missing <= 0:
            break
        if shares[index] < sizes[index] - 1:
            shares[index] += 1
            missing -= 1
    return shares
