"""A whole network in one safetensors file, its sparse weights as named components.

A compressed weight `layer.weight` stands in the file as `layer.weight.values`, `layer.weight.deltas` and so on; every
other tensor (biases, normalisation, counters, dense weights) stands under its own name with its own type. The metadata
key `sparsepipe` is a JSON object {"version": 1, "tensors": {name: {"format": ..., "shape": ..., ...}}} that names every
tensor; the format of an uncompressed one is `dense`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsepipe.errors import FormatError
from sparsepipe.formats.layout import Array, Compressed, check_shape, element_limit, fail
from sparsepipe.formats.registry import decode, find
from sparsepipe.formats.tensors import read_tensors, write_tensors

METADATA_KEY = "sparsepipe"
VERSION = 1
DENSE = "dense"

State = Mapping[str, Array | Compressed]


def save(path: Path, state: State) -> None:
    """Write dense arrays and compressed weights, each under its name, atomically.

    Raises:
        FormatError: a component would stand under the name of another tensor, or `load` would refuse the file.
    """
    arrays: dict[str, Array] = {}
    described: dict[str, Any] = {}
    for name in sorted(state):
        entry = state[name]
        described[name] = entry.metadata if isinstance(entry, Compressed) else _describe_dense(entry)
        for full_name, array in _arrays(name, entry).items():
            if full_name in arrays or (full_name != name and full_name in state):
                fail(f"A component would overwrite the tensor '{full_name}'.", name)
            arrays[full_name] = array
    _check_elements(sum(math.prod(entry.shape) for entry in state.values()), arrays, str(path))
    write_tensors(path, arrays, {METADATA_KEY: json.dumps({"version": VERSION, "tensors": described})})


def load(path: Path) -> dict[str, Array | Compressed]:
    """Read what `save` wrote. The components of a compressed weight are checked when it is decoded.

    Raises:
        ArtefactError: no such file, or not a safetensors file.
        FormatError: the metadata is missing or malformed, or does not account for every array in the file.
    """
    arrays, metadata = read_tensors(path)
    described = _read_metadata(metadata, str(path))
    state: dict[str, Array | Compressed] = {}
    used: set[str] = set()
    elements = 0
    for name, entry in described.items():
        where = f"{path}: {name}"
        state[name], names, shape = _read_entry(name, entry, arrays, where)
        if repeated := used & names:
            fail(f"The array '{min(repeated)}' belongs to two tensors.", where)
        used |= names
        elements += math.prod(shape)
    if unnamed := set(arrays) - used:
        fail(f"The array '{min(unnamed)}' is not named in the metadata.", str(path))
    _check_elements(elements, arrays, str(path))
    return state


def load_dense(path: Path) -> dict[str, Array]:
    """Read what `save` wrote and decode every weight.

    Raises:
        ArtefactError: no such file, or not a safetensors file.
        FormatError: the metadata or a component is malformed; the message says which and how.
    """
    return {
        name: decode(entry, where=f"{path}: {name}") if isinstance(entry, Compressed) else entry
        for name, entry in load(path).items()
    }


def is_network(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a safetensors file is that of a network written by `save`."""
    return METADATA_KEY in metadata


def _check_elements(elements: int, arrays: Mapping[str, Array], where: str) -> None:
    """Refuse tensors that each may be nearly empty, but not all together: no small file shall fill the memory."""
    if elements > element_limit(sum(array.nbytes for array in arrays.values())):
        raise FormatError(
            f"All tensors together have {elements} elements, too many for the size of the file: there is next to "
            "nothing in them.",
            where=where,
            advice="If the network really is that empty, store it in the format bitmask.",
        )


def _arrays(name: str, entry: Array | Compressed) -> dict[str, Array]:
    if isinstance(entry, Compressed):
        return {f"{name}.{component}": array for component, array in entry.components.items()}
    return {name: entry}


def _describe_dense(array: Array) -> dict[str, Any]:
    return {"format": DENSE, "shape": list(array.shape)}


def _read_metadata(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    if METADATA_KEY not in metadata:
        raise FormatError(
            f"The metadata of this file has no key '{METADATA_KEY}', so it holds no converted network.", where=where
        )
    try:
        table = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"The metadata '{METADATA_KEY}' is not valid JSON.", where=where) from error
    if not isinstance(table, dict) or table.get("version") != VERSION:
        fail(f"The metadata '{METADATA_KEY}' is not of version {VERSION}.", where)
    tensors = table.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        fail(f"The metadata '{METADATA_KEY}' has no object 'tensors' that describes each tensor.", where)
    return tensors


def _read_entry(
    name: str, entry: dict[str, Any], arrays: Mapping[str, Array], where: str
) -> tuple[Array | Compressed, set[str], tuple[int, ...]]:
    """The tensor, the names of its arrays in the file, and its dense shape."""
    parameters = dict(entry)
    format_name, shape = parameters.pop("format", None), parameters.pop("shape", None)
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        fail(f"The shape {shape!r} is not a list of sizes.", where)
    if format_name == DENSE:
        if name not in arrays or list(arrays[name].shape) != shape or parameters:
            fail(f"The file has no dense array of shape {shape} under this name.", where)
        return arrays[name], {name}, tuple(shape)
    components = {}
    for component in find(str(format_name), where).components:
        if (full_name := f"{name}.{component}") not in arrays:
            fail("The component is missing from the file.", where, component)
        components[component] = arrays[full_name]
    weight = Compressed(str(format_name), tuple(shape), components, parameters)
    check_shape(weight.shape, weight.nbytes, where)
    return weight, {f"{name}.{component}" for component in components}, weight.shape
