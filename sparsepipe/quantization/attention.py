"""Attention, which stays float32 in int8 files.

onnxruntime's Softmax of bytes takes several times as long as that of floats, and between the two the products of
activations gain nothing (native/NOTES.md). Without roundings the outputs are nearer to the fp32 network's, too.
"""

from __future__ import annotations

import math

from onnx import ModelProto, NodeProto

from sparsepipe.graph.index import Index, index, is_standard

BETWEEN = ("Add", "Clip", "Div", "Max", "Min", "Mul", "Sub", "Where")
"""What scales and masks scores."""


def attention(model: ModelProto) -> set[str]:
    """The outputs of the nodes that compute attention: every Softmax, the products of activations before and behind it,
    what scales and masks in between, and what scales a factor alone.
    """
    found = index(model.graph)
    nodes: list[NodeProto] = []
    for softmax in (node for node in model.graph.node if is_standard(node, "Softmax")):
        scores = _scores(softmax.input[0], found, set())
        behind = [node for node in found.consumers.get(softmax.output[0], []) if _is_product(node, found)]
        factors = [name for node in (*scores, *behind) if _is_product(node, found) for name in node.input]
        scalings = [node for name in factors if (node := found.producers.get(name)) and _scales(node, found)]
        nodes += [*scalings, *scores, softmax, *behind]
    return {node.output[0] for node in nodes}


def _scores(name: str, found: Index, seen: set[str]) -> list[NodeProto]:
    """The nodes on the ways from products of activations to a tensor."""
    node = found.producers.get(name)
    if node is None or name in seen:
        return []
    seen.add(name)
    if _is_product(node, found):
        return [node]
    inputs = node.input if is_standard(node, *BETWEEN) else []
    before = [each for given in inputs for each in _scores(given, found, seen)]
    return [*before, node] if before else []


def _is_product(node: NodeProto, found: Index) -> bool:
    return is_standard(node, "MatMul") and not any(name in found.constants for name in node.input)


def _scales(node: NodeProto, found: Index) -> bool:
    """Whether a node multiplies by a constant number, for a product alone."""
    numbers = [found.constants[name] for name in node.input if name in found.constants]
    alone = len(found.consumers.get(node.output[0], [])) == 1 and not found.pinned(node.output[0])
    return alone and is_standard(node, "Mul", "Div") and any(math.prod(tensor.dims) == 1 for tensor in numbers)
