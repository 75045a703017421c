"""Checkpoints: the whole state of a training in one safetensors file.

Tensors are stored by their path in the state ("optimizer/state/0/momentum_buffer"); everything else is JSON in the
file's metadata, with a checksum over all of it. A file is written under a temporary name, and the one before it is
kept, so that at any moment at least one checkpoint can be read, also after a power failure.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsepipe.artefact import atomic_write
from sparsepipe.errors import ArtefactError

FILE = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
DAMAGED = "checkpoint.damaged.safetensors"
VERSION = "1"

log = logging.getLogger("sparsepipe")


class _DamagedError(Exception):
    """A checkpoint file that cannot be used, and why."""


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` as the newest checkpoint of `folder`; the one before becomes the previous one.

    Args:
        folder: where the checkpoint lies.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "", tensors))
    metadata = {"version": VERSION, "state": tree, "checksum": _checksum(tree, tensors)}
    newest = folder / FILE
    with atomic_write(newest) as file:
        file.write(safetensors.torch.save(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())
        # Only now, with the new state safe on disk, does the old one step aside.
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
    _sync_names(folder)


def exists(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, readable or not."""
    return any((folder / name).exists() for name in (FILE, PREVIOUS))


def load(folder: Path) -> dict[str, Any] | None:
    """The newest state of `folder` that can be read, on the CPU; None if there never was one.

    A newest file that cannot be read is put aside, and the previous one takes its name: the next `save` would otherwise
    put the damaged one in the place of the only good one.

    Raises:
        ArtefactError: there are checkpoints, but none can be read.
    """
    reasons = []
    for path in (folder / FILE, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = _read(path)
        except _DamagedError as problem:
            reasons.append(f"{path.name}: {problem}")
            continue
        if path.name == PREVIOUS:
            reason = "; ".join(reasons) or f"{FILE} is missing"
            log.warning("The newest checkpoint cannot be used (%s); going on from the one before it.", reason)
            if reasons:
                os.replace(folder / FILE, folder / DAMAGED)
            os.replace(path, folder / FILE)
        return state
    if reasons:
        raise ArtefactError(
            f"No checkpoint can be read ({'; '.join(reasons)}).",
            where=str(folder),
            advice="Delete this folder and train from the start.",
        )
    return None


def remove_older(folder: Path) -> None:
    """Leave only the newest checkpoint."""
    for name in (PREVIOUS, DAMAGED):
        (folder / name).unlink(missing_ok=True)


def _sync_names(folder: Path) -> None:
    """Wait until the names of the files are on the disk, as `fsync` of a file waits for its content alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != VERSION:
                raise _DamagedError(f"it has version {metadata.get('version')}, not {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if _checksum(metadata["state"], tensors) != metadata["checksum"]:
            raise _DamagedError("its content does not match its checksum")
        state = _unpack(json.loads(metadata["state"]), tensors)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise _DamagedError(str(error)) from error
    if not isinstance(state, dict):
        raise _DamagedError("it holds no table of values")
    return state


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors put into `tensors` by their path and replaced by a reference."""

    def inner(key: object, entry: Any) -> Any:
        return _pack(entry, f"{path}/{key}" if path else str(key), tensors)

    if isinstance(value, Tensor):
        if path in tensors:
            raise ValueError(f"a checkpoint cannot hold two tensors at {path}")
        # A copy, because safetensors refuses tensors that share memory, as tied weights do.
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"$tensor": path}
    if isinstance(value, Mapping):
        return {"$items": [[key, inner(key, entry)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [inner(index, entry) for index, entry in enumerate(value)]}
    if isinstance(value, list):
        return [inner(index, entry) for index, entry in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} at {path}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$tuple":
            return tuple(_unpack(entry, tensors) for entry in content)
        return {key: _unpack(entry, tensors) for key, entry in content}
    return value


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over the JSON and all bytes of the tensors: safetensors itself does not notice damage in the data."""
    total = zlib.crc32(tree.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
