"""Splits, hold-outs and labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsepipe.data import ArraySplit, Split, hold_out
from sparsepipe.data.labels import Labels, as_labels, class_names
from sparsepipe.errors import DataError


def numbered(labels: list[int]) -> ArraySplit:
    """A split whose only feature is the sample's number."""
    inputs = np.arange(len(labels), dtype=np.float32)[:, None]
    return ArraySplit(inputs, np.array(labels, np.int64))


def numbers(split: Split) -> list[int]:
    return [int(number) for number in split.load(np.arange(len(split)))[:, 0]]


def test_subset_of_a_subset_selects_the_right_samples() -> None:
    split = numbered([0, 1, 2, 0, 1, 2])
    inner = split.subset(np.array([5, 3, 1])).subset(np.array([2, 0]))
    assert numbers(inner) == [1, 5]
    assert inner.labels.tolist() == [1, 2]
    assert inner.inputs is split.inputs  # nothing was copied


def test_loaded_samples_are_contiguous() -> None:
    images = np.zeros((4, 3, 5, 6), np.uint8).transpose(0, 2, 3, 1)
    assert ArraySplit(images, np.zeros(4, np.int64)).load(np.array([2, 0])).flags.c_contiguous


@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=120),
    st.floats(0.05, 0.9),
    st.integers(0, 2**31 - 1),
)
def test_hold_out_is_disjoint_complete_stratified_and_seeded(labels: list[int], fraction: float, seed: int) -> None:
    split = numbered(labels)
    sizes = np.bincount(labels, minlength=5)
    wanted = round(fraction * len(labels))
    try:
        rest, held = hold_out(split, fraction, seed)
    except DataError:
        assert wanted == 0 or (sizes <= 1).all()
        return
    assert sorted(numbers(rest) + numbers(held)) == list(range(len(labels)))
    assert numbers(rest) == sorted(numbers(rest))
    assert held.labels.tolist() == [labels[index] for index in numbers(held)]
    shares, most = np.bincount(held.labels, minlength=5), np.maximum(sizes - 1, 0)
    assert (shares <= most).all()
    assert (shares <= sizes * fraction + 1).all()
    assert (shares > np.minimum(sizes * fraction, most) - 1).all()
    assert len(held) <= wanted
    if (np.ceil(sizes * fraction) <= most).all():
        assert len(held) == wanted
    again = hold_out(split, fraction, seed)[1]
    assert numbers(again) == numbers(held)


def test_hold_out_depends_on_the_seed() -> None:
    split = numbered([0, 1] * 50)
    assert numbers(hold_out(split, 0.2, 0)[1]) != numbers(hold_out(split, 0.2, 1)[1])


def test_hold_out_is_the_same_for_ever() -> None:
    """Pinned: a change would move samples between training and test of every dataset without a test split."""
    split = numbered([0] * 6 + [1] * 4)
    assert numbers(hold_out(split, 0.5, 7)[1]) == [0, 3, 5, 7, 9]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_hold_out_refuses_fractions_outside_0_to_1(fraction: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(numbered([0, 1, 0, 1]), fraction, 0)


def labels(*values: int) -> Labels:
    return Labels(np.array(values, np.int64), lambda index: f"sample {index}")


def test_class_names() -> None:
    assert class_names(["cat", "dog"], labels(0, 1, 1), labels(0), "here") == ("cat", "dog")
    assert class_names(None, labels(2, 0, 1), None, "here") == ("0", "1", "2")
    assert class_names(["a", "b", "c"], labels(0, 1), None, "here") == ("a", "b", "c")  # c has no sample: allowed


@pytest.mark.parametrize(
    ("names", "train", "test", "message"),
    [
        (None, labels(), None, "here: The training split holds no samples"),
        (None, labels(0, 1), labels(), "here: The test split holds no samples"),
        (["a", "b"], labels(0, 1, 2), None, r"sample 2: The label 2 is outside 0\.\.1"),
        (["a", "b"], labels(0, -1, -1), None, r"sample 1: The label -1 .* \(2 of 3 .* unlabelled"),
        (["a"], labels(0, 0), None, "only one class"),
        (None, labels(0, 0), None, "only one class"),
        (None, labels(1, 2), None, "No training sample has the label 0"),
        (None, labels(0, 1, 900_000_000), None, "No training sample has the label 2"),
        (None, labels(0, 1), labels(0, 1, 2), "sample 2: The label 2 .* The training split has 2 classes"),
    ],
)
def test_bad_labels(names: list[str] | None, train: Labels, test: Labels | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_names(names, train, test, "here")


def test_as_labels() -> None:
    converted = as_labels(np.array([True, False]), "here")
    assert converted.tolist() == [1, 0]
    assert converted.dtype == np.int64
    with pytest.raises(DataError, match=r"shape \[2, 1\].*ravel"):
        as_labels(np.array([[0], [1]]), "here")
    with pytest.raises(DataError, match="here: The labels are of type float64"):
        as_labels(np.array([0.0, 1.0]), "here")
