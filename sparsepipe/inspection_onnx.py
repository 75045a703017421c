"""The part of inspection that is about ONNX files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.io import DENSE
from sparsepipe.formats.layout import Array
from sparsepipe.graph.index import all_nodes, attribute, graphs, integer, is_standard
from sparsepipe.graph.load import load_with_rows
from sparsepipe.graph.restore import Compact
from sparsepipe.graph.select import Use, uses
from sparsepipe.native import operators

SPARSE = "sparse"


@dataclass(frozen=True)
class Weight:
    """A weight that export counts, too; one that several nodes use is one weight.

    Attributes:
        name: its name in the graph.
        values: the dense values; bfloat16 as float32.
        op: the first operator that uses it.
        inputs_first: its first dimension is that of the operator's inputs, not of its outputs.
        stored_as: "dense", "sparse" (a sparse tensor), or the format of a universal file: "csr", "bsr 4x1".
        stored_bytes: bytes of its values (and indices) in the file.
        mode: how a kernel of the library packs its input, of `operators.MODES`; None for other operators.
    """

    name: str
    values: Array
    op: str
    inputs_first: bool
    stored_as: str
    stored_bytes: int
    mode: str | None = None


def read(path: Path) -> tuple[dict[str, Any], list[Weight]]:
    """Facts about an ONNX file, and its weights, those in subgraphs and functions among them.

    Raises:
        GraphError: the file is damaged, or its external data lies outside of its folder.
    """
    model, compact = load_with_rows(path)
    # Reading takes external data in and makes weights ordinary ones; how they are stored says the file itself.
    as_stored = ModelProto.FromString(path.read_bytes())
    stored = dict(_sparse_bytes(as_stored))
    weights = list(_weights(model, stored, {row.name: row for row in compact}, str(path)))
    used = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in _nodes(as_stored))
    facts = {
        "ir_version": as_stored.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in as_stored.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "inputs": {value.name: _type_text(value) for value in model.graph.input},
        "outputs": {value.name: _type_text(value) for value in model.graph.output},
        "operators": dict(used.most_common()),
        "sparse_initializers": len(stored),
        "external_data": sorted(set(_external_files(as_stored))),
        "functions": len(as_stored.functions),
    }
    return facts, weights


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    """All nodes but those of the fallback bodies, which do not run where the kernel library is."""
    own = (function for function in model.functions if function.domain != operators.DOMAIN)
    for owner in (*graphs(model), *own):
        yield from owner.node


def _sparse_bytes(model: ModelProto) -> Iterator[tuple[str, int]]:
    for graph in graphs(model):
        for sparse in graph.sparse_initializer:
            yield sparse.values.name, sparse.ByteSize()
    for node in all_nodes(model):
        found = attribute(node, "sparse_value") if is_standard(node, "Constant") else None
        if found is not None:
            yield node.output[0], found.sparse_tensor.ByteSize()


def _external_files(model: ModelProto) -> Iterator[str]:
    for graph in graphs(model):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _weights(
    model: ModelProto, stored: Mapping[str, int], compact: Mapping[str, Compact], where: str
) -> Iterator[Weight]:
    seen = set()
    for use in uses(model):
        name = use.weight.name
        if use.key in seen:
            continue
        seen.add(use.key)
        try:
            values = numpy_helper.to_array(use.weight)
        except (ValueError, TypeError) as error:
            raise GraphError(f"The tensor is malformed: {error}.", where=f"{where}: {name}") from error
        weight = Weight(
            name=name,
            values=values.astype(np.float32) if use.weight.data_type == TensorProto.BFLOAT16 else values,
            op=use.node.op_type,
            inputs_first=_inputs_first(use, matrix=values.ndim == 2),
            stored_as=SPARSE if name in stored else DENSE,
            stored_bytes=stored.get(name, values.nbytes),
        )
        row = compact.get(name)
        if row is not None:
            size = row.bytes or weight.stored_bytes  # of a weight that is stored dense
            weight = replace(weight, op=row.op, stored_as=row.stored_as, stored_bytes=size, mode=row.mode)
        yield weight


def _inputs_first(use: Use, *, matrix: bool) -> bool:
    """Whether the first dimension of a stored weight is that of the inputs."""
    second = use.position == 1
    first = second and (
        (is_standard(use.node, "MatMul") and matrix)
        or (is_standard(use.node, "Gemm") and not integer(use.node, "transB", 0))
        or is_standard(use.node, "ConvTranspose")
    )
    turns = sum(is_standard(view, "Transpose") for view in use.views) if matrix else 0
    return first != bool(turns % 2)


def _type_text(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value"))
    sides = [
        str(side.dim_param) or (str(side.dim_value) if side.HasField("dim_value") else "?") for side in tensor.shape.dim
    ]
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(sides)}]"
