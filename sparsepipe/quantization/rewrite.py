"""The `universal` target in int8: quantised layers as operators of the kernel library, each with a fallback body.

The layers keep the numbers that quantisation gave them, so a file computes the same with the library, without it, and
as plain int8 file, but for rounding by 1 in sums. A layer's ReLU or Clip is the range of its output. Layers that
follow one another exchange bytes: nothing is left between them. Where any layer is sparse, what lies between (`beside`)
takes part: onnxruntime's own int8 operators would change the layout before and after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from sparsepipe.graph.choice import Choice, counted_once
from sparsepipe.graph.index import Index, copy, fresh, index, is_standard, label, opset
from sparsepipe.graph.kernel_layer import Stays
from sparsepipe.graph.shapes import Shapes
from sparsepipe.graph.tidy import tidy
from sparsepipe.graph.universal import OLDEST_IR
from sparsepipe.native import operators, quantized
from sparsepipe.quantization.beside import pool
from sparsepipe.quantization.layer import QLayer, Quantised, fuse_bias, fuse_sum, read
from sparsepipe.quantization.normal import LAYERS
from sparsepipe.quantization.table import tabulate

FEWEST_VALUES = 256
FEWEST_INPUTS = 8
"""As for fp32: smaller weights take microseconds either way. Convolutions of fewer channels, those of images, are full
blocks beside sparse layers."""
FIXED = 0.32
RELATIVE: Mapping[int, float] = {4: 1.5, 2: 2.1, 1: 3.2}
"""Time of a sparse layer in times of onnxruntime's dense int8 one: FIXED, and this for the share of values that blocks
of so many outputs store. Lines through VGG-19 on 32 x 32 images at 80%, 60% and 90%, one core with AVX-512 VNNI, beside
other work; other networks were not timed."""
PAYS_BELOW = 0.9


def rewrite(model: ModelProto) -> tuple[ModelProto, list[Choice]]:
    """A copy of a quantised model whose sparse layers are operators of the kernel library, and a row for each layer.

    Args:
        model: as `calibrate.quantise` gives it.
    """
    result = copy(model)
    # It fails for more than 2 GB, and for operators that onnx does not know: then sums are not fused.
    with contextlib.suppress(Exception):
        result.graph.CopyFrom(onnx.shape_inference.infer_shapes(result).graph)
    choices = _choose(result.graph)
    chosen = {choice.output: choice for choice in choices if choice.sparse}
    if not chosen:
        return result, choices
    shapes = Shapes(result.graph, index(result.graph))
    bodies: dict[str, onnx.FunctionProto] = {}
    stored: dict[str, str] = {}
    # From the end: a sum of two branches is fused with the layer that runs last.
    for node in reversed(list(result.graph.node)):
        if node.output and node.output[0] in chosen:
            made = _replace(result.graph, node, chosen[node.output[0]], shapes, stored)
            bodies.setdefault(made.op_type, quantized.function_for(made, opset(result)))
    for made in (*tabulate(result.graph, shapes, opset(result)), *pool(result.graph)):
        bodies.setdefault(made.op_type, quantized.function_for(made, opset(result)))
    tidy(result.graph)
    result.functions.extend(bodies[name] for name in sorted(bodies))
    result.opset_import.append(helper.make_opsetid(operators.DOMAIN, operators.VERSION))
    result.ir_version = max(result.ir_version, OLDEST_IR)
    return result, choices


def best_block(weight: NDArray[np.int8]) -> tuple[int, float]:
    """Outputs of the blocks in which a weight is expected to run fastest, and its time in times of the dense one.

    Args:
        weight: int8 [O, I, ...].
    """
    times = {
        block: FIXED + RELATIVE[block] * quantized.encode(weight, block)[0].size / weight.size
        for block in RELATIVE
        if len(weight) % block == 0
    }
    block = min(times, key=times.__getitem__)
    return block, times[block]


def _choose(graph: GraphProto) -> list[Choice]:
    found = index(graph)
    choices = []
    between: dict[str, QLayer] = {}
    for node in graph.node:
        if not is_standard(node, *LAYERS):
            continue
        stored = _stored_weight(node, found)
        if stored is None:
            continue
        weight = numpy_helper.to_array(found.constants[stored])
        row = Choice(
            name=stored.removesuffix("_quantized"),
            node=label(node),
            op=node.op_type,
            shape=tuple(weight.shape),
            nnz=int(np.count_nonzero(weight)),
            size=weight.size,
            sparsity=1 - np.count_nonzero(weight) / max(weight.size, 1),
            dense_bytes=weight.nbytes,
            bytes=weight.nbytes,
            sparse=False,
            block=0,
            reason="",
            output=node.output[0],
        )
        try:
            layer = read(node, found)
            if layer.base != "SparseQLinear" and layer.weight.shape[1] < FEWEST_INPUTS:
                between[row.output] = layer
            choices.append(_judge(row, layer))
        except Stays as reason:
            choices.append(replace(row, reason=str(reason)))
    if any(choice.sparse for choice in choices):
        choices = [_dense(row, between[row.output]) if row.output in between else row for row in choices]
    return counted_once(choices, [("", choice.name) for choice in choices])


def _stored_weight(node: NodeProto, found: Index) -> str | None:
    """The name of the constant that a layer multiplies by, quantised or not."""
    for name in reversed(node.input[:2]):
        step = found.producers.get(name)
        stored = step.input[0] if step is not None and is_standard(step, "DequantizeLinear") else name
        if stored in found.constants:
            return str(stored)
    return None


def _judge(row: Choice, layer: QLayer) -> Choice:
    weight = layer.weight
    if layer.base == "QDepthwiseConv":
        raise Stays(f"convolution of {len(weight)} groups")
    if weight.size < FEWEST_VALUES:
        raise Stays(f"only {weight.size} values")
    if layer.base == "SparseQConv" and weight.shape[1] < FEWEST_INPUTS:
        raise Stays(f"convolution of {weight.shape[1]} channels")
    block, time = best_block(weight)
    if time >= PAYS_BELOW:
        raise Stays(f"blocks of {block}x4 would take {time:.2f} of the dense int8 time")
    return _taken(row, layer, block, f"blocks of {block}x4 take about {time:.2f} of the dense int8 time")


def _dense(row: Choice, layer: QLayer) -> Choice:
    """A dense convolution of few channels beside sparse layers; onnxruntime's takes four times as long (NOTES.md)."""
    if layer.base == "QDepthwiseConv":
        return replace(row, sparse=True, block=0, reason="depthwise beside int8 kernels", kernel=layer.base)
    block = next(block for block in RELATIVE if len(layer.weight) % block == 0)
    return _taken(row, layer, block, f"a convolution of {layer.weight.shape[1]} channels is faster beside int8 kernels")


def _taken(row: Choice, layer: QLayer, block: int, reason: str) -> Choice:
    values, deltas = quantized.encode(layer.weight, block)
    size = values.nbytes + deltas.nbytes
    return replace(row, sparse=True, block=block, bytes=size, reason=reason, kernel=layer.base)


def _replace(graph: GraphProto, node: NodeProto, choice: Choice, shapes: Shapes, stored: dict[str, str]) -> NodeProto:
    found = index(graph)
    layer = read(node, found)
    bias = fuse_bias(layer, found)
    fuse_sum(layer, found, shapes)
    if bias is None and not layer.bias:  # nodes of one operator share its body, which has a bias or not
        bias = np.zeros(len(layer.weight), np.int32)
    if bias is not None:
        layer.bias = _added(graph, bias, f"{choice.name.removesuffix('.weight')}.bias_quantized")
    depthwise = layer.base == "QDepthwiseConv"
    weight = [layer.weight_name] if depthwise else _encoded(graph, choice, layer, stored)
    inputs = [*_names(layer.source), *weight, layer.weight_scale, layer.output.scale, layer.output.zero_point]
    inputs.append(layer.bias)
    if layer.residual is not None and layer.sum is not None:
        inputs += [*_names(layer.residual), layer.sum.scale, layer.sum.zero_point]
    output = layer.last.output[0]
    shared: dict[str, Any] = {"weight_shape": layer.weight.shape, **layer.window}
    shared |= {} if depthwise else {"block": choice.block}
    made = _MAKERS[layer.base](inputs, output, name=node.name, **shared)
    position = next(place for place, entry in enumerate(graph.node) if entry.output[:1] == made.output[:1])
    graph.node.insert(position, made)
    for gone in layer.nodes:
        graph.node.remove(gone)
    return made


_MAKERS: Mapping[str, Callable[..., NodeProto]] = {
    "SparseQConv": quantized.sparse_qconv,
    "SparseQLinear": quantized.sparse_qlinear,
    "QDepthwiseConv": quantized.qdepthwise_conv,
}


def _encoded(graph: GraphProto, choice: Choice, layer: QLayer, stored: dict[str, str]) -> list[str]:
    """The names of the blocks of a weight, which become constants of the graph.

    Layers that share a weight share its values (`stored`, by name of the weight). The deltas are each layer's own: of
    equal bodies onnxruntime makes one weight, and where its int8 shall be exact it cannot load a shared one.
    """
    stem = choice.name.removesuffix(".weight")
    values, deltas = quantized.encode(layer.weight, choice.block)
    if layer.weight_name not in stored:
        stored[layer.weight_name] = _added(graph, values, f"{stem}.values")
    return [stored[layer.weight_name], _added(graph, deltas, f"{stem}.deltas")]


def _added(graph: GraphProto, value: NDArray[Any], name: str) -> str:
    graph.initializer.append(numpy_helper.from_array(value, fresh(name, graph)))
    return str(graph.initializer[-1].name)


def _names(tensor: Quantised) -> list[str]:
    return [tensor.name, tensor.scale, tensor.zero_point]
