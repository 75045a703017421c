"""The `universal` target: layers as operators of domain `sparsepipe`, each with a fallback body of standard operators.

Where the kernel library is registered its kernels run; elsewhere onnxruntime inlines the bodies, which rebuild the
dense weights, and the file runs as the dense one does. A bias, an activation and a residual sum that follow a layer
become part of its node, where nothing else uses what lies between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.graph import cost
from sparsepipe.graph.index import Index, attribute, copy, fresh, index, integer, is_standard, label, number, opset
from sparsepipe.graph.select import uses
from sparsepipe.graph.tidy import tidy
from sparsepipe.native import operators

OLDEST_OPSET = 13  # of the fallback bodies
OLDEST_IR = 8  # the first with model-local functions
LARGEST_KERNEL = 255
LARGEST = {"strides": 4096, "dilations": 4096, "pads": 65535}
"""What the kernels take of each attribute of a window."""
FLOAT_LIMITS = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))
Array = NDArray[Any]


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


class _Stays(Exception):
    """Why a node stays as it is."""


@dataclass
class _Layer:
    """A node in the terms of the kernels; `last` is the node whose output it makes."""

    base: str
    weight: Array
    bias: Array
    source: str
    window: Mapping[str, Sequence[int]]
    last: NodeProto
    fused: list[NodeProto] = field(default_factory=list)
    residual: str | None = None
    activation: str = "none"
    limits: tuple[float, float] | None = None


def choose(model: ModelProto) -> list[Choice]:
    """A row for each node with a constant weight, in the order of the graph; subgraphs and functions last."""
    fixed = _fixed(model.graph)
    inputs = {value.name for value in model.graph.input}
    choices = []
    for use in uses(model):
        try:
            if use.place:
                raise _Stays(f"inside of {use.place}, which is left alone")
            if opset(model) < OLDEST_OPSET:
                raise _Stays(f"opset {opset(model)} is older than {OLDEST_OPSET}")
            if use.weight.name in inputs:
                raise _Stays("the weight is an input of the network")
            choices.append(_judge(use.node, use.weight, _layer(use.node, fixed).weight))
        except _Stays as reason:
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
    """Dense or sparse, and in which blocks, by the cost model."""
    dense = _dense(node, stored, "")
    if weight.size < cost.FEWEST_VALUES:
        return replace(dense, reason=f"{weight.size} values are too few to matter")
    if node.op_type == "Conv" and weight.shape[1] < cost.FEWEST_CHANNELS:
        return replace(dense, reason=f"{weight.shape[1]} input channels: onnxruntime's own kernel is as fast")
    times: dict[int, tuple[float, int]] = {}
    for block in cost.ENTRY:
        if weight.shape[0] % block == 0:
            rows = weight.reshape(weight.shape[0] // block, block, -1)
            kept = int(rows.any(axis=1).sum()) * block
            times[block] = (cost.relative_time(weight.shape, kept / weight.size, block), kept)
    block = min(times, key=lambda size: times[size][0])
    predicted = (
        f"{dense.sparsity:.1%} zeros, in blocks of {block} x 1: predicted {times[block][0]:.2f} of the dense time"
    )
    if times[block][0] >= cost.PAYS_BELOW:
        return replace(dense, reason=f"{predicted}; pays below {cost.PAYS_BELOW}")
    values, deltas = operators.encode(weight, block)
    return replace(dense, sparse=True, block=block, bytes=values.nbytes + deltas.nbytes, reason=predicted)


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


def _layer(node: NodeProto, found: Index) -> _Layer:
    """`node` as the kernels see it, or `_Stays`."""
    if node.op_type not in _READERS or not is_standard(node, node.op_type):
        raise _Stays("transposed convolution" if node.op_type == "ConvTranspose" else f"no kernel for {node.op_type}")
    layer = _READERS[node.op_type](node, found)
    if not np.isfinite(layer.weight).all() or not np.isfinite(layer.bias).all():
        raise _Stays("a value is not finite")
    return layer


def _own(node: NodeProto, name: str, found: Index) -> Array:
    """The constant weight `name` of `node`, that nothing else uses; a transposition of it is done here."""
    step = found.producers.get(name)
    if name not in found.constants and step is not None and is_standard(step, "Transpose"):
        order = attribute(step, "perm")
        value = _own(step, step.input[0], found)
        if len(found.consumers[name]) > 1 or found.pinned(name):
            raise _Stays("the weight is used elsewhere, too")
        return value.transpose(list(order.ints) if order else None)
    if name not in found.constants:
        raise _Stays(f"the weight goes through {step.op_type}" if step is not None else "the weight is not constant")
    if found.constants[name].data_type != TensorProto.FLOAT:
        raise _Stays(f"the weight is {TensorProto.DataType.Name(found.constants[name].data_type)}, not FLOAT")
    if len(found.consumers[name]) > 1 or found.pinned(name):
        raise _Stays("the weight is used elsewhere, too")
    return numpy_helper.to_array(found.constants[name])


def _bias(node: NodeProto, outputs: int, found: Index) -> Array:
    """The third input as float32 [outputs]; zeros where there is none."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(outputs, np.float32)
    if node.input[2] not in found.constants:
        raise _Stays("the bias is not constant")
    bias = numpy_helper.to_array(found.constants[node.input[2]])
    if bias.size not in (1, outputs) or (bias.ndim and bias.shape[-1] != bias.size):
        raise _Stays("the bias differs from row to row")
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), outputs), np.float32)


def _read_conv(node: NodeProto, found: Index) -> _Layer:
    if (groups := integer(node, "group", 1)) != 1:
        stored = found.constants.get(node.input[1])
        depthwise = stored is not None and stored.dims[1] == 1
        raise _Stays("depthwise convolution" if depthwise else f"convolution of {groups} groups")
    padding = attribute(node, "auto_pad")
    if padding is not None and padding.s not in (b"", b"NOTSET", b"VALID"):
        raise _Stays(f"auto_pad {padding.s.decode()} depends on the size of the input")
    weight = _own(node, node.input[1], found)
    if (rank := weight.ndim - 2) not in (1, 2):
        raise _Stays(f"no kernel for convolutions in {rank} dimensions")
    valid = padding is not None and padding.s == b"VALID"
    if max(weight.shape[2:]) > LARGEST_KERNEL:
        raise _Stays(f"no kernel for a window of {list(weight.shape[2:])}")
    window: dict[str, Sequence[int]] = {}
    for name, count, default in (("strides", rank, 1), ("pads", 2 * rank, 0), ("dilations", rank, 1)):
        given = attribute(node, name) if not (valid and name == "pads") else None
        window[name] = list(given.ints) if given is not None else [default] * count
    for name, numbers in window.items():
        if not all(0 <= value <= LARGEST[name] for value in numbers):
            raise _Stays(f"no kernel for {name} {list(numbers)}")
    return _Layer("SparseConv", weight, _bias(node, weight.shape[0], found), node.input[0], window, node)


def _read_gemm(node: NodeProto, found: Index) -> _Layer:
    if node.input[1] not in found.constants and node.input[0] in found.constants:
        raise _Stays("the weight is the left factor")
    if integer(node, "transA", 0) or number(node, "alpha", 1.0) != 1:
        raise _Stays("no kernel for transA, or alpha other than 1")
    weight = _own(node, node.input[1], found)
    weight = weight if integer(node, "transB", 0) else weight.T
    bias = _bias(node, weight.shape[0], found) * np.float32(number(node, "beta", 1.0))
    return _Layer("SparseLinear", weight, bias, node.input[0], {}, node)


def _read_matmul(node: NodeProto, found: Index) -> _Layer:
    if node.input[0] in found.constants:
        raise _Stays("the weight is the left factor")
    weight = _own(node, node.input[1], found)
    if weight.ndim != 2:
        raise _Stays(f"a weight of {weight.ndim} dimensions is several matrices")
    return _Layer("SparseLinear", weight.T, np.zeros(weight.shape[1], np.float32), node.input[0], {}, node)


_READERS = {"Conv": _read_conv, "Gemm": _read_gemm, "MatMul": _read_matmul}


def _replace(graph: GraphProto, node: NodeProto, choice: Choice) -> NodeProto:
    """Put the sparse operator in the place of the last node that it stands for."""
    found = _fixed(graph)
    layer = _layer(node, found)
    if node.op_type == "MatMul":
        _fuse_bias(layer, found)
    if layer.base == "SparseConv":
        _fuse_residual(layer, found, _shapes(graph))
    _fuse_activation(layer, found)
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
    for gone in (node, *layer.fused, *_steps(node.input[1], found)):
        graph.node.remove(gone)
    return made


def _steps(name: str, found: Index) -> list[NodeProto]:
    """The transpositions through which a weight reaches its node."""
    step = found.producers.get(name)
    if step is None or name in found.constants:
        return []
    return [step, *_steps(step.input[0], found)]


def _next(layer: _Layer, found: Index) -> NodeProto | None:
    """The only node that uses the output so far."""
    output = layer.last.output[0]
    users = found.consumers.get(output, [])
    return users[0] if len(users) == 1 and not found.pinned(output) else None


def _take(layer: _Layer, node: NodeProto) -> None:
    layer.fused.append(node)
    layer.last = node


def _other(node: NodeProto, name: str) -> str:
    first, second = map(str, node.input)
    return second if first == name else first


def _fuse_bias(layer: _Layer, found: Index) -> None:
    node = _next(layer, found)
    if node is None or not is_standard(node, "Add"):
        return
    constant = found.constants.get(_other(node, layer.last.output[0]))
    if constant is not None and list(constant.dims) == [layer.weight.shape[0]]:
        bias = numpy_helper.to_array(constant)
        if np.isfinite(bias).all():
            layer.bias = bias
            _take(layer, node)


def _fuse_residual(layer: _Layer, found: Index, shapes: Mapping[str, list[int | str]]) -> None:
    """A sum with a tensor that is known to have the same shape: the kernel does not broadcast."""
    node = _next(layer, found)
    if node is None or not is_standard(node, "Add"):
        return
    output = layer.last.output[0]
    other = _other(node, output)
    same = shapes.get(output)
    if other not in found.constants and same is not None and all(same) and shapes.get(other) == same:
        layer.residual = other
        _take(layer, node)


def _fuse_activation(layer: _Layer, found: Index) -> None:
    node = _next(layer, found)
    if node is None:
        return
    if is_standard(node, "Relu"):
        layer.activation = "relu"
    elif is_standard(node, "HardSwish") and layer.base == "SparseConv":
        layer.activation = "hardswish"
    elif is_standard(node, "Clip"):
        bounds = list(FLOAT_LIMITS)
        for place, name in enumerate(node.input[1:3]):
            if name and name not in found.constants:
                return
            if name:
                bounds[place] = float(numpy_helper.to_array(found.constants[name]).reshape(()))
        if not np.isfinite(bounds).all() or bounds[0] > bounds[1]:
            return
        layer.activation, layer.limits = "clip", (bounds[0], bounds[1])
    else:
        return
    _take(layer, node)


def _shapes(graph: GraphProto) -> dict[str, list[int | str]]:
    """Shapes of the tensors for which one is recorded; 0 or "" for a dimension that is not known."""
    return {
        value.name: [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }
