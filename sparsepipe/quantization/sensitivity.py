"""Which layers lose most in int8, and how many of them must stay fp32 for a wanted accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from sparsepipe.graph.finish import serialise
from sparsepipe.graph.index import Index, index, is_standard
from sparsepipe.quantization.calibrate import Feeds, Ranges, with_ranges
from sparsepipe.quantization.normal import LAYERS, obstacle
from sparsepipe.runtime.sessions import run, session

Outputs = list[list[NDArray[np.float64]]]


@dataclass(frozen=True)
class Sensitive:
    """A layer that may stay fp32, and why it comes where it does in the ranking.

    Attributes:
        output: what its node makes.
        sqnr_db: signal to noise of the network's outputs where this layer alone is int8.
    """

    output: str
    sqnr_db: float


def layers(model: ModelProto) -> list[str]:
    """Outputs of the nodes with constant weights that have an int8 form, in the order of the graph."""
    found = index(model.graph)
    return [
        node.output[0]
        for node in model.graph.node
        if is_standard(node, *LAYERS)
        and any(name in found.constants for name in node.input[:2])
        and obstacle(node, found) is None
    ]


def rank(
    model: ModelProto, found: Ranges, samples: Sequence[Feeds], advance: Callable[[str], None] = lambda note: None
) -> list[Sensitive]:
    """All layers, the one first whose int8 form alone moves the outputs of the network most.

    One network is run for each layer.

    Args:
        model: in normal form.
        found: the ranges of its activations.
        samples: input name -> array of each call.
        advance: called for each layer.
    """
    names = layers(model)
    expected = _outputs(model, samples)
    ranked = []
    for name in names:
        others = {other for other in names if other != name}
        ranked.append(Sensitive(name, _sqnr(expected, _outputs(mixed(model, found, others), samples))))
        advance(f"int8 noise of {name}")
    return sorted(ranked, key=lambda one: one.sqnr_db)


def mixed(model: ModelProto, found: Ranges, fp32: set[str]) -> ModelProto:
    """The int8 form of a model in which some layers stay fp32.

    What has no weights, such as a sum or pooling, is int8 only where what comes into it is: else its bytes would be
    made for it alone.

    Args:
        model: in normal form.
        found: the ranges of its activations.
        fp32: outputs of the layers that stay.
    """
    return with_ranges(model, found, exclude=_with_followers(model, fp32)) if fp32 else with_ranges(model, found)


def fewest(order: Sequence[frozenset[str]], accurate: Callable[[frozenset[str]], bool]) -> frozenset[str] | None:
    """The first of growing sets of layers that is enough, by bisection; None where the last one is not.

    Args:
        order: sets, each a part of the next.
        accurate: whether the network is accurate enough if these layers stay fp32; it is asked about log2(n) sets.
    """
    if not order or not accurate(order[-1]):
        return None
    low, high = 0, len(order) - 1
    while low < high:
        middle = (low + high) // 2
        if accurate(order[middle]):
            high = middle
        else:
            low = middle + 1
    return order[low]


def _with_followers(model: ModelProto, fp32: set[str]) -> set[str]:
    """Layers, and the nodes without weights all of whose inputs come from nothing but these."""
    found = index(model.graph)
    weighted = set(layers(model))
    bytes_at = {value.name: False for value in model.graph.input}
    stay = set(fp32)
    for node in model.graph.node:
        name = node.output[0] if node.output else ""
        if name in weighted:
            has_bytes = name not in fp32
        else:
            has_bytes = _any_bytes(node, found, bytes_at)
            if not has_bytes:
                stay.add(name)
        bytes_at.update((output, has_bytes) for output in node.output)
    return stay


def _any_bytes(node: NodeProto, found: Index, bytes_at: Mapping[str, bool]) -> bool:
    return any(bytes_at.get(name, False) for name in node.input if name not in found.constants)


def _outputs(model: ModelProto, samples: Sequence[Feeds]) -> Outputs:
    opened = session(serialise(model, where=model.graph.name), library=False)
    return [[np.asarray(value, np.float64) for value in run(opened, feeds)] for feeds in samples]


def _sqnr(expected: Outputs, found: Outputs) -> float:
    pairs = [pair for one, two in zip(expected, found, strict=True) for pair in zip(one, two, strict=True)]
    signal = sum(float(np.square(one).sum()) for one, _ in pairs)
    error = sum(float(np.square(one - two).sum()) for one, two in pairs)
    return 10 * math.log10(signal / error) if error and signal else math.inf
