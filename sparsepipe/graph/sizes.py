"""The sizes of tensors at one batch: what the time of a layer depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import ModelProto, ValueInfoProto

from sparsepipe.graph.index import copy

IMAGE_SIDE = 224
"""What a free size of an input of four dimensions counts as, behind batch and channels."""
SEQUENCE_LENGTH = 16
"""What another free size counts as."""

Sizes = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Sized:
    """Shapes of the tensors of a network.

    Attributes:
        sizes: name -> shape of each tensor whose rank is known, None for a size that is not.
        assumed: whether they follow from sizes that the network leaves free, other than the batch.
    """

    sizes: Sizes
    assumed: bool


def sizes_of(model: ModelProto, inputs: Mapping[str, Sequence[int]] | None = None) -> Sized:
    """The shape of each tensor at batch 1, or at the batch that the network fixes.

    Args:
        model: of any origin; left as it is.
        inputs: shapes of the graph's inputs by name. What is free in an input that is not named here counts as
            `IMAGE_SIDE` or `SEQUENCE_LENGTH`; sizes of the same name are the same.
    """
    fixed = copy(model)
    graph = fixed.graph
    constants = {tensor.name for tensor in graph.initializer}
    named: dict[str, int] = {}
    free = [_fix(value, named, (inputs or {}).get(value.name)) for value in graph.input if value.name not in constants]
    # What the file says of other tensors may hold the free sizes in many guises.
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except Exception:  # a model of more than 2 GB, or with operators that onnx does not know
        return Sized({}, assumed=True)
    sizes = {
        value.name: tuple(dim.dim_value if dim.dim_value > 0 else None for dim in value.type.tensor_type.shape.dim)
        for value in (*fixed.graph.input, *fixed.graph.output, *fixed.graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }
    return Sized(sizes, any(free))


def _fix(value: ValueInfoProto, named: dict[str, int], given: Sequence[int] | None) -> bool:
    """Give the free sizes of an input numbers; whether one besides the batch had to be assumed."""
    dims = value.type.tensor_type.shape.dim
    assumed = False
    for axis, dim in enumerate(dims):
        if given is not None:
            dim.dim_value = given[axis]
        elif dim.WhichOneof("value") != "dim_value":
            size = 1 if axis == 0 else (IMAGE_SIDE if len(dims) == 4 and axis > 1 else SEQUENCE_LENGTH)
            if dim.dim_param:
                size = named.setdefault(dim.dim_param, size)
            assumed |= axis > 0 and size != 1
            dim.dim_value = size
    return assumed
