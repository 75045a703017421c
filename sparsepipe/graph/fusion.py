"""What follows a sparse layer and can become part of its node: a bias, a residual sum, an activation.

Nodes are fused only where they alone use the output of the layer, and nothing outside of the graph sees that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from sparsepipe.graph import activations
from sparsepipe.graph.index import Index, is_standard
from sparsepipe.graph.kernel_layer import KernelLayer
from sparsepipe.graph.shapes import Shapes
from sparsepipe.native import operators

FUSED = {
    "SparseConv": ("relu", "clip", "hardswish", "silu"),
    "SparseLinear": ("relu", "clip", "gelu"),
    "DepthwiseConv": ("relu", "clip", "hardswish", "silu"),
    "StemConv": ("relu", "clip", "hardswish", "silu"),
}
"""The activations that each kernel computes."""


def fuse(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
    """Make what follows `layer` a part of it, as far as its kernel can do it: the layer grows in place.

    Args:
        layer: as `kernel_layer.read` gives it.
        found: the index of its graph.
        shapes: of the graph's tensors.
    """
    for step in _STEPS[layer.base]:
        step(layer, found, shapes)


def _fuse_bias(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
    """A sum with a constant row of one number for each output, where the layer has no bias yet."""
    node = _sum(layer, found)
    if node is None or layer.last.op_type != "MatMul":
        return
    output = layer.last.output[0]
    constant = found.constants.get(_other(node, output))
    outputs = layer.weight.shape[0]
    if constant is None or not constant.dims or constant.dims[-1] != outputs or any(n != 1 for n in constant.dims[:-1]):
        return
    if len(constant.dims) > 1 and len(constant.dims) > (shapes.rank(output) or 0):
        return  # the sum has more dimensions than the layer's output
    bias = numpy_helper.to_array(constant)
    if np.isfinite(bias).all():
        layer.bias = bias.reshape(outputs)
        layer.take(node)


def _fuse_residual(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
    """A sum with a tensor that is known to have the same shape: the kernel does not broadcast."""
    node = _sum(layer, found)
    if node is None:
        return
    output = layer.last.output[0]
    other = _other(node, output)
    if other not in found.constants and shapes.same(output, other):
        layer.residual = other
        layer.take(node)


def _fuse_activation(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
    activation = activations.after(layer.last.output[0], found)
    if activation is not None and activation.kind in FUSED[layer.base]:
        layer.activation, layer.limits = activation.kind, activation.limits
        layer.take(*activation.nodes)


def _fuse_pool(layer: KernelLayer, found: Index, shapes: Shapes) -> None:
    """A MaxPool of the kind that follows the first convolution of a ResNet."""
    output = layer.last.output[0]
    users = found.consumers.get(output, [])
    if (layer.weight.shape[2:], tuple(layer.window["strides"])) != operators.POOLED_STEM:
        return
    if len(users) != 1 or found.pinned(output) or not is_standard(users[0], "MaxPool") or len(users[0].output) != 1:
        return
    given = {entry.name: helper.get_attribute_value(entry) for entry in users[0].attribute}
    size, pads = list(given.get("kernel_shape", ())), list(given.get("pads", [0] * 4))
    plain = {"kernel_shape", "strides", "pads", "ceil_mode", "auto_pad", "dilations", "storage_order"} >= given.keys()
    if (
        plain
        and len(size) == 2
        and all(n in operators.STEM_POOLS for n in size)
        and list(given.get("strides", ())) == list(operators.STEM_POOL_STRIDE)
        and all(0 <= pad < n for pad, n in zip(pads, size * 2, strict=True))
        and not given.get("ceil_mode", 0)
        and given.get("auto_pad", b"NOTSET") in (b"", b"NOTSET")
        and all(n == 1 for n in given.get("dilations", ()))
    ):
        layer.pool = size, pads
        layer.take(users[0])


_STEPS: Mapping[str, tuple[Callable[[KernelLayer, Index, Shapes], None], ...]] = {
    "SparseConv": (_fuse_residual, _fuse_activation),
    "SparseLinear": (_fuse_bias, _fuse_residual, _fuse_activation),
    "DepthwiseConv": (_fuse_activation,),
    "StemConv": (_fuse_activation, _fuse_pool),
}
"""What each kernel can do after its product, in the order in which it does it."""


def _sum(layer: KernelLayer, found: Index) -> NodeProto | None:
    """The Add that alone uses the output so far."""
    output = layer.last.output[0]
    users = found.consumers.get(output, [])
    return users[0] if len(users) == 1 and not found.pinned(output) and is_standard(users[0], "Add") else None


def _other(node: NodeProto, name: str) -> str:
    first, second = map(str, node.input)
    return second if first == name else first
