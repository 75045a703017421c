"""The file of masks: one bit per weight. Needs no torch.

A safetensors file with, for each parameter name, uint8 [ceil(size / 8)]: the mask in C order, lowest bit first. The
metadata key `shapes` is a JSON object from parameter name to shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsepipe.errors import ArtefactError, FormatError
from sparsepipe.formats.layout import MAX_DIMENSION
from sparsepipe.formats.tensors import read_tensors, write_tensors

Mask = npt.NDArray[np.bool_]


def save_masks(path: Path, masks: Mapping[str, Mask]) -> None:
    """Write masks, True where a weight is active."""
    packed = {name: np.packbits(mask.reshape(-1), bitorder="little") for name, mask in masks.items()}
    shapes = {name: list(masks[name].shape) for name in sorted(masks)}
    write_tensors(path, packed, {"shapes": json.dumps(shapes)})


def load_masks(path: Path) -> dict[str, Mask]:
    """Read masks as bool arrays of their weights' shapes.

    Raises:
        ArtefactError: no such file, or not a safetensors file.
        FormatError: the shapes are missing or do not fit the bits; the message names the mask.
    """
    tensors, metadata = read_tensors(path)
    try:
        shapes = json.loads(metadata["shapes"])
    except KeyError as error:
        raise ArtefactError(
            "The metadata of this file has no key 'shapes', so it holds no masks.", where=str(path)
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError("The shapes in the metadata are not valid JSON.", where=str(path)) from error
    if not isinstance(shapes, dict) or set(shapes) != set(tensors):
        raise FormatError("The shapes in the metadata do not name the same masks as the file holds.", where=str(path))
    return {name: _unpack(tensors[name], shapes[name], f"{path}: mask of {name}") for name in tensors}


def is_masks(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a safetensors file is that of a file of masks."""
    return set(metadata) == {"shapes"}


def _unpack(packed: npt.NDArray[np.uint8], shape: object, where: str) -> Mask:
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side <= MAX_DIMENSION for side in shape):
        raise FormatError(f"{shape!r} is not a shape.", where=where)
    size = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (-(-size // 8),):
        raise FormatError(
            f"A mask of shape {shape} takes {-(-size // 8)} bytes of type uint8; "
            f"the file has {list(packed.shape)} of {packed.dtype}.",
            where=where,
        )
    bits = np.unpackbits(packed, bitorder="little")
    if bits[size:].any():
        raise FormatError(f"Bits are set beyond the last of {size}.", where=where)
    return bits[:size].astype(bool).reshape(shape)
