"""Labels and class names: what makes them valid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsepipe.data.split import IntArray
from sparsepipe.errors import DataError


@dataclass(frozen=True)
class Labels:
    """The labels of one split.

    Attributes:
        values: int64 [N].
        name: the name of the sample at an index, for errors.
    """

    values: IntArray
    name: Callable[[int], str]


def as_array(values: Any, what: str, where: str) -> NDArray[Any]:
    """`values`, an array or nested lists, as an array; `what` they are, for errors.

    Raises:
        DataError: lists of different lengths.
    """
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"The {what} are lists of different lengths, not an array.", where=where) from error


def as_labels(values: Any, where: str) -> IntArray:
    """`values`, an array or lists, as int64 [N].

    Raises:
        DataError: they are not integers, or not one-dimensional.
    """
    values = as_array(values, "labels", where)
    if values.ndim != 1:
        raise DataError(
            f"The labels have the shape {list(values.shape)}; they must be [N], one class number for each sample.",
            where=where,
            advice="One-hot labels: take .argmax(1); labels of shape [N, 1]: take .ravel().",
        )
    if values.dtype.kind not in "iub":
        raise DataError(
            f"The labels are of type {values.dtype}; they must be integers.",
            where=where,
            advice='Convert them to class numbers 0, 1, 2, ... of type "int64".',
        )
    labels: IntArray = values.astype(np.int64)
    return labels


def class_names(names: Sequence[str] | None, train: Labels, test: Labels | None, where: str) -> tuple[str, ...]:
    """The class names, after checking both splits' labels against them.

    Args:
        names: in the order of the labels. None makes them the numbers 0..K-1, where K-1 is the largest label of the
            training split; then each class must have a training sample.
        train: labels of the training split.
        test: labels of the test split, None if there is none.
        where: the dataset, for errors.

    Raises:
        DataError: a split is empty; fewer than two classes; a label that is not in 0..classes-1; splits with different
            classes.
    """
    for split, labels in (("training", train), ("test", test)):
        if labels is not None and not len(labels.values):
            raise DataError(f"The {split} split holds no samples.", where=where)
    count = len(names) if names is not None else int(train.values.max()) + 1
    _check_range(train, count, "")
    if names is None:
        # Else the numbers of a wrong column would be taken for so many classes.
        _check_complete(train.values, where)
    if count < 2:
        raise DataError(
            "The dataset has only one class; classification needs at least two.",
            where=where,
            advice="Check that this is the right label column or folder.",
        )
    if test is not None:
        _check_range(test, count, "" if names is not None else f" The training split has {count} classes.")
    return tuple(names) if names is not None else tuple(str(label) for label in range(count))


def _check_range(labels: Labels, count: int, note: str) -> None:
    values = labels.values
    wrong = np.flatnonzero((values < 0) | (values >= count))
    if len(wrong):
        first = int(wrong[0])
        unlabelled = "Labels below zero often mean an unlabelled split."
        raise DataError(
            f"The label {values[first]} is outside 0..{count - 1} ({len(wrong)} of {len(values)} labels are).{note}",
            where=labels.name(first),
            advice=unlabelled if values[first] < 0 else "Check the labels, and that this is the right label column.",
        )


def _check_complete(labels: IntArray, where: str) -> None:
    present = np.unique(labels)
    if len(present) > labels.max():
        return
    # The smallest number that is missing is the first place at which the sorted labels step away from 0, 1, 2, ...
    missing = int(np.flatnonzero(present != np.arange(len(present)))[0])
    raise DataError(
        f"No training sample has the label {missing}, though labels go up to {labels.max()} ({len(present)} different "
        "labels).",
        where=where,
        advice="Number the classes 0, 1, 2, ... without gaps.",
    )
