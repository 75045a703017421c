"""What the formats share: the compressed weight, the limits it is held to, and the checks of its components.

A weight [O, I, *kernel] (outputs, inputs, kernel taps) is taken as a matrix of O rows. Its C order, and so the column
order of every format, is input channel first, then tap: column = i * taps + tap, with the taps in C order.

Zero has one form. A -0.0 counts as zero: no format stores it, and it decodes to +0.0. NaN and infinities are values
like any other. A component that holds what `encode` would never write is refused on decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from sparsepipe.errors import FormatError

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

VALUE_DTYPES = tuple(
    np.dtype(name)
    for name in (
        *("float16", "float32", "float64"),
        *("int8", "int16", "int32", "int64"),
        *("uint8", "uint16", "uint32", "uint64"),
    )
)
INDEX_DTYPES = tuple(np.dtype(name) for name in ("uint8", "uint16", "uint32"))

FREE_ELEMENTS = 2**26
"""A weight of up to this many elements may be decoded from any number of bytes."""
ELEMENTS_PER_BYTE = 512
"""Beyond that, each stored byte stands for at most this many elements (a 99.98% sparse float32 needs no more)."""
MAX_DIMENSION = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Compressed:
    """A weight in one of the formats.

    Attributes:
        format: name of the format.
        shape: shape of the dense weight, at least 2-D.
        components: the named arrays that hold it.
        parameters: what else the format needs to read them, such as a block's sides.
    """

    format: str
    shape: tuple[int, ...]
    components: dict[str, Array]
    parameters: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Size of all components in bytes."""
        return sum(array.nbytes for array in self.components.values())

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but the components, as JSON-able values."""
        return {"format": self.format, "shape": list(self.shape), **self.parameters}


def fail(what: str, where: str, component: str | None = None) -> NoReturn:
    """Raise a FormatError about the weight `where`, or about one component of it."""
    raise FormatError(what, where=f"{where}.{component}" if component else where)


def positive_zeros(dense: Array) -> Array:
    """A copy of `dense` in which every zero is +0.0; all other bits are kept."""
    return np.where(dense == 0, dense.dtype.type(0), dense)


def as_matrix(dense: Array, where: str) -> Array:
    """Check a weight that is to be encoded and view it as [O, I, taps].

    Raises:
        FormatError: fewer than two dimensions, or a dtype that is neither a float nor an integer of numpy.
    """
    if dense.ndim < 2:
        fail(f"A weight of shape {dense.shape} has no rows and columns; two or more dimensions are needed.", where)
    if dense.dtype not in VALUE_DTYPES:
        fail(f"Values of type {dense.dtype} cannot be compressed; take floats or integers of up to 64 bits.", where)
    return dense.reshape(dense.shape[0], dense.shape[1], math.prod(dense.shape[2:]))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(O, I, taps) of a weight's shape."""
    return shape[0], shape[1], math.prod(shape[2:])


def element_limit(stored_bytes: int) -> int:
    """How many dense elements `stored_bytes` of components may stand for, so that no small file fills the memory."""
    return max(FREE_ELEMENTS, stored_bytes * ELEMENTS_PER_BYTE)


def check_shape(shape: Sequence[int], stored_bytes: int, where: str) -> None:
    """Refuse a shape that is malformed, or so large that its components cannot stand for it.

    Raises:
        FormatError: with the limit that it breaks.
    """
    if len(shape) < 2 or not all(type(side) is int and 0 <= side <= MAX_DIMENSION for side in shape):
        fail(f"The shape {list(shape)} is not one of two or more dimensions from 0 to {MAX_DIMENSION}.", where)
    elements = math.prod(max(side, 1) for side in shape)
    limit = element_limit(stored_bytes)
    if elements > limit or len(shape) > 8:
        fail(
            f"The shape {list(shape)} is too large for {stored_bytes} bytes of components "
            f"(at most {limit} elements in 8 dimensions).",
            where,
        )


def check(weight: Compressed, components: Sequence[str], parameters: Mapping[str, tuple[int, int]], where: str) -> None:
    """Check that a weight has exactly these components, and parameters within these ranges, and a possible shape.

    Raises:
        FormatError: naming what is missing, unknown or out of its range.
    """
    for name in components:
        if not isinstance(weight.components.get(name), np.ndarray):
            fail(f"The component is missing; the format {weight.format} needs {', '.join(components)}.", where, name)
    for name in weight.components:
        if name not in components:
            fail(f"The format {weight.format} has no such component; it has {', '.join(components)}.", where, name)
    if set(weight.parameters) != set(parameters):
        named = ", ".join(sorted(map(str, weight.parameters))) or "none"
        fail(f"The format {weight.format} takes the parameters {', '.join(parameters) or 'none'}; got {named}.", where)
    for name, (low, high) in parameters.items():
        value = weight.parameters[name]
        if type(value) is not int or not low <= value <= high:
            fail(f"The parameter {name} is {value!r}; it must be an integer from {low} to {high}.", where)
    check_shape(weight.shape, weight.nbytes, where)


def check_values(weight: Compressed, shape: tuple[int, ...] | None, where: str) -> Array:
    """The component `values`, checked for its dtype, its shape and negative zeros.

    Args:
        weight: the weight that holds it.
        shape: the shape it must have; None for any 1-D shape.
        where: name of the weight.

    Raises:
        FormatError: naming the component and the first bad entry.
    """
    values = weight.components["values"]
    if values.dtype not in VALUE_DTYPES:
        fail(f"The values are of type {values.dtype}; floats or integers are needed.", where, "values")
    if (values.ndim != 1) if shape is None else (values.shape != shape):
        expected = "one dimension" if shape is None else f"shape {list(shape)}"
        fail(f"The array has shape {list(values.shape)}; {expected} is needed.", where, "values")
    if values.dtype.kind == "f" and (negative := np.flatnonzero((values == 0) & np.signbit(values))).size:
        fail(f"Entry {negative[0]} is -0.0, which no format stores.", where, "values")
    return values


def check_vector(weight: Compressed, name: str, length: int, dtypes: Sequence[np.dtype[Any]], where: str) -> Array:
    """The component `name`, checked to be 1-D, of one of `dtypes` and `length` long.

    Raises:
        FormatError: naming the component and what it should be.
    """
    array = weight.components[name]
    if array.dtype not in dtypes:
        fail(f"The type is {array.dtype}; {' or '.join(map(str, dtypes))} is needed.", where, name)
    if array.shape != (length,):
        fail(f"The array has shape {list(array.shape)}; {length} entries are needed.", where, name)
    return array


def check_packed(weight: Compressed, name: str, bits: int, where: str) -> npt.NDArray[np.uint8]:
    """The component `name`, `bits` bits packed little-endian into uint8, unpacked to one uint8 of 0 or 1 per bit.

    Raises:
        FormatError: another dtype or length, or bits set beyond the last one.
    """
    packed = check_vector(weight, name, -(-bits // 8), (np.dtype(np.uint8),), where)
    unpacked = np.unpackbits(packed, bitorder="little")
    if unpacked[bits:].any():
        fail(f"Bits are set beyond the last of {bits}.", where, name)
    return unpacked[:bits]


def empty_weight(weight: Compressed, dtype: np.dtype[Any], where: str) -> Array:
    """A zero weight of the full shape, to be filled in.

    Raises:
        FormatError: there is not enough memory for it.
    """
    try:
        return np.zeros(weight.shape, dtype)
    except MemoryError:
        fail(f"There is not enough memory for a weight of shape {list(weight.shape)}.", where)


def narrow(numbers: IntArray, where: str, component: str) -> Array:
    """The same non-negative numbers in the smallest of uint8, uint16 and uint32 that holds them all.

    Raises:
        FormatError: the largest needs more than 32 bits.
    """
    largest = int(numbers.max(initial=0))
    for dtype in INDEX_DTYPES:
        if largest <= np.iinfo(dtype).max:
            return numbers.astype(dtype)
    fail(f"The number {largest} does not fit into 32 bits.", where, component)
