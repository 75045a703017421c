"""The operators of domain ``sparsepipe``, version 1, as an ONNX file writes them: encoding, nodes, fallback bodies.

``SparseConv(X, values, deltas, B?, residual?) -> Y`` and ``SparseLinear(X, values, deltas, B?, residual?) -> Y``.
A weight of [O, I, *kernel] (or [N, K]) is cut into blocks of ``r`` consecutive output channels of one column; the
nonzero blocks are numbered ``b = (o // r) * K + k`` with K = I * prod(kernel). ``values`` holds their numbers,
float32 [blocks, r], and ``deltas`` the differences of consecutive b (the first: b itself), uint8 or uint16. A gap that
does not fit is bridged by blocks of zeros.

``SparseSeparableConv(X, depthwise_W, depthwise_B, values, deltas, B?, residual?) -> Y`` is a depthwise separable
convolution: a dense depthwise one with W [I, 1, 3, 3], its own activation, and a sparse 1x1 one of its output.

``DepthwiseConv(X, W, B?) -> Y`` is a dense depthwise convolution with W [C, 1, *kernel]: it keeps the NCHW layout
between sparse layers, where onnxruntime's own one pays for two changes of layout.

``StemConv(X, W, B?) -> Y`` is the dense convolution of an image that many networks begin with, W [O, up to 4, *kernel];
one of 7 x 7 with stride 2 may have the MaxPool of stride 2 behind it in it.

The fallback is a model-local function per operator: it rebuilds the dense weight from standard operators, which
onnxruntime folds into a constant where it inlines the function. Numbers reach the body as the node's attributes. What
cannot differ within one body is part of the operator's name: ``SparseConvAddRelu`` is ``SparseConv`` with a residual
and ReLU, ``SparseSeparableReluConv`` has one between its two convolutions (``operator_name``). A file therefore gives
all its nodes a bias, or none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper

from sparsepipe.native.encoding import decode as decode
from sparsepipe.native.encoding import encode as encode

DOMAIN = "sparsepipe"
VERSION = 1
INPUTS = {
    "SparseConv": ("X", "values", "deltas", "B", "residual"),
    "SparseLinear": ("X", "values", "deltas", "B", "residual"),
    "SparseSeparableConv": ("X", "depthwise_W", "depthwise_B", "values", "deltas", "B", "residual"),
    "DepthwiseConv": ("X", "W", "B"),
    "StemConv": ("X", "W", "B"),
}
MOST_STEM_CHANNELS = 4
POOLED_STEM = ((7, 7), (2, 2))
STEM_POOLS, STEM_POOL_STRIDE = (2, 3), (2, 2)
"""Kernel and strides of a StemConv that may have a pooling; sizes of the windows of that, and its strides."""

MODES = {
    "SparseConv": ("auto", "direct", "flat", "rows", "columns", "shift"),
    "SparseLinear": ("auto", "vector", "tiles"),
}
"""Operator -> ways of reading the input, as the attribute ``mode`` numbers them (what they do: ``ops/conv_tiles.h``,
``ops/sparse_linear.cc``); "auto" leaves it to the kernel, which also takes another one where that of the node does not
fit the shapes it meets."""
ACTIVATIONS = {"none": "", "relu": "Relu", "clip": "Clip", "hardswish": "HardSwish", "silu": "Silu", "gelu": "Gelu"}
HARDSWISH_SINCE = 14  # opset


def operator_name(
    base: str, activation: str, *, residual: bool = False, pool: bool = False, depthwise: str = "none"
) -> str:
    """The name under which the library knows ``base`` with these fused steps.

    Args:
        base: a key of ``INPUTS``.
        activation: a key of ``ACTIVATIONS``.
        residual: whether a tensor is added.
        pool: whether a MaxPool is the last step.
        depthwise: the activation between the two convolutions of a SparseSeparableConv.
    """
    stem = base.removesuffix("Conv") + ACTIVATIONS[depthwise] + "Conv" if depthwise != "none" else base
    return stem + ("Add" if residual else "") + ACTIVATIONS[activation] + ("MaxPool" if pool else "")


def _window(
    weight_shape: Sequence[int],
    strides: Sequence[int] | None,
    pads: Sequence[int] | None,
    dilations: Sequence[int] | None,
) -> dict[str, list[int]]:
    """The attributes of the window of a convolution with a weight of [O, I, *kernel]."""
    rank = len(weight_shape) - 2
    return {
        "kernel_shape": list(weight_shape[2:]),
        "strides": list(strides or [1] * rank),
        "pads": list(pads or [0] * 2 * rank),
        "dilations": list(dilations or [1] * rank),
    }


def _limits(limits: tuple[float, float] | None, prefix: str = "") -> dict[str, float]:
    """The attributes of the bounds of activation "clip"."""
    return {f"{prefix}min": float(limits[0]), f"{prefix}max": float(limits[1])} if limits else {}


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
    mode: str = "auto",
    name: str = "",
) -> onnx.NodeProto:
    """A SparseConv node under its ``operator_name``.

    Args:
        inputs: names of X, values, deltas and perhaps of B and the residual; a missing B before a residual is "".
        output: name of Y.
        weight_shape: [O, I, *kernel].
        strides: as of Conv.
        pads: as of Conv.
        dilations: as of Conv.
        block: output channels of a block.
        activation: a key of ``ACTIVATIONS``.
        limits: the bounds of activation "clip".
        mode: one of ``MODES``.
        name: of the node.
    """
    attributes: dict[str, Any] = {
        **_window(weight_shape, strides, pads, dilations),
        "group": 1,
        "in_channels": weight_shape[1],
        "out_channels": weight_shape[0],
        "block": block,
        "activation": activation,
        "mode": MODES["SparseConv"].index(mode),
    }
    attributes |= _limits(limits)
    op_type = operator_name("SparseConv", activation, residual=len(inputs) > 4)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def sparse_separable_conv(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    block: int = 1,
    depthwise_activation: str = "none",
    depthwise_limits: tuple[float, float] | None = None,
    activation: str = "none",
    limits: tuple[float, float] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A SparseSeparableConv node under its ``operator_name``.

    Args:
        inputs: names of X, depthwise_W, depthwise_B, values, deltas and perhaps of B and the residual; a missing B
            before a residual is "".
        output: name of Y.
        weight_shape: [O, I] or [O, I, 1, 1] of the sparse convolution.
        strides: of the depthwise convolution, both 1 or both 2.
        pads: of the depthwise convolution.
        block: output channels of a block.
        depthwise_activation: a key of ``ACTIVATIONS``, between the two convolutions.
        depthwise_limits: its bounds where it is "clip".
        activation: a key of ``ACTIVATIONS``, at the end.
        limits: its bounds where it is "clip".
        name: of the node.
    """
    attributes: dict[str, Any] = {
        "kernel_shape": [3, 3],
        "strides": list(strides),
        "pads": list(pads),
        "dilations": [1, 1],
        "in_channels": weight_shape[1],
        "out_channels": weight_shape[0],
        "block": block,
        "depthwise_activation": depthwise_activation,
        "activation": activation,
    }
    attributes |= _limits(limits) | _limits(depthwise_limits, "depthwise_")
    op_type = operator_name("SparseSeparableConv", activation, residual=len(inputs) > 6, depthwise=depthwise_activation)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


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
    """A DepthwiseConv node under its ``operator_name``; ``weight_shape`` is [C, 1, *kernel]."""
    attributes: dict[str, Any] = {
        **_window(weight_shape, strides, pads, dilations),
        "channels": weight_shape[0],
        "activation": activation,
    }
    attributes |= _limits(limits)
    op_type = operator_name("DepthwiseConv", activation)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def stem_conv(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    activation: str = "none",
    limits: tuple[float, float] | None = None,
    pool: tuple[Sequence[int], Sequence[int]] | None = None,
    name: str = "",
) -> onnx.NodeProto:
    """A StemConv node under its ``operator_name``; ``pool`` is the window and the pads of a MaxPool."""
    attributes: dict[str, Any] = {
        **_window(weight_shape, strides, pads, dilations),
        "activation": activation,
    }
    attributes |= _limits(limits)
    if pool:
        attributes |= {"pool_shape": list(pool[0]), "pool_strides": list(STEM_POOL_STRIDE), "pool_pads": list(pool[1])}
    op_type = operator_name("StemConv", activation, pool=pool is not None)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def sparse_linear(
    inputs: Sequence[str],
    output: str,
    *,
    weight_shape: Sequence[int],
    block: int = 1,
    activation: str = "none",
    limits: tuple[float, float] | None = None,
    mode: str = "auto",
    name: str = "",
) -> onnx.NodeProto:
    """A SparseLinear node; ``weight_shape`` is [N, K], ``mode`` one of ``MODES``."""
    attributes: dict[str, Any] = {
        "in_features": weight_shape[1],
        "out_features": weight_shape[0],
        "block": block,
        "activation": activation,
        "mode": MODES["SparseLinear"].index(mode),
    }
    attributes |= _limits(limits)
    op_type = operator_name("SparseLinear", activation, residual=len(inputs) > 4)
    return helper.make_node(op_type, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def function_for(node: onnx.NodeProto, opset: int = 17) -> onnx.FunctionProto:
    """The fallback body of all nodes of an operator that have the inputs and the activation of ``node``.

    Args:
        node: one of them.
        opset: version of the standard operators in the body, 13 or newer.
    """
    base = BASES[node.op_type]
    if base == "SparseConv":
        weight = _dense_weight("W", ("out_channels", "in_channels"), [_kernel_shape()])
    elif base == "SparseSeparableConv":
        weight = _dense_weight("W", ("out_channels", "in_channels"), [_constant("taps", np.ones(2, np.int64))])
    elif base == "SparseLinear":
        weight = _dense_weight("transposed", ("out_features", "in_features"))
        weight.append(helper.make_node("Transpose", ["transposed"], ["W"], perm=[1, 0]))
    else:
        weight = []
    inputs = list(INPUTS[base][: len(node.input)])
    nodes = [*weight, *_standard_nodes(node, opset)]
    function = helper.make_function(DOMAIN, node.op_type, inputs, ["Y"], nodes, [helper.make_opsetid("", opset)])
    function.attribute.extend(sorted(attribute.name for attribute in node.attribute))
    return function


BASES: Mapping[str, str] = {
    operator_name(base, activation, residual=residual, pool=pool, depthwise=depthwise): base
    for base, inputs in INPUTS.items()
    for activation in ACTIVATIONS
    for residual in {False, "residual" in inputs}
    for pool in {False, base == "StemConv"}
    for depthwise in (ACTIVATIONS if "depthwise_W" in inputs else ["none"])
    if "depthwise_W" not in inputs or activation == "none" or (not residual and depthwise in ("none", activation))
}
"""The name of an operator -> the key of ``INPUTS`` that it is a variant of.

A SparseSeparableConv that adds a residual ends with that, and of two activations both are the same: a session takes
time for each operator of the library, and networks have no others.
"""


def _standard_nodes(node: onnx.NodeProto, opset: int) -> list[onnx.NodeProto]:
    """What ``node`` computes of its inputs and of the dense ``W``, [O, I, *kernel] (of SparseLinear [K, N])."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    base = BASES[node.op_type]
    present = {name for name, value in zip(INPUTS[base], node.input, strict=False) if value}
    window = {name: name for name in ("kernel_shape", "strides", "pads", "dilations") if name in attributes}
    bias = ["B"] if "B" in present else []
    if base in ("SparseConv", "StemConv"):
        conv = helper.make_node("Conv", ["X", "W", *bias], ["y0"], group=1)
        nodes = [with_references(conv, window, AttributeProto.INTS)]
    elif base == "DepthwiseConv":
        conv = with_references(helper.make_node("Conv", ["X", "W", *bias], ["y0"]), window, AttributeProto.INTS)
        nodes = [with_references(conv, {"group": "channels"}, AttributeProto.INT)]
    elif base == "SparseSeparableConv":
        nodes = _depthwise(attributes["depthwise_activation"], window, present, opset)
        nodes.append(helper.make_node("Conv", ["depthwise_Y", "W", *bias], ["y0"]))
    else:
        nodes = [helper.make_node("MatMul", ["X", "W"], ["y0"])]
        if bias:
            nodes.append(helper.make_node("Add", ["y0", "B"], ["y1"]))
    if "residual" in present:
        nodes.append(helper.make_node("Add", [nodes[-1].output[0], "residual"], ["sum"]))
    nodes += _activation(attributes["activation"], nodes[-1].output[0], "Y", opset)
    if "pool_shape" not in attributes:
        return nodes
    if nodes[-1].op_type == "Identity":
        nodes.pop()
    nodes[-1].output[0] = "unpooled"
    pool = helper.make_node("MaxPool", ["unpooled"], ["Y"])
    pooling = {"kernel_shape": "pool_shape", "strides": "pool_strides", "pads": "pool_pads"}
    return [*nodes, with_references(pool, pooling, AttributeProto.INTS)]


def _depthwise(
    activation: bytes, window: Mapping[str, str], present: Collection[str], opset: int
) -> list[onnx.NodeProto]:
    """``depthwise_Y``, the first part of a SparseSeparableConv."""
    conv = helper.make_node(
        "Conv", ["X", *(name for name in ("depthwise_W", "depthwise_B") if name in present)], ["d0"]
    )
    with_references(conv, window, AttributeProto.INTS)
    with_references(conv, {"group": "in_channels"}, AttributeProto.INT)
    if activation == b"none":
        conv.output[0] = "depthwise_Y"
        return [conv]
    return [conv, *_activation(activation, "d0", "depthwise_Y", opset, "depthwise_")]


def with_references(
    node: onnx.NodeProto, sources: Mapping[str, str], kind: AttributeProto.AttributeType
) -> onnx.NodeProto:
    """``node`` with attributes (its name -> the function's name) that the caller of the function sets."""
    for name, source in sources.items():
        node.attribute.add(name=name, ref_attr_name=source, type=kind)
    return node


def attribute_tensor(output: str, field: str, source: str, kind: AttributeProto.AttributeType) -> onnx.NodeProto:
    """A tensor of an attribute of the function."""
    return with_references(helper.make_node("Constant", [], [output]), {field: source}, kind)


def _constant(name: str, value: NDArray[Any]) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))


def _kernel_shape() -> onnx.NodeProto:
    return attribute_tensor("taps", "value_ints", "kernel_shape", AttributeProto.INTS)


def _dense_weight(output: str, sizes: tuple[str, str], taps: Sequence[onnx.NodeProto] = ()) -> list[onnx.NodeProto]:
    """``values``, ``deltas`` -> weight. The blocks lie as [O/r, K, r]; a transpose brings the channels together.

    Args:
        output: what to call the weight.
        sizes: the attributes with the outputs and inputs of the weight.
        taps: a node that makes the tensor of this name, with the further dimensions of the weight.
    """
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
    dims = {"outputs": sizes[0], "inputs": sizes[1], "r": "block"}
    nodes = [_constant("rest", np.array([-1], np.int64)), _constant("axis0", np.array(0, np.int64))]
    for name, source in dims.items():
        nodes.append(attribute_tensor(f"{name}_", "value_int", source, AttributeProto.INT))
        nodes.append(helper.make_node("Reshape", [f"{name}_", "rest"], [name]))
    return [
        *nodes,
        *taps,
        helper.make_node("Concat", ["outputs", "inputs", *(["taps"] if taps else [])], ["weight_shape"], axis=0),
        helper.make_node("Concat", ["rest", "r"], ["blocks_shape"], axis=0),
        helper.make_node("Div", ["outputs", "r"], ["rows_of_blocks"]),
        helper.make_node("Concat", ["rows_of_blocks", "rest", "r"], ["rows_shape"], axis=0),
        helper.make_node("ConstantOfShape", ["weight_shape"], ["zeros_flat"], value=zero),
        helper.make_node("Reshape", ["zeros_flat", "blocks_shape"], ["zeros"]),
        helper.make_node("Cast", ["deltas"], ["deltas64"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["deltas64", "axis0"], ["index"]),
        helper.make_node("Unsqueeze", ["index", "rest"], ["index1"]),
        helper.make_node("Shape", ["values"], ["values_shape"]),
        helper.make_node("Expand", ["index1", "values_shape"], ["indices"]),
        helper.make_node("ScatterElements", ["zeros", "indices", "values"], ["blocks"], axis=0),
        helper.make_node("Reshape", ["blocks", "rows_shape"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["channels"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["channels", "weight_shape"], [output]),
    ]


def _activation(activation: bytes, value: str, output: str, opset: int, prefix: str = "") -> list[onnx.NodeProto]:
    """``value`` -> ``output``; ``prefix`` is before the names of the attributes and of what lies between."""
    gate = f"{prefix}gate"
    match activation:
        case b"none":
            return [helper.make_node("Identity", [value], [output])]
        case b"relu":
            return [helper.make_node("Relu", [value], [output])]
        case b"hardswish" if opset < HARDSWISH_SINCE:
            return [
                helper.make_node("HardSigmoid", [value], [gate], alpha=1 / 6, beta=0.5),
                helper.make_node("Mul", [value, gate], [output]),
            ]
        case b"hardswish":
            return [helper.make_node("HardSwish", [value], [output])]
        case b"clip":
            limits = [f"{prefix}min", f"{prefix}max"]
            bounds = [attribute_tensor(name, "value_float", name, AttributeProto.FLOAT) for name in limits]
            return [*bounds, helper.make_node("Clip", [value, *limits], [output])]
        case b"silu":
            return [
                helper.make_node("Sigmoid", [value], [gate]),
                helper.make_node("Mul", [value, gate], [output]),
            ]
        case b"gelu":
            return [
                _constant("root_half", np.array(0.5**0.5, np.float32)),
                _constant("one", np.array(1.0, np.float32)),
                _constant("half", np.array(0.5, np.float32)),
                helper.make_node("Mul", [value, "root_half"], ["scaled"]),
                helper.make_node("Erf", ["scaled"], ["erf"]),
                helper.make_node("Add", ["erf", "one"], [gate]),
                helper.make_node("Mul", [value, "half"], ["halved"]),
                helper.make_node("Mul", ["halved", gate], [output]),
            ]
        case other:
            raise ValueError(f"unknown activation {other!r}")
