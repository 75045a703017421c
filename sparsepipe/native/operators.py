"""The operators of domain ``sparsepipe``, version 1, as an ONNX file writes them: encoding, nodes, fallback bodies.

``SparseConv(X, values, deltas, B?, residual?) -> Y`` and ``SparseLinear(X, values, deltas, B?) -> Y``. A weight of
[O, I, *kernel] (or [N, K]) is cut into blocks of ``r`` consecutive output channels of one column; the nonzero blocks
are numbered ``b = (o // r) * K + k`` with K = I * prod(kernel). ``values`` holds their numbers, float32 [blocks, r],
and ``deltas`` the differences of consecutive b (the first: b itself), uint8 or uint16. A gap that does not fit is
bridged by blocks of zeros.

``DepthwiseConv(X, W, B?) -> Y`` is a dense depthwise convolution with W [C, 1, *kernel]: it keeps the NCHW layout
between sparse layers, where onnxruntime's own one pays for two changes of layout.

The fallback is a model-local function per node: it rebuilds the dense weight from standard operators, which
onnxruntime folds into a constant where it inlines the function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

DOMAIN = "sparsepipe"
VERSION = 1
INPUTS = {
    "SparseConv": ("X", "values", "deltas", "B", "residual"),
    "SparseLinear": ("X", "values", "deltas", "B"),
    "DepthwiseConv": ("X", "W", "B"),
}


def encode(
    weight: NDArray[np.float32], block: int = 1, dtype: type[np.unsignedinteger[Any]] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.unsignedinteger[Any]]]:
    """``values`` [blocks, block] and ``deltas`` [blocks] of a weight whose first dimension is the output.

    Args:
        weight: [O, ...]; O must be a multiple of ``block``.
        block: output channels of a block: 1, 2 or 4.
        dtype: ``np.uint8`` or ``np.uint16``; by default the one that makes the smaller file.
    """
    out = weight.shape[0]
    if block not in (1, 2, 4) or out % block:
        raise ValueError(f"a block of {block} does not divide {out} outputs into blocks of 1, 2 or 4")
    blocks = weight.reshape(out // block, block, -1).transpose(0, 2, 1).reshape(-1, block)
    index = np.flatnonzero(blocks.any(axis=1))
    if dtype is None:
        sizes = {kind: _count(index, kind) * (4 * block + np.dtype(kind).itemsize) for kind in (np.uint8, np.uint16)}
        dtype = min(sizes, key=lambda kind: sizes[kind])
    most = int(np.iinfo(dtype).max)
    gaps = np.diff(index, prepend=0)
    fillers = np.maximum((gaps - 1) // most, 0)
    position = np.arange(len(index)) + np.cumsum(fillers)
    total = len(index) + int(fillers.sum())
    deltas = np.full(total, most, dtype)
    deltas[position] = gaps - fillers * most
    values = np.zeros((total, block), np.float32)
    values[position] = blocks[index]
    return values, deltas


def _count(index: NDArray[np.intp], dtype: type[np.unsignedinteger[Any]]) -> int:
    gaps = np.diff(index, prepend=0)
    return int(len(index) + np.maximum((gaps - 1) // int(np.iinfo(dtype).max), 0).sum())


def sparse_conv(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    block: int = 1,
    activation: str = "none",
    limits: tuple[float, float] | None = None,
    mode: int = 0,
    name: str = "",
) -> onnx.NodeProto:
    """A SparseConv node; ``weight_shape`` is [O, I, *kernel], ``limits`` the bounds of activation "clip"."""
    rank = len(weight_shape) - 2
    attributes: dict[str, Any] = {
        "kernel_shape": list(weight_shape[2:]),
        "strides": list(strides or [1] * rank),
        "pads": list(pads or [0] * 2 * rank),
        "dilations": list(dilations or [1] * rank),
        "group": 1,
        "in_channels": weight_shape[1],
        "out_channels": weight_shape[0],
        "block": block,
        "activation": activation,
        "mode": mode,
    }
    if limits:
        attributes |= {"min": float(limits[0]), "max": float(limits[1])}
    return helper.make_node("SparseConv", list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def depthwise_conv(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    activation: str = "none",
    limits: tuple[float, float] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A DepthwiseConv node; ``weight_shape`` is [C, 1, *kernel]."""
    rank = len(weight_shape) - 2
    attributes: dict[str, Any] = {
        "kernel_shape": list(weight_shape[2:]),
        "strides": list(strides or [1] * rank),
        "pads": list(pads or [0] * 2 * rank),
        "dilations": list(dilations or [1] * rank),
        "channels": weight_shape[0],
        "activation": activation,
    }
    if limits:
        attributes |= {"min": float(limits[0]), "max": float(limits[1])}
    return helper.make_node("DepthwiseConv", list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def sparse_linear(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    block: int = 1,
    activation: str = "none",
    limits: tuple[float, float] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A SparseLinear node; ``weight_shape`` is [N, K]."""
    attributes: dict[str, Any] = {
        "in_features": weight_shape[1],
        "out_features": weight_shape[0],
        "block": block,
        "activation": activation,
        "mode": 0,
    }
    if limits:
        attributes |= {"min": float(limits[0]), "max": float(limits[1])}
    return helper.make_node("SparseLinear", list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def function_for(node: onnx.NodeProto, opset: int = 17) -> onnx.FunctionProto:
    """The fallback body of one node, with the node's attributes written into it.

    A function is one body for all nodes of its name, so a file gives each shape, activation and set of inputs an
    ``overload``, or, for runtimes before ONNX IR 10, keeps one body per op type by passing what differs as attributes.
    This builder serves files that hold one node of each type.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    names = INPUTS[node.op_type]
    present = {name for name, value in zip(names, node.input, strict=False) if value}
    window = {k: attributes[k] for k in ("kernel_shape", "strides", "pads", "dilations") if k in attributes}
    bias = ["B"] if "B" in present else []
    if node.op_type == "SparseConv":
        shape = [attributes["out_channels"], attributes["in_channels"], *attributes["kernel_shape"]]
        nodes = _dense_weight(shape, attributes["block"])
        nodes.append(helper.make_node("Conv", ["X", "W", *bias], ["y0"], group=1, **window))
        if "residual" in present:
            nodes.append(helper.make_node("Add", ["y0", "residual"], ["y1"]))
    elif node.op_type == "DepthwiseConv":
        nodes = [helper.make_node("Conv", ["X", "W", *bias], ["y0"], group=attributes["channels"], **window)]
    else:
        nodes = _dense_weight([attributes["out_features"], attributes["in_features"]], attributes["block"])
        nodes.append(helper.make_node("Transpose", ["W"], ["Wt"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["X", "Wt"], ["y0"]))
        if bias:
            nodes.append(helper.make_node("Add", ["y0", "B"], ["y1"]))
    nodes += _activation(attributes, nodes[-1].output[0])
    function = helper.make_function(
        DOMAIN, node.op_type, list(names[: len(node.input)]), ["Y"], nodes, [helper.make_opsetid("", opset)]
    )
    function.attribute.extend(sorted(attributes))
    return function


def _constant(name: str, value: NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))


def _dense_weight(shape: Sequence[int], block: int) -> list[onnx.NodeProto]:
    """``values``, ``deltas`` -> W. The blocks lie as [O/r, K, r]; a transpose brings the channels together."""
    out = shape[0]
    columns = int(np.prod(shape[1:]))
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    return [
        helper.make_node("Cast", ["deltas"], ["deltas64"], to=TensorProto.INT64),
        _constant("axis0", np.array(0, np.int64)),
        helper.make_node("CumSum", ["deltas64", "axis0"], ["index"]),
        _constant("blocks_shape", np.array([out // block * columns, block], np.int64)),
        helper.make_node("ConstantOfShape", ["blocks_shape"], ["zeros"], value=zero),
        _constant("axis1", np.array([1], np.int64)),
        helper.make_node("Unsqueeze", ["index", "axis1"], ["index1"]),
        helper.make_node("Shape", ["values"], ["values_shape"]),
        helper.make_node("Expand", ["index1", "values_shape"], ["indices"]),
        helper.make_node("ScatterElements", ["zeros", "indices", "values"], ["blocks"], axis=0),
        _constant("rows_shape", np.array([out // block, columns, block], np.int64)),
        helper.make_node("Reshape", ["blocks", "rows_shape"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["channels"], perm=[0, 2, 1]),
        _constant("weight_shape", np.array(shape, np.int64)),
        helper.make_node("Reshape", ["channels", "weight_shape"], ["W"]),
    ]


def _activation(attributes: Mapping[str, Any], value: str) -> list[onnx.NodeProto]:
    match attributes["activation"]:
        case b"none":
            return [helper.make_node("Identity", [value], ["Y"])]
        case b"relu":
            return [helper.make_node("Relu", [value], ["Y"])]
        case b"hardswish":
            return [helper.make_node("HardSwish", [value], ["Y"])]
        case b"clip":
            bounds = [_constant(name, np.array(attributes[name], np.float32)) for name in ("min", "max")]
            return [*bounds, helper.make_node("Clip", [value, "min", "max"], ["Y"])]
        case b"silu":
            return [
                helper.make_node("Sigmoid", [value], ["gate"]),
                helper.make_node("Mul", [value, "gate"], ["Y"]),
            ]
        case b"gelu":
            return [
                _constant("root_half", np.array(0.5**0.5, np.float32)),
                _constant("one", np.array(1.0, np.float32)),
                _constant("half", np.array(0.5, np.float32)),
                helper.make_node("Mul", [value, "root_half"], ["scaled"]),
                helper.make_node("Erf", ["scaled"], ["erf"]),
                helper.make_node("Add", ["erf", "one"], ["gate"]),
                helper.make_node("Mul", [value, "half"], ["halved"]),
                helper.make_node("Mul", ["halved", "gate"], ["Y"]),
            ]
        case other:
            raise ValueError(f"unknown activation {other!r}")
