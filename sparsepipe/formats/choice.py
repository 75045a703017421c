"""The smallest format for a weight, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparsepipe.errors import FormatError
from sparsepipe.formats.layout import Array, Compressed, positive_zeros
from sparsepipe.formats.patterns import BLOCKS, block_of, group_of, narrowest_groups
from sparsepipe.formats.registry import decode, encode


@dataclass(frozen=True)
class Choice:
    """What was chosen for one weight.

    Attributes:
        weight: the compressed weight; None where it stays dense.
        reason: why, as a sentence.
    """

    weight: Compressed | None
    reason: str


def choose(dense: Array, formats: Sequence[str], pattern: str, *, where: str = "weight") -> Choice:
    """Encode a weight [O, I, *kernel] in every format allowed; keep the smallest if it is smaller than the dense one.

    Args:
        dense: the weight.
        formats: names of the formats to try, preferred first where sizes are equal; `dense` is always possible.
        pattern: the pattern it was trained with, such as `unstructured`, `8x1` or `2:4`: its block shape is tried, too.
        where: name of the weight.

    Raises:
        FormatError: the weight cannot be compressed at all (one dimension, or no number type).
    """
    size, zeros = dense.size, dense.size - int(np.count_nonzero(dense))
    if size == 0:
        return Choice(None, "It has no elements.")
    if zeros == 0:
        return Choice(None, "It has no zeros.")
    tried = list(_candidates(dense, formats, pattern, where))
    share = f"{zeros / size:.1%} of its weights are zero"
    if not tried:
        return Choice(None, f"{share}, but no format allowed can hold it.")
    best = min(tried, key=lambda weight: weight.nbytes)
    if best.nbytes >= dense.nbytes:
        return Choice(None, f"{share}, but even {describe(best)} would take {_part(best, dense)} of the dense size.")
    reason = f"{share}; {describe(best)} takes {_part(best, dense)} of the dense size"
    others = [weight for weight in tried if weight.format != best.format]
    if others:
        second = min(others, key=lambda weight: weight.nbytes)
        reason += f", {describe(second)} would take {_part(second, dense)}"
    return Choice(best, f"{reason}.")


def verify(weight: Compressed, dense: Array, *, where: str = "weight") -> None:
    """Check that a compressed weight decodes to `dense` bit for bit (every zero as +0.0).

    Raises:
        FormatError: it does not.
    """
    decoded = decode(weight, where=where)
    expected = positive_zeros(dense)
    if (decoded.dtype, decoded.shape) != (dense.dtype, dense.shape) or decoded.tobytes() != expected.tobytes():
        raise FormatError(
            f"The weight does not come back from the format {describe(weight)} as it was.",
            where=where,
            advice="This is a fault of sparsepipe: please report it, and leave the format out meanwhile.",
        )


def describe(weight: Compressed) -> str:
    """The format and its parameters, such as `csr`, `bsr 4x1` or `nm 2:4`."""
    block = block_text(weight)
    return f"{weight.format} {block}" if block else weight.format


def block_text(weight: Compressed) -> str | None:
    """The parameters of a format, as a pattern writes them; None where it has none."""
    separator = ":" if weight.format == "nm" else "x"
    return separator.join(map(str, weight.parameters.values())) or None


def _candidates(dense: Array, formats: Sequence[str], pattern: str, where: str) -> Iterator[Compressed]:
    for name in formats:
        if name == "bsr":
            parameters = [{"r": r, "c": c} for r, c in dict.fromkeys([*BLOCKS, *_known(block_of(pattern))])]
        elif name == "nm":
            groups = dict.fromkeys([*narrowest_groups(dense, where=where), *_known(group_of(pattern))])
            parameters = [{"n": n, "m": m} for n, m in groups]
        elif name == "dense":
            continue
        else:
            parameters = [{}]
        for chosen in parameters:
            try:
                yield encode(dense, name, where=where, **chosen)
            except FormatError:
                # A format that cannot hold this weight, such as 2:4 for a layer that was trained without it, is no
                # candidate.
                continue


def _known(pattern: tuple[int, int] | None) -> list[tuple[int, int]]:
    return [] if pattern is None else [pattern]


def _part(weight: Compressed, dense: Array) -> str:
    return f"{weight.nbytes / dense.nbytes:.1%}"
