"""Zeros at random in a dense ONNX model, in the pattern and at the sparsity of a training that has not happened yet.

The layers are those that such a training prunes with the distribution `uniform`: every convolution and linear layer
but the first convolution, depthwise kernels, and weights that a block pattern does not fit. What is left is scaled by
1 / sqrt(density), so that the variance of each layer's output stays what it was (He et al., arXiv 1502.01852,
section 2.2) and activations neither die nor overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.formats.patterns import block_of
from sparsepipe.graph.index import attribute, copy, index, integer, is_standard
from sparsepipe.graph.select import Use, uses

UNSTRUCTURED = "unstructured"
PRUNED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Array = NDArray[Any]


@dataclass(frozen=True)
class Pruned:
    """What became of one weight.

    Attributes:
        name: of the weight.
        shape: as it is stored.
        nnz: values that are left.
        reason: why it stays dense; None where it does not.
    """

    name: str
    shape: tuple[int, ...]
    nnz: int
    reason: str | None


class _Dense(Exception):
    """Why a weight stays dense."""


def block_shape(pattern: str) -> tuple[int, int]:
    """Output and input channels of the blocks of a pattern: (1, 1) where it is `unstructured`.

    Raises:
        GraphError: the pattern is neither that nor `RxC`.
    """
    block = (1, 1) if pattern == UNSTRUCTURED else block_of(pattern)
    if block is None or min(block) < 1:
        raise GraphError(
            f"Zeros of the pattern '{pattern}' cannot be made.",
            where="pattern",
            advice=f"Use {UNSTRUCTURED}, or blocks of output x input channels such as 2x1 and 4x1.",
        )
    return block


def prune(model: ModelProto, sparsity: float, pattern: str, *, seed: int = 0) -> tuple[ModelProto, list[Pruned]]:
    """A copy of `model` with random zeros.

    Args:
        model: any dense model.
        sparsity: share of zeros in each weight that is pruned, in whole blocks: 0 <= sparsity < 1.
        pattern: `unstructured`, or `RxC` for blocks of R output x C input channels at each kernel tap.
        seed: of the masks.

    Raises:
        GraphError: the pattern is none of those, or no weight can be pruned.
    """
    block = block_shape(pattern)
    result = copy(model)
    stored = index(result.graph).stored
    random = np.random.default_rng(seed)
    found = list(uses(result))
    stem = next((use.node for use in found if use.node.op_type == "Conv"), None)
    rows: dict[tuple[str, str], Pruned] = {}
    for use in found:
        name = use.weight.name
        if use.key in rows:  # one mask serves all uses of a weight
            continue
        weight, reason = numpy_helper.to_array(use.weight), None
        try:
            if use.node is stem:
                raise _Dense("the first convolution")
            weight = _with_zeros(weight, _output_axis(use), sparsity, block, random)
            stored[name].CopyFrom(numpy_helper.from_array(weight, stored[name].name))
        except _Dense as why:
            reason = str(why)
        rows[use.key] = Pruned(name, tuple(weight.shape), int(np.count_nonzero(weight)), reason)
    reasons = {row.reason for row in rows.values()}
    if None not in reasons:
        listed = "; ".join(sorted(str(reason) for reason in reasons)) or "it has none"
        raise GraphError(f"No weight of the network can be pruned: {listed}.", where=result.graph.name)
    return result, list(rows.values())


def _output_axis(use: Use) -> int:
    """The axis of the stored weight that its outputs lie along, or `_Dense`."""
    node, weight = use.node, use.weight
    if use.place:
        raise _Dense(f"inside of {use.place}")
    if node.op_type not in PRUNED_OPS or not is_standard(node, node.op_type):
        raise _Dense(f"a weight of {node.op_type}")
    if weight.data_type != TensorProto.FLOAT:
        raise _Dense(f"{TensorProto.DataType.Name(weight.data_type)}, not FLOAT")
    if use.position != 1:
        raise _Dense("the left factor of a product")
    if integer(node, "group", 1) > 1 and weight.dims[1] == 1:
        raise _Dense("a depthwise kernel")
    rank = len(weight.dims)
    if node.op_type == "Conv":
        axis = 0
    elif node.op_type == "Gemm":
        axis = 0 if integer(node, "transB", 0) else 1
    else:
        axis = 1 if node.op_type == "ConvTranspose" else rank - 1
    for view in use.views:
        if not is_standard(view, "Transpose"):
            raise _Dense(f"it goes through {view.op_type}")
        order = attribute(view, "perm")
        axis = list(order.ints)[axis] if order is not None else rank - 1 - axis
    return axis


def _with_zeros(
    weight: Array, axis: int, sparsity: float, block: tuple[int, int], random: np.random.Generator
) -> Array:
    """`weight` with whole blocks of zeros at random and the rest scaled; `axis` is that of the outputs."""
    moved = np.moveaxis(weight, axis, 0)
    outputs, inputs, taps = *moved.shape[:2], math.prod(moved.shape[2:])
    r, c = block
    if outputs % r or inputs % c:
        raise _Dense(f"{outputs} outputs x {inputs} inputs are not divisible into blocks of {r}x{c}")
    groups = weight.size // (r * c)
    kept = max(1, round((1 - sparsity) * groups))
    mask = np.zeros(groups, bool)
    mask[random.permutation(groups)[:kept]] = True
    spread = mask.reshape(outputs // r, inputs // c, taps).repeat(r, axis=0).repeat(c, axis=1)
    scaled = moved * np.float32((groups / kept) ** 0.5)
    pruned = np.where(spread.reshape(moved.shape), scaled, np.float32(0))
    return np.ascontiguousarray(np.moveaxis(pruned, 0, axis))
