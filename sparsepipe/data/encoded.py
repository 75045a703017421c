"""Datasets of encoded images: in memory where they fit, else decoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsepipe.data.dataset import Dataset, assemble
from sparsepipe.data.images import Decoder, EncodedImages, decode, decoder_for
from sparsepipe.data.labels import Labels, class_names
from sparsepipe.data.options import ImageOptions
from sparsepipe.data.split import ArraySplit, IntArray, Split
from sparsepipe.progress import bar

LAZY_ABOVE_BYTES = 2**30


@dataclass(frozen=True)
class LabelledImages:
    """One split before decoding: M images and int64 [M] labels."""

    images: EncodedImages
    labels: IntArray


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """A split that decodes its images each time they are loaded.

    Args:
        images: M encoded images.
        labels: int64 [N].
        decoder: what decodes them.
        rows: int64 [N], the index in `images` of each sample.
    """

    images: EncodedImages
    labels: IntArray
    decoder: Decoder
    rows: IntArray

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: IntArray) -> NDArray[np.uint8]:
        return decode(self.images, self.rows[indices], self.decoder)

    def subset(self, indices: IntArray) -> EncodedSplit:
        chosen = np.asarray(indices, np.int64)
        return EncodedSplit(self.images, self.labels[chosen], self.decoder, self.rows[chosen])


def assemble_images(
    name: str,
    names: Sequence[str] | None,
    train: LabelledImages,
    test: LabelledImages | None,
    options: ImageOptions,
    where: str,
) -> Dataset:
    """Check the labels, decode the images (or not yet, if they would take more than 1 GiB), and build the dataset.

    Args:
        name: of the dataset, as it was asked for.
        names: of the classes; None takes the numbers of the labels.
        train: the training split.
        test: None makes it a part of the training split.
        options: size and channels of the images, and the size of that part.
        where: the folder or the like that all this came from, for errors.

    Raises:
        DataError: labels or images are not as they should be.
    """
    classes = class_names(names, _labels(train), None if test is None else _labels(test), where)
    decoder = decoder_for(train.images, options)
    return assemble(
        name,
        classes,
        _split(train, decoder, "decoding training images"),
        None if test is None else _split(test, decoder, "decoding test images"),
        options,
    )


def _labels(split: LabelledImages) -> Labels:
    return Labels(split.labels, split.images.name)


def _split(source: LabelledImages, decoder: Decoder, description: str) -> Split:
    everything = np.arange(len(source.images))
    if len(everything) * int(np.prod(decoder.shape)) > LAZY_ABOVE_BYTES:
        return EncodedSplit(source.images, source.labels, decoder, everything)
    with bar(description, len(everything)) as progress:
        inputs = decode(source.images, everything, decoder, progress.advance)
    return ArraySplit(inputs, source.labels)
