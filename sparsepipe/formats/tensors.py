"""Plain safetensors files of numpy arrays, and the digest of a network's tensors. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from sparsepipe.artefact import atomic_write
from sparsepipe.errors import ArtefactError
from sparsepipe.formats.layout import Array

# numpy has no bfloat16: those tensors are read as float32, which holds every bfloat16 exactly.
BFLOAT16 = "BF16"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    BFLOAT16: "uint16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class TensorFile(NamedTuple):
    """Contents of a safetensors file."""

    tensors: dict[str, Array]
    metadata: dict[str, str]


def read_tensors(path: Path) -> TensorFile:
    """Read a safetensors file; bfloat16 tensors become float32 without loss.

    Raises:
        ArtefactError: no such file, not a safetensors file, or a tensor of a type that numpy lacks.
    """
    try:
        content = path.read_bytes()
        entries = deserialize(content)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ArtefactError(f"The file cannot be read: {error.strerror}.", where=str(path)) from error
    except SafetensorError as error:
        raise ArtefactError(f"This is not a valid safetensors file: {error}.", where=str(path)) from error
    tensors = {name: _to_array(entry, f"{path}: {name}") for name, entry in entries}
    return TensorFile(dict(sorted(tensors.items())), _metadata(content))


def write_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Equal contents give equal bytes if `metadata` has one key at most."""
    # safetensors takes the raw memory of an array, so it must be in C order.
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    content = save(ordered, None if metadata is None else dict(metadata))
    with atomic_write(path) as file:
        file.write(content)


def digest_tensors(tensors: Mapping[str, Array]) -> str:
    """`sha256:<hex>` over names, types, shapes and values, whatever the order or the file they come from."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        hasher.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        hasher.update(array.tobytes())
    return f"sha256:{hasher.hexdigest()}"


def _to_array(entry: Mapping[str, object], where: str) -> Array:
    kind, shape, data = str(entry["dtype"]), entry["shape"], entry["data"]
    if kind not in DTYPES:
        raise ArtefactError(
            f"A tensor of type {kind} cannot be read here.",
            where=where,
            advice=f"Save it as one of {', '.join(DTYPES)}.",
        )
    assert isinstance(shape, list)
    assert isinstance(data, bytes | bytearray | memoryview)
    try:
        array = np.frombuffer(data, np.dtype(DTYPES[kind]).newbyteorder("<")).reshape(shape)
    except ValueError as error:
        raise ArtefactError(f"A tensor of shape {shape} cannot be read: {error}.", where=where) from error
    array = array.astype(DTYPES[kind])
    if kind == BFLOAT16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _metadata(content: bytes) -> dict[str, str]:
    # `deserialize` has checked the header: its length stands in the first eight bytes, and metadata is str -> str.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header.get("__metadata__") or {})
