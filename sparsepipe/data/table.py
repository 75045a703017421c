"""Tables with a column of encoded images and a column of labels, as Arrow holds them (Parquet files, hub datasets)."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.data.encoded import LabelledImages
from sparsepipe.data.labels import as_labels
from sparsepipe.data.options import TableOptions
from sparsepipe.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class Columns:
    """The names of the two columns in use."""

    image: str
    label: str


@dataclass(frozen=True)
class Piece:
    """A part of a split, in order: a `pyarrow.Table` and the file (or the like) that it came from."""

    where: str
    table: Any


def find_columns(schema: Any, options: TableOptions, where: str) -> Columns:
    """Choose the columns by option, by usual name, or (images) because there is only one with images.

    Args:
        schema: a `pyarrow.Schema`.
        options: may name them.
        where: the file, for errors.

    Raises:
        DataError: no such column, or one of the wrong type; the columns that there are are listed.
    """
    import pyarrow as pa

    listed = "The columns are: " + "; ".join(f"{field.name}: {field.type}" for field in schema) + "."
    holding = [field.name for field in schema if _holds_images(field.type)]
    image = options.image_column or _first(IMAGE_COLUMNS, schema.names) or (holding[0] if len(holding) == 1 else "")
    label = options.label_column or _first(LABEL_COLUMNS, schema.names)
    for column, usual, option in ((image, IMAGE_COLUMNS, "image_column"), (label, LABEL_COLUMNS, "label_column")):
        if column not in schema.names:
            what = f"'{column}'" if column else f"called {', '.join(usual[:-1])} or {usual[-1]}"
            raise DataError(
                f"There is no column {what}.", where=where, advice=f"{listed} Name one with the option {option}."
            )
    image_type, label_type = schema.field(image).type, schema.field(label).type
    if image not in holding:
        raise DataError(
            f"The column '{image}' is of type {image_type}; images are struct<bytes, path> or binary.",
            where=where,
            advice=f"{listed} Name one with the option image_column.",
        )
    if not pa.types.is_integer(label_type):
        raise DataError(
            f"The column '{label}' is of type {label_type}; labels are integers.",
            where=where,
            advice=f"{listed} Name one with the option label_column.",
        )
    return Columns(image, label)


def labelled_images(pieces: Sequence[Piece], columns: Columns, *, follow_paths: bool = False) -> LabelledImages:
    """One split from its parts.

    Args:
        pieces: at least one.
        columns: to take from each.
        follow_paths: read images that the table names by their path only.

    Raises:
        DataError: a label is missing.
    """
    labels = [_labels(piece, columns.label) for piece in pieces]
    return LabelledImages(ArrowImages(pieces, columns.image, follow_paths), np.concatenate(labels))


def class_names_in(schema: Any, label_column: str) -> list[str] | None:
    """Class names from the schema's metadata: `class_names` (comma-separated) or the features of the `datasets`
    library; None where there are none."""
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    if b"class_names" in metadata:
        return [name.strip() for name in metadata[b"class_names"].decode().split(",")]
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


@dataclass(frozen=True)
class _Chunk:
    """Consecutive images: encoded bytes, paths (or None), the file they are in and the first one's row there."""

    encoded: Any
    paths: Any
    where: str
    row: int


class ArrowImages:
    """Encoded images in an Arrow column."""

    def __init__(self, pieces: Sequence[Piece], column: str, follow_paths: bool) -> None:
        self._chunks: list[_Chunk] = []
        self._starts: list[int] = []
        self._count = 0
        for piece in pieces:
            row = 0
            for chunk in piece.table.column(column).chunks:
                encoded, paths = _fields(chunk)
                self._chunks.append(_Chunk(encoded, paths if follow_paths else None, piece.where, row))
                self._starts.append(self._count)
                row += len(chunk)
                self._count += len(chunk)

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> bytes:
        chunk, offset = self._locate(index)
        encoded: bytes | None = chunk.encoded[offset].as_py()
        if encoded is not None:
            return encoded
        path = None if chunk.paths is None else chunk.paths[offset].as_py()
        if path is None:
            raise DataError("The image is missing (its bytes are null).", where=self.name(index))
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"The image file '{path}' cannot be read.", where=self.name(index)) from error

    def name(self, index: int) -> str:
        chunk, offset = self._locate(index)
        return f"{chunk.where}, row {chunk.row + offset}"

    def _locate(self, index: int) -> tuple[_Chunk, int]:
        position = bisect.bisect_right(self._starts, index) - 1
        return self._chunks[position], index - self._starts[position]


def _fields(chunk: Any) -> tuple[Any, Any]:
    """Arrow arrays of the bytes and, where there are any, of the paths."""
    import pyarrow as pa

    if not pa.types.is_struct(chunk.type):
        return chunk, None
    children = {field.name: array for field, array in zip(chunk.type, chunk.flatten(), strict=True)}
    return children["bytes"], children.get("path")


def _labels(piece: Piece, column: str) -> Any:
    values = piece.table.column(column)
    where = f"{piece.where}, column '{column}'"
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy()))
        raise DataError(f"The label in row {row} is missing (null).", where=where, advice="Remove the row.")
    return as_labels(values.to_numpy(), where)


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _first(wanted: Sequence[str], names: Sequence[str]) -> str:
    return next((name for name in wanted if name in names), "")
