"""The `portable` target: chosen weights as `sparse_initializer`, standard operators only.

This is the last rewriting of all: onnx-ir drops sparse initializers without a word, and shape inference, the version
converter and the reference evaluator cannot read them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from sparsepipe.graph.index import constant_value, copy
from sparsepipe.graph.select import Layer


def sparsify(model: ModelProto, layers: Iterable[Layer]) -> ModelProto:
    """A copy of `model` with the weights of the rows marked `sparse` stored as sparse initializers.

    A weight in a Constant node becomes an initializer of the same name. A weight that is also an input of the graph,
    as old files have it, stops being one: a sparse initializer cannot be overridden.
    """
    result = copy(model)
    graph = result.graph
    chosen = {layer.name for layer in layers if layer.sparse}
    positions = [position for position, tensor in enumerate(graph.initializer) if tensor.name in chosen]
    graph.sparse_initializer.extend(sparse_tensor(graph.initializer[position]) for position in positions)
    for position in reversed(positions):
        del graph.initializer[position]
    for node in list(graph.node):
        if (value := constant_value(node)) is not None and node.output[0] in chosen:
            value.name = node.output[0]
            graph.sparse_initializer.append(sparse_tensor(value))
            graph.node.remove(node)
    for declared in (graph.input, graph.value_info):
        for value in [value for value in declared if value.name in chosen]:
            declared.remove(value)
    return result


def sparse_tensor(tensor: TensorProto) -> SparseTensorProto:
    """`tensor` as its nonzero values and their INT64 positions in row-major order, ascending; -0.0 is a zero."""
    values = numpy_helper.to_array(tensor).reshape(-1)
    positions = np.flatnonzero(values).astype(np.int64)
    sparse = SparseTensorProto(dims=tensor.dims)
    sparse.values.CopyFrom(numpy_helper.from_array(values[positions], tensor.name))
    sparse.indices.CopyFrom(numpy_helper.from_array(positions))
    return sparse
