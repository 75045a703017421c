"""The file of a film: the mask of one layer at several moments of a training, one bit per weight. Needs no torch.

A safetensors file with `bits`, uint8 [frames, ceil(size / 8)] (each mask in C order, lowest bit first), and int64
[frames] `updates` (mask updates so far) and `steps` (optimizer steps so far). The metadata key `film` is a JSON object
with the name of the `layer` and the `shape` of its weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsepipe.errors import FormatError
from sparsepipe.formats.layout import MAX_DIMENSION, Array
from sparsepipe.formats.masks import Mask
from sparsepipe.formats.tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class Film:
    """Masks of the weight `layer`, oldest first."""

    layer: str
    updates: tuple[int, ...]
    steps: tuple[int, ...]
    masks: tuple[Mask, ...]


def save_film(
    path: Path,
    layer: str,
    shape: Sequence[int],
    updates: Sequence[int],
    steps: Sequence[int],
    bits: Sequence[npt.NDArray[np.uint8]],
) -> None:
    """Write the frames `bits`, each a packed mask of `shape`."""
    tensors: dict[str, Array] = {
        "bits": np.stack(bits),
        "updates": np.array(updates, dtype=np.int64),
        "steps": np.array(steps, dtype=np.int64),
    }
    write_tensors(path, tensors, {"film": json.dumps({"layer": layer, "shape": list(shape)})})


def load_film(path: Path) -> Film:
    """Read a film.

    Raises:
        ArtefactError: no such file, or not a safetensors file.
        FormatError: an entry is missing, or does not fit the others.
    """
    tensors, metadata = read_tensors(path)
    missing = np.empty(0)
    bits, updates, steps = (tensors.get(name, missing) for name in ("bits", "updates", "steps"))
    try:
        about = json.loads(metadata["film"])
        layer, shape = str(about["layer"]), about["shape"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError("The metadata do not say which weight this is.", where=str(path)) from error
    sides = shape if isinstance(shape, list) and len(shape) >= 2 else [None]
    if not all(type(side) is int and 0 < side <= MAX_DIMENSION for side in sides):
        raise FormatError(f"{shape!r} is not a shape.", where=str(path))
    size = math.prod(shape)
    if bits.dtype != np.uint8 or bits.ndim != 2 or not len(bits) or bits.shape[1] != -(-size // 8):
        raise FormatError(f"There are no frames 'bits' of {size} bits each.", where=str(path))
    if any(each.dtype != np.int64 or each.shape != bits.shape[:1] for each in (updates, steps)):
        raise FormatError("There is not one 'updates' and one 'steps' (int64) for each frame.", where=str(path))
    frames = np.unpackbits(bits, axis=1, count=size, bitorder="little").astype(bool)
    return Film(
        layer,
        tuple(updates.tolist()),
        tuple(steps.tolist()),
        tuple(frame.reshape(shape) for frame in frames),
    )
