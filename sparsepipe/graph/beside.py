"""Dense convolutions beside sparse layers, which the library runs in the layout of these.

onnxruntime's own kernels want another layout of their inputs and outputs. Between dense layers that costs nothing, as
they want it, too; a depthwise convolution between two sparse layers costs two changes of layout, and the first
convolution of an image one, which is also fewer products in the library's kernel.

With the sparse 1x1 convolution that alone reads it, a depthwise one becomes one operator: what is between is then never
written to memory. That also pays behind a dense layer, where the change of layout only moves to the front.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import GraphProto, NodeProto

from sparsepipe.graph.fusion import fuse
from sparsepipe.graph.index import attribute, index
from sparsepipe.graph.kernel_layer import KernelLayer, Stays, dense_kernel, read, read_dense
from sparsepipe.graph.shapes import Shapes
from sparsepipe.native import operators

REASONS = {
    "DepthwiseConv": "depthwise convolution between sparse layers: the library's dense kernel keeps their layout",
    "StemConv": "first convolution, before a sparse layer: the library's dense kernel writes its layout",
}
FUSED = "depthwise convolution: part of the sparse 1x1 convolution that reads it"
KINDS = {"DepthwiseConv": "depthwise convolution", "StemConv": "first convolution"}
"""How a reason calls what a dense kernel may take."""
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
        """The input and the output of a layer, or of a convolution that stays dense.

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
                layer = (read_dense if dense_kernel(node, self.found) else read)(node, self.found)
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
        sparse: the layers that become sparse.
        dense: the others that have a `dense_kernel`.
        spans: of the graph.
    """

    def __init__(self, sparse: Collection[NodeProto], dense: Collection[NodeProto], spans: Spans) -> None:
        self._spans = spans
        stems = [node for node in dense if dense_kernel(node, spans.found) == "StemConv" and self._taken(node)]
        self._outputs = {spans.of(node)[1] for node in (*sparse, *stems)}
        self._inputs = {(node.output[0], node.input[0]) for node in sparse}

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
        """Why a convolution that has a `dense_kernel` stays with onnxruntime; None where the library runs it.

        Raises:
            Stays: the library's kernel does not take it.
        """
        found = self._spans.found
        source, output = self._spans.of(node)
        users = found.consumers.get(output, [])
        if dense_kernel(node, found) == "StemConv":
            follows = any(self._is_plain(user, output) for user in users)
            return None if follows else "first convolution: what follows it is not sparse"
        if self.pointwise(node) is not None and (source in self._outputs or _strides(node) == [1, 1]):
            return None  # with stride 2 the tensor whose layout changes would be four times as large
        if source not in self._outputs:
            return "depthwise convolution: what comes before it is not sparse"
        if not users or found.pinned(output):
            return "depthwise convolution: its output leaves the network"
        if not all((user.output[0], output) in self._inputs for user in users):
            return "depthwise convolution: what follows it is not sparse"
        return None

    def _is_plain(self, user: NodeProto, name: str) -> bool:
        """Whether the library runs what uses the output `name` of a first convolution."""
        if (user.output[0], name) in self._inputs:
            return True
        is_depthwise = dense_kernel(user, self._spans.found) == "DepthwiseConv"
        return is_depthwise and self._taken(user) and self.obstacle(user) is None

    def _taken(self, node: NodeProto) -> bool:
        try:
            self._spans.of(node)
        except Stays:
            return False
        return True


def _strides(node: NodeProto) -> list[int]:
    given = attribute(node, "strides")
    return list(given.ints) if given is not None else [1, 1]


def _is_pointwise(layer: KernelLayer) -> bool:
    """Whether a sparse layer computes each position of its output from the same one of its input."""
    window = layer.window
    return layer.base == "SparseConv" and (
        layer.weight.shape[2:] == (1, 1) and list(window["strides"]) == [1, 1] and not any(window["pads"])
    )
