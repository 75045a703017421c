"""Which weights of a graph are stored sparse: a row for every node with a constant weight, with the reason.

The `portable` target spends an 8-byte index on every nonzero, so it pays only where few values are left: below a
density of 1/3 for float32, 1/5 for float16, 1/9 for int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from sparsepipe.graph.index import STANDARD_DOMAINS, Index, index, is_standard, label, subgraphs

INDEX_BYTES = 8  # INT64, the only type of index that onnx.checker accepts

WEIGHT_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1, 0),
    "MatMul": (1, 0),
    "ConvInteger": (1,),
    "MatMulInteger": (1, 0),
    "QLinearConv": (3,),
    "QLinearMatMul": (3, 0),
    "FusedConv": (1,),
    "FusedGemm": (1, 0),
    "FusedMatMul": (1, 0),
}
"""Operators with weights, and the inputs that may be the weight, likeliest first. The fused ones are onnxruntime's."""
WEIGHT_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")

VIEWS = ("DequantizeLinear", "Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that may stand between a stored weight and the node that uses it."""

VALUE_TYPES = frozenset(
    {
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT32,
    }
)
"""Types of value that onnxruntime reads from a sparse initializer."""


@dataclass(frozen=True)
class Layer:
    """One node with a constant weight.

    Attributes:
        name: name of the stored weight.
        op: operator of the node that uses it.
        shape: shape of the weight as it is stored.
        nnz: values that are not zero; -0.0 is a zero.
        size: all values.
        sparsity: share of zeros.
        dense_bytes: bytes of the values stored dense; 0 where an earlier row counts the same weight.
        bytes: bytes as stored.
        sparse: whether it is stored sparse.
        reason: why.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    nnz: int
    size: int
    sparsity: float
    dense_bytes: int
    bytes: int
    sparse: bool
    reason: str


def survey(model: ModelProto) -> list[Layer]:
    """A row for each node with a constant weight of two or more dimensions, in the order of the graph.

    Weights inside of subgraphs (of If, Loop, Scan) and of functions are listed last, and stay as they are.
    """
    found = index(model.graph)
    inputs = {value.name for value in model.graph.input}
    layers: list[Layer] = []
    counted: dict[str, tuple[Layer, str]] = {}
    for node in model.graph.node:
        if (weight := weight_of(node, found)) is None:
            continue
        if weight.name in counted:
            layers.append(_again(node, *counted[weight.name]))
            continue
        layers.append(_judge(node, weight, _obstacle(weight, found), was_input=weight.name in inputs))
        counted[weight.name] = (layers[-1], label(node))
    for place, nodes, inner in left_alone(model, found):
        for node in nodes:
            if (weight := weight_of(node, inner)) is None:
                continue
            if weight.name in counted and weight.name in found.captured:
                layers.append(_again(node, *counted[weight.name]))
            else:
                layers.append(_judge(node, weight, f"inside of {place}, which is left alone"))
    return layers


def weights(model: ModelProto) -> Iterator[TensorProto]:
    """The constant weights that nodes use, in the order of the graph, those in subgraphs and functions last.

    A weight that is used again comes again.
    """
    found = index(model.graph)
    for _, nodes, seen in [("", model.graph.node, found), *left_alone(model, found)]:
        for node in nodes:
            if (weight := weight_of(node, seen)) is not None:
                yield weight


def sparsity(layers: Iterable[Layer]) -> float:
    """Share of zeros over all weights, each counted once; 0 where there are none."""
    counted = [layer for layer in layers if layer.dense_bytes]
    size = sum(layer.size for layer in counted)
    return 1 - sum(layer.nnz for layer in counted) / size if size else 0.0


def weight_of(node: NodeProto, found: Index) -> TensorProto | None:
    """The constant weight of `node` as it is stored, under the name of the tensor that holds it."""
    if node.domain not in WEIGHT_DOMAINS:
        return None
    for position in WEIGHT_INPUTS.get(node.op_type, ()):
        name = node.input[position] if position < len(node.input) else ""
        while name not in found.constants and name in found.producers and is_standard(found.producers[name], *VIEWS):
            name = found.producers[name].input[0]
        if name in found.constants and len(found.constants[name].dims) > 1:
            stored = found.constants[name]
            if stored.name != name:  # the tensor inside of a Constant node has no name, or any
                stored = _renamed(stored, name)
            return stored
    return None


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    result = TensorProto()
    result.CopyFrom(tensor)
    result.name = name
    return result


def _obstacle(weight: TensorProto, found: Index) -> str | None:
    if weight.name in found.outputs:
        return "it is an output of the network"
    if weight.name in found.captured:
        return "a subgraph uses it, too"
    return None


def _judge(node: NodeProto, weight: TensorProto, obstacle: str | None, *, was_input: bool = False) -> Layer:
    values = numpy_helper.to_array(weight)
    nnz, value_bytes = int(np.count_nonzero(values)), values.dtype.itemsize
    dense_bytes, sparse_bytes = values.size * value_bytes, nnz * (value_bytes + INDEX_BYTES)
    zeros = 1 - nnz / values.size if values.size else 0.0
    pays = sparse_bytes < dense_bytes
    reason = f"{zeros:.1%} zeros; smaller above {INDEX_BYTES / (INDEX_BYTES + value_bytes):.1%}"
    if weight.data_type not in VALUE_TYPES:
        obstacle = f"onnxruntime reads no sparse {TensorProto.DataType.Name(weight.data_type)}"
    if obstacle is not None and pays:
        reason = obstacle
    sparse = pays and obstacle is None
    if sparse and was_input:
        reason += "; no input of the network any more"
    return Layer(
        name=weight.name,
        op=node.op_type,
        shape=tuple(values.shape),
        nnz=nnz,
        size=values.size,
        sparsity=zeros,
        dense_bytes=dense_bytes,
        bytes=sparse_bytes if sparse else dense_bytes,
        sparse=sparse,
        reason=reason,
    )


def _again(node: NodeProto, first: Layer, user: str) -> Layer:
    """The row of a further node that uses the weight of `first`, which counts its bytes."""
    return replace(first, op=node.op_type, dense_bytes=0, bytes=0, reason=f"same weight as in '{user}'")


def left_alone(model: ModelProto, found: Index) -> Iterator[tuple[str, Sequence[NodeProto], Index]]:
    """The subgraphs and functions: what to call each, its nodes, and the tensors that these see."""
    yield from _inner_graphs(model.graph.node, found)
    for function in model.functions:
        inner = index(GraphProto(node=function.node))
        yield f"the function '{function.name}'", function.node, inner
        yield from _inner_graphs(function.node, inner)


def _inner_graphs(nodes: Iterable[NodeProto], outer: Index) -> Iterator[tuple[str, Sequence[NodeProto], Index]]:
    for node in nodes:
        for graph in subgraphs(node):
            own = index(graph)
            inner = replace(own, constants={**outer.constants, **own.constants})
            yield f"a subgraph of {node.op_type} '{label(node)}'", graph.node, inner
            yield from _inner_graphs(graph.node, inner)
