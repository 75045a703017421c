"""Datasets that come as arrays: `npz:FILE`, and what a user's function returns."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsepipe.data.dataset import Dataset, assemble
from sparsepipe.data.labels import Labels, as_array, as_labels, class_names
from sparsepipe.data.options import HoldOutOptions
from sparsepipe.data.paths import existing, listing
from sparsepipe.data.split import ArraySplit, Raw
from sparsepipe.errors import DataError

# Where an image's channels may stand is told by their number; 1 and 3 go first, as 2 and 4 may well be a small side.
CHANNEL_COUNTS = ((1, 3), (2, 4))
KEYS = ("x", "y", "x_train", "y_train", "x_test", "y_test")
"""Other arrays of a file, as those of names, are not read."""


class Npz:
    """Arrays x, y and, optionally, x_test, y_test (or x_train, ...) in an .npz file."""

    def load(self, name: str, argument: str, options: HoldOutOptions) -> Dataset:
        path = existing("file", argument)
        try:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError("This is an .npy file with a single array.", where=argument, advice=_ADVICE)
            with file:
                arrays = {key: file[key] if key in KEYS else None for key in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            # numpy advises to trust such a file, and to let it run code.
            reason = "it holds Python objects, or it is of another kind" if "pickle" in str(error) else error
            raise DataError(
                f"The file cannot be read: {reason}.",
                where=argument,
                advice="It must be an .npz file (numpy.savez) of numbers, without Python objects.",
            ) from error
        return assemble_arrays(name, arrays, options, argument)

    def identity(self, argument: str, options: HoldOutOptions) -> object:
        path = existing("file", argument)
        return listing(path.parent, [path])


_ADVICE = "Wanted are the arrays x and y, and optionally x_test and y_test."


@dataclass(frozen=True)
class _Part:
    inputs: Raw
    labels: Labels

    @property
    def split(self) -> ArraySplit:
        return ArraySplit(self.inputs, self.labels.values)


def assemble_arrays(name: str, arrays: Mapping[str, Any], options: HoldOutOptions, where: str) -> Dataset:
    """Build a dataset from arrays.

    Args:
        name: as it was asked for.
        arrays: `x` and `y` (or `x_train` and `y_train`), and optionally `x_test` and `y_test`. x is uint8 [N, H, W],
            [N, H, W, C] or [N, C, H, W] (images), or numbers [N, F] (features); y is integers [N].
        options: the size of the test split, if there is none.
        where: the file or function that they are from, for errors.

    Raises:
        DataError: arrays are missing, of a wrong type or shape, of different lengths, or hold NaN.
    """
    keys = ("x_train", "y_train") if "x_train" in arrays or "y_train" in arrays else ("x", "y")
    train = _part(arrays, *keys, where)
    test = _part(arrays, "x_test", "y_test", where) if "x_test" in arrays or "y_test" in arrays else None
    classes = class_names(None, train.labels, test.labels if test else None, where)
    return assemble(name, classes, train.split, test.split if test else None, options)


def _part(arrays: Mapping[str, Any], x_key: str, y_key: str, where: str) -> _Part:
    missing = [key for key in (x_key, y_key) if key not in arrays]
    if missing:
        raise DataError(
            f"There is no array '{missing[0]}'; there are: {', '.join(sorted(arrays)) or 'none'}.",
            where=where,
            advice=_ADVICE,
        )
    labels = as_labels(arrays[y_key], f"{where}, {y_key}")
    inputs = as_inputs(as_array(arrays[x_key], "samples", f"{where}, {x_key}"), f"{where}, {x_key}")
    if len(inputs) != len(labels):
        raise DataError(f"{x_key} holds {len(inputs)} samples, but {y_key} holds {len(labels)} labels.", where=where)
    return _Part(inputs, Labels(labels, lambda index: f"{where}, {y_key}, row {index}"))


def as_inputs(x: NDArray[Any], where: str) -> Raw:
    """Raw samples: uint8 [N, H, W, C] from images in any usual layout, float32 [N, F] from features.

    Raises:
        DataError: a shape or type that is neither, or a feature that is no finite float32.
    """
    if 0 in x.shape[1:]:
        raise DataError(f"The samples have the shape {list(x.shape)}: they hold no values.", where=where)
    if x.ndim == 2:
        return _features(x, where)
    if x.ndim not in (3, 4):
        raise DataError(
            f"The samples have the shape {list(x.shape)}; images are [N, H, W], [N, H, W, C] or [N, C, H, W], features "
            "[N, F].",
            where=where,
        )
    if x.dtype != np.uint8:
        raise DataError(
            f"Images are of type {x.dtype}; they must be uint8, 0..255.",
            where=where,
            advice="Store them unscaled: mean and std are taken care of. Features of any numbers are [N, F].",
        )
    return np.ascontiguousarray(x[..., None] if x.ndim == 3 else _channels_last(x, where))


def _channels_last(x: NDArray[Any], where: str) -> NDArray[Any]:
    for counts in CHANNEL_COUNTS:
        if x.shape[3] in counts:
            return x
        if x.shape[1] in counts:
            return x.transpose(0, 2, 3, 1)
    raise DataError(
        f"The images have the shape {list(x.shape)}, in which neither the second nor the last axis is 1 to 4 channels.",
        where=where,
    )


def _features(x: NDArray[Any], where: str) -> NDArray[np.float32]:
    if x.dtype.kind not in "fiub":
        raise DataError(f"Features are of type {x.dtype}; they must be real numbers.", where=where)
    with np.errstate(over="ignore"):  # caught below, as infinity
        features = np.ascontiguousarray(x, np.float32)
    wrong = np.argwhere(~np.isfinite(features))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"The feature in row {row}, column {column} is {x[row, column]}, which is no finite float32 "
            f"({len(wrong)} values are not).",
            where=where,
            advice="Fill in or remove such rows.",
        )
    return features


NPZ = Npz()
