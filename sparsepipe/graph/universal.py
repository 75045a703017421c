"""The `universal` target: layers as operators of domain `sparsepipe`, each with a fallback body of standard operators.

Where the kernel library is registered its kernels run; elsewhere onnxruntime inlines the bodies, which rebuild the
dense weights, and the file runs as the dense one does. A bias, an activation and a residual sum that follow a layer
become part of its node, where nothing else uses what lies between. A depthwise convolution between two sparse layers
and the first convolution of an image before one become the library's own dense ones; a depthwise one
that a sparse 1x1 convolution alone reads becomes a part of that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from sparsepipe.graph.beside import SEPARABLE
from sparsepipe.graph.choice import Choice, choose, settle
from sparsepipe.graph.fusion import fuse
from sparsepipe.graph.index import Names, copy, index, opset
from sparsepipe.graph.kernel_layer import Array, KernelLayer, read, read_dense
from sparsepipe.graph.shapes import Shapes
from sparsepipe.graph.tidy import tidy
from sparsepipe.native import operators

__all__ = ["Choice", "choose", "rewrite"]

OLDEST_IR = 8  # the first with model-local functions


def rewrite(model: ModelProto, choices: Sequence[Choice]) -> ModelProto:
    """A copy of `model` in which the chosen nodes, and what follows them, are operators of the kernel library."""
    chosen = {choice.output: choice for choice in settle(model, choices) if choice.sparse or choice.kernel}
    result = copy(model)
    if not chosen:
        return result
    result.graph.CopyFrom(_with_shapes(result).graph)
    separable = {output for output, choice in chosen.items() if choice.kernel == SEPARABLE and not choice.sparse}
    rewriter = _Rewriter(result.graph, separable)
    replaced = chosen.keys() - separable
    bodies: dict[str, onnx.FunctionProto] = {}
    # From the end: a sum of two branches is fused with the layer that runs last, when the other one is done.
    for node in reversed(list(result.graph.node)):
        if node.output and node.output[0] in replaced:
            made = rewriter.replace(node, chosen[node.output[0]])
            bodies.setdefault(made.op_type, operators.function_for(made, opset(model)))
    rewriter.finish()
    present = {function.name for function in result.functions if function.domain == operators.DOMAIN}
    result.functions.extend(body for name, body in sorted(bodies.items()) if name not in present)
    if all(entry.domain != operators.DOMAIN for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(operators.DOMAIN, operators.VERSION))
    result.ir_version = max(result.ir_version, OLDEST_IR)
    return result


def _with_shapes(model: ModelProto) -> ModelProto:
    """The model with the shapes of all tensors: onnxruntime cannot infer those behind operators that it finds new."""
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # a model of more than 2 GB, or with operators that onnx does not know
        return model


class _Rewriter:
    """Puts operators of the library in the place of nodes of one graph.

    Args:
        graph: to be rewritten in place.
        separable: outputs of the depthwise convolutions that become part of the layer after them.
    """

    def __init__(self, graph: GraphProto, separable: Collection[str]) -> None:
        self._graph = graph
        self._found = index(graph)
        self._shapes = Shapes(graph, self._found)
        self._names = Names(graph)
        self._encoded: dict[str, list[tuple[list[str], Array, Array]]] = {}
        self._replaced: dict[str, NodeProto | None] = {}  # output of a node -> what stands in its place
        # What the layer after it reads -> depthwise layer.
        self._separable: dict[str, tuple[NodeProto, KernelLayer]] = {}
        for node in [self._found.producers[output] for output in separable]:
            layer = self._fused(node, dense=True)
            self._separable[layer.last.output[0]] = node, layer

    def replace(self, node: NodeProto, choice: Choice) -> NodeProto:
        """Make the operator for a layer and what follows it."""
        layer = self._fused(node, dense=not choice.sparse)
        made = self._made(node, layer, choice)
        gone = [node, *layer.fused]
        if choice.kernel == SEPARABLE:
            first, before = self._separable[layer.source]
            gone += [first, *before.fused]
        for old in gone:
            self._found.remove(old)
            self._replaced[old.output[0]] = None
        self._found.add(made)
        self._replaced[made.output[0]] = made
        return made

    def _fused(self, node: NodeProto, *, dense: bool) -> KernelLayer:
        layer = (read_dense if dense else read)(node, self._found)
        fuse(layer, self._found, self._shapes)
        return layer

    def finish(self) -> None:
        """Put each operator in the place of the last node that it stands for; the others go."""
        nodes = [self._replaced.get(node.output[0], node) if node.output else node for node in self._graph.node]
        del self._graph.node[:]
        self._graph.node.extend(node for node in nodes if node is not None)
        tidy(self._graph)

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
        if layer.base == "StemConv":
            return operators.stem_conv([layer.source, node.input[1], bias], output, pool=layer.pool, **shared)
        if layer.base == "DepthwiseConv":
            return operators.depthwise_conv([layer.source, node.input[1], bias], output, **shared)
        inputs = [*self._encode(stem, layer.weight, choice.block), bias]
        inputs += [layer.residual] if layer.residual else []
        if choice.kernel == SEPARABLE:
            first, before = self._separable[layer.source]
            bias = self._stored(f"{first.input[1].removesuffix('.weight')}.bias", before.bias)
            shared |= {name: before.window[name] for name in ("strides", "pads")}
            del shared["dilations"]
            return operators.sparse_separable_conv(
                [before.source, first.input[1], bias, *inputs], output, block=choice.block,
                depthwise_activation=before.activation, depthwise_limits=before.limits, **shared,
            )  # fmt: skip
        inputs = [layer.source, *inputs]
        if layer.base == "SparseConv":
            return operators.sparse_conv(inputs, output, block=choice.block, mode=choice.mode, **shared)
        return operators.sparse_linear(inputs, output, block=choice.block, mode=choice.mode, **shared)

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
        name = self._names.fresh(name)
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
