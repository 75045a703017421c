"""Remove what nothing in a graph needs any more."""

from __future__ import annotations

from onnx import GraphProto

from sparsepipe.graph.index import mentioned, subgraphs


def tidy(graph: GraphProto) -> None:
    """Remove, in place, nodes and initializers that no output needs, and recorded shapes of tensors that are not made.

    An initializer that is also an input of the graph stays.
    """
    needed = {value.name for value in graph.output}
    for position in reversed(range(len(graph.node))):
        node = graph.node[position]
        if not any(name in needed for name in node.output if name):
            del graph.node[position]
            continue
        needed.update(node.input)
        for _, inner in subgraphs(node):
            needed |= mentioned(inner)
    needed.update(value.name for value in graph.input)
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in needed:
            del graph.initializer[position]
    made = {name for node in graph.node for name in node.output}
    for position in reversed(range(len(graph.value_info))):
        if graph.value_info[position].name not in made:
            del graph.value_info[position]
