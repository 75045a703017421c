"""The int8 operators of domain ``sparsepipe``, version 1, as an ONNX file writes them: encoding, nodes, bodies.

``SparseQConv(X, x_scale, x_zero_point, values, deltas, w_scale, y_scale, y_zero_point, B?, residual?, residual_scale?,
residual_zero_point?, sum_scale?, sum_zero_point?) -> Y`` and ``SparseQLinear`` of the same inputs are QLinearConv, and
a linear layer of the same arithmetic, of a sparse weight: X, residual and Y are all uint8 or all int8, with a scale and
a zero point each; the weight is int8 without a zero point, with one scale, or one for each output; B is int32, in units
of x_scale * w_scale. All but X and residual are constants. The result of a product is rounded as QLinearConv does:

    q = saturate(round_half_even(float32(sum) * (x_scale * w_scale / y_scale)) + y_zero_point)

With a residual, q is the byte that the product alone would give, and

    Y = saturate(round_half_even(fma(q, y_scale / sum_scale, fma(residual, residual_scale / sum_scale, fixed))))
    fixed = sum_zero_point - fma(y_scale / sum_scale, y_zero_point, residual_scale / sum_scale * residual_zero_point)

in float32, which are the bits of onnxruntime's ``com.microsoft::QLinearAdd`` on x86 CPUs with AVX2, and at most 1 from
DequantizeLinear, Add and QuantizeLinear. The activation ``relu`` is a bound of Y at its zero point, ``clip`` bounds Y
by ``min`` and ``max``, integers of Y's type: an activation of uint8 with zero point 0 needs no ``relu``.

A weight [O, I, *kernel] (or [N, K]) is cut into blocks of ``r`` consecutive outputs by 4 consecutive inputs at one
kernel position; inputs are padded with zeros to a multiple of 4. The nonzero blocks are numbered ``b = ((o // r) * G +
i // 4) * P + p`` with G groups of inputs and P kernel positions. ``values`` holds them, int8 [blocks, r, 4], and
``deltas`` the differences of consecutive b as in `operators`.

``QDepthwiseConv(X, x_scale, x_zero_point, W, w_scale, y_scale, y_zero_point, B?) -> Y`` is the QLinearConv of one dense
filter for each channel, W int8 [C, 1, *kernel], and ``QMaxPool(X) -> Y`` is MaxPool of uint8 or int8: in NCHW, where
onnxruntime's own ones are slow or change the layout. ``QLookup(X, table) -> Y`` is any function of one byte, uint8 or
int8: ``table`` [256] holds Y, of X's type, by the bits of X, so that -1 stands at 255.

The fallback body of an operator rebuilds the dense weight, which onnxruntime folds into a constant, for QLinearConv, or
for DequantizeLinear, Gemm and QuantizeLinear, which onnxruntime fuses to one integer product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper

from sparsepipe.native.encoding import chain, unchain
from sparsepipe.native.operators import DOMAIN, attribute_tensor, operator_name, with_references

QUAD = 4
"""Inputs of a block."""
BLOCKS = (1, 2, 4)
"""Outputs of a block, any of these."""
INPUTS = {
    "SparseQConv": (
        "X", "x_scale", "x_zero_point", "values", "deltas", "w_scale", "y_scale", "y_zero_point", "B",
        "residual", "residual_scale", "residual_zero_point", "sum_scale", "sum_zero_point",
    ),
    "SparseQLinear": (
        "X", "x_scale", "x_zero_point", "values", "deltas", "w_scale", "y_scale", "y_zero_point", "B",
        "residual", "residual_scale", "residual_zero_point", "sum_scale", "sum_zero_point",
    ),
    "QDepthwiseConv": ("X", "x_scale", "x_zero_point", "W", "w_scale", "y_scale", "y_zero_point", "B"),
    "QMaxPool": ("X",),
    "QLookup": ("X", "table"),
}  # fmt: skip
WINDOW = ("kernel_shape", "strides", "pads", "dilations")
ACTIVATIONS = ("none", "relu", "clip")


def encode(
    weight: NDArray[np.int8], block: int = 4, dtype: type[np.unsignedinteger[Any]] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.unsignedinteger[Any]]]:
    """``values`` [blocks, block, 4] and ``deltas`` [blocks] of an int8 weight whose first dimension is the output.

    Args:
        weight: [O, I, ...]; O must be a multiple of ``block``.
        block: outputs of a block: 1, 2 or 4.
        dtype: ``np.uint8`` or ``np.uint16``; by default the one that makes the smaller file.
    """
    blocks = _cut(weight, block)
    index = np.flatnonzero(blocks.any(axis=(1, 2)))
    position, deltas = chain(index, block * QUAD, dtype)
    values = np.zeros((len(deltas), block, QUAD), np.int8)
    values[position] = blocks[index]
    return values, deltas


def decode(
    values: NDArray[np.int8], deltas: NDArray[np.unsignedinteger[Any]], shape: Sequence[int], block: int
) -> NDArray[np.int8]:
    """The weight of which ``encode`` made ``values`` and ``deltas``.

    Args:
        values: [blocks, block, 4].
        deltas: [blocks], uint8 or uint16.
        shape: of the weight, [O, I, ...]; O must be a multiple of ``block``.
        block: outputs of a block: 1, 2 or 4.

    Raises:
        ValueError: the arrays do not fit each other or the shape, or the blocks do not ascend or lie outside of it.
    """
    out, channels, *kernel = shape
    _check(out, block)
    if values.dtype != np.int8 or values.shape != (len(deltas), block, QUAD):
        raise ValueError(f"values of {values.dtype} {values.shape} do not fit {len(deltas)} deltas")
    groups, positions = -(-channels // QUAD), math.prod(kernel)
    blocks = np.zeros((out // block * groups * positions, block, QUAD), np.int8)
    blocks[unchain(deltas, len(blocks))] = values
    rows = blocks.reshape(out // block, groups, positions, block, QUAD).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(rows.reshape(out, groups * QUAD, positions)[:, :channels]).reshape(shape)


def _check(out: int, block: int) -> None:
    if block not in BLOCKS or out % block:
        raise ValueError(f"a block of {block} does not divide {out} outputs into blocks of 1, 2 or 4")


def _cut(weight: NDArray[np.int8], block: int) -> NDArray[np.int8]:
    """All blocks of a weight, [blocks, block, 4]."""
    out, channels = weight.shape[:2]
    _check(out, block)
    if weight.dtype != np.int8:
        raise ValueError(f"a weight of {weight.dtype} is not int8")
    flat = weight.reshape(out, channels, -1)
    padded = np.pad(flat, ((0, 0), (0, -channels % QUAD), (0, 0)))
    rows = padded.reshape(out // block, block, -1, QUAD, flat.shape[2])
    return np.ascontiguousarray(rows.transpose(0, 2, 4, 1, 3)).reshape(-1, block, QUAD)


def sparse_qconv(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    block: int = 4,
    activation: str = "none",
    limits: tuple[int, int] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A SparseQConv node under its ``operator_name``.

    Args:
        inputs: names in the order of ``INPUTS``: the first eight, B, and the five of a residual; a missing B is "".
        output: name of Y.
        weight_shape: [O, I, *kernel].
        strides: as of Conv.
        pads: as of Conv; the padding is x_zero_point, which stands for 0.
        dilations: as of Conv.
        block: outputs of a block.
        activation: one of ``ACTIVATIONS``.
        limits: the bounds of activation "clip", integers of Y's type.
        name: of the node.
    """
    attributes: dict[str, Any] = {
        **_window(weight_shape[2:], strides, pads, dilations),
        "group": 1,
        "in_channels": weight_shape[1],
        "out_channels": weight_shape[0],
        **_shared(block, activation, limits),
    }
    op_type = operator_name("SparseQConv", activation, residual=len(inputs) > INPUTS["SparseQConv"].index("residual"))
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def sparse_qlinear(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    block: int = 4,
    activation: str = "none",
    limits: tuple[int, int] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A SparseQLinear node; ``inputs`` as of ``INPUTS``, ``weight_shape`` is [N, K], ``limits`` as of SparseQConv."""
    attributes: dict[str, Any] = {
        "in_features": weight_shape[1],
        "out_features": weight_shape[0],
        **_shared(block, activation, limits),
    }
    residual = len(inputs) > INPUTS["SparseQLinear"].index("residual")
    op_type = operator_name("SparseQLinear", activation, residual=residual)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def qdepthwise_conv(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    activation: str = "none",
    limits: tuple[int, int] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A QDepthwiseConv node; ``inputs`` as of ``INPUTS``, ``weight_shape`` is [C, 1, *kernel], else as SparseQConv."""
    attributes: dict[str, Any] = {
        **_window(weight_shape[2:], strides, pads, dilations),
        "channels": weight_shape[0],
        **_bounded(activation, limits),
    }
    op_type = operator_name("QDepthwiseConv", activation)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def qmax_pool(
    source: str,
    output: str,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A QMaxPool node; the arguments as of MaxPool (ceil_mode 0), each of ``pads`` below the kernel's size."""
    window = _window(kernel_shape, strides, pads, dilations)
    return helper.make_node("QMaxPool", [source], [output], name=name, domain=DOMAIN, **window)


def qlookup(source: str, table: str, output: str, *, name: str = "") -> onnx.NodeProto:
    """A QLookup node; `table` is the name of its [256] bytes."""
    return helper.make_node("QLookup", [source, table], [output], name=name, domain=DOMAIN)


def _window(
    kernel: Sequence[int], strides: Sequence[int] | None, pads: Sequence[int] | None, dilations: Sequence[int] | None
) -> dict[str, Any]:
    rank = len(kernel)
    return {
        "kernel_shape": list(kernel),
        "strides": list(strides or [1] * rank),
        "pads": list(pads or [0] * 2 * rank),
        "dilations": list(dilations or [1] * rank),
    }


def _shared(block: int, activation: str, limits: tuple[int, int] | None) -> dict[str, Any]:
    return {"block": block, **_bounded(activation, limits)}


def _bounded(activation: str, limits: tuple[int, int] | None) -> dict[str, Any]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"the int8 operators have no activation {activation!r}, only {', '.join(ACTIVATIONS)}")
    bounds = {"min": int(limits[0]), "max": int(limits[1])} if limits else {}
    return {"activation": activation, **bounds}


def function_for(node: onnx.NodeProto, opset: int = 17) -> onnx.FunctionProto:
    """The fallback body of all nodes of an operator that have the inputs and the activation of ``node``.

    Args:
        node: one of them.
        opset: version of the standard operators in the body, 13 or newer.
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    base = next(name for name in INPUTS if node.op_type.startswith(name))
    if base == "QMaxPool":
        window = {name: name for name in WINDOW}
        pool = with_references(helper.make_node("MaxPool", ["X"], ["Y"]), window, AttributeProto.INTS)
        made = helper.make_function(DOMAIN, base, ["X"], ["Y"], [pool], [helper.make_opsetid("", opset)])
        made.attribute.extend(sorted(WINDOW))
        return made
    if base == "QLookup":
        return helper.make_function(
            DOMAIN, base, ["X", "table"], ["Y"], _lookup(opset), [helper.make_opsetid("", opset)]
        )
    names = INPUTS[base][: len(node.input)]
    present = {name for name, value in zip(names, node.input, strict=True) if value}
    if base == "SparseQConv":
        nodes = _dense_weight(("out_channels", "in_channels"), "kernel_shape")
        nodes += _convolution("B" in present)
        zero_point = "y_zero_point"
        if "residual" in present:
            nodes += _sum("y0")
            zero_point = "sum_zero_point"
    elif base == "QDepthwiseConv":
        nodes = _convolution("B" in present)
        with_references(nodes[-1], {"group": "channels"}, AttributeProto.INT)
        zero_point = "y_zero_point"
    else:
        nodes = _dense_weight(("out_features", "in_features"))
        nodes += _linear("B" in present)
        zero_point = "y_zero_point"
        if "residual" in present:
            nodes += _sum("y2")
            zero_point = "sum_zero_point"
    nodes += _bounds(attributes["activation"], nodes[-1].output[0], zero_point)
    function = helper.make_function(DOMAIN, node.op_type, list(names), ["Y"], nodes, [helper.make_opsetid("", opset)])
    function.attribute.extend(sorted(attributes))
    return function


def _lookup(opset: int) -> list[onnx.NodeProto]:
    """Y = table[X]; an index below 0 counts from the end, as int8 does.

    On a flat X by GatherElements: Gather takes 8 times as long in onnxruntime.
    """
    node = helper.make_node
    empty: dict[str, Any] = {"allowzero": 1} if opset >= 14 else {}
    return [
        _constant("flat", [-1]),
        node("Reshape", ["X", "flat"], ["x0"]),
        node("Cast", ["x0"], ["index"], to=TensorProto.INT32),
        node("GatherElements", ["table", "index"], ["y0"]),
        node("Shape", ["X"], ["shape"]),
        node("Reshape", ["y0", "shape"], ["Y"], **empty),
    ]


def _constant(name: str, value: Any, dtype: Any = np.int64) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(value, dtype)))


def _dense_weight(sizes: tuple[str, str], kernel: str | None = None) -> list[onnx.NodeProto]:
    """``values``, ``deltas`` -> W, int8.

    Args:
        sizes: the attributes with the outputs and inputs of the weight.
        kernel: the attribute with its further dimensions.
    """
    node = helper.make_node
    zero = helper.make_tensor("zero", TensorProto.INT8, [1], [0])
    nodes = [_constant("rest", [-1]), _constant("axis0", 0), _constant("quad", [QUAD]), _constant("start", [0])]
    nodes += [_constant("less", [QUAD - 1]), _constant("axis1", [1])]
    for name, source in {"outputs": sizes[0], "inputs": sizes[1], "r": "block"}.items():
        nodes.append(attribute_tensor(f"{name}_", "value_int", source, AttributeProto.INT))
        nodes.append(node("Reshape", [f"{name}_", "rest"], [name]))
    taps = []
    if kernel:
        nodes.append(attribute_tensor("taps", "value_ints", kernel, AttributeProto.INTS))
        taps = ["taps"]
    return [
        *nodes,
        node("Add", ["inputs", "less"], ["more_inputs"]),
        node("Div", ["more_inputs", "quad"], ["groups"]),
        node("Mul", ["groups", "quad"], ["padded_inputs"]),
        node("Mul", ["r", "quad"], ["block_size"]),
        node("Div", ["outputs", "r"], ["rows_of_blocks"]),
        node("Concat", ["outputs", "padded_inputs", *taps], ["padded_shape"], axis=0),
        node("Concat", ["outputs", "inputs", *taps], ["weight_shape"], axis=0),
        node("Concat", ["rest", "block_size"], ["blocks_shape"], axis=0),
        node("Concat", ["rows_of_blocks", "groups", "rest", "r", "quad"], ["rows_shape"], axis=0),
        node("ConstantOfShape", ["padded_shape"], ["zeros_flat"], value=zero),
        node("Reshape", ["zeros_flat", "blocks_shape"], ["zeros"]),
        node("Flatten", ["values"], ["flat_values"], axis=1),
        node("Cast", ["deltas"], ["deltas64"], to=TensorProto.INT64),
        node("CumSum", ["deltas64", "axis0"], ["index"]),
        node("Unsqueeze", ["index", "rest"], ["index1"]),
        node("Shape", ["flat_values"], ["values_shape"]),
        node("Expand", ["index1", "values_shape"], ["indices"]),
        node("ScatterElements", ["zeros", "indices", "flat_values"], ["blocks"], axis=0),
        node("Reshape", ["blocks", "rows_shape"], ["rows"]),
        node("Transpose", ["rows"], ["channels"], perm=[0, 3, 1, 4, 2]),
        node("Reshape", ["channels", "padded_shape"], ["padded"]),
        node("Slice", ["padded", "start", "inputs", "axis1"], ["W"]),
    ]


def _convolution(bias: bool) -> list[onnx.NodeProto]:
    inputs = ["X", "x_scale", "x_zero_point", "W", "w_scale", "w_zero_point", "y_scale", "y_zero_point"]
    conv = helper.make_node("QLinearConv", [*inputs, *(["B"] if bias else [])], ["y0"])
    window = {name: name for name in WINDOW}
    return [_constant("w_zero_point", 0, np.int8), with_references(conv, window, AttributeProto.INTS)]


def _sum(product: str) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("DequantizeLinear", [product, "y_scale", "y_zero_point"], ["product1"]),
        node("DequantizeLinear", ["residual", "residual_scale", "residual_zero_point"], ["residual1"]),
        node("Add", ["product1", "residual1"], ["total"]),
        node("QuantizeLinear", ["total", "sum_scale", "sum_zero_point"], ["sum"]),
    ]


def _linear(bias: bool) -> list[onnx.NodeProto]:
    """DequantizeLinear, Gemm, QuantizeLinear on the rows of X, of however many dimensions."""
    node = helper.make_node
    nodes = [
        node("Concat", ["rest", "inputs"], ["matrix_shape"], axis=0),
        node("Reshape", ["X", "matrix_shape"], ["x0"]),
        node("DequantizeLinear", ["x0", "x_scale", "x_zero_point"], ["x1"]),
        node("Expand", ["w_scale", "outputs"], ["w_scales"]),
        _constant("w_zero_point", 0, np.int8),
        node("Expand", ["w_zero_point", "outputs"], ["w_zero_points"]),
        node("DequantizeLinear", ["W", "w_scales", "w_zero_points"], ["w1"], axis=0),
    ]
    if bias:
        nodes += [
            node("Mul", ["x_scale", "w_scales"], ["b_scales"]),
            node("DequantizeLinear", ["B", "b_scales"], ["b1"], axis=0),
        ]
    return [
        *nodes,
        node("Gemm", ["x1", "w1", *(["b1"] if bias else [])], ["y0"], transB=1),
        node("QuantizeLinear", ["y0", "y_scale", "y_zero_point"], ["y1"]),
        node("Shape", ["X"], ["x_shape"]),
        node("Slice", ["x_shape", "start", "rest"], ["leading"]),
        node("Concat", ["leading", "outputs"], ["y_shape"], axis=0),
        node("Reshape", ["y1", "y_shape"], ["y2"]),
    ]


def _bounds(activation: bytes, value: str, zero_point: str) -> list[onnx.NodeProto]:
    """The activation as bounds of quantised values."""
    node = helper.make_node
    if activation == b"none":
        return [node("Identity", [value], ["Y"])]
    nodes = [_constant("scalar", np.zeros(0))]
    if activation == b"relu":
        return [*nodes, node("Reshape", [zero_point, "scalar"], ["low"]), node("Clip", [value, "low"], ["Y"])]
    # Numbers of the attributes in the type of the zero point, which is not known here: quantised with scale 1.
    nodes += [
        _constant("one", 1, np.float32),
        node("Reshape", [zero_point, "scalar"], ["zero_point"]),
        node("Cast", ["zero_point"], ["origin"], to=TensorProto.FLOAT),
    ]
    for name in ("min", "max"):
        nodes += [
            attribute_tensor(f"{name}_", "value_int", name, AttributeProto.INT),
            node("Cast", [f"{name}_"], [f"{name}_float"], to=TensorProto.FLOAT),
            node("Sub", [f"{name}_float", "origin"], [f"{name}_steps"]),
            node("QuantizeLinear", [f"{name}_steps", "one", "zero_point"], [f"{name}_q"]),
        ]
    return [*nodes, node("Clip", [value, "min_q", "max_q"], ["Y"])]
