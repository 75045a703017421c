"""How an ONNX file holds a sparse weight: blocks of nonzero values, and how far each lies from the one before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encode(
    weight: NDArray[np.float32], block: int = 1, dtype: type[np.unsignedinteger[Any]] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger[Any]]]:
    """``values`` [blocks, block] and ``deltas`` [blocks] of a weight whose first dimension is the output.

    Args:
        weight: [O, ...]; O must be a multiple of ``block``.
        block: output channels of a block: 1, 2 or 4.
        dtype: ``np.uint8`` or ``np.uint16``; by default the one that makes the smaller file.
    """
    out = weight.shape[0]
    if block not in (1, 2, 4) or out % block:
        raise ValueError(f"a block of {block} does not divide {out} outputs into blocks of 1, 2 or 4")
    blocks = weight.reshape(out // block, block, -1).transpose(0, 2, 1).reshape(-1, block)
    index = np.flatnonzero(blocks.any(axis=1))
    position, deltas = chain(index, 4 * block, dtype)
    values = np.zeros((len(deltas), block), np.float32)
    values[position] = blocks[index]
    return values, deltas


def decode(
    values: NDArray[np.float32], deltas: NDArray[np.unsignedinteger[Any]], shape: Sequence[int], block: int
) -> NDArray[np.float32]:
    """The weight of which ``encode`` made ``values`` and ``deltas``.

    Args:
        values: [blocks, block].
        deltas: [blocks], uint8 or uint16.
        shape: of the weight, [O, ...]; O must be a multiple of ``block``.
        block: output channels of a block: 1, 2 or 4.

    Raises:
        ValueError: the arrays do not fit each other or the shape, or the blocks do not ascend or lie outside of it.
    """
    out, columns = shape[0], math.prod(shape[1:])
    if block not in (1, 2, 4) or out % block:
        raise ValueError(f"a block of {block} does not divide {out} outputs into blocks of 1, 2 or 4")
    if values.dtype != np.float32 or deltas.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"values of {values.dtype} and deltas of {deltas.dtype} are not float32 and uint8 or uint16")
    if deltas.ndim != 1 or values.shape != (len(deltas), block):
        raise ValueError(f"values of shape {values.shape} and deltas of shape {deltas.shape} do not fit each other")
    count = out // block * columns
    blocks = np.zeros((count, block), np.float32)
    blocks[unchain(deltas, count)] = values
    return np.ascontiguousarray(blocks.reshape(out // block, columns, block).transpose(0, 2, 1)).reshape(shape)


def chain(
    index: NDArray[np.intp], block_bytes: int, dtype: type[np.unsignedinteger[Any]] | None
) -> tuple[NDArray[np.intp], NDArray[np.unsignedinteger[Any]]]:
    """The place of each block among those that are stored, and the ``deltas`` of these.

    Args:
        index: numbers of the nonzero blocks, ascending.
        block_bytes: what the values of a block take.
        dtype: of the deltas; None takes the one that makes the smaller file.
    """
    if dtype is None:
        sizes = {kind: _count(index, kind) * (block_bytes + np.dtype(kind).itemsize) for kind in (np.uint8, np.uint16)}
        dtype = min(sizes, key=lambda kind: sizes[kind])
    most = int(np.iinfo(dtype).max)
    gaps = np.diff(index, prepend=0)
    fillers = np.maximum((gaps - 1) // most, 0)
    position = np.arange(len(index)) + np.cumsum(fillers)
    deltas = np.full(len(index) + int(fillers.sum()), most, dtype)
    deltas[position] = gaps - fillers * most
    return position, deltas


def unchain(deltas: NDArray[np.unsignedinteger[Any]], count: int) -> NDArray[np.int64]:
    """The number of each stored block, of a weight that has ``count`` blocks.

    Raises:
        ValueError: the blocks do not ascend, or one lies outside of the weight.
    """
    if not deltas[1:].all():
        raise ValueError("the blocks do not ascend")
    index = np.cumsum(deltas, dtype=np.int64)
    if len(index) and index[-1] >= count:
        raise ValueError(f"block {index[-1]} is outside of the weight's {count}")
    return index


def _count(index: NDArray[np.intp], dtype: type[np.unsignedinteger[Any]]) -> int:
    gaps = np.diff(index, prepend=0)
    return int(len(index) + np.maximum((gaps - 1) // int(np.iinfo(dtype).max), 0).sum())
