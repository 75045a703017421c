"""The weights of an ONNX file as plain arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from onnx import GraphProto, TensorProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.layout import Array
from sparsepipe.graph.index import Index, index, is_standard, subgraphs
from sparsepipe.graph.load import load

OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
VIEWS = ("Identity", "Transpose")
"""Operators that may stand between a weight and the node that uses it."""
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def read(path: Path) -> dict[str, Array]:
    """The float constants that feed the nodes of OPS, subgraphs included, under their names and in their shapes there.

    Constants are initializers, dense or sparse, and Constant nodes. bfloat16 becomes float32.

    Raises:
        GraphError: the file is missing or damaged, or has no such constant.
    """
    found = {
        name: _to_array(tensor, f"{path}: {name}")
        for name, tensor in _constants(load(path).graph, {})
        if tensor.data_type in FLOATS
    }
    if not found:
        raise GraphError(f"No float constant feeds any {', '.join(OPS)}.", where=str(path))
    return dict(sorted(found.items()))


def _constants(graph: GraphProto, outer: Mapping[str, TensorProto]) -> Iterator[tuple[str, TensorProto]]:
    local = index(graph)
    visible = {**outer, **local.constants}
    for node in graph.node:
        if is_standard(node, *OPS):
            sources = [_source(name, local) for name in node.input]
            yield from ((name, visible[name]) for name in sources if name in visible)
        for inner in subgraphs(node):
            yield from _constants(inner, visible)


def _source(name: str, local: Index) -> str:
    while name in local.producers and is_standard(local.producers[name], *VIEWS):
        name = local.producers[name].input[0]
    return name


def _to_array(tensor: TensorProto, where: str) -> Array:
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise GraphError(f"The tensor is malformed: {error}.", where=where) from error
    return array.astype(np.float32) if tensor.data_type == TensorProto.BFLOAT16 else array
