"""Refuse a model whose constants hold values that no network has: NaN, and infinities in the weights of a layer.

Infinities elsewhere are masks that are added to scores, and bounds.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, TensorProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.finite import ADVICE, not_finite
from sparsepipe.formats.layout import Array
from sparsepipe.graph.index import all_nodes, constant_value, graphs
from sparsepipe.graph.select import uses

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
TRAINED = frozenset(
    {
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "Gemm",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "PRelu",
    }
)
"""Operators all of whose inputs but the first come from training."""


def refuse_not_finite(model: ModelProto, *, where: str) -> ModelProto:
    """The model itself, with dense constants (`graph.load`), if all of them are such as networks have.

    Raises:
        GraphError: an initializer or a Constant holds NaN, or a weight infinities; the message names the first and
            counts.
    """
    weights = {use.weight.name for use in uses(model)}
    weights.update(name for node in all_nodes(model) if node.op_type in TRAINED for name in node.input[1:])
    if problem := not_finite(_floats(model), weights):
        raise GraphError(problem, where=where, advice=ADVICE)
    return model


def _floats(model: ModelProto) -> Iterator[tuple[str, Array]]:
    for graph in graphs(model):
        held = [(tensor.name, tensor) for tensor in graph.initializer]
        held += [(node.output[0], value) for node in graph.node if (value := constant_value(node)) is not None]
        yield from ((name, numpy_helper.to_array(tensor)) for name, tensor in held if tensor.data_type in FLOATS)
