"""Fold batch normalisation into the weights before it, and drop what does nothing when a network is used.

A batch normalisation that follows a convolution or a linear layer is a scale and a shift of each output channel
(Jacob et al., arXiv 1712.05877, section 3.2):

    s = gamma / sqrt(var + eps),    W' = s W,    b' = s (b - mean) + beta

Scaling keeps every zero of W, so a sparse weight stays as sparse as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from sparsepipe.graph.index import (
    Index,
    Names,
    attribute,
    copy,
    index,
    integer,
    is_standard,
    label,
    number,
)
from sparsepipe.graph.tidy import tidy

FREE_WEIGHTS_SINCE = 4  # IR version
DEFAULT_EPSILON = 1e-5  # of BatchNormalization in the ONNX standard
Array = NDArray[Any]


@dataclass(frozen=True)
class Unfolded:
    """A batch normalisation that stays a node of its own."""

    node: str
    reason: str


class _NotFoldable(Exception):
    """Why one batch normalisation stays as it is."""


def fold(model: ModelProto) -> tuple[ModelProto, list[Unfolded]]:
    """A copy of `model` with batch normalisations folded and pass-through nodes and unused initializers removed.

    A folded layer's output takes the name of the batch normalisation's output. A layer is folded only if it alone
    uses its weight and only the batch normalisation uses its output. Arithmetic is in float64, the result is stored
    in the weight's own type; zeros stay exactly +0.0. In files from before IR version 4, where every weight had to be
    an input of the network, too, weights are no inputs afterwards.

    Returns:
        The folded model, and the batch normalisations that could not be folded.
    """
    result = copy(model)
    graph = result.graph
    if result.ir_version < FREE_WEIGHTS_SINCE:
        _drop_weights_from_inputs(graph)
        result.ir_version = FREE_WEIGHTS_SINCE
    found = index(graph)
    _drop_pass_through(graph, found)
    unfolded = _fold_batch_norms(graph, found)
    tidy(graph)
    return result, unfolded


def _fold_batch_norms(graph: GraphProto, found: Index) -> list[Unfolded]:
    names, gone, left = Names(graph), [], []
    for position, node in enumerate(graph.node):
        if is_standard(node, "BatchNormalization"):
            try:
                _fold_into_producer(graph, node, found, names)
                gone.append(position)
            except _NotFoldable as reason:
                left.append(Unfolded(label(node), str(reason)))
    _delete(graph, gone)
    return left


def _fold_into_producer(graph: GraphProto, norm: NodeProto, found: Index, names: Names) -> None:
    layer = found.producers.get(norm.input[0])
    if layer is None or not is_standard(layer, *_FOLDERS):
        before = "the input of the network" if layer is None else f"{layer.op_type} '{label(layer)}'"
        raise _NotFoldable(f"it follows {before}, not a convolution or a linear layer")
    if any(norm.output[1:]) or integer(norm, "training_mode", 0):
        raise _NotFoldable("it is in training mode")
    if len(found.consumers[layer.output[0]]) > 1 or found.pinned(layer.output[0]):
        raise _NotFoldable(f"the output of '{label(layer)}' is used elsewhere, too")
    weight = found.constants.get(layer.input[1])
    if weight is None:
        raise _NotFoldable(f"the weight of '{label(layer)}' is not constant")
    if len(found.consumers[layer.input[1]]) > 1 or found.pinned(layer.input[1]):
        raise _NotFoldable(f"the weight '{layer.input[1]}' is shared")
    scale, shift = _scale_and_shift(norm, found)
    bias = _constant(layer.input[2], found, "bias") if len(layer.input) > 2 and layer.input[2] else None
    new_weight, new_bias = _FOLDERS[layer.op_type](layer, numpy_helper.to_array(weight), bias, scale, shift)
    found.remove(norm)
    found.remove(layer)
    _replace(graph, found, layer, new_weight, new_bias, names)
    layer.output[0] = norm.output[0]
    found.add(layer)


def _scale_and_shift(norm: NodeProto, found: Index) -> tuple[Array, Array]:
    """`scale` and `shift` in float64, so that the batch normalisation computes scale * x + shift."""
    names = ("scale", "shift", "mean", "variance")
    gamma, beta, mean, variance = (
        _constant(name, found, what) for name, what in zip(norm.input[1:5], names, strict=True)
    )
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + number(norm, "epsilon", DEFAULT_EPSILON))
        shift = beta - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise _NotFoldable("its variance is not positive, or a value is not finite")
    return scale, shift


def _constant(name: str, found: Index, what: str) -> Array:
    if name not in found.constants:
        raise _NotFoldable(f"the {what} '{name}' is not constant")
    return numpy_helper.to_array(found.constants[name]).astype(np.float64)


def _fold_conv(layer: NodeProto, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """Weight [O, I / groups, *k]: one scale for each output channel O."""
    factor = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return _scaled(weight, factor), _stored(shift if bias is None else bias * scale + shift, weight)


def _fold_conv_transpose(
    layer: NodeProto, weight: Array, bias: Array | None, scale: Array, shift: Array
) -> tuple[Array, Array]:
    """Weight [I, O / groups, *k]: the rows of group g make the output channels g * O / groups and on."""
    groups = integer(layer, "group", 1)
    rows = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    factor = rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    return _scaled(weight, factor), _stored(shift if bias is None else bias * scale + shift, weight)


def _fold_gemm(layer: NodeProto, weight: Array, bias: Array | None, scale: Array, shift: Array) -> tuple[Array, Array]:
    """Weight [N, K] with transB, else [K, N]; the output is alpha A W + beta C, and beta moves into C."""
    factor = scale[:, None] if integer(layer, "transB", 0) else scale[None, :]
    rows = number(layer, "beta", 1.0) * bias if bias is not None else np.zeros(1)
    if rows.ndim > 1 and rows.shape[0] > 1:
        raise _NotFoldable("the bias differs from row to row")
    new_weight, new_bias = _scaled(weight, factor), _stored(rows.reshape(-1) * scale + shift, weight)
    if (beta := attribute(layer, "beta")) is not None:
        beta.f = 1.0
    return new_weight, new_bias


_FOLDERS: Mapping[str, Callable[[NodeProto, Array, Array | None, Array, Array], tuple[Array, Array]]] = {
    "Conv": _fold_conv,
    "ConvTranspose": _fold_conv_transpose,
    "Gemm": _fold_gemm,
}


def _scaled(weight: Array, factor: Array) -> Array:
    product = weight.astype(np.float64) * factor
    product[weight == 0] = 0.0  # a negative scale would make -0.0 of it
    return _stored(product, weight)


def _stored(value: Array, like: Array) -> Array:
    with np.errstate(over="ignore"):
        stored = value.astype(like.dtype)
    if not np.isfinite(stored.astype(np.float64)).all():
        raise _NotFoldable(f"a folded value does not fit into {like.dtype}")
    return stored


def _replace(graph: GraphProto, found: Index, layer: NodeProto, weight: Array, bias: Array, names: Names) -> None:
    """Give `layer` a new weight and bias under the old names; a bias that others use, too, is left to them."""
    name = layer.input[1]
    found.constants[name].CopyFrom(numpy_helper.from_array(weight, found.constants[name].name))
    old = layer.input[2] if len(layer.input) > 2 else ""
    if old and old not in found.consumers and not found.pinned(old):
        found.constants[old].CopyFrom(numpy_helper.from_array(bias, found.constants[old].name))
        return
    stem = name.removesuffix(".weight")
    graph.initializer.append(numpy_helper.from_array(bias, names.fresh(f"{stem}.bias")))
    found.store(graph.initializer[-1])
    del layer.input[2:]
    layer.input.append(graph.initializer[-1].name)


def _drop_weights_from_inputs(graph: GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    for value in [value for value in graph.input if value.name in weights]:
        graph.input.remove(value)


def _drop_pass_through(graph: GraphProto, found: Index) -> None:
    """Remove Identity and Dropout nodes: in use, both hand on their input."""
    gone = []
    for position, node in enumerate(graph.node):
        if not is_standard(node, "Identity", "Dropout") or not _passes_through(node, found):
            continue
        source, target = node.input[0], node.output[0]
        if not found.pinned(target):
            found.remove(node)
            _rename_inputs(found, target, source)
        elif target not in found.captured and source in found.producers and not found.pinned(source):
            found.remove(node)
            producer = found.producers[source]  # it can write the output itself
            found.remove(producer)
            producer.output[list(producer.output).index(source)] = target
            found.add(producer)
            _rename_inputs(found, source, target)
        else:
            continue
        gone.append(position)
    _delete(graph, gone)


def _passes_through(node: NodeProto, found: Index) -> bool:
    if any(node.output[1:]):  # the mask of a Dropout
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    training = found.constants.get(node.input[2])
    return training is not None and not numpy_helper.to_array(training).any()


def _rename_inputs(found: Index, old: str, new: str) -> None:
    for node in found.consumers.get(old, []):
        found.remove(node)
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new
        found.add(node)


def _delete(graph: GraphProto, positions: Sequence[int]) -> None:
    for position in reversed(positions):
        del graph.node[position]
