"""The layers of an ONNX file and what each computes: nonzeros, operations, how it is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from sparsepipe.graph.index import index
from sparsepipe.graph.restore import Compact
from sparsepipe.graph.select import Use, uses
from sparsepipe.graph.sizes import Sizes

CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "FusedConv")
PRODUCTS = ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "FusedGemm", "FusedMatMul", "QGemm")


@dataclass(frozen=True)
class LayerWork:
    """A layer: a node with a constant weight.

    Attributes:
        key: name of the node, as `node_times.Profiler` is told.
        name: of the weight.
        op: operator of the layer in the file.
        shape: of the weight as standard operators take it.
        nnz: values that are not zero.
        size: all values.
        parameter_bytes: of the weight as it is stored for the operator that runs, and of the bias.
        positions: how often each value is used: outputs of a channel, or rows, times the batch; None where not known.
        stored_as: "dense", "csr", "bsr 4x1", ...
        mode: how a kernel of the library reads its input, where it is told; None elsewhere.
    """

    key: str
    name: str
    op: str
    shape: tuple[int, ...]
    nnz: int
    size: int
    parameter_bytes: int
    positions: int | None
    stored_as: str = "dense"
    mode: str | None = None

    @property
    def density(self) -> float:
        return self.nnz / self.size if self.size else 1.0

    @property
    def flops(self) -> int | None:
        """On nonzeros; a multiplication and an addition each."""
        return None if self.positions is None else 2 * self.nnz * self.positions

    @property
    def dense_flops(self) -> int | None:
        return None if self.positions is None else 2 * self.size * self.positions

    @property
    def windows(self) -> int:
        """Taps of a kernel; 1 for a linear layer."""
        return math.prod(self.shape[2:])


def layers_of(model: ModelProto, compact: Sequence[Compact], sizes: Sizes) -> list[LayerWork]:
    """The layers in the order of the graph.

    Args:
        model: as `graph.load` reads it, with a name for each node.
        compact: the rows that came with it.
        sizes: of its tensors.
    """
    stored = {row.name: row for row in compact}
    constants = index(model.graph).stored
    found = []
    for use in uses(model):
        if use.place or use.node.op_type not in (*CONVOLUTIONS, *PRODUCTS):
            continue
        weight = numpy_helper.to_array(use.weight)
        row = stored.get(use.weight.name)
        layer = LayerWork(
            key=use.node.name,
            name=use.weight.name,
            op=row.op if row else use.node.op_type,
            shape=weight.shape,
            nnz=int(np.count_nonzero(weight)),
            size=weight.size,
            parameter_bytes=(row.bytes if row and row.bytes else weight.nbytes) + _other_bytes(use, constants),
            positions=_positions(use, sizes),
        )
        found.append(layer if row is None else replace(layer, stored_as=row.stored_as, mode=row.mode))
    return found


def _other_bytes(use: Use, constants: Mapping[str, TensorProto]) -> int:
    """Of the bias, and of scales and zero points."""
    others = (name for position, name in enumerate(use.node.input) if position != use.position)
    return sum(numpy_helper.to_array(constants[name]).nbytes for name in others if name in constants)


def _positions(use: Use, sizes: Mapping[str, tuple[int | None, ...]]) -> int | None:
    shape = sizes.get(use.node.output[0])
    if shape is None or None in shape:
        return None
    known = [size for size in shape if size is not None]
    if use.node.op_type in CONVOLUTIONS:
        return math.prod(known) // known[1] if len(known) > 1 and known[1] else None
    return math.prod(known[:-1])


def sparsity_of(layers: Sequence[LayerWork]) -> float:
    """Share of zeros over all layers."""
    size = sum(layer.size for layer in layers)
    return 1 - sum(layer.nnz for layer in layers) / size if size else 0.0
