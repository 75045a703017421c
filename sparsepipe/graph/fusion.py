"""What follows a sparse layer and can become part of its node: a bias, a residual sum, an activation.

A node is fused only where it alone uses the output of the one before it, and nothing outside of the graph sees that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from sparsepipe.graph.index import Index, is_standard
from sparsepipe.graph.kernel_layer import KernelLayer

FLOAT_LIMITS = (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max))
Shapes = Mapping[str, list[int | str]]
FUSED = {"SparseConv": ("relu", "clip", "hardswish"), "SparseLinear": ("relu", "clip")}
"""The activations that are fused into each operator."""


@dataclass(frozen=True)
class Activation:
    """An activation of a kernel, and the nodes that compute it.

    Attributes:
        kind: a key of `operators.ACTIVATIONS`.
        nodes: in the order of the graph; the last one makes the output.
        limits: the bounds of `clip`.
    """

    kind: str
    nodes: tuple[NodeProto, ...]
    limits: tuple[float, float] | None = None


def fuse(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
    """Make what follows `layer` a part of it, as far as its kernel can do it: the layer grows in place.

    Args:
        layer: as `kernel_layer.read` gives it.
        found: the index of its graph.
        shapes: of the graph's tensors, as `shapes_of` gives them.
    """
    if layer.last.op_type == "MatMul":
        _fuse_bias(layer, found)
    if layer.base == "SparseConv":
        _fuse_residual(layer, found, shapes)
    _fuse_activation(layer, found)


def _next(layer: KernelLayer, found: Index) -> NodeProto | None:
    """The only node that uses the output so far."""
    output = layer.last.output[0]
    users = found.consumers.get(output, [])
    return users[0] if len(users) == 1 and not found.pinned(output) else None


def _take(layer: KernelLayer, node: NodeProto) -> None:
    layer.fused.append(node)
    layer.last = node


def _other(node: NodeProto, name: str) -> str:
    first, second = map(str, node.input)
    return second if first == name else first


def _fuse_bias(layer: KernelLayer, found: Index) -> None:
    node = _next(layer, found)
    if node is None or not is_standard(node, "Add"):
        return
    constant = found.constants.get(_other(node, layer.last.output[0]))
    if constant is not None and list(constant.dims) == [layer.weight.shape[0]]:
        bias = numpy_helper.to_array(constant)
        if np.isfinite(bias).all():
            layer.bias = bias
            _take(layer, node)


def _fuse_residual(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
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


def _fuse_activation(layer: KernelLayer, found: Index) -> None:
    node = _next(layer, found)
    matcher = _ACTIVATIONS.get(node.op_type) if node is not None and is_standard(node, node.op_type) else None
    activation = matcher(node, found) if node is not None and matcher is not None else None
    if activation is None or activation.kind not in FUSED[layer.base]:
        return
    layer.activation, layer.limits = activation.kind, activation.limits
    for part in activation.nodes:
        _take(layer, part)


def _relu(node: NodeProto, found: Index) -> Activation | None:
    return Activation("relu", (node,))


def _hardswish(node: NodeProto, found: Index) -> Activation | None:
    return Activation("hardswish", (node,))


def _clip(node: NodeProto, found: Index) -> Activation | None:
    bounds = list(FLOAT_LIMITS)
    for place, name in enumerate(node.input[1:3]):
        if name and name not in found.constants:
            return None
        if name:
            bounds[place] = float(numpy_helper.to_array(found.constants[name]).reshape(()))
    if not np.isfinite(bounds).all() or bounds[0] > bounds[1]:
        return None
    return Activation("clip", (node,), (bounds[0], bounds[1]))


_ACTIVATIONS: Mapping[str, Callable[[NodeProto, Index], Activation | None]] = {
    "Relu": _relu,
    "Clip": _clip,
    "HardSwish": _hardswish,
}
"""Operator of the first node of an activation -> its matcher."""


def shapes_of(graph: GraphProto) -> Shapes:
    """Shapes of the tensors for which one is recorded; 0 or "" for a dimension that is not known."""
    return {
        value.name: [size.dim_value or size.dim_param for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }
