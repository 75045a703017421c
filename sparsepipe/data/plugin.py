"""`module:function`: a dataset that the user's own code makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.artefact import digest_file
from sparsepipe.data.arrays import assemble_arrays
from sparsepipe.data.dataset import Dataset
from sparsepipe.data.labels import Labels, as_labels, class_names
from sparsepipe.data.options import HoldOutOptions
from sparsepipe.data.split import Split
from sparsepipe.errors import DataError, SparsepipeError
from sparsepipe.plugins import failure, load_plugin

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class Plugin:
    """The function takes the options as keywords. It returns a `Dataset`; or arrays x_train, y_train and, optionally,
    x_test, y_test, as a dict or, in this order, as a tuple."""

    def load(self, name: str, argument: str, options: Mapping[str, Any]) -> Dataset:
        result = _call(load_plugin(argument, DataError), argument, options)
        if isinstance(result, Dataset):
            return _checked(result, argument)
        if isinstance(result, tuple) and len(result) in (2, 4):
            result = dict(zip(ARRAYS, result, strict=False))
        if not isinstance(result, Mapping):
            raise DataError(
                f"The function returned a {type(result).__name__}.",
                where=argument,
                advice=f"It must return a sparsepipe.data.Dataset, or arrays {', '.join(ARRAYS)} as a dict or a tuple.",
            )
        return assemble_arrays(name, result, HoldOutOptions(), argument)

    def identity(self, argument: str, options: Mapping[str, Any]) -> object:
        """The name and the source of the module; what the code reads is not known."""
        load_plugin(argument, DataError)
        spec = find_spec(argument.partition(":")[0])
        source = Path(spec.origin) if spec is not None and spec.origin else None
        return [argument, digest_file(source) if source is not None and source.is_file() else None]


def _call(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise DataError(
            f"The function does not take these options: {error}.",
            where=name,
            advice=f"Its signature is {inspect.signature(function)}.",
        ) from error
    try:
        return function(**options)
    except SparsepipeError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise DataError(f"The function failed with {failure(error)}.", where=name) from error


def _checked(dataset: Dataset, where: str) -> Dataset:
    """The user's own `Dataset`, after the checks that others pass on their way."""
    parts = [("training", dataset.train), ("test", dataset.test)]
    train, test = (_labels(split, f"{where}, {name} split") for name, split in parts)
    class_names(dataset.classes, train, test, where)
    for name, split in parts:
        sample = split.load(np.zeros(1, np.int64))
        shape = sample.shape[1:] if sample.ndim == 2 else (sample.shape[-1], *sample.shape[1:-1])
        if tuple(shape) != tuple(dataset.input_shape):
            raise DataError(
                f"The samples of the {name} split have the shape {list(shape)}, channels first; input_shape says "
                f"{list(dataset.input_shape)}.",
                where=where,
            )
    return dataset


def _labels(split: Split, where: str) -> Labels:
    return Labels(as_labels(np.asarray(split.labels), where), lambda index: f"{where}, sample {index}")


PLUGIN = Plugin()
