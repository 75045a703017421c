"""Inputs and outputs of several calls of a network in one file, which every runtime can read whatever its packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feeds = Mapping[str, NDArray[Any]]


def write(path: Path, calls: Sequence[Feeds]) -> Path:
    """Store the arrays of each call under their names, in an uncompressed .npz file, and give its path back."""
    entries = {f"{number}/{name}": value for number, call in enumerate(calls) for name, value in call.items()}
    with path.open("wb") as stream:
        np.savez(stream, **entries)  # type: ignore[arg-type] # the keyword of its own is not among the names
    return path


def read(path: str | Path) -> list[dict[str, NDArray[Any]]]:
    """The calls that `write` stored, in their order, with the arrays of each in theirs."""
    calls: dict[int, dict[str, NDArray[Any]]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, _, name = key.partition("/")
            calls.setdefault(int(number), {})[name] = stored[key]
    return [calls[number] for number in sorted(calls)]


def write_outputs(path: Path, outputs: Sequence[Sequence[NDArray[Any]]]) -> Path:
    """Store the outputs of each call in their order."""
    return write(path, [{str(place): value for place, value in enumerate(call)} for call in outputs])


def read_outputs(path: str | Path) -> list[list[NDArray[Any]]]:
    """What `write_outputs` stored."""
    return [list(call.values()) for call in read(path)]
