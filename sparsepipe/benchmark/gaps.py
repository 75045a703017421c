"""Why a layer takes longer than its nonzeros alone would: reasons in words, the largest first.

Some reasons have a price that the roofline gives (zeros that are computed, bytes that are moved, the operator's own
cost). The others say what about the layer keeps a kernel from its peak, and are named where those prices leave a good
part of the time open. They are rules of thumb, each told by the layer's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sparsepipe.benchmark.layer_work import LayerWork
from sparsepipe.benchmark.roofline import Roofline

WORTH_NAMING = 0.1
"""A reason with a price is named if that is so much of the time."""
OPEN_SHARE = 0.3
"""The others are named if so much of the time is left."""
MOST = 3
TILE = 128
"""So many outputs of a channel keep the kernels' registers busy on any instruction set: eight vectors of 16."""
SHORT_ROW = 16

DENSE_OPERATOR, MEMORY_BOUND, OVERHEAD = "dense operator", "memory bound", "overhead"
ONE_ROW, SMALL_MAP, SHORT_ROWS, PACKING, UNSTRUCTURED = "one row", "small map", "short rows", "window", "unstructured"
LEGEND = {
    DENSE_OPERATOR: "the layer runs dense and multiplies by its zeros",
    MEMORY_BOUND: "moving its bytes takes longer than its arithmetic",
    OVERHEAD: "an operator costs so much here before it computes anything",
    ONE_ROW: "each weight is read for a single product, so reading weights is the work",
    SMALL_MAP: f"fewer than {TILE} outputs share a weight, so loading it weighs",
    SHORT_ROWS: "few nonzeros for each output, so that starting and storing a row weighs",
    PACKING: "the input is laid out for the window of the convolution first",
    UNSTRUCTURED: "each weight loads inputs of its own, which the weights of a 4x1 block share",
}
"""What a reason's first words mean."""


@dataclass(frozen=True)
class Measured:
    """A layer as it ran: microseconds, bytes, and whether a sparse kernel computed it."""

    work: LayerWork
    us: float
    bytes: int
    sparse: bool
    roof: Roofline

    @property
    def arithmetic_us(self) -> float:
        """Of the nonzeros at the machine's peak."""
        return (self.work.flops or 0) / self.roof.peak_gflops / 1e3

    @property
    def moving_us(self) -> float:
        """Of all bytes, once each: in the cache if they fit there, from memory else."""
        return self.bytes / self.roof.bandwidth_gbs(self.bytes) / 1e3

    @property
    def attainable_us(self) -> float:
        """By the roofline: the longer of arithmetic and moving bytes."""
        return max(self.arithmetic_us, self.moving_us)


Priced = tuple[float, str]


def _zeros(layer: Measured) -> Priced | None:
    if layer.sparse or layer.work.nnz == layer.work.size or layer.work.dense_flops is None:
        return None
    us = layer.work.dense_flops / layer.roof.peak_gflops / 1e3 - layer.arithmetic_us
    return us, f"{DENSE_OPERATOR} ({1 - layer.work.density:.0%} zeros)"


def _bytes(layer: Measured) -> Priced | None:
    us = min(layer.moving_us, layer.us)
    if us <= layer.arithmetic_us:
        return None
    place = "L2 cache" if layer.roof.in_cache(layer.bytes) else "memory"
    return us - layer.arithmetic_us, f"{MEMORY_BOUND} ({layer.moving_us / layer.us:.0%} of a copy's rate in {place})"


def _operator(layer: Measured) -> Priced | None:
    us = layer.roof.overhead_us
    return us, f"{OVERHEAD} ({us:.2g} us)"


def _one_row(layer: Measured) -> str | None:
    return ONE_ROW if layer.work.positions == 1 else None


def _small_map(layer: Measured) -> str | None:
    positions = layer.work.positions
    if positions is None or not 1 < positions < TILE:
        return None
    return f"{SMALL_MAP} ({positions} outputs)"


def _short_rows(layer: Measured) -> str | None:
    outputs = layer.work.shape[0] if len(layer.work.shape) > 2 or layer.sparse else layer.work.shape[-1]
    each = layer.work.nnz / max(outputs, 1)
    if not layer.sparse or each >= SHORT_ROW:
        return None
    return f"{SHORT_ROWS} ({each:.1f} each)"


def _packing(layer: Measured) -> str | None:
    window = "x".join(map(str, layer.work.shape[2:]))
    return f"{PACKING} ({window})" if layer.sparse and layer.work.windows > 1 else None


def _unstructured(layer: Measured) -> str | None:
    if not layer.sparse or layer.work.stored_as != "csr":
        return None
    return UNSTRUCTURED


PRICED: tuple[Callable[[Measured], Priced | None], ...] = (_zeros, _bytes, _operator)
TOLD_BY_SHAPE: tuple[Callable[[Measured], str | None], ...] = (
    _one_row,
    _small_map,
    _short_rows,
    _packing,
    _unstructured,
)


def reasons(layer: Measured) -> list[str]:
    """Why it does not take its arithmetic alone, the largest reason first; empty where it nearly does."""
    if layer.work.flops is None or layer.us <= 0:
        return []
    priced = sorted(filter(None, (rule(layer) for rule in PRICED)), reverse=True)
    named = [(us, text) for us, text in priced if us >= WORTH_NAMING * layer.us]
    left = layer.us - layer.arithmetic_us - sum(us for us, _ in named)
    texts = [text for _, text in named]
    if left > OPEN_SHARE * layer.us:
        texts += _told_by_shape(layer)
    return texts[:MOST]


def _told_by_shape(layer: Measured) -> Iterator[str]:
    for rule in TOLD_BY_SHAPE:
        if text := rule(layer):
            yield text


def legend(texts: Iterable[str]) -> dict[str, str]:
    """What the reasons that occur among `texts` mean, in the order of `LEGEND`."""
    found = {text.partition(" (")[0] for text in texts}
    return {name: meaning for name, meaning in LEGEND.items() if name in found}
