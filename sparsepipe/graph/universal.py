"""The `universal` target: layers as operators of domain `sparsepipe`, each with a fallback body of standard operators.

Where the kernel library is registered its kernels run; elsewhere onnxruntime inlines the bodies, which rebuild the
dense weights, and the file runs as the dense one does. A bias, an activation and a residual sum that follow a layer
become part of its node, where nothing else uses what lies between. A depthwise convolution between two sparse layers
becomes the library's own dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.graph import cost, depthwise
from sparsepipe.graph.depthwise import Neighbours
from sparsepipe.graph.fusion import fuse
from sparsepipe.graph.index import Index, copy, fresh, index, label, opset
from sparsepipe.graph.kernel_layer import Array, KernelLayer, Stays, is_depthwise, read, read_depthwise, steps, users
from sparsepipe.graph.select import uses
from sparsepipe.graph.shapes import Shapes
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
        kernel: the operator of the library that takes the node's place; empty where it stays.
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
    kernel: str = ""


def choose(model: ModelProto) -> list[Choice]:
    """A row for each node with a constant weight, in the order of the graph; subgraphs and functions last.

    The bytes of a weight that several nodes use are counted in the first row.
    """
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
            choices.append(_judge(use.node, use.weight, read(use.node, fixed)))
        except Stays as reason:
            choices.append(_dense(use.node, use.weight, str(reason)))
    return settle(model, _counted_once(_all_or_none(choices, fixed)))


def settle(model: ModelProto, choices: Sequence[Choice]) -> list[Choice]:
    """The rows with those of depthwise convolutions decided anew: they go by the layers around them."""
    fixed = _fixed(model.graph)
    nodes = {node.output[0]: node for node in model.graph.node if node.output}
    sparse = [nodes[choice.output] for choice in choices if choice.sparse]
    neighbours = Neighbours(sparse, fixed, Shapes(model.graph, fixed))
    settled = []
    for choice in choices:
        node = nodes.get(choice.output)
        if node is not None and is_depthwise(node, fixed) and opset(model) >= OLDEST_OPSET:
            try:
                reason = neighbours.obstacle(node)
            except Stays as stays:
                reason = f"depthwise convolution: {stays}"
            kernel = "" if reason else "DepthwiseConv"
            settled.append(replace(choice, kernel=kernel, reason=reason or depthwise.REASON))
        else:
            settled.append(choice if choice.sparse else replace(choice, kernel=""))
    return settled


def rewrite(model: ModelProto, choices: Sequence[Choice]) -> ModelProto:
    """A copy of `model` in which the chosen nodes, and what follows them, are operators of the kernel library."""
    chosen = {choice.output: choice for choice in settle(model, choices) if choice.sparse or choice.kernel}
    result = copy(model)
    if not chosen:
        return result
    result.graph.CopyFrom(_with_shapes(result).graph)
    rewriter = _Rewriter(result.graph)
    bodies: dict[str, onnx.FunctionProto] = {}
    # From the end: a sum of two branches is fused with the layer that runs last, when the other one is done.
    for node in reversed(list(result.graph.node)):
        if node.output and node.output[0] in chosen:
            made = rewriter.replace(node, chosen[node.output[0]])
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


def _judge(node: NodeProto, stored: TensorProto, layer: KernelLayer) -> Choice:
    """Dense or sparse, and in which blocks."""
    dense = _dense(node, stored, "")
    block, reason = _verdict(node, layer.weight, dense.sparsity)
    if not block:
        return replace(dense, reason=reason)
    values, deltas = operators.encode(layer.weight, block)
    return replace(
        dense, sparse=True, block=block, bytes=values.nbytes + deltas.nbytes, reason=reason, kernel=layer.base
    )


def _all_or_none(choices: Sequence[Choice], found: Index) -> list[Choice]:
    """The rows with those dense again whose weight a node that stays uses, too: the file would hold it twice."""
    sparse = {choice.output for choice in choices if choice.sparse}

    def dense_user(name: str) -> NodeProto | None:
        for user in users(name, found):
            as_weight = sum(name in (slot, *_sources(slot, found)) for slot in user.input) == 1
            if user.output[0] not in sparse or not as_weight:
                return user
        return None

    result = []
    for choice in choices:
        other = dense_user(choice.name) if choice.sparse else None
        if other is not None:
            reason = f"{other.op_type} '{label(other)}', which stays, uses the weight, too"
            choice = replace(choice, sparse=False, block=0, bytes=choice.dense_bytes, reason=reason, kernel="")
        result.append(choice)
    return result


def _sources(name: str, found: Index) -> list[str]:
    return [step.input[0] for step in steps(name, found)]


def _counted_once(choices: Sequence[Choice]) -> list[Choice]:
    """The rows with no bytes where an earlier one counts the same weight."""
    first: dict[str, str] = {}
    result = []
    for choice in choices:
        if choice.name in first:
            reason = f"{choice.reason}; same weight as in '{first[choice.name]}'"
            choice = replace(choice, dense_bytes=0, bytes=0, reason=reason)
        first.setdefault(choice.name, choice.node)
        result.append(choice)
    return result


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


class _Rewriter:
    """Puts operators of the library in the place of nodes of one graph."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._shapes = Shapes(graph, _fixed(graph))
        self._encoded: dict[str, list[tuple[list[str], Array, Array]]] = {}

    def replace(self, node: NodeProto, choice: Choice) -> NodeProto:
        """Put the operator in the place of the last node that it stands for."""
        found = _fixed(self._graph)
        layer = read_depthwise(node, found) if choice.kernel == "DepthwiseConv" else read(node, found)
        fuse(layer, found, self._shapes)
        made = self._made(node, layer, choice)
        position = next(place for place, entry in enumerate(self._graph.node) if entry.output[:1] == made.output[:1])
        self._graph.node.insert(position, made)
        for gone in (node, *layer.fused):
            self._graph.node.remove(gone)
        for step in steps(node.input[1], found):
            if any(step.output[0] in entry.input for entry in self._graph.node):
                break
            self._graph.node.remove(step)
        return made

    def _made(self, node: NodeProto, layer: KernelLayer, choice: Choice) -> NodeProto:
        stem = choice.name.removesuffix(".weight")
        bias = self._stored(f"{stem}.bias", layer.bias)
        output = layer.last.output[0]
        shared: dict[str, Any] = {
            "weight_shape": layer.weight.shape,
            "activation": layer.activation,
            "limits": layer.limits,
            "name": node.name,
            **layer.window,
        }
        if layer.base == "DepthwiseConv":
            return operators.depthwise_conv([layer.source, node.input[1], bias], output, **shared)
        inputs = [layer.source, *self._encode(stem, layer.weight, choice.block), bias]
        inputs += [layer.residual] if layer.residual else []
        if layer.base == "SparseConv":
            return operators.sparse_conv(inputs, output, block=choice.block, **shared)
        return operators.sparse_linear(inputs, output, block=choice.block, **shared)

    def _encode(self, stem: str, weight: Array, block: int) -> list[str]:
        """The names of the values and deltas of a weight; nodes that share it share these."""
        values, deltas = operators.encode(np.ascontiguousarray(weight), block)
        before = self._encoded.setdefault(stem, [])
        for names, same_values, same_deltas in before:
            if np.array_equal(values, same_values) and np.array_equal(deltas, same_deltas):
                return names
        names = [self._stored(f"{stem}.values", values), self._stored(f"{stem}.deltas", deltas)]
        before.append((names, values, deltas))
        return names

    def _stored(self, name: str, value: Array) -> str:
        name = fresh(name, self._graph)
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
