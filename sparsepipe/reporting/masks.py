"""Masks as pictures: the largest sparse layers, shrunk by density, as small transparent PNG images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsepipe.artefact import Artefact
from sparsepipe.formats.masks import Mask, load_masks
from sparsepipe.spec import MASKS_FILE

MAX_ROWS, MAX_COLUMNS = 128, 640
INK_LEVELS = 15
"""Steps between no ink and full ink: few, so that the image compresses well."""


@dataclass(frozen=True)
class Picture:
    """One mask as an image: `cell` is how many (rows, columns) of the [O, I*k*k] mask one pixel stands for."""

    name: str
    shape: tuple[int, ...]
    nnz: int
    cell: tuple[int, int]
    full_ink: float
    """Density that is drawn with full ink."""
    width: int
    height: int
    data_uri: str

    @property
    def drawn_height(self) -> int:
        """A tall mask is drawn flatter, so that it fits on a screen."""
        return min(self.height, max(self.width // 3, 1))

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read(artefact: Artefact | None) -> dict[str, Mask]:
    """The masks that an artefact holds, by parameter name; none where there is no artefact or no file of masks.

    Raises:
        ArtefactError: not a file of masks.
        FormatError: a mask is malformed; the message names it.
    """
    if artefact is None or MASKS_FILE not in artefact.manifest.outputs:
        return {}
    masks = load_masks(artefact.file(MASKS_FILE))
    return {name: mask for name, mask in masks.items() if mask.ndim > 1 and mask.size}


def pictures(masks: Mapping[str, Mask], limit: int = 6) -> tuple[Picture, ...]:
    """Pictures of the `limit` largest masks that leave something out, largest first."""
    sparse = [(name, mask) for name, mask in masks.items() if not mask.all()]
    sparse.sort(key=lambda item: (-item[1].size, item[0]))
    return tuple(draw(name, mask) for name, mask in sparse[:limit])


def shrink(mask: Mask, rows: int, columns: int) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """Mean of a mask [R, C] over equal cells, so that at most `rows` x `columns` of them are left.

    Returns:
        Densities in [0, 1], and the size of a cell; cells at the far edges are averaged over what they cover.
    """
    cell = -(-mask.shape[0] // rows), -(-mask.shape[1] // columns)
    starts = [np.arange(0, extent, step) for extent, step in zip(mask.shape, cell, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(mask, starts[1], axis=1, dtype=np.int64), starts[0], axis=0)
    extents = [np.diff(np.append(start, extent)) for start, extent in zip(starts, mask.shape, strict=True)]
    return sums / np.outer(*extents), cell


def draw(name: str, mask: Mask) -> Picture:
    """The picture of one mask [O, I, *k]: output channels downwards, inputs and kernel taps to the right."""
    flat = mask.reshape(mask.shape[0], -1)
    density, cell = shrink(flat, MAX_ROWS, MAX_COLUMNS)
    full_ink = float(np.quantile(density, 0.995)) or float(density.max()) or 1.0
    ink = np.minimum(density / full_ink, 1.0)
    return Picture(
        name=name,
        shape=mask.shape,
        nnz=int(np.count_nonzero(mask)),
        cell=cell,
        full_ink=full_ink,
        width=density.shape[1],
        height=density.shape[0],
        data_uri=_png(ink),
    )


def _png(ink: NDArray[np.float64]) -> str:
    """Black with `ink` as opacity, so that the page can show it on any background."""
    from PIL import Image

    opacity = (np.rint(ink * INK_LEVELS) * (255 // INK_LEVELS)).astype(np.uint8)
    pixels = np.stack([np.zeros_like(opacity), opacity], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode="LA").save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
