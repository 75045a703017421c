"""The weights of an ONNX file as plain arrays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from onnx import TensorProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.layout import Array
from sparsepipe.graph.load import load
from sparsepipe.graph.select import uses

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def read(path: Path) -> dict[str, Array]:
    """The constant weights of floating-point type, under their names and in their shapes in the file.

    Constants are initializers, dense or sparse, and Constant nodes, in subgraphs and functions, too. A name there that
    another graph has as well is followed by its place. bfloat16 becomes float32.

    Raises:
        GraphError: the file is missing or damaged, or has no such weight.
    """
    found = {use.key: use.weight for use in uses(load(path)) if use.weight.data_type in FLOATS}
    if not found:
        raise GraphError("No node of this file has a constant weight of floating-point type.", where=str(path))
    times = Counter(name for _, name in found)
    state = {
        f"{name} in {home}" if home and times[name] > 1 else name: _to_array(tensor, f"{path}: {name}")
        for (home, name), tensor in found.items()
    }
    return dict(sorted(state.items()))


def _to_array(tensor: TensorProto, where: str) -> Array:
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise GraphError(f"The tensor is malformed: {error}.", where=where) from error
    return array.astype(np.float32) if tensor.data_type == TensorProto.BFLOAT16 else array
