"""Fix the size of a network's input where the file leaves it open."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import copy

ADVICE = "Export it again for this size; here a size can be set only where the file leaves it open."


def resize(model: ModelProto, shape: Sequence[int]) -> ModelProto:
    """A copy of `model` whose only input has the sizes `shape`; its first dimension, the batch, stays open.

    Raises:
        GraphError: the network has several inputs or another number of dimensions, or a size is fixed at another one.
    """
    result = copy(model)
    weights = {tensor.name for tensor in result.graph.initializer}
    inputs = [value for value in result.graph.input if value.name not in weights]
    where = result.graph.name or "model"
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise GraphError(f"The network has {len(inputs)} inputs ({names}); the size of one can be set.", where=where)
    dims = inputs[0].type.tensor_type.shape.dim
    if len(dims) != len(shape):
        raise GraphError(
            f"The input '{inputs[0].name}' has {len(dims)} dimensions, not the {len(shape)} of {_text(shape)}.",
            where=where,
        )
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            if dim.dim_value != size:
                what = "batch size" if axis == 0 else f"size of dimension {axis}"
                raise GraphError(
                    f"The {what} of the input '{inputs[0].name}' is fixed at {dim.dim_value}, so it cannot be {size}.",
                    where=where,
                    advice=ADVICE,
                )
        elif axis > 0:
            dim.dim_value = size
    del result.graph.value_info[:]  # shapes recorded for any size; they are inferred anew
    return result


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
