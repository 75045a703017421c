"""Refuse a model whose constants hold values that are not finite."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import ModelProto, TensorProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.finite import ADVICE, not_finite
from sparsepipe.formats.layout import Array
from sparsepipe.graph.index import constant_value, graphs

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def refuse_not_finite(model: ModelProto, *, where: str) -> ModelProto:
    """The model itself, with dense constants (`graph.load`), if all of them are finite.

    Raises:
        GraphError: an initializer or a Constant holds NaN or infinities; the message names the first and counts.
    """
    if problem := not_finite(_floats(model)):
        raise GraphError(problem, where=where, advice=ADVICE)
    return model


def _floats(model: ModelProto) -> Iterator[tuple[str, Array]]:
    for graph in graphs(model):
        held = [(tensor.name, tensor) for tensor in graph.initializer]
        held += [(node.output[0], value) for node in graph.node if (value := constant_value(node)) is not None]
        yield from ((name, numpy_helper.to_array(tensor)) for name, tensor in held if tensor.data_type in FLOATS)
