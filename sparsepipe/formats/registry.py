"""The formats by name, with one verb each way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsepipe.errors import FormatError
from sparsepipe.formats import bitmask, bsr, csr, nm
from sparsepipe.formats.layout import Array, Compressed


@dataclass(frozen=True)
class Format:
    """A way to store a sparse weight.

    Attributes:
        name: what it is called in recipes and files.
        summary: one line about it.
        components: names of its arrays.
        parameters: names of its parameters with the range of each.
        encode: (dense, *, where, **parameters) -> Compressed.
        decode: (weight, *, where) -> dense.
    """

    name: str
    summary: str
    components: tuple[str, ...]
    parameters: Mapping[str, tuple[int, int]]
    encode: Callable[..., Compressed]
    decode: Callable[..., Array]


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("csr", "nonzeros by row, delta-encoded columns", csr.COMPONENTS, {}, csr.encode, csr.decode),
        Format("bsr", "blocks of outputs x inputs by row", bsr.COMPONENTS, bsr.PARAMETERS, bsr.encode, bsr.decode),
        Format("nm", "n of m consecutive inputs", nm.COMPONENTS, nm.PARAMETERS, nm.encode, nm.decode),
        Format("bitmask", "a bit per weight and the nonzeros", bitmask.COMPONENTS, {}, bitmask.encode, bitmask.decode),
    )
}


def find(name: str, where: str = "weight") -> Format:
    """The format called `name`.

    Raises:
        FormatError: there is none; the message lists those that are known.
    """
    if name not in FORMATS:
        raise FormatError(f"There is no format '{name}'.", where=where, advice=f"Known are: {', '.join(FORMATS)}.")
    return FORMATS[name]


def encode(dense: Array, name: str, *, where: str = "weight", **parameters: int) -> Compressed:
    """Compress a dense weight [O, I, *kernel] in the format `name`.

    Raises:
        FormatError: an unknown format, or a weight that does not fit it.
    """
    return find(name, where).encode(dense, where=where, **parameters)


def decode(weight: Compressed, *, where: str = "weight") -> Array:
    """The dense weight; whatever the components hold, either it is right or this raises.

    Args:
        weight: the components and what they are.
        where: name of the weight for messages.

    Raises:
        FormatError: naming the component that is malformed, and how.
    """
    return find(weight.format, where).decode(weight, where=where)
