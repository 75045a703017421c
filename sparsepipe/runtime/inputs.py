"""What a network takes, and made-up inputs for any network."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from sparsepipe.errors import GraphError

FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
BYTES = {"int8": np.int8, "uint8": np.uint8}
INTEGERS = {
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
}
TYPES: dict[str, Any] = {**FLOATS, **BYTES, **INTEGERS, "bool": np.bool_}

IMAGE_SIDE = 224
SEQUENCE_LENGTH = 16
INTEGER_BOUND = 2


@dataclass(frozen=True)
class Input:
    """One input of a network. A dimension is a number, or the name (None where it has none) of a free one."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def batch(self) -> int | None:
        """The fixed size of the first dimension; None where it is free or absent."""
        return self.shape[0] if self.shape and isinstance(self.shape[0], int) else None


def inputs_of(model: onnxruntime.InferenceSession) -> list[Input]:
    """The inputs that a caller must give.

    Raises:
        GraphError: an input is not a tensor of numbers.
    """
    found = []
    for node in model.get_inputs():
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        if kind not in TYPES:
            raise GraphError(
                f"The input '{node.name}' has the type {node.type}.",
                advice=f"Inputs can be tensors of {', '.join(TYPES)}.",
            )
        shape = tuple(size if isinstance(size, int) and size > 0 else _name(size) for size in node.shape)
        found.append(Input(node.name, kind, shape))
    return found


def sized(inputs: Sequence[Input], shapes: Mapping[str, Sequence[int]]) -> list[Input]:
    """The inputs with the sizes that `shapes` gives to free dimensions; equal names get equal sizes in all inputs.

    Args:
        inputs: what a network takes.
        shapes: name of an input -> its shape, batch first; the name "" is the only input.

    Raises:
        GraphError: there is no such input, it has another number of dimensions, one of them is fixed at another size,
            or two dimensions of one name get different sizes.
    """
    fixed: dict[str, Sequence[int | str | None]] = {}
    for name, shape in shapes.items():
        if not name and len(inputs) != 1:
            raise GraphError(
                f"The network has {len(inputs)} inputs ({_names(inputs)}), so a shape needs the name of one.",
                advice=f"Write {inputs[0].name}={_text(shape)}, for example." if inputs else None,
            )
        fixed[name or inputs[0].name] = shape
    unknown = next((name for name in fixed if name not in {entry.name for entry in inputs}), None)
    if unknown is not None:
        raise GraphError(f"The network has no input '{unknown}'; it has {_names(inputs)}.")
    sizes: dict[str, int] = {}
    for entry in inputs:
        given = fixed.get(entry.name, entry.shape)
        if len(given) != len(entry.shape):
            raise GraphError(
                f"The input '{entry.name}' has {len(entry.shape)} dimensions, not the {len(given)} of {_text(given)}."
            )
        for axis, (free, size) in enumerate(zip(entry.shape, given, strict=True)):
            if not isinstance(size, int):
                continue
            known = free if isinstance(free, int) else sizes.setdefault(free, size) if free else size
            if known != size:
                what = "batch size" if axis == 0 else f"size of dimension {axis}"
                raise GraphError(
                    f"The {what} of the input '{entry.name}' is fixed at {known}, so it cannot be {size}.",
                    advice="Only dimensions that the file leaves open take a size.",
                )
    return [
        replace(
            entry,
            shape=tuple(
                sizes.get(size, size) if isinstance(size, str) else size for size in fixed.get(entry.name, entry.shape)
            ),
        )
        for entry in inputs
    ]


def resolve(inputs: Sequence[Input], batch: int) -> dict[str, tuple[int, ...]]:
    """Give every free dimension a size: the batch, or one that suits its place. Equal names get equal sizes.

    The batch is the first dimension, and any that is named after it. Other free dimensions become 224 in tensors of
    rank 4 (the sides of images) and 16 elsewhere (lengths of sequences).

    Raises:
        GraphError: all inputs have fixed batch sizes, and none is `batch`.
    """
    batched = [entry for entry in inputs if len(entry.shape) > 1]
    if batched and all(entry.batch not in (None, batch) for entry in batched):
        raise GraphError(
            f"The batch size of the input '{batched[0].name}' is fixed at {batched[0].batch}, so it cannot be {batch}.",
            advice="Export it with a dynamic batch dimension.",
        )
    sizes: dict[str, int] = {}
    for entry in inputs:
        for axis, size in enumerate(entry.shape):
            if isinstance(size, str):
                sizes.setdefault(size, _size(size, axis, len(entry.shape), batch))
    return {
        entry.name: tuple(
            size if isinstance(size, int) else sizes[size] if size else _size("", axis, len(entry.shape), batch)
            for axis, size in enumerate(entry.shape)
        )
        for entry in inputs
    }


def aligned(first: Sequence[Input], second: Sequence[Input]) -> list[Input]:
    """The inputs of the second network in the order of the first: by name, or by position where the names differ."""
    named = {entry.name: entry for entry in second}
    if named.keys() == {entry.name for entry in first}:
        return [named[entry.name] for entry in first]
    return list(second)


def merge(first: Sequence[Input], second: Sequence[Input]) -> list[Input]:
    """What two networks that shall be compared both take, under the names of the first.

    A dimension is free only where it is free in both; a type may differ in width.

    Raises:
        GraphError: the networks take different inputs.
    """
    if len(first) != len(second):
        raise GraphError(
            f"The networks cannot be compared: one has {len(first)} inputs ({_names(first)}), "
            f"the other {len(second)} ({_names(second)})."
        )
    return [_merge(entry, other) for entry, other in zip(first, aligned(first, second), strict=True)]


def rename(
    values: Mapping[str, NDArray[Any]], inputs: Sequence[Input], target: Sequence[Input]
) -> dict[str, NDArray[Any]]:
    """Inputs made for `inputs` as a network with the inputs `target` takes them: its names and its types."""
    return {
        other.name: values[entry.name].astype(TYPES[other.type], copy=False)
        for entry, other in zip(inputs, aligned(inputs, target), strict=True)
    }


def random_inputs(
    inputs: Sequence[Input], batch: int, seed: int, bounds: Mapping[str, int] | None = None
) -> dict[str, NDArray[Any]]:
    """Seeded inputs of the right names, types and shapes: the same for the same arguments, on every machine.

    Floats are standard normal, bytes cover their whole range (raw images), and wider integers are indices below
    `bounds[name]`, or 0 and 1 where no bound is known. An input whose name speaks of a mask is all ones.

    Args:
        inputs: what the network takes.
        batch: size of the first dimension.
        seed: of the random generator; each input has a stream of its own, keyed by its name.
        bounds: name -> number of allowed values of an integer input.

    Raises:
        GraphError: the batch size does not fit.
    """
    shapes = resolve(inputs, batch)
    made: dict[str, NDArray[Any]] = {}
    for entry in inputs:
        random = np.random.default_rng([seed, zlib.crc32(entry.name.encode())])
        shape, dtype = shapes[entry.name], TYPES[entry.type]
        if "mask" in entry.name.lower():
            made[entry.name] = np.ones(shape, dtype)
        elif entry.type in FLOATS:
            made[entry.name] = random.standard_normal(shape).astype(dtype)
        elif entry.type in BYTES:
            made[entry.name] = np.frombuffer(random.bytes(int(np.prod(shape))), dtype).reshape(shape)
        else:
            bound = (bounds or {}).get(entry.name, INTEGER_BOUND)
            made[entry.name] = random.integers(0, bound, shape).astype(dtype)
    return made


def _merge(first: Input, second: Input) -> Input:
    kinds = [np.dtype(TYPES[entry.type]).kind.replace("u", "i") for entry in (first, second)]
    agree = len(first.shape) == len(second.shape) and all(
        size == other or not (isinstance(size, int) and isinstance(other, int))
        for size, other in zip(first.shape, second.shape, strict=True)
    )
    if kinds[0] != kinds[1] or not agree:
        described = [f"{entry.type} {list(entry.shape)}" for entry in (first, second)]
        raise GraphError(
            f"The networks cannot be compared: one takes '{first.name}' as {described[0]}, "
            f"the other '{second.name}' as {described[1]}."
        )
    sizes = zip(first.shape, second.shape, strict=True)
    shape = tuple(other if isinstance(other, int) else size for size, other in sizes)
    return Input(first.name, first.type, shape)


def _names(inputs: Sequence[Input]) -> str:
    return ", ".join(entry.name for entry in inputs)


def _text(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape))


def _name(size: Any) -> str | None:
    return size if isinstance(size, str) and size else None


def _size(name: str, axis: int, rank: int, batch: int) -> int:
    if axis == 0 or "batch" in name.lower():
        return batch
    return IMAGE_SIDE if rank == 4 else SEQUENCE_LENGTH
