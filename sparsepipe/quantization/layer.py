"""A layer of a quantised graph: an fp32 operator between DequantizeLinear and QuantizeLinear, read as one of int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from sparsepipe.graph.index import Index, integer, is_standard
from sparsepipe.graph.kernel_layer import Stays, window_of
from sparsepipe.graph.shapes import Shapes
from sparsepipe.quantization.normal import obstacle

Array = NDArray[Any]
BYTES = (TensorProto.UINT8, TensorProto.INT8)


@dataclass(frozen=True)
class Quantised:
    """A quantised tensor: the names of its bytes, scale and zero point."""

    name: str
    scale: str
    zero_point: str


@dataclass
class QLayer:
    """A layer in the terms of the int8 kernels.

    Attributes:
        base: its operator, a key of `quantized.INPUTS`.
        weight: int8 [O, I, *kernel].
        weight_name: name of the weight as it is stored.
        weight_scale: name of the scales, one or [O].
        bias: name of the int32 bias [O]; empty where there is none.
        source: what it takes.
        output: what the product alone would give.
        window: strides, pads and dilations of a convolution.
        nodes: the nodes that it stands for.
        last: the node whose output it makes.
        residual: what is added to it.
        sum: what it gives where something is added.
    """

    base: str
    weight: NDArray[np.int8]
    weight_name: str
    weight_scale: str
    bias: str
    source: Quantised
    output: Quantised
    window: Mapping[str, Sequence[int]]
    last: NodeProto
    nodes: list[NodeProto] = field(default_factory=list)
    residual: Quantised | None = None
    sum: Quantised | None = None


def read(node: NodeProto, found: Index) -> QLayer:
    """`node`, an fp32 operator, as the int8 kernels see it.

    Raises:
        Stays: there is no kernel for it, or it is not quantised.
    """
    if not is_standard(node, "Conv", "Gemm", "MatMul"):
        raise Stays(f"no int8 kernel for {node.op_type}")
    if (reason := obstacle(node, found)) is not None:
        raise Stays(reason)
    source, weight = source_of(node.input[0], found), source_of(node.input[1], found)
    if source is None or weight is None:
        raise Stays("not quantised")
    if source.name in found.constants:
        raise Stays("the weight is the left factor")
    values = _constant(weight.name, found)
    if values.dtype != np.int8 or np.any(_constant(weight.zero_point, found)):
        raise Stays("the weight is not symmetric int8")
    bias = node.input[2] if len(node.input) > 2 else ""
    step = quantiser_of(node.output[0], found)
    if step is None:
        raise Stays("its output is not quantised")
    output = Quantised(step.output[0], step.input[1], step.input[2])
    kinds = {_kind(one.zero_point, found) for one in (source, output)}
    if len(kinds) != 1 or not kinds <= set(BYTES):
        raise Stays("input and output are not bytes of one type")
    if is_standard(node, "Conv"):
        base, window = "SparseQConv", window_of(node, values.shape[2:])
        groups = integer(node, "group", 1)
        if groups > 1 and values.shape[:2] == (groups, 1):
            base = "QDepthwiseConv"
        elif groups != 1:
            raise Stays(f"convolution of {groups} groups")
    else:
        base, window = "SparseQLinear", {}
        values = _rows(node, values)
    if _constant(weight.scale, found).size not in (1, len(values)):
        raise Stays("its scales are not those of outputs")
    bias = _bias(bias, len(values), found)
    layer = QLayer(base, values, weight.name, weight.scale, bias, source, output, window, step)
    layer.nodes = [node, step]
    return layer


def fuse_sum(layer: QLayer, found: Index, shapes: Shapes) -> None:
    """Take a sum with another quantised tensor of the same shape into a sparse layer, in place."""
    back = _only_user(layer.output.name, found)
    if layer.base not in ("SparseQConv", "SparseQLinear") or back is None or not is_standard(back, "DequantizeLinear"):
        return
    add = _only_user(back.output[0], found)
    if add is None or not is_standard(add, "Add"):
        return
    other = add.input[1] if add.input[0] == back.output[0] else add.input[0]
    residual, step = source_of(other, found), quantiser_of(add.output[0], found)
    if residual is None or step is None or residual.name in found.constants:
        return
    kinds = {_kind(name, found) for name in (layer.output.zero_point, residual.zero_point, step.input[2])}
    if len(kinds) == 1 and shapes.same(back.output[0], other):
        layer.residual = residual
        layer.sum = Quantised(step.output[0], step.input[1], step.input[2])
        layer.nodes += [back, add, step]
        layer.last = step


def fuse_bias(layer: QLayer, found: Index) -> Array | None:
    """Take a sum with a constant of [outputs] behind a linear layer without a bias into it, in place.

    Returns:
        The bias, int32 [outputs] in units of the product's scale; None where there is no such sum, or where a number
        is too large. The product is no longer rounded to bytes before the sum: the result differs by about 1.
    """
    back = _only_user(layer.output.name, found)
    if layer.base != "SparseQLinear" or layer.bias or back is None or not is_standard(back, "DequantizeLinear"):
        return None
    add = _only_user(back.output[0], found)
    if add is None or not is_standard(add, "Add"):
        return None
    step = quantiser_of(add.output[0], found)
    bias = _real(add.input[1] if add.input[0] == back.output[0] else add.input[0], found)
    if step is None or bias is None or bias.shape != (len(layer.weight),):
        return None
    if _kind(step.input[2], found) != _kind(layer.output.zero_point, found):
        return None
    scale = _constant(layer.source.scale, found).astype(np.float64) * _constant(layer.weight_scale, found)
    units = np.rint(bias / scale)
    if not np.all(np.abs(units) < np.iinfo(np.int32).max):
        return None
    layer.output = Quantised(step.output[0], step.input[1], step.input[2])
    layer.nodes += [back, add, step]
    layer.last = step
    return units.astype(np.int32)


def _real(name: str, found: Index) -> Array | None:
    """The numbers of a constant, be it quantised with one scale or not, in float64."""
    if name in found.constants:
        return numpy_helper.to_array(found.constants[name]).astype(np.float64)
    stored = source_of(name, found)
    if stored is None or stored.name not in found.constants or _constant(stored.scale, found).size != 1:
        return None
    steps = _constant(stored.name, found).astype(np.float64) - _constant(stored.zero_point, found)
    return np.asarray(steps * _constant(stored.scale, found).astype(np.float64))


def alike(one: Quantised, other: Quantised, found: Index) -> bool:
    """Whether two quantised tensors mean the same number by the same byte."""
    if found.constants[one.zero_point].data_type not in BYTES:
        return False
    pairs = ((one.scale, other.scale), (one.zero_point, other.zero_point))
    arrays = [[numpy_helper.to_array(found.constants[name]) for name in pair] for pair in pairs]
    return all(left.dtype == right.dtype and np.array_equal(left, right) for left, right in arrays)


def source_of(name: str, found: Index) -> Quantised | None:
    """The quantised form of an fp32 tensor."""
    step = found.producers.get(name)
    if step is None or not is_standard(step, "DequantizeLinear") or len(step.input) != 3:
        return None
    if step.input[1] not in found.constants or step.input[2] not in found.constants:
        return None
    return Quantised(*step.input)


def quantiser_of(name: str, found: Index) -> NodeProto | None:
    """The QuantizeLinear that alone uses an fp32 tensor."""
    step = _only_user(name, found)
    if step is None or not is_standard(step, "QuantizeLinear") or len(step.input) != 3:
        return None
    return step if step.input[1] in found.constants and step.input[2] in found.constants else None


def _only_user(name: str, found: Index) -> NodeProto | None:
    users = found.consumers.get(name, [])
    return users[0] if len(users) == 1 and not found.pinned(name) else None


def _constant(name: str, found: Index) -> Array:
    if name not in found.constants:
        raise Stays("the weight is not constant")
    return numpy_helper.to_array(found.constants[name])


def _kind(name: str, found: Index) -> int:
    return int(found.constants[name].data_type)


def _rows(node: NodeProto, weight: Array) -> Array:
    if weight.ndim != 2:
        raise Stays(f"a weight of {weight.ndim} dimensions is several matrices")
    if is_standard(node, "MatMul"):
        return weight.T
    if integer(node, "transA", 0):
        raise Stays("no kernel for transA")
    return weight if integer(node, "transB", 0) else weight.T


def _bias(name: str, outputs: int, found: Index) -> str:
    """The name of the int32 bias behind the fp32 one; its scale is that of the product, by the tools' own rule."""
    if not name:
        return ""
    bias = found.producers.get(name)
    stored = found.constants.get(bias.input[0]) if bias is not None and is_standard(bias, "DequantizeLinear") else None
    if stored is None or bias is None or stored.data_type != TensorProto.INT32 or list(stored.dims) != [outputs]:
        raise Stays("the bias is not int32 for each output")
    return str(bias.input[0])
