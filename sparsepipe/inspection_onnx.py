"""The part of inspection that is about ONNX files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.layout import Array
from sparsepipe.graph.index import Index, attribute, index, integer, is_standard, subgraphs
from sparsepipe.graph.load import load

VIEWS = ("DequantizeLinear", "Identity", "Cast", "Transpose")
"""Operators that may stand between a weight and the node that uses it, and keep its two dimensions."""


@dataclass(frozen=True)
class Weight:
    """A constant of two or more dimensions.

    Attributes:
        name: its name in the graph.
        values: the dense values; bfloat16 as float32.
        op: the operator that uses it; None where nothing does.
        inputs_first: its first dimension is that of the operator's inputs, not of its outputs.
        sparse: it is stored as a sparse tensor.
        stored_bytes: bytes of its values (and indices) in the file.
    """

    name: str
    values: Array
    op: str | None
    inputs_first: bool
    sparse: bool
    stored_bytes: int


def read(path: Path) -> tuple[dict[str, Any], list[Weight]]:
    """Facts about an ONNX file, and its weights with those of its subgraphs.

    Raises:
        GraphError: the file is damaged, or its external data lies outside of its folder.
    """
    model = load(path)
    # `load` takes external data in and makes sparse tensors dense; how they are stored says the file itself.
    as_stored = ModelProto.FromString(path.read_bytes()).graph
    stored = dict(_sparse_bytes(as_stored))
    weights = [
        Weight(
            name=name,
            values=values,
            op=op,
            inputs_first=inputs_first,
            sparse=name in stored,
            stored_bytes=stored.get(name, values.nbytes),
        )
        for name, values, op, inputs_first in _weights(model.graph, str(path))
    ]
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    facts = {
        "ir_version": model.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": {value.name: _type_text(value) for value in model.graph.input},
        "outputs": {value.name: _type_text(value) for value in model.graph.output},
        "operators": dict(Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in nodes).most_common()),
        "sparse_initializers": len(stored),
        "external_data": sorted(set(_external_files(as_stored))),
        "functions": len(model.functions),
    }
    return facts, weights


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _sparse_bytes(main: GraphProto) -> Iterator[tuple[str, int]]:
    for graph in _graphs(main):
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse.ByteSize()
        for node in graph.node:
            found = attribute(node, "sparse_value") if is_standard(node, "Constant") else None
            if found is not None:
                yield node.output[0], found.sparse_tensor.ByteSize()


def _external_files(main: GraphProto) -> Iterator[str]:
    for graph in _graphs(main):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _weights(main: GraphProto, where: str) -> Iterator[tuple[str, Array, str | None, bool]]:
    for graph in _graphs(main):
        local = index(graph)
        for name, tensor in local.constants.items():
            if len(tensor.dims) < 2:
                continue
            try:
                values = numpy_helper.to_array(tensor)
            except (ValueError, TypeError) as error:
                raise GraphError(f"The tensor is malformed: {error}.", where=f"{where}: {name}") from error
            if tensor.data_type == TensorProto.BFLOAT16:
                values = values.astype(np.float32)
            op, inputs_first = _use(name, local, matrix=values.ndim == 2)
            yield name, values, op, inputs_first


def _use(name: str, local: Index, *, matrix: bool) -> tuple[str | None, bool]:
    """The operator that uses a weight, and whether the weight's first dimension is that of the inputs."""
    turned = False
    while users := local.consumers.get(name):
        user = users[0]
        if is_standard(user, *VIEWS) and user.input[0] == name:
            turned ^= matrix and user.op_type == "Transpose"
            name = user.output[0]
            continue
        second = len(user.input) > 1 and user.input[1] == name
        inputs_first = (
            (is_standard(user, "MatMul") and second and matrix)
            or (is_standard(user, "Gemm") and second and not integer(user, "transB", 0))
            or (is_standard(user, "ConvTranspose") and second)
        )
        return user.op_type, inputs_first != turned
    return None, False


def _type_text(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value"))
    sides = [
        side.dim_param or (str(side.dim_value) if side.HasField("dim_value") else "?") for side in tensor.shape.dim
    ]
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(sides)}]"
