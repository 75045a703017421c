"""Remove what no node of a graph needs any more."""

from __future__ import annotations

from onnx import GraphProto

from sparsepipe.graph.index import index, is_standard


def tidy(graph: GraphProto) -> None:
    """Remove, in place, unused initializers and Constant nodes, and recorded shapes of tensors that are not made.

    An initializer that is also an input of the graph stays.
    """
    found = index(graph)
    inputs = {value.name for value in graph.input}

    def is_used(name: str) -> bool:
        return name in found.consumers or found.pinned(name) or name in inputs

    for node in [node for node in graph.node if is_standard(node, "Constant") and not is_used(node.output[0])]:
        graph.node.remove(node)
    for position in reversed(range(len(graph.initializer))):
        if not is_used(graph.initializer[position].name):
            del graph.initializer[position]
    made = {name for node in graph.node for name in node.output}
    for value in [value for value in graph.value_info if value.name not in made]:
        graph.value_info.remove(value)
