"""What lies between the layers of a quantised graph, as int8 operators of the kernel library."""

from __future__ import annotations

from onnx import GraphProto, NodeProto

from sparsepipe.graph.index import Index, attribute, index, integer, is_standard
from sparsepipe.graph.kernel_layer import Stays, window_of
from sparsepipe.native import quantized
from sparsepipe.native.operators import DOMAIN
from sparsepipe.quantization.layer import Quantised, alike, quantiser_of, source_of


def pool(graph: GraphProto) -> list[NodeProto]:
    """Make QMaxPool of the quantised poolings next to operators of the library, in place; returns the new nodes.

    The largest of some bytes stands for the largest of their numbers: the same bytes as by DequantizeLinear, MaxPool
    and QuantizeLinear where both have one scale and one zero point.
    """
    made = []
    for node in [node for node in graph.node if is_standard(node, "MaxPool")]:
        found = index(graph)
        source, step = source_of(node.input[0], found), quantiser_of(node.output[0], found)
        if source is None or step is None or len(node.output) != 1:
            continue
        output = Quantised(step.output[0], step.input[1], step.input[2])
        if not alike(source, output, found) or not _beside(source.name, output.name, found):
            continue
        given = attribute(node, "kernel_shape")
        kernel = list(given.ints) if given is not None else []
        try:
            window = window_of(node, kernel)
        except Stays:
            continue
        if integer(node, "ceil_mode", 0) or any(pad >= kernel[i % len(kernel)] for i, pad in enumerate(window["pads"])):
            continue
        made.append(quantized.qmax_pool(source.name, output.name, kernel_shape=kernel, name=node.name, **window))
        graph.node.insert(list(graph.node).index(node), made[-1])
        graph.node.remove(node)
        graph.node.remove(step)
    return made


def _beside(source: str, output: str, found: Index) -> bool:
    """Whether an operator of the library makes or takes one of these bytes."""
    neighbours = [found.producers.get(source), *found.consumers.get(output, [])]
    return any(node is not None and node.domain == DOMAIN for node in neighbours)
