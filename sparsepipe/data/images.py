"""Decoding images (JPEG, PNG, ...), with errors that name the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsepipe.data.options import ImageOptions
from sparsepipe.data.split import IntArray
from sparsepipe.environment import usable_cores
from sparsepipe.errors import DataError, MissingExtraError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow also opens formats that call other programs (EPS calls Ghostscript): a dataset must not choose those.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
GREY_MODES = ("1", "L", "LA", "La")
DEEP_MODES = ("I", "F")
ORIENTATION = 0x0112
"""The tag of the EXIF standard, and its values that exchange width and height."""
SIDEWAYS = (5, 6, 7, 8)
CHUNK = 64
# Below this size, decoding spends more time under Python's lock than in the decoder, and threads make it slower.
THREADS_FROM_PIXELS = 96 * 96
PEEK = 64


class EncodedImages(Protocol):
    """Image files, wherever they lie."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image. Raises DataError, naming it, if it is not there."""
        ...

    def name(self, index: int) -> str:
        """The file, or the file and row, for errors."""
        ...


@dataclass(frozen=True)
class Decoder:
    """Decodes images that must all come out in one shape.

    Attributes:
        shape: (H, W, C) of each decoded image.
        crop: fit images of other sizes by resizing the shorter side and cropping the centre.
        grey_only: a colour image is an error.
    """

    shape: tuple[int, int, int]
    crop: bool
    grey_only: bool

    def __call__(self, images: EncodedImages, index: int) -> NDArray[np.uint8]:
        """uint8 [H, W, C].

        Raises:
            DataError: naming the image, if it cannot be decoded or does not fit.
        """
        data = images.read(index)
        height, width, channels = self.shape
        try:
            with _pillow().open(BytesIO(data), formats=FORMATS) as image:
                self._check(image, images, index)
                if self.crop:
                    image.draft(None, (2 * width, 2 * height))  # lets the JPEG decoder skip detail that is not needed
                mode = "L" if channels == 1 else "RGB"
                upright = _upright(image)
                converted = upright if upright.mode == mode else upright.convert(mode)
                if self.crop and converted.size != (width, height):
                    converted = _fit(converted, (width, height))
                return np.asarray(converted).reshape(self.shape)
        except DataError:
            raise
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise _corrupt(error, images.name(index)) from error

    def _check(self, image: Image, images: EncodedImages, index: int) -> None:
        height, width, _ = self.shape
        size = _upright_size(image)
        if not self.crop and size != (width, height):
            raise DataError(
                f"The image is {size[0]} x {size[1]} pixels, but the first one is {width} x {height}.",
                where=images.name(index),
                advice="Images of different sizes need the option size=PIXELS, which resizes and crops them.",
            )
        if image.mode.startswith(DEEP_MODES):
            raise DataError(
                f"The image has more than 8 bits in a channel (Pillow mode {image.mode}), which is not supported.",
                where=images.name(index),
                advice="Convert the images to 8 bits.",
            )
        if self.grey_only and image.mode not in GREY_MODES:
            raise DataError(
                "This image is in colour, but the others that were looked at are in shades of grey.",
                where=images.name(index),
                advice="Choose with the option channels=3 (colour) or channels=1 (grey).",
            )


def decoder_for(images: EncodedImages, options: ImageOptions) -> Decoder:
    """The decoder for `images` and everything that must have the same shape.

    Without the option `channels`, images are grey if all of some evenly spaced ones are. Without the option `size`,
    the size is that of the first image.
    """
    indices = np.linspace(0, len(images) - 1, min(len(images), PEEK)).round().astype(int)
    modes, (width, height) = Counter[bool](), (0, 0)
    for index in reversed(indices.tolist()):
        mode, (width, height) = _peek(images, index)
        modes[mode in GREY_MODES] += 1
    grey = not modes[False]
    channels = options.channels or (1 if grey else 3)
    if options.size:
        width = height = options.size
    return Decoder((height, width, channels), options.size is not None, grey and options.channels is None)


def decode(
    images: EncodedImages, indices: IntArray, decoder: Decoder, advance: Callable[[int], None] | None = None
) -> NDArray[np.uint8]:
    """Decode the images at `indices`, on all cores where that is faster.

    Args:
        images: where they are.
        indices: int64 [n].
        decoder: what decodes them.
        advance: called with the number of images that were finished, now and then.

    Returns:
        uint8 [n, H, W, C].

    Raises:
        DataError: naming the first image that cannot be decoded.
    """
    out = np.empty((len(indices), *decoder.shape), np.uint8)

    def work(start: int) -> int:
        chosen = indices[start : start + CHUNK].tolist()
        for row, index in enumerate(chosen, start):
            out[row] = decoder(images, index)
        return len(chosen)

    starts = range(0, len(indices), CHUNK)
    threads = min(usable_cores(), len(starts)) if np.prod(decoder.shape[:2]) >= THREADS_FROM_PIXELS else 1
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for done in pool.map(work, starts) if threads > 1 else map(work, starts):
            if advance is not None:
                advance(done)
    return out


def _peek(images: EncodedImages, index: int) -> tuple[str, tuple[int, int]]:
    """Mode and (width, height) of one image, from its header."""
    data = images.read(index)
    try:
        with _pillow().open(BytesIO(data), formats=FORMATS) as image:
            return image.mode, _upright_size(image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise _corrupt(error, images.name(index)) from error


def _orientation(image: Image) -> int:
    """1 to 8: how a camera was held, as it noted in the EXIF data."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # of damaged notes Pillow raises many kinds; viewers pass over them
        return 1


def _upright(image: Image) -> Image:
    """The image as viewers show it."""
    if _orientation(image) == 1:
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _upright_size(image: Image) -> tuple[int, int]:
    """Width and height as viewers show it; of a TIFF file Pillow says them so by itself."""
    turned = image.format != "TIFF" and _orientation(image) in SIDEWAYS
    return image.size[::-1] if turned else image.size


def _fit(image: Image, size: tuple[int, int]) -> Image:
    from PIL import Image, ImageOps

    return ImageOps.fit(image, size, Image.Resampling.BILINEAR)


def _corrupt(error: Exception, where: str) -> DataError:
    reason = first_line(error)
    if type(error).__name__ == "UnidentifiedImageError":  # its text shows a Python object
        reason = f"it is not one of {', '.join(FORMATS)}"
    return DataError(f"The image cannot be decoded: {reason}.", where=where, advice="Replace or remove it.")


@cache
def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "datasets", "Decoding images") from error
    return Image
