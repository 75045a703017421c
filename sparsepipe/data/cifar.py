"""`cifar10:DIR` and `cifar100:DIR`: the official python archives, as a folder or still packed."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.data.dataset import Dataset, assemble
from sparsepipe.data.labels import Labels, as_labels, class_names
from sparsepipe.data.options import NoOptions
from sparsepipe.data.paths import listing
from sparsepipe.data.pickles import read_pickle
from sparsepipe.data.split import ArraySplit
from sparsepipe.errors import DataError
from sparsepipe.progress import track

SHAPE = (3, 32, 32)  # channels first in the archives


@dataclass(frozen=True)
class Cifar:
    """One of the two datasets: its files and the keys in them.

    Attributes:
        folder: name of the folder in the archive.
        archive: usual name of the archive.
        train: files of the training split, in order.
        test: file of the test split.
        meta: file with the class names.
        label_key: of the labels, in the files of the splits.
        names_key: of the class names, in `meta`.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    names_key: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.meta, *self.train, self.test)

    def load(self, name: str, argument: str, options: NoOptions) -> Dataset:
        place = self._find(argument)
        contents = self._unpack(place) if place.is_file() else self._read(place)
        tables = {file: read_pickle(data, f"{place}, {file}") for file, data in contents.items()}
        names = _list(tables[self.meta], self.names_key, f"{place}, {self.meta}")
        train = self._labelled(tables, self.train, place)
        test = self._labelled(tables, (self.test,), place)
        classes = class_names([str(text) for text in names], train.labels, test.labels, str(place))
        return assemble(name, classes, train.split, test.split)

    def identity(self, argument: str, options: NoOptions) -> object:
        place = self._find(argument)
        if place.is_file():
            return listing(place.parent, [place])
        return listing(place, [place / file for file in self.files if (place / file).is_file()])

    def _find(self, argument: str) -> Path:
        """The folder with the files, or the archive: `argument` itself, or in it."""
        path = Path(argument).expanduser()
        if path.is_file() or any((path / file).is_file() for file in self.files):
            return path
        for place in (path / self.folder, path / self.archive):
            if place.exists():
                return place
        raise DataError(
            f"There is neither a folder {self.folder} nor an archive {self.archive}.",
            where=argument,
            advice="Name the folder that holds one of them, or either of them itself. "
            "The archives are on https://www.cs.toronto.edu/~kriz/cifar.html (python version).",
        )

    def _read(self, folder: Path) -> dict[str, bytes]:
        try:
            return {file: (folder / file).read_bytes() for file in self.files}
        except OSError as error:
            raise DataError(
                f"The file cannot be read: {error.strerror}.",
                where=str(error.filename),
                advice="Unpack the archive again.",
            ) from error

    def _unpack(self, archive: Path) -> dict[str, bytes]:
        """The contents of the files in a tar archive, read in memory."""
        found: dict[str, bytes] = {}
        try:
            with tarfile.open(archive) as tar:
                members = (member for member in tar if member.isfile() and Path(member.name).name in self.files)
                for member in track(members, f"unpacking {archive.name}", len(self.files)):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    found[Path(member.name).name] = content.read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"The archive cannot be read: {error}.",
                where=str(archive),
                advice="It may be truncated: download it again.",
            ) from error
        missing = [file for file in self.files if file not in found]
        if missing:
            raise DataError(
                f"The archive lacks {', '.join(missing)}.",
                where=str(archive),
                advice=f"This dataset needs the python version of {self.archive}.",
            )
        return found

    def _labelled(self, tables: Mapping[str, dict[str, Any]], files: Sequence[str], place: Path) -> _Part:
        parts = [self._part(tables[file], f"{place}, {file}") for file in files]
        images = np.concatenate([images for images, _ in parts])
        ends = np.cumsum([len(labels) for _, labels in parts])

        def row_name(index: int) -> str:
            part = int(np.searchsorted(ends, index, side="right"))
            start = ends[part] - len(parts[part][1])
            return f"{place}, {files[part]}, row {index - start}"

        labels = Labels(np.concatenate([labels for _, labels in parts]), row_name)
        return _Part(ArraySplit(images, labels.values), labels)

    def _part(self, table: dict[str, Any], where: str) -> tuple[Any, Any]:
        images = table.get("data")
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (np.prod(SHAPE),):
            raise DataError(f"'data' is not a uint8 array [N, {np.prod(SHAPE)}].", where=where)
        labels = as_labels(_list(table, self.label_key, where), where)
        if len(labels) != len(images):
            raise DataError(f"There are {len(images)} images but {len(labels)} labels.", where=where)
        return np.ascontiguousarray(images.reshape(-1, *SHAPE).transpose(0, 2, 3, 1)), labels


@dataclass(frozen=True)
class _Part:
    split: ArraySplit
    labels: Labels


def _list(table: dict[str, Any], key: str, where: str) -> list[Any]:
    value = table.get(key)
    if not isinstance(value, list):
        keys = ", ".join(re.sub(r"\W", "?", str(name)) for name in table)
        raise DataError(
            f"The key '{key}' is missing or not a list; there are: {keys or 'none'}.",
            where=where,
            advice="Check that this is the right one of CIFAR-10 and CIFAR-100.",
        )
    return value


CIFAR10 = Cifar(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    label_key="labels",
    names_key="label_names",
)
CIFAR100 = Cifar(
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    test="test",
    meta="meta",
    label_key="fine_labels",
    names_key="fine_label_names",
)
