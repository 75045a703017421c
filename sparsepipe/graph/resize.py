"""Fix the sizes of a network's inputs where the file leaves them open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, ValueInfoProto

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import copy

ADVICE = "Export it again for this size; here a size can be set only where the file leaves it open."


def resize(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> ModelProto:
    """A copy of `model` whose inputs have these sizes; the first dimension, the batch, stays open.

    Args:
        model: any model.
        shapes: name of an input -> its shape, batch first; the name "" is the only input.

    Raises:
        GraphError: there is no such input, it has another number of dimensions, or a size is fixed at another one.
    """
    result = copy(model)
    weights = {tensor.name for tensor in result.graph.initializer}
    inputs = {value.name: value for value in result.graph.input if value.name not in weights}
    where = result.graph.name or "model"
    for name, shape in shapes.items():
        if not name and len(inputs) != 1:
            raise GraphError(
                f"The network has {len(inputs)} inputs ({', '.join(inputs)}), so a shape needs the name of one.",
                where=where,
            )
        if name and name not in inputs:
            raise GraphError(f"The network has no input '{name}'; it has {', '.join(inputs)}.", where=where)
        _set_sizes(inputs[name] if name else next(iter(inputs.values())), shape, where)
    if shapes:
        del result.graph.value_info[:]  # shapes recorded for any size; they are inferred anew
    return result


def _set_sizes(value: ValueInfoProto, shape: Sequence[int], where: str) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(shape):
        raise GraphError(
            f"The input '{value.name}' has {len(dims)} dimensions, not the {len(shape)} of {_text(shape)}.",
            where=where,
        )
    for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            if dim.dim_value != size:
                what = "batch size" if axis == 0 else f"size of dimension {axis}"
                raise GraphError(
                    f"The {what} of the input '{value.name}' is fixed at {dim.dim_value}, so it cannot be {size}.",
                    where=where,
                    advice=ADVICE,
                )
        elif axis > 0:
            dim.dim_value = size


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
