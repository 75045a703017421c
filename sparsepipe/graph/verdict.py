"""Whether a layer goes sparse, and in which blocks: the cost model applied to a node in its place in the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from sparsepipe.graph import cost
from sparsepipe.graph.kernel_layer import Array, KernelLayer
from sparsepipe.graph.sizes import Sizes, sizes_of

ASSUMED_SIDE = 14
"""Side of a plane whose size cannot be derived from those of the network's inputs."""
ASSUMED_ROWS = 1
"""Rows of a linear layer, likewise."""
ANY_ISA = "any"
COMMON_ISAS = ("avx512", "avx2", "sse4", "neon")
"""What a file for any machine must pay on. Processors that only the portable kernels run on are left out: onnxruntime
has no kernels of its own for them, either."""


@dataclass(frozen=True)
class Verdict:
    """What the cost model says of one layer.

    Attributes:
        times: rows of a block -> predicted time, in times of the dense one; empty for a layer that stays dense
            whatever it takes.
        block: rows of the best block; 0 where the layer stays dense.
        reason: why.
        dense: predicted nanoseconds of the dense layer on `cost.REFERENCE`.
    """

    times: Mapping[int, float]
    block: int
    reason: str
    dense: float = 0.0


@dataclass(frozen=True)
class Network:
    """What the time of a layer depends on besides the layer itself.

    Attributes:
        sizes: of the network's tensors at batch 1.
        assumed: whether sizes besides the batch are free, and were assumed.
        streamed: whether its weights exceed `cost.CACHE_BYTES`.
    """

    sizes: Sizes
    assumed: bool
    streamed: bool

    @classmethod
    def of(cls, model: ModelProto) -> Network:
        weights = 4 * sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
        found = sizes_of(model)
        return cls(found.sizes, found.assumed, weights > cost.CACHE_BYTES)


def judge(layer: KernelLayer, network: Network, isa: str = ANY_ISA) -> Verdict:
    """Dense or sparse, and in which blocks.

    Args:
        layer: as `kernel_layer.read` gives it, before anything is fused.
        network: that it is part of.
        isa: a key of `cost.ISAS`; `any` takes the worst of the common ones, for a file that may run anywhere.
    """
    weight = layer.weight
    if weight.size < cost.FEWEST_VALUES:
        return Verdict({}, 0, f"{weight.size} values are too few to matter")
    if layer.base == "SparseConv" and weight.shape[1] < cost.FEWEST_CHANNELS:
        return Verdict({}, 0, f"{weight.shape[1]} input channels: onnxruntime's own kernel is as fast")
    work, place = _work(layer, network)
    isas = [cost.ISAS[name] for name in (COMMON_ISAS if isa == ANY_ISA else (isa,))]
    times = {
        block: max(cost.relative_time(work, stored, block, one) for one in isas)
        for block, stored in stored_shares(weight).items()
    }
    block = min(times, key=lambda size: times[size])
    reason = f"predicted {times[block]:.2f} of the dense time, {place}"
    dense = cost.dense_time(work, cost.ISAS[cost.REFERENCE])
    if times[block] >= cost.pays_below():
        return Verdict(times, 0, f"{reason}: pays below {cost.pays_below():.2f}", dense)
    return Verdict(times, block, reason, dense)


def stored_shares(weight: Array) -> dict[int, float]:
    """Rows of a block -> share of the values of `weight` [O, ...] in blocks that are not all zeros."""
    shares = {}
    for block in cost.BLOCKS:
        if weight.shape[0] % block == 0:
            rows = weight.reshape(weight.shape[0] // block, block, -1)
            shares[block] = int(rows.any(axis=1).sum()) * block / weight.size
    return shares


def _work(layer: KernelLayer, network: Network) -> tuple[cost.Work, str]:
    """What the layer computes, and over how many positions or rows, in words."""
    sizes = network.sizes
    outputs, columns = layer.weight.shape[0], int(np.prod(layer.weight.shape[1:]))
    after = sizes.get(layer.last.output[0], ())
    if layer.base == "SparseLinear":
        known = _product(after[:-1]) if after else None
        rows = ASSUMED_ROWS if known is None else known
        work = cost.Work("linear", outputs, columns, rows, 1, rows, network.streamed)
        return work, _counted(rows, "row", assumed=network.assumed or known is None)
    taps = int(np.prod(layer.weight.shape[2:]))
    rank = layer.weight.ndim - 2
    plane, before = _product(after[2:]), _product(sizes.get(layer.source, ())[2:])
    derived = len(after) == rank + 2 and plane is not None and before is not None
    if plane is None or before is None or not derived:
        plane = ASSUMED_SIDE**rank
        before = plane * math.prod(layer.window["strides"])
    work = cost.Work("conv", outputs, columns, plane, taps, before, network.streamed)
    return work, _counted(plane, "position", assumed=network.assumed or not derived)


def _counted(count: int, what: str, *, assumed: bool) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}{' (assumed)' if assumed else ''}"


def _product(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return math.prod(known) if len(known) == len(sizes) else None
