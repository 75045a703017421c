"""Changes of layout that sparse layers bring about.

On x86 onnxruntime runs dense convolutions and poolings in a blocked layout (NCHWc) and changes the layout where another
kind of operator stands before or after. The sparse kernels keep the plain layout (NCHW), so a network that alternates
between both pays at each change for a pass over the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from onnx import GraphProto, NodeProto, TensorProto

from sparsepipe.graph.index import index, integer, is_standard
from sparsepipe.graph.sizes import Sizes

SMALLEST = 16
"""Convolutions of fewer input channels, those of images, read the plain layout; of fewer outputs, they keep it."""
POOLINGS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
ELEMENTWISE = ("Relu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Add", "Sum", "Mul")


class Layout:
    """The layout of each tensor of a graph, as onnxruntime 1.17 to 1.31 choose it on x86.

    Args:
        graph: without sparse layers.
        sizes: of its tensors. A tensor whose size is not known counts nothing.
    """

    def __init__(self, graph: GraphProto, sizes: Sizes) -> None:
        self._sizes = sizes
        constants = index(graph).constants
        self._nodes: list[tuple[NodeProto, str, list[str]]] = []
        for node in graph.node:
            inputs = [name for name in node.input if name and name not in constants]
            weight = constants.get(node.input[1]) if len(node.input) > 1 else None
            self._nodes.append((node, _kind(node, weight), inputs))
        self._outputs = [value.name for value in graph.output]

    def changes(self, plain: Collection[str]) -> list[int]:
        """Floats of each tensor whose layout changes where the nodes with the outputs `plain` keep the plain layout."""
        blocked: set[str] = set()
        both: set[str] = set()
        moved: list[int] = []

        def need(name: str, want_blocked: bool) -> None:
            if name not in both and (name in blocked) != want_blocked:
                both.add(name)
                moved.append(self._floats(name))

        for node, kind, inputs in self._nodes:
            if node.output and node.output[0] in plain:
                kind = "plain"
            elif kind == "either":
                kind = "stem" if all(name in blocked for name in inputs) else "plain"
            if kind != "stem":
                for name in inputs:
                    need(name, kind == "blocked")
            if kind != "plain":
                blocked.update(node.output)
        for name in self._outputs:
            need(name, False)
        return moved

    def _floats(self, name: str) -> int:
        known = [size for size in self._sizes.get(name, ()) if size is not None]
        return math.prod(known) if known and len(known) == len(self._sizes[name]) else 0


def _kind(node: NodeProto, weight: TensorProto | None) -> str:
    """The layout of a node: `blocked`, `plain`, `stem` (it takes what it gets and writes blocked), `either` (that of
    its inputs, blocked if all are).
    """
    if is_standard(node, *POOLINGS):
        return "blocked"
    if is_standard(node, *ELEMENTWISE):
        return "either"
    if not is_standard(node, "Conv") or weight is None or len(weight.dims) != 4:
        return "plain"
    outputs, inputs = weight.dims[:2]
    if integer(node, "group", 1) != 1:
        return "blocked" if inputs == 1 and outputs >= SMALLEST else "plain"
    if outputs < SMALLEST:
        return "plain"
    return "blocked" if inputs >= SMALLEST else "stem"
