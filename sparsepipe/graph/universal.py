"""The `universal` target: layers as operators of domain `sparsepipe`, each with a fallback body of standard operators.

Where the kernel library is registered its kernels run; elsewhere onnxruntime inlines the bodies, which rebuild the
dense weights, and the file runs as the dense one does. A bias, an activation and a residual sum that follow a layer
become part of its node, where nothing else uses what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.graph import cost
from sparsepipe.graph.fusion import fuse, shapes_of
from sparsepipe.graph.index import Index, copy, fresh, index, label, opset
from sparsepipe.graph.kernel_layer import Array, Stays, read, steps
from sparsepipe.graph.select import uses
from sparsepipe.graph.tidy import tidy
from sparsepipe.native import operators

OLDEST_OPSET = 13  # of the fallback bodies
OLDEST_IR = 8  # the first with model-local functions


@dataclass(frozen=True)
class Choice:
    """What becomes of one node with a constant weight.

    Attributes:
        name: name of the stored weight.
        node: what the node is called.
        op: its operator.
        shape: shape of the weight as it was stored.
        nnz: values that are not zero.
        size: all values.
        sparsity: share of zeros.
        dense_bytes: bytes of the values stored dense.
        bytes: bytes as stored.
        sparse: whether a sparse kernel takes the node's place.
        block: rows of its blocks; 0 for a dense layer.
        reason: why.
        output: name of the node's output.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    nnz: int
    size: int
    sparsity: float
    dense_bytes: int
    bytes: int
    sparse: bool
    block: int
    reason: str
    output: str


def choose(model: ModelProto) -> list[Choice]:
    """A row for each node with a constant weight, in the order of the graph; subgraphs and functions last."""
    fixed = _fixed(model.graph)
    inputs = {value.name for value in model.graph.input}
    choices = []
    for use in uses(model):
        try:
            if use.place:
                raise Stays(f"inside of {use.place}, which is left alone")
            if opset(model) < OLDEST_OPSET:
                raise Stays(f"opset {opset(model)} is older than {OLDEST_OPSET}")
            if use.weight.name in inputs:
                raise Stays("the weight is an input of the network")
            choices.append(_judge(use.node, use.weight, read(use.node, fixed).weight))
        except Stays as reason:
            choices.append(_dense(use.node, use.weight, str(reason)))
    return choices


def rewrite(model: ModelProto, choices: Sequence[Choice]) -> ModelProto:
    """A copy of `model` in which the chosen nodes, and what follows them, are operators of the kernel library."""
    chosen = {choice.output: choice for choice in choices if choice.sparse}
    result = copy(model)
    if not chosen:
        return result
    result.graph.CopyFrom(_with_shapes(result).graph)
    bodies: dict[str, onnx.FunctionProto] = {}
    # From the end: a sum of two branches is fused with the layer that runs last, when the other one is done.
    for node in reversed(list(result.graph.node)):
        if node.output and node.output[0] in chosen:
            made = _replace(result.graph, node, chosen[node.output[0]])
            bodies.setdefault(made.op_type, operators.function_for(made, opset(model)))
    tidy(result.graph)
    present = {function.name for function in result.functions if function.domain == operators.DOMAIN}
    result.functions.extend(body for name, body in sorted(bodies.items()) if name not in present)
    if all(entry.domain != operators.DOMAIN for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(operators.DOMAIN, operators.VERSION))
    result.ir_version = max(result.ir_version, OLDEST_IR)
    return result


def _fixed(graph: GraphProto) -> Index:
    """The index, without the constants that are also inputs: a caller may override those."""
    found = index(graph)
    inputs = {value.name for value in graph.input}
    return replace(found, constants={name: value for name, value in found.constants.items() if name not in inputs})


def _with_shapes(model: ModelProto) -> ModelProto:
    """The model with the shapes of all tensors: onnxruntime cannot infer those behind operators that it finds new."""
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # a model of more than 2 GB, or with operators that onnx does not know
        return model


def _judge(node: NodeProto, stored: TensorProto, weight: Array) -> Choice:
    """Dense or sparse, and in which blocks."""
    dense = _dense(node, stored, "")
    block, reason = _verdict(node, weight, dense.sparsity)
    if not block:
        return replace(dense, reason=reason)
    values, deltas = operators.encode(weight, block)
    return replace(dense, sparse=True, block=block, bytes=values.nbytes + deltas.nbytes, reason=reason)


def _verdict(node: NodeProto, weight: Array, sparsity: float) -> tuple[int, str]:
    """Rows of the blocks, by the cost model, and why; 0 where the layer stays dense."""
    if weight.size < cost.FEWEST_VALUES:
        return 0, f"{weight.size} values are too few to matter"
    if node.op_type == "Conv" and weight.shape[1] < cost.FEWEST_CHANNELS:
        return 0, f"{weight.shape[1]} input channels: onnxruntime's own kernel is as fast"
    times: dict[int, float] = {}
    for block in cost.ENTRY:
        if weight.shape[0] % block == 0:
            rows = weight.reshape(weight.shape[0] // block, block, -1)
            kept = int(rows.any(axis=1).sum()) * block
            times[block] = cost.relative_time(weight.shape, kept / weight.size, block)
    block = min(times, key=lambda size: times[size])
    predicted = f"{sparsity:.1%} zeros, in blocks of {block} x 1: predicted {times[block]:.2f} of the dense time"
    if times[block] >= cost.PAYS_BELOW:
        return 0, f"{predicted}; pays below {cost.PAYS_BELOW}"
    return block, predicted


def _dense(node: NodeProto, stored: TensorProto, reason: str) -> Choice:
    values = numpy_helper.to_array(stored)
    nnz = int(np.count_nonzero(values))
    return Choice(
        name=stored.name,
        node=label(node),
        op=node.op_type,
        shape=tuple(values.shape),
        nnz=nnz,
        size=values.size,
        sparsity=1 - nnz / values.size if values.size else 0.0,
        dense_bytes=values.nbytes,
        bytes=values.nbytes,
        sparse=False,
        block=0,
        reason=reason,
        output=node.output[0],
    )


def _replace(graph: GraphProto, node: NodeProto, choice: Choice) -> NodeProto:
    """Put the sparse operator in the place of the last node that it stands for."""
    found = _fixed(graph)
    layer = read(node, found)
    fuse(layer, found, shapes_of(graph))
    values, deltas = operators.encode(np.ascontiguousarray(layer.weight), choice.block)
    inputs = [layer.source]
    for part, array in {"values": values, "deltas": deltas, "bias": layer.bias}.items():
        inputs.append(fresh(f"{choice.name.removesuffix('.weight')}.{part}", graph))
        graph.initializer.append(numpy_helper.from_array(array, inputs[-1]))
    shared: dict[str, Any] = {
        "weight_shape": layer.weight.shape,
        "block": choice.block,
        "activation": layer.activation,
        "limits": layer.limits,
        "name": node.name,
        **layer.window,
    }
    output = layer.last.output[0]
    if layer.base == "SparseConv":
        inputs += [layer.residual] if layer.residual else []
        made = operators.sparse_conv(inputs, output, **shared)
    else:
        made = operators.sparse_linear(inputs, output, **shared)
    position = next(place for place, entry in enumerate(graph.node) if entry.output[:1] == [output])
    graph.node.insert(position, made)
    for gone in (node, *layer.fused, *steps(node.input[1], found)):
        graph.node.remove(gone)
    return made
