"""Quantised weights that several nodes share, as one weight for each node.

onnxruntime 1.31 fails to load such files where its int8 operators shall be exact: for each node it makes a uint8 weight
of the int8 one, and all of them under one name.
"""

from __future__ import annotations

from collections import defaultdict

from onnx import ModelProto, NodeProto, TensorProto


def unshare(model: ModelProto) -> ModelProto:
    """Give each node int8 constants of its own, behind a DequantizeLinear of its own, in place; returns the model."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    users: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for slot, name in enumerate(node.input):
            users[name].append((node, slot))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            for count, (user, slot) in enumerate(users[node.output[0]][1:]):
                nodes.append(NodeProto())
                nodes[-1].CopyFrom(node)
                nodes[-1].ClearField("name")  # no two nodes may have the same one
                nodes[-1].output[0] = user.input[slot] = f"{node.output[0]}.unshared{count}"
    taken: set[str] = set()
    for count, node in enumerate(nodes):
        for slot, name in enumerate(node.input):
            if name in taken:
                copy = graph.initializer.add()
                copy.CopyFrom(stored[name])
                copy.name = node.input[slot] = f"{name}.unshared{count}"
            elif name in stored:
                taken.add(name)
    del graph.node[:]
    graph.node.extend(nodes)
    return model
