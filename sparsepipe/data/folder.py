"""`imagefolder:DIR`: image files, sorted into one folder per class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsepipe.data.dataset import Dataset
from sparsepipe.data.encoded import LabelledImages, assemble_images
from sparsepipe.data.options import ImageOptions
from sparsepipe.data.paths import existing, listing
from sparsepipe.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "validation", "valid")
"""In any mixture of small and capital letters."""

ClassFiles = Mapping[str, list[str]]


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images in files of their own."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise DataError(f"The image cannot be read: {error.strerror}.", where=self.paths[index]) from error

    def name(self, index: int) -> str:
        return self.paths[index]


class ImageFolder:
    """train/CLASS/* with test/CLASS/* (or val/CLASS/*), or CLASS/* alone."""

    def load(self, name: str, argument: str, options: ImageOptions) -> Dataset:
        train, test = _find(existing("folder", argument))
        if test is not None and set(train) != set(test):
            missing = sorted(set(train) ^ set(test))
            raise DataError(
                f"The training split has {len(train)} classes and the test split {len(test)}; not in both: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}.",
                where=argument,
                advice="Give both splits the same class folders.",
            )
        return assemble_images(
            name, sorted(train), _flatten(train), None if test is None else _flatten(test), options, argument
        )

    def identity(self, argument: str, options: ImageOptions) -> object:
        root = existing("folder", argument)
        files = (path for split in _find(root) if split for paths in split.values() for path in paths)
        return listing(root, map(Path, files))


def _find(root: Path) -> tuple[ClassFiles, ClassFiles | None]:
    """The image files of each class, of the training split and, where there is one, of the test split."""
    folders = {name.lower(): root / name for name in _subfolders(root)}
    train = next((folders[name] for name in TRAIN_FOLDERS if name in folders), None)
    tests = [folders[name] for name in TEST_FOLDERS if name in folders]
    # Among classes of vehicles, a folder of images called `train` is one of them.
    if train is None or not (tests or _subfolders(train)):
        return _classes(root), None
    # Some datasets come with a folder of unlabelled test images, which is of no use here.
    test = next((folder for folder in tests if _subfolders(folder)), None)
    return _classes(train), None if test is None else _classes(test)


def _classes(folder: Path) -> ClassFiles:
    names = _subfolders(folder)
    if not names:
        raise DataError(
            "The folder holds no class folders.",
            where=str(folder),
            advice="The layout is train/CLASS/images and test/CLASS/images (or val/), or CLASS/images alone.",
        )
    found = {name: _image_files(folder / name) for name in names}
    for name, files in found.items():
        if not files:
            raise DataError(
                "The class folder holds no images.",
                where=str(folder / name),
                advice=f"Image files end in {', '.join(SUFFIXES)}.",
            )
    return found


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # copies, as in .ipynb_checkpoints
        images = (name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in images]
    return sorted(found)


def _flatten(classes: ClassFiles) -> LabelledImages:
    """The files of all classes, in the order of the class names, labelled with the class's number."""
    ordered = sorted(classes)
    labels = np.repeat(np.arange(len(ordered)), [len(classes[name]) for name in ordered])
    return LabelledImages(ImageFiles([path for name in ordered for path in classes[name]]), labels)


IMAGE_FOLDER = ImageFolder()
