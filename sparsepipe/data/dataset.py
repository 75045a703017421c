"""A dataset for classification: two splits, class names, and the preprocessing that belongs to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsepipe.data.options import HoldOutOptions
from sparsepipe.data.preprocess import statistics
from sparsepipe.data.split import Raw, Split, hold_out
from sparsepipe.errors import DataError
from sparsepipe.spec import Preprocessing

IMAGE_SCALE = 1 / 255
HOLD_OUT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """Labelled samples to train on and to test on.

    Attributes:
        name: as it was asked for.
        classes: name of each label.
        train: the training split. A validation split, if one is wanted, is held out from it (`hold_out`).
        test: the test split.
        input_shape: (C, H, W) or (F,) of one prepared sample.
        preprocessing: what `prepare` does to the raw samples of both splits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing


def assemble(
    name: str,
    classes: tuple[str, ...],
    train: Split,
    test: Split | None,
    options: HoldOutOptions | None = None,
    image_scale: float = IMAGE_SCALE,
) -> Dataset:
    """Build a dataset from splits whose labels are checked (`class_names`).

    Args:
        name: as it was asked for.
        classes: name of each label.
        train: the training split.
        test: None makes it a stratified part of `train`, the same in every run.
        options: the size of that part.
        image_scale: what raw pixels are multiplied by before mean and std apply; features are not scaled.

    Raises:
        DataError: the samples of the two splits differ in shape, or a test fraction was given for a dataset that has a
            test split of its own.
    """
    options = options or HoldOutOptions()
    if test is None:
        train, test = hold_out(train, options.test_fraction, HOLD_OUT_SEED)
    elif "test_fraction" in options.model_fields_set:
        raise DataError(
            "This dataset has a test split of its own, so test_fraction has no meaning.",
            where=name,
            advice="Leave the option out.",
        )
    first = np.zeros(1, np.int64)
    raw, other = train.load(first), test.load(first)
    if raw.shape != other.shape:
        raise DataError(
            f"Training samples have the shape {list(raw.shape[1:])}, test samples {list(other.shape[1:])}.", where=name
        )
    scale = image_scale if raw.ndim == 4 else 1.0
    return Dataset(name, classes, train, test, _input_shape(raw), statistics(train, scale))


def _input_shape(raw: Raw) -> tuple[int, ...]:
    if raw.ndim == 2:
        return (raw.shape[1],)
    _, height, width, channels = raw.shape
    return (channels, height, width)
