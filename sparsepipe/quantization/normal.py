"""The normal form of an fp32 network: of other forms onnxruntime's tools leave layers as they are, or make wrong ones.

In it every weight is an initializer as its layer uses it, of one layer's outputs along one axis; and a Gemm is W x + c:

    alpha A B + beta C  =  A (alpha B) + (beta C),    one c for each output
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import (
    Index,
    attribute,
    constant_value,
    copy,
    fresh,
    index,
    integer,
    is_standard,
    label,
    number,
)
from sparsepipe.graph.tidy import tidy

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def normal_form(model: ModelProto) -> ModelProto:
    """A copy that computes the same, in normal form; the names of its activations and layers' outputs stay.

    Raises:
        GraphError: a layer computes in another type than float32.
    """
    result = copy(model)
    graph = result.graph
    _store_constants(graph)
    _refuse_other_floats(graph)
    found = index(graph)
    for gemm in [node for node in graph.node if is_standard(node, "Gemm")]:
        _fold_factors(graph, gemm, found)
    _separate_axes(graph)
    tidy(graph)
    return result


def obstacle(layer: NodeProto, found: Index) -> str | None:
    """Why onnxruntime has no int8 form of a layer in normal form, or a wrong one; None where it has one."""
    left, weight, bias = (found.stored.get(name) for name in [*layer.input, ""][:3])
    if is_standard(layer, "MatMul") and left is not None:
        return "the weight is the left factor"
    if weight is None:
        return None
    if is_standard(layer, "MatMul") and len(weight.dims) > 2:
        return f"a weight of {len(weight.dims)} dimensions is several matrices"
    outputs = weight.dims[_output_axis(layer)] if bias is not None else 0
    if is_standard(layer, "Gemm") and bias is not None and list(bias.dims) != [outputs]:
        return "the bias differs from row to row"
    if is_standard(layer, "ConvTranspose") and outputs > 1 and (groups := integer(layer, "group", 1)) > 1:
        return f"transposed convolution of {groups} groups"
    return None


def stay_fp32(model: ModelProto) -> set[str]:
    """The outputs of the nodes of a network in normal form that onnxruntime's tools must leave as they are.

    A ReLU or Clip is among them where something outside of the graph's nodes sees what comes before it, too: the tools
    would give that the range of what comes behind.
    """
    found = index(model.graph)
    return {
        node.output[0]
        for node in model.graph.node
        if (is_standard(node, *LAYERS) and obstacle(node, found))
        or (is_standard(node, "Relu", "Clip") and found.pinned(node.input[0]))
    }


def _store_constants(graph: GraphProto) -> None:
    """Make initializers of the values of Constant nodes, and of what transpositions make of constants."""
    constants = dict(index(graph).constants)
    kept = []
    for node in graph.node:
        value = constant_value(node)
        if value is None and is_standard(node, "Transpose") and node.input[0] in constants:
            order = attribute(node, "perm")
            array = numpy_helper.to_array(constants[node.input[0]]).transpose(list(order.ints) if order else None)
            value = numpy_helper.from_array(np.ascontiguousarray(array))
        if value is None:
            kept.append(node)
        else:
            constants[node.output[0]] = _stored(graph, value, node.output[0])
    del graph.node[:]
    graph.node.extend(kept)


def _refuse_other_floats(graph: GraphProto) -> None:
    found = index(graph)
    for node in graph.node:
        if not is_standard(node, *LAYERS):
            continue
        kind = next((found.stored[name].data_type for name in node.input if name in found.stored), None)
        if kind in OTHER_FLOATS:
            raise GraphError(
                f"'{label(node)}' computes in {TensorProto.DataType.Name(kind)}, and int8 is made of float32 networks.",
                where=graph.name or "model",
                advice="Export the float32 network that it was made from, or make it float32 before its export to ONNX "
                "(in PyTorch: network.float()).",
            )


def _fold_factors(graph: GraphProto, gemm: NodeProto, found: Index) -> None:
    """Move alpha and beta of a Gemm into its constants, and give it a bias for each output."""
    weight = found.constants.get(gemm.input[1])
    if weight is None or weight.data_type != TensorProto.FLOAT:
        return
    alpha, beta = (number(gemm, name, 1.0) for name in ("alpha", "beta"))
    outputs = weight.dims[_output_axis(gemm)]
    if alpha != 1:
        _give(graph, gemm, 1, numpy_helper.to_array(weight) * np.float32(alpha), found)
    _forget(gemm, "alpha")
    bias = found.constants.get(gemm.input[2]) if len(gemm.input) > 2 else None
    if bias is None:
        return
    values = numpy_helper.to_array(bias) * np.float32(beta)
    if values.size == 1 or values.shape[-1] == values.size:
        values = np.broadcast_to(values.reshape(-1), outputs)
    if beta != 1 or list(bias.dims) != list(values.shape):
        _give(graph, gemm, 2, values, found)
    _forget(gemm, "beta")


def _separate_axes(graph: GraphProto) -> None:
    """Give each use of a weight along another axis, or by something that is no layer, a copy of its own."""
    found = index(graph)
    uses: dict[str, dict[int | None, list[tuple[NodeProto, int]]]] = defaultdict(lambda: defaultdict(list))
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name in found.constants:
                axis = _output_axis(node) if slot == 1 and is_standard(node, *LAYERS) else None
                uses[name][axis].append((node, slot))
    for name, by_axis in uses.items():
        axes = [axis for axis in by_axis if axis is not None]
        for axis in axes if None in by_axis or found.pinned(name) else axes[1:]:
            copied = _stored(graph, found.constants[name], fresh(name, graph)).name
            for node, slot in by_axis[axis]:
                node.input[slot] = copied


def _output_axis(layer: NodeProto) -> int:
    """The axis of a layer's weight along which its outputs lie."""
    transposed = is_standard(layer, "Gemm") and integer(layer, "transB", 0)
    return 0 if is_standard(layer, "Conv") or transposed else 1


def _give(graph: GraphProto, node: NodeProto, slot: int, values: NDArray[Any], found: Index) -> None:
    """Give a node another constant, under the old name where it alone uses that."""
    old = node.input[slot]
    value = numpy_helper.from_array(np.ascontiguousarray(values, np.float32), old)
    if len(found.consumers[old]) == 1 and not found.pinned(old):
        found.constants[old].CopyFrom(value)
    else:
        node.input[slot] = _stored(graph, value, fresh(old, graph)).name


def _stored(graph: GraphProto, value: TensorProto, name: str) -> TensorProto:
    added: TensorProto = graph.initializer.add()
    added.CopyFrom(value)
    added.name = name
    return added


def _forget(node: NodeProto, name: str) -> None:
    found = attribute(node, name)
    if found is not None:
        node.attribute.remove(found)
