"""Models of one int8 operator, and what stock onnxruntime's own int8 operators make of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from sparsepipe.native import quantized

Array = NDArray[Any]
WINDOW = ("kernel_shape", "strides", "pads", "dilations")


@dataclass
class Layer:
    """A node with its constants, its inputs and its dense weight, [O, I, *kernel]."""

    node: onnx.NodeProto
    constants: dict[str, Array]
    feeds: dict[str, Array]
    weight: Array

    def model(self, opset: int = 17, body: bool = True) -> onnx.ModelProto:
        functions = [quantized.function_for(self.node, opset)] if body else []
        return model([self.node], self.constants, self.feeds, functions, opset)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array],
    feeds: Mapping[str, Array],
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 17,
) -> onnx.ModelProto:
    """A model of these nodes whose output is "Y", of the type of the input "X"."""
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
        [helper.make_tensor_value_info("Y", types["X"], None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    domains = {"": opset, "sparsepipe": 1, "com.microsoft": 1}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=8)


def blocked_weight(random: np.random.Generator, shape: Sequence[int], block: int, density: float) -> Array:
    """Values of the whole range of int8 in about that share of the blocks; the second row of blocks is empty."""
    out, channels, *kernel = shape
    groups = -(-channels // quantized.QUAD)
    kept = random.random((out // block, 1, groups, 1, *kernel)) < density
    if density < 1 and out > block:
        kept[1] = False
    blocks = random.integers(-128, 128, (out // block, block, groups, quantized.QUAD, *kernel)) * kept
    extremes = random.random(blocks.shape) < 0.1
    blocks = np.where(extremes, np.sign(blocks) * 127, blocks).reshape(out, groups * quantized.QUAD, *kernel)
    return np.ascontiguousarray(blocks[:, :channels]).astype(np.int8)


def activations(random: np.random.Generator, shape: Sequence[int], dtype: type, saturated: bool) -> Array:
    """Random values of the whole range, or the least and the largest only."""
    info = np.iinfo(dtype)
    values = random.integers(info.min, info.max + 1, shape)
    return (np.where(values < (info.min + info.max) / 2, info.min, info.max) if saturated else values).astype(dtype)


def quantization(random: np.random.Generator, weight: Array, dtype: type, bias: bool) -> dict[str, Array]:
    """Scales that give outputs of about the whole range, and any zero points."""
    info = np.iinfo(dtype)

    def zero_point() -> Array:
        return np.array(random.choice([info.min, info.max, *random.integers(info.min, info.max, 3)]), dtype)

    x_scale = np.float32(random.uniform(0.001, 0.1))
    w_scale = random.uniform(0.001, 0.02, len(weight)).astype(np.float32)
    if random.random() < 0.2:
        w_scale = w_scale[:1].reshape(random.choice([0, 1]) * (1,))
    sums = 100 * np.sqrt((weight.astype(np.float64) ** 2).sum() / len(weight)) + 1
    made: dict[str, Array] = {
        "x_scale": np.asarray(x_scale),
        "x_zero_point": zero_point(),
        "w_scale": w_scale,
        "y_scale": np.asarray(np.float32(x_scale * w_scale.mean() * sums / random.choice([30, 100, 3000]))),
        "y_zero_point": zero_point(),
    }
    if bias:
        made["B"] = random.integers(-int(sums), int(sums) + 1, len(weight)).astype(np.int32)
    return made


def residual_quantization(random: np.random.Generator, y_scale: Array, dtype: type) -> dict[str, Array]:
    info = np.iinfo(dtype)
    points = [np.array(value, dtype) for value in random.integers(info.min, info.max + 1, 2)]
    return {
        "residual_scale": np.asarray(np.float32(y_scale * random.uniform(0.2, 3))),
        "residual_zero_point": points[0],
        "sum_scale": np.asarray(np.float32(y_scale * random.uniform(0.5, 3))),
        "sum_zero_point": points[1],
    }


def limits_of(dtype: type) -> tuple[int, int]:
    """Bounds of the activation "clip"."""
    return int(np.iinfo(dtype).min) + 30, int(np.iinfo(dtype).max) - 70


def reference(layer: Layer, *, sum_of_standard_operators: bool = False) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """The same numbers by QLinearConv, and QLinearAdd or standard operators for a sum, in uint8; and its inputs.

    Tensors of int8 are shifted to uint8, and so is the weight: CPUs without VNNI saturate uint8 x int8 in onnxruntime.
    `bounded` undoes it.
    """
    shifted = {name: _shifted(value) if _is_quantized(name) else value for name, value in layer.constants.items()}
    constants = {name: value for name, value in shifted.items() if name not in ("values", "deltas")}
    constants["W"] = _shifted(layer.weight)
    constants["w_zero_point"] = np.array(128, np.uint8)
    attributes = {a.name: helper.get_attribute_value(a) for a in layer.node.attribute if a.name in WINDOW}
    if layer.node.op_type.startswith("QDepthwiseConv"):
        attributes["group"] = len(layer.weight)
    names = ["X", "x_scale", "x_zero_point", "W", "w_scale", "w_zero_point", "y_scale", "y_zero_point"]
    conv = helper.make_node("QLinearConv", [*names, *(["B"] if "B" in constants else [])], ["y"], **attributes)
    nodes = [conv]
    if "residual" in layer.feeds:
        terms = [["y", "y_scale", "y_zero_point"], ["residual", "residual_scale", "residual_zero_point"]]
        scale = ["sum_scale", "sum_zero_point"]
        if sum_of_standard_operators:
            nodes += [helper.make_node("DequantizeLinear", term, [f"{term[0]}_real"]) for term in terms]
            nodes.append(helper.make_node("Add", ["y_real", "residual_real"], ["total"]))
            nodes.append(helper.make_node("QuantizeLinear", ["total", *scale], ["Y"]))
        else:
            nodes.append(helper.make_node("QLinearAdd", [*terms[0], *terms[1], *scale], ["Y"], domain="com.microsoft"))
    else:
        nodes.append(helper.make_node("Identity", ["y"], ["Y"]))
    feeds = {name: _shifted(value) for name, value in layer.feeds.items()}
    return model(nodes, constants, feeds), feeds


def bounded(layer: Layer, result: Array) -> Array:
    """`result` of the reference, in the type of the layer and within the bounds of its activation."""
    dtype = layer.feeds["X"].dtype
    value = result.astype(np.int16) - (128 if dtype == np.int8 else 0)
    activation = next(a.s for a in layer.node.attribute if a.name == "activation")
    if activation == b"relu":
        zero_point = layer.constants["sum_zero_point" if "residual" in layer.feeds else "y_zero_point"]
        value = np.maximum(value, zero_point)
    elif activation == b"clip":
        value = np.clip(value, *limits_of(dtype.type))
    return value.astype(dtype)


def _is_quantized(name: str) -> bool:
    return name.endswith("zero_point")


def _shifted(value: Array) -> Array:
    """int8 as the uint8 that lies 128 above, and uint8 as it is."""
    if value.dtype == np.int8:
        return (value.astype(np.int16) + 128).astype(np.uint8)
    return value
