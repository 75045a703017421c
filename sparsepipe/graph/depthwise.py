"""Depthwise convolutions between sparse layers, which the library runs in the layout of these.

onnxruntime's own kernel wants another layout of its input and output. Between dense layers that costs nothing, as they
want it, too; between two sparse layers it costs two changes of layout.

With the sparse 1x1 convolution that alone reads it, a depthwise one becomes one operator: what is between is then never
written to memory. That also pays behind a dense layer, where the change of layout only moves to the front.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import GraphProto, NodeProto

from sparsepipe.graph.fusion import fuse
from sparsepipe.graph.index import attribute, index
from sparsepipe.graph.kernel_layer import KernelLayer, Stays, is_depthwise, read, read_depthwise
from sparsepipe.graph.shapes import Shapes
from sparsepipe.native import operators

REASON = "depthwise convolution between sparse layers: the library's dense kernel keeps their layout"
FUSED = "depthwise convolution: part of the sparse 1x1 convolution that reads it"
SEPARABLE = "SparseSeparableConv"


class Spans:
    """From which tensor to which one a node reaches with what is fused into it; each node is read once.

    Args:
        graph: in which no layer is replaced yet.

    Attributes:
        found: its index.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.found = index(graph)
        self._shapes = Shapes(graph, self.found)
        self._known: dict[str, KernelLayer | str] = {}  # a text says why no kernel takes it

    def of(self, node: NodeProto) -> tuple[str, str]:
        """The input and the output of a layer, a depthwise convolution among them.

        Raises:
            Stays: no kernel of the library takes it.
        """
        layer = self.layer(node)
        return layer.source, layer.last.output[0]

    def layer(self, node: NodeProto) -> KernelLayer:
        """The same with all that is fused into it."""
        key = node.output[0]
        if key not in self._known:
            try:
                layer = (read_depthwise if is_depthwise(node, self.found) else read)(node, self.found)
                fuse(layer, self.found, self._shapes)
                self._known[key] = layer
            except Stays as reason:
                self._known[key] = str(reason)
        known = self._known[key]
        if isinstance(known, str):
            raise Stays(known)
        return known


class Neighbours:
    """Where the sparse layers of a graph are, with what is fused into them.

    Args:
        nodes: the layers that become sparse.
        spans: of the graph.
    """

    def __init__(self, nodes: Collection[NodeProto], spans: Spans) -> None:
        self._spans = spans
        self._nodes = {node.output[0]: node for node in nodes}
        self._outputs = {spans.of(node)[1] for node in nodes}
        self._inputs = {(node.output[0], node.input[0]) for node in nodes}

    def pointwise(self, node: NodeProto) -> str | None:
        """The output of the sparse 1x1 convolution that one kernel can compute together with this depthwise one.

        Raises:
            Stays: the library's kernel does not take it.
        """
        found = self._spans.found
        _, output = self._spans.of(node)
        users = found.consumers.get(output, [])
        if len(users) != 1 or found.pinned(output) or (users[0].output[0], output) not in self._inputs:
            return None
        first, last = self._spans.layer(node), self._spans.layer(users[0])
        suits = first.weight.shape[2:] == (3, 3) and list(first.window["dilations"]) == [1, 1]
        if not suits or list(first.window["strides"]) not in ([1, 1], [2, 2]) or not _is_pointwise(last):
            return None
        name = operators.operator_name(
            SEPARABLE, last.activation, residual=last.residual is not None, depthwise=first.activation
        )
        return str(users[0].output[0]) if name in operators.BASES else None

    def obstacle(self, node: NodeProto) -> str | None:
        """Why a depthwise convolution stays with onnxruntime; None where it is between sparse layers.

        Raises:
            Stays: the library's kernel does not take it.
        """
        found = self._spans.found
        source, output = self._spans.of(node)
        users = found.consumers.get(output, [])
        if self.pointwise(node) is not None and (source in self._outputs or _strides(node) == [1, 1]):
            return None  # with stride 2 the tensor whose layout changes would be four times as large
        if source not in self._outputs:
            return "depthwise convolution: what comes before it is not sparse"
        if not users or found.pinned(output):
            return "depthwise convolution: its output leaves the network"
        if not all((user.output[0], output) in self._inputs for user in users):
            return "depthwise convolution: what follows it is not sparse"
        return None


def _strides(node: NodeProto) -> list[int]:
    given = attribute(node, "strides")
    return list(given.ints) if given is not None else [1, 1]


def _is_pointwise(layer: KernelLayer) -> bool:
    """Whether a sparse layer computes each position of its output from the same one of its input."""
    window = layer.window
    return layer.base == "SparseConv" and (
        layer.weight.shape[2:] == (1, 1) and list(window["strides"]) == [1, 1] and not any(window["pads"])
    )
