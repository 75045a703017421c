"""`parquet:DIR`: Parquet files in the layout of dataset hubs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsepipe.data.dataset import Dataset
from sparsepipe.data.encoded import assemble_images
from sparsepipe.data.options import TableOptions
from sparsepipe.data.paths import existing, listing
from sparsepipe.data.table import TEST_SPLITS, Columns, Piece, class_names_in, find_columns, labelled_images
from sparsepipe.errors import DataError, MissingExtraError, first_line


class Parquet:
    """train*.parquet with test*.parquet (or validation*), in DIR or in DIR/data."""

    def load(self, name: str, argument: str, options: TableOptions) -> Dataset:
        train, test = _find(existing("folder", argument), options)
        schema = _open(train[0]).schema_arrow
        columns = find_columns(schema, options, str(train[0]))
        names = class_names_in(schema, columns.label)
        return assemble_images(
            name,
            names,
            labelled_images(_read(train, columns, names), columns),
            labelled_images(_read(test, columns, names), columns) if test else None,
            options,
            argument,
        )

    def identity(self, argument: str, options: TableOptions) -> object:
        root = existing("folder", argument)
        return listing(root, [file for split in _find(root, options) for file in split])


def _find(root: Path, options: TableOptions) -> tuple[list[Path], list[Path]]:
    """The files of the training split and of the test split (none: an empty list)."""
    folder = next((place for place in (root, root / "data") if _files(place, options.train_split)), None)
    if folder is None:
        found = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.parquet"))
        layout = "The layout is train*.parquet and test*.parquet, in the folder or in its subfolder data."
        there = f"Found are: {', '.join(found[:8])}. Name their folder, or the split with the option train_split."
        raise DataError(
            f"There is no file {options.train_split}*.parquet.", where=str(root), advice=there if found else layout
        )
    if options.test_split is None:
        return _files(folder, options.train_split), next(filter(None, (_files(folder, s) for s in TEST_SPLITS)), [])
    test = _files(folder, options.test_split)
    if not test:
        raise DataError(f"There is no file {options.test_split}*.parquet.", where=str(folder))
    return _files(folder, options.train_split), test


def _files(folder: Path, split: str) -> list[Path]:
    return sorted(file for file in folder.glob("*.parquet") if file.name.startswith(split))


def _read(files: Sequence[Path], columns: Columns, names: Sequence[str] | None) -> list[Piece]:
    """The two columns of each file, which must have them under the same names and with the same class names."""
    pieces = []
    for path in files:
        file = _open(path)
        schema = file.schema_arrow
        find_columns(schema, TableOptions(image_column=columns.image, label_column=columns.label), str(path))
        other = class_names_in(schema, columns.label)
        if other != (list(names) if names is not None else None):
            raise DataError(
                f"The class names ({_short(other)}) differ from those of the training split ({_short(names)}).",
                where=str(path),
                advice="All files must name the same classes in the same order.",
            )
        try:
            pieces.append(Piece(str(path), file.read(columns=[columns.image, columns.label])))
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise _unreadable(path, error) from error
    return pieces


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets", "Reading Parquet files") from error
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = first_line(error)
    return DataError(f"The Parquet file cannot be read: {reason}.", where=str(path), advice="Download it again.")


def _short(names: Sequence[str] | None) -> str:
    return "none" if names is None else f"{len(names)}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


PARQUET = Parquet()
