"""What follows a sparse layer and can become part of its node: a bias, a residual sum, an activation.

Nodes are fused only where they alone use the output of the layer, and nothing outside of the graph sees that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto, numpy_helper

from sparsepipe.graph import activations
from sparsepipe.graph.index import Index, is_standard
from sparsepipe.graph.kernel_layer import KernelLayer
from sparsepipe.graph.shapes import Shapes

FUSED = {
    "SparseConv": ("relu", "clip", "hardswish", "silu"),
    "SparseLinear": ("relu", "clip", "gelu"),
    "DepthwiseConv": ("relu", "clip", "hardswish", "silu"),
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


_STEPS: Mapping[str, tuple[Callable[[KernelLayer, Index, Shapes], None], ...]] = {
    "SparseConv": (_fuse_residual, _fuse_activation),
    "SparseLinear": (_fuse_bias, _fuse_residual, _fuse_activation),
    "DepthwiseConv": (_fuse_activation,),
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
