"""Depthwise convolutions between sparse layers, which the library runs in the layout of these.

onnxruntime's own kernel wants another layout of its input and output. Between dense layers that costs nothing, as they
want it, too; between two sparse layers it costs two changes of layout.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import NodeProto

from sparsepipe.graph.fusion import fuse
from sparsepipe.graph.index import Index
from sparsepipe.graph.kernel_layer import read, read_depthwise
from sparsepipe.graph.shapes import Shapes

REASON = "depthwise convolution between sparse layers: the library's dense kernel keeps their layout"


class Neighbours:
    """Where the sparse layers of a graph are, with what is fused into them.

    Args:
        nodes: the layers that become sparse.
        found: the index of the graph.
        shapes: of its tensors.
    """

    def __init__(self, nodes: Collection[NodeProto], found: Index, shapes: Shapes) -> None:
        self._found, self._shapes = found, shapes
        self._outputs = set()
        self._inputs = {(node.output[0], node.input[0]) for node in nodes}
        for node in nodes:
            layer = read(node, found)
            fuse(layer, found, shapes)
            self._outputs.add(layer.last.output[0])

    def obstacle(self, node: NodeProto) -> str | None:
        """Why a depthwise convolution stays with onnxruntime; None where it is between sparse layers.

        Raises:
            Stays: the library's kernel does not take it.
        """
        layer = read_depthwise(node, self._found)
        fuse(layer, self._found, self._shapes)
        output = layer.last.output[0]
        users = self._found.consumers.get(output, [])
        if layer.source not in self._outputs:
            return "depthwise convolution: what comes before it is not sparse"
        if not users or self._found.pinned(output):
            return "depthwise convolution: its output leaves the network"
        if not all((user.output[0], output) in self._inputs for user in users):
            return "depthwise convolution: what follows it is not sparse"
        return None
