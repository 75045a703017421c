"""Quantised ONNX files: whether a file is one, and how much noise each of its layers adds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from sparsepipe.graph.index import all_nodes, is_standard
from sparsepipe.native import operators, quantized

Array = NDArray[Any]

INTEGER_OPS = (
    "QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
)  # fmt: skip
SUFFIX = "_QuantizeLinear_Output"
"""What onnxruntime's tools put behind the name of an fp32 tensor for its bytes."""


@dataclass(frozen=True)
class Bytes:
    """A quantised tensor of a graph.

    Attributes:
        name: of the bytes.
        stands_for: name that the tensor has, or had before quantisation, in fp32.
        scale: size of a step.
        zero_point: the byte that means 0.
        before: the quantised tensors that it is computed from, by name of their bytes.
    """

    name: str
    stands_for: str
    scale: float
    zero_point: int
    before: tuple[str, ...]


@dataclass(frozen=True)
class Noise:
    """The noise of a quantised tensor against fp32.

    Attributes:
        layer: the tensor's name in fp32.
        sqnr_db: signal to quantisation noise up to here, 10 log10(sum s^2 / sum (s - q)^2); None where it has no finite
            value.
        added: noise that comes in here: the ratio noise to signal of this tensor less the largest of those before.
    """

    layer: str
    sqnr_db: float | None
    added: float


def is_quantised(model: ModelProto) -> bool:
    """Whether a graph computes with bytes."""
    return any(
        is_standard(node, *INTEGER_OPS) or (node.domain == operators.DOMAIN and _scale_place(node) is not None)
        for node in all_nodes(model)
    )


def tensors(graph: GraphProto) -> list[Bytes]:
    """The activations of a graph that are bytes with one constant scale, in the order in which they are made."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output if name}
    found: dict[str, Bytes] = {}
    for node in graph.node:
        place = _scale_place(node)
        if place is None or len(node.input) <= place + 1:
            continue
        scale, zero_point = (constants.get(node.input[place + offset]) for offset in (0, 1))
        if scale is None or zero_point is None or math.prod(scale.dims) != 1:
            continue
        name = node.output[0]
        found[name] = Bytes(
            name=name,
            stands_for=node.input[0] if node.op_type == "QuantizeLinear" else name.removesuffix(SUFFIX),
            scale=float(numpy_helper.to_array(scale).reshape(-1)[0]),
            zero_point=int(numpy_helper.to_array(zero_point).reshape(-1)[0]),
            before=tuple(_before(node, producers, found)),
        )
    return list(found.values())


def noise(order: Sequence[Bytes], reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> list[Noise]:
    """The noise of each tensor that both have, in the order of the graph.

    Args:
        order: `tensors` of the candidate.
        reference: values in fp32 by name.
        candidate: bytes by name.
    """
    ratios: dict[str, float] = {}
    found = []
    for tensor in order:
        before = max((ratios[name] for name in tensor.before if name in ratios), default=0.0)
        expected, stored = reference.get(tensor.stands_for), candidate.get(tensor.name)
        if expected is None or stored is None or expected.size != stored.size:
            ratios[tensor.name] = before
            continue
        values = (stored.astype(np.float64) - tensor.zero_point) * tensor.scale
        signal = float(np.square(expected.astype(np.float64)).sum())
        error = float(np.square(values.ravel() - expected.astype(np.float64).ravel()).sum())
        ratio = error / signal if signal > 0 else (math.inf if error else 0.0)
        ratios[tensor.name] = ratio
        usable = 0 < ratio < math.inf
        found.append(Noise(tensor.stands_for, -10 * math.log10(ratio) if usable else None, max(ratio - before, 0.0)))
    return found


def _scale_place(node: NodeProto) -> int | None:
    """Which input of a node is the scale of the bytes that it gives; None where it gives none."""
    if is_standard(node, "QuantizeLinear"):
        return 1
    if node.domain != operators.DOMAIN:
        return None
    base = next((name for name in quantized.INPUTS if node.op_type.startswith(name)), None)
    if base is None:
        return None
    names = quantized.INPUTS[base][: len(node.input)]
    return next((names.index(name) for name in ("sum_scale", "y_scale") if name in names), None)


def _before(node: NodeProto, producers: Mapping[str, NodeProto], known: Mapping[str, Bytes]) -> Iterator[str]:
    """The nearest quantised tensors that a node depends on."""
    waiting, seen = list(node.input), set(node.input)
    while waiting:
        name = waiting.pop()
        if name in known:
            yield name
        elif name in producers:
            fresh = [one for one in producers[name].input if one and one not in seen]
            waiting += fresh
            seen.update(fresh)
