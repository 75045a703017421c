"""Who makes and who uses each tensor of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

STANDARD_DOMAINS = ("", "ai.onnx")
NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
"""Attributes of a Constant node that hold plain numbers, and the type of the tensor that they make."""


@dataclass(frozen=True)
class Index:
    """The tensors of one graph by name: of the graph as it was when this was made, and as `add` and `remove` say.

    Attributes:
        producers: the node that writes a tensor.
        consumers: the nodes that read a tensor, once per input slot; nodes inside subgraphs are not among them.
        stored: initializers and the values of Constant nodes.
        constants: those that are the same in every call; an initializer that is an input of the graph, too, is only the
            default of that input.
        outputs: names of the graph's outputs.
        captured: names that a subgraph (of If, Loop or Scan) mentions.
    """

    producers: dict[str, NodeProto]
    consumers: dict[str, list[NodeProto]]
    stored: dict[str, TensorProto]
    constants: dict[str, TensorProto]
    outputs: frozenset[str]
    captured: frozenset[str]

    def pinned(self, name: str) -> bool:
        """Whether `name` is seen from outside of the graph's own nodes, so that its meaning must stay."""
        return name in self.outputs or name in self.captured

    def add(self, node: NodeProto) -> None:
        """Note a node that came into the graph, or has changed."""
        for name in node.input:
            self.consumers.setdefault(name, []).append(node)
        self.producers.update((name, node) for name in node.output if name)

    def store(self, tensor: TensorProto) -> None:
        """Note an initializer that came into the graph."""
        self.stored[tensor.name] = self.constants[tensor.name] = tensor

    def remove(self, node: NodeProto) -> None:
        """Forget a node that leaves the graph, or before it changes."""
        for name in set(node.input):
            left = [user for user in self.consumers.pop(name) if user is not node]
            if left:
                self.consumers[name] = left
        for name in node.output:
            self.producers.pop(name, None)


def index(graph: GraphProto) -> Index:
    """Index the nodes and initializers of `graph`."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    captured: set[str] = set()
    for node in graph.node:
        if (value := constant_value(node)) is not None:
            stored[node.output[0]] = value
        for _, inner in subgraphs(node):
            captured |= mentioned(inner)
    inputs = {value.name for value in graph.input}
    constants = {name: tensor for name, tensor in stored.items() if name not in inputs}
    outputs = frozenset(value.name for value in graph.output)
    found = Index({}, {}, stored, constants, outputs, frozenset(captured))
    for node in graph.node:
        found.add(node)
    return found


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """The attribute `name` of `node`, or None where it is not set."""
    return next((found for found in node.attribute if found.name == name), None)


def integer(node: NodeProto, name: str, default: int) -> int:
    """The value of an integer attribute."""
    found = attribute(node, name)
    return default if found is None else found.i


def number(node: NodeProto, name: str, default: float) -> float:
    """The value of a float attribute."""
    found = attribute(node, name)
    return default if found is None else found.f


def is_standard(node: NodeProto, *op_types: str) -> bool:
    """Whether `node` is one of these operators of the ONNX standard."""
    return node.domain in STANDARD_DOMAINS and node.op_type in op_types


def constant_value(node: NodeProto) -> TensorProto | None:
    """The tensor of a Constant node that holds one as `value`; None for every other node.

    Inside of a function the value may be an attribute of the node that calls it; that is none, either.
    """
    found = attribute(node, "value") if is_standard(node, "Constant") else None
    return found.t if found is not None and not found.ref_attr_name else None


def subgraphs(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The graphs that `node` holds as attributes, with the names of these."""
    for found in node.attribute:
        if found.type == AttributeProto.GRAPH:
            yield found.name, found.g
        yield from ((f"{found.name}[{place}]", graph) for place, graph in enumerate(found.graphs))


def graphs(model: ModelProto) -> Iterator[GraphProto]:
    """Every graph of `model`: the main one, and those inside of nodes at any depth, of functions, too."""
    pending = [model.graph]
    pending += [inner for function in model.functions for node in function.node for _, inner in subgraphs(node)]
    while pending:
        graph = pending.pop()
        yield graph
        pending += [inner for node in graph.node for _, inner in subgraphs(node)]


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node of `model`, those of subgraphs and functions among them."""
    for owner in (*graphs(model), *model.functions):
        yield from owner.node


def label(node: NodeProto) -> str:
    """What to call a node in a message."""
    return node.name or next((name for name in node.output if name), node.op_type)


def opset(model: ModelProto) -> int:
    """The version of the ONNX standard's operators that `model` uses; 0 where it names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), 0)


def copy(model: ModelProto) -> ModelProto:
    """A copy that shares nothing with `model`."""
    result = ModelProto()
    result.CopyFrom(model)
    return result


class Names:
    """Gives names to new tensors of a graph."""

    def __init__(self, graph: GraphProto) -> None:
        self._taken = mentioned(graph)

    def fresh(self, name: str) -> str:
        """`name`, made longer until no tensor of the graph or of its subgraphs has it, nor one that was named here."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def fresh(name: str, graph: GraphProto) -> str:
    """A name for one new tensor of a graph; for many, `Names` looks through the graph once."""
    return Names(graph).fresh(name)


def mentioned(graph: GraphProto) -> set[str]:
    """The names of all tensors of `graph` and of its subgraphs."""
    names = {value.name for value in [*graph.input, *graph.output]}
    names |= {tensor.name for tensor in graph.initializer}
    names |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        names.update(node.input)
        names.update(node.output)
        for _, inner in subgraphs(node):
            names |= mentioned(inner)
    return names
