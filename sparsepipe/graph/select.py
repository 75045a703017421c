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

WEIGHT_INPUTS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "Conv": ((1,),),
    "ConvTranspose": ((1,),),
    "Gemm": ((1, 0),),
    "MatMul": ((1, 0),),
    "ConvInteger": ((1,),),
    "MatMulInteger": ((1, 0),),
    "QLinearConv": ((3,),),
    "QLinearMatMul": ((3, 0),),
    "LSTM": ((1,), (2,)),
    "GRU": ((1,), (2,)),
    "RNN": ((1,), (2,)),
    "Gather": ((0,),),
    "FusedConv": ((1,),),
    "FusedGemm": ((1, 0),),
    "FusedMatMul": ((1, 0),),
    "QGemm": ((3,),),
    "DynamicQuantizeMatMul": ((1,),),
    "MatMulIntegerToFloat": ((1,),),
    "Attention": ((1,),),
    "QAttention": ((1,),),
}
"""Operators with weights: for each weight the inputs that may be it, likeliest first. Any input of Einsum may be one.
The last eight are onnxruntime's."""
NO_WEIGHTS = frozenset({TensorProto.STRING, TensorProto.BOOL, TensorProto.INT64})
"""Types of tables that are no weights: Gather looks up words, flags and positions, too."""
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
    counted: dict[tuple[str, str], tuple[Layer, str]] = {}
    for use in uses(model):
        if use.key in counted:
            layers.append(_again(use.node, *counted[use.key]))
            continue
        if use.place:
            layers.append(_judge(use, f"inside of {use.place}, which is left alone"))
        else:
            layers.append(_judge(use, _obstacle(use.weight, found), was_input=use.weight.name in inputs))
        counted[use.key] = (layers[-1], label(use.node))
    return layers


@dataclass(frozen=True)
class Use:
    """A constant weight of a node.

    Attributes:
        place: the subgraph or function that the node is in, which is left alone; empty in the graph itself.
        home: the one that stores the weight; a subgraph sees what is around it, too.
        node: the node.
        position: which of its inputs the weight is.
        weight: the weight as it is stored, under the name of the tensor that holds it.
        views: the nodes between the weight and `node`, the one next to `node` first.
    """

    place: str
    home: str
    node: NodeProto
    position: int
    weight: TensorProto
    views: tuple[NodeProto, ...]

    @property
    def key(self) -> tuple[str, str]:
        """What tells weights apart: each graph and function has names of its own."""
        return self.home, self.weight.name


@dataclass(frozen=True)
class _Scope:
    """The nodes of one graph or function, the tensors that they see, and the place of those from outside of the graph
    itself."""

    place: str
    nodes: Sequence[NodeProto]
    found: Index
    homes: Mapping[str, str]


def uses(model: ModelProto) -> Iterator[Use]:
    """Every use of a constant weight, in the order of the graph, those in subgraphs and functions last."""
    for scope in _scopes(model):
        for node in scope.nodes:
            yield from _uses(node, scope)


def sparsity(layers: Iterable[Layer]) -> float:
    """Share of zeros over all weights, each counted once; 0 where there are none."""
    counted = [layer for layer in layers if layer.dense_bytes]
    size = sum(layer.size for layer in counted)
    return 1 - sum(layer.nnz for layer in counted) / size if size else 0.0


def _uses(node: NodeProto, scope: _Scope) -> Iterator[Use]:
    if node.domain not in WEIGHT_DOMAINS:
        return
    groups = WEIGHT_INPUTS.get(node.op_type, ())
    if node.op_type == "Einsum":
        groups = tuple((position,) for position in range(len(node.input)))
    for group in groups:
        candidates = (_use(node, position, scope) for position in group if position < len(node.input))
        if (use := next((use for use in candidates if use is not None), None)) is not None:
            yield use


def _use(node: NodeProto, position: int, scope: _Scope) -> Use | None:
    found = scope.found
    name, views = node.input[position], []
    while name not in found.stored and name in found.producers and is_standard(found.producers[name], *VIEWS):
        views.append(found.producers[name])
        name = views[-1].input[0]
    stored = found.stored.get(name)
    if stored is None or len(stored.dims) < 2 or stored.data_type in NO_WEIGHTS:
        return None
    if stored.name != name:  # the tensor inside of a Constant node has no name, or any
        stored = _renamed(stored, name)
    return Use(scope.place, scope.homes.get(name, ""), node, position, stored, tuple(views))


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


def _judge(use: Use, obstacle: str | None, *, was_input: bool = False) -> Layer:
    weight = use.weight
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
        op=use.node.op_type,
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


def _scopes(model: ModelProto) -> Iterator[_Scope]:
    """The graph, the subgraphs in it, and the functions with theirs."""
    outermost = [_Scope("", model.graph.node, index(model.graph), {})]
    for function in model.functions:
        found, place = index(GraphProto(node=function.node)), f"the function '{function.name}'"
        outermost.append(_Scope(place, function.node, found, dict.fromkeys(found.stored, place)))
    for scope in outermost:
        yield scope
        yield from _inner(scope)


def _inner(outer: _Scope) -> Iterator[_Scope]:
    for node in outer.nodes:
        for name, graph in subgraphs(node):
            place = f"the {name} of {node.op_type} '{label(node)}'" + (f" in {outer.place}" if outer.place else "")
            own = index(graph)
            found = replace(own, stored={**outer.found.stored, **own.stored})
            scope = _Scope(place, graph.node, found, {**outer.homes, **dict.fromkeys(own.stored, place)})
            yield scope
            yield from _inner(scope)
