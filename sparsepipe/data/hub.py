"""`hf:NAME`: what the `datasets` library loads, from the Hugging Face hub or from a folder.

That library keeps its own cache of downloads; nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsepipe.data.dataset import Dataset
from sparsepipe.data.encoded import assemble_images
from sparsepipe.data.options import HubOptions
from sparsepipe.data.paths import listing
from sparsepipe.data.table import TEST_SPLITS, Piece, class_names_in, find_columns, labelled_images
from sparsepipe.errors import DataError, MissingExtraError, first_line


class Hub:
    """Image classification datasets, by the name they have on the hub."""

    def load(self, name: str, argument: str, options: HubOptions) -> Dataset:
        splits = _download(argument, options)
        train = _choose(splits, options.train_split, name)
        test = next((split for split in TEST_SPLITS if split in splits), None)
        if options.test_split is not None:
            test = _choose(splits, options.test_split, name)
        schema = splits[train].features.arrow_schema
        columns = find_columns(schema, options, f"{name}, split '{train}'")

        def pieces(split: str) -> list[Piece]:
            return [Piece(f"{name}, split '{split}'", splits[split].with_format("arrow")[:])]

        return assemble_images(
            name,
            class_names_in(schema, columns.label),
            labelled_images(pieces(train), columns, follow_paths=True),
            labelled_images(pieces(test), columns, follow_paths=True) if test else None,
            options,
            name,
        )

    def identity(self, argument: str, options: HubOptions) -> object:
        """The files of a local folder; of a dataset on the hub, its name alone (pin it with `revision`)."""
        folder = Path(argument).expanduser()
        if not folder.is_dir():
            return [argument]
        return listing(folder, (path for path in folder.rglob("*") if path.is_file()))


def _download(argument: str, options: HubOptions) -> Mapping[str, Any]:
    """All splits, by name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", "Loading datasets from the Hugging Face hub") from error
    path = Path(argument).expanduser()
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(
            str(path) if path.is_dir() else argument, options.config, revision=options.revision
        )
    except Exception as error:  # the library and those below it raise many kinds
        raise _unavailable(argument, error) from error
    return loaded


def _unavailable(argument: str, error: Exception) -> DataError:
    reason = first_line(error)
    if isinstance(error, ConnectionError):
        advice = "The hub cannot be reached: check the network, or download the data and use parquet:DIR."
    elif isinstance(error, FileNotFoundError):
        advice = "Check the name; datasets of users are called USER/NAME, and private ones need a login."
    else:
        advice = "Check the name and the options config and revision."
    return DataError(f"The dataset cannot be loaded: {reason}.", where=f"hf:{argument}", advice=advice)


def _choose(splits: Mapping[str, Any], split: str, name: str) -> str:
    if split not in splits:
        raise DataError(
            f"There is no split '{split}'.",
            where=name,
            advice=f"The splits are: {', '.join(splits)}. Choose with the options train_split and test_split.",
        )
    return split


HUB = Hub()
