"""Elementwise steps between two quantised tensors as one table: what they make of each of the 256 bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel

from sparsepipe.graph.index import Index, fresh, index, is_standard
from sparsepipe.graph.shapes import Shapes
from sparsepipe.graph.tidy import tidy
from sparsepipe.native import quantized
from sparsepipe.quantization.layer import BYTES, Quantised, alike
from sparsepipe.runtime.sessions import run, session

ELEMENTWISE = """
Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh Div Elu Erf Exp Floor Gelu HardSigmoid HardSwish
Identity LeakyRelu Log Max Min Mish Mul Neg PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
Softsign Sqrt Sub Swish Tan Tanh ThresholdedRelu
"""
"""Operators of which each number depends on the number at the same place of their inputs alone."""
OLDEST_IR = 8


@dataclass(frozen=True)
class _Function:
    """How the bytes of one tensor follow from those of another.

    Attributes:
        source: the name of the bytes that it takes.
        nodes: what computes it, in the order of the graph, from DequantizeLinear on.
        step: the QuantizeLinear that ends it.
    """

    source: str
    nodes: list[NodeProto]
    step: NodeProto


def tabulate(graph: GraphProto, shapes: Shapes, opset: int) -> list[NodeProto]:
    """Make QLookup of all elementwise steps from one quantised tensor to another, in place; returns the new nodes.

    What lies between is computed in float32: roundings to bytes on the way are left out, but not their bounds, which
    may stand for a ReLU or Clip. So the result is nearer to the fp32 network's than that of bytes at each step.

    Args:
        graph: a quantised graph in topological order.
        shapes: those of its tensors.
        opset: version of its standard operators.
    """
    made: list[NodeProto] = []
    found = index(graph)
    sources = _sources(graph, found, shapes)
    # From the end: what only later steps needed is gone when it would be its turn.
    for step in reversed([node for node in graph.node if is_standard(node, "QuantizeLinear")]):
        output = step.output[0]
        function = _function(step, sources, found) if output in found.producers else None
        if function is None:
            continue
        name = fresh(f"{output}.table", graph)
        graph.initializer.append(numpy_helper.from_array(_values(function, found, opset), name))
        made.append(quantized.qlookup(function.source, name, output, name=step.name))
        place = next(place for place, node in enumerate(graph.node) if node.output[:1] == [output])
        graph.node.insert(place, made[-1])
        graph.node.remove(step)
        tidy(graph)
        found = index(graph)
    return made


def _sources(graph: GraphProto, found: Index, shapes: Shapes) -> dict[str, str]:
    """Tensor -> the bytes of which each of its numbers is a function, the same one at each place."""
    ranks = {name: len(tensor.dims) for name, tensor in found.constants.items() if math.prod(tensor.dims) == 1}
    sources: dict[str, str] = {}
    for node in graph.node:
        if len(node.output) != 1:
            continue
        name = node.output[0]
        if is_standard(node, "QuantizeLinear", "DequantizeLinear"):
            stored = node.input[0]
            if len(node.input) != 3 or any(number not in ranks for number in node.input[1:]):
                continue
            if is_standard(node, "QuantizeLinear"):
                if stored in sources:
                    sources[name] = sources[stored]
            elif stored in ranks:
                ranks[name] = ranks[stored]
            elif stored not in found.constants:
                sources[name] = sources.get(stored, stored)
        elif is_standard(node, *ELEMENTWISE.split()):
            moving = [given for given in node.input if given and given not in ranks]
            rank = max((shapes.rank(given) or 0 for given in moving), default=0)
            fits = all(ranks[given] <= rank for given in node.input if given in ranks)
            origins = {sources.get(given) for given in moving}
            if fits and len(origins) == 1 and (origin := origins.pop()) is not None:
                sources[name] = origin
    return sources


def _function(step: NodeProto, sources: Mapping[str, str], found: Index) -> _Function | None:
    """What ends in `step`; None where that is no function of bytes of the same type, or changes nothing."""
    source = sources.get(step.output[0])
    if source is None:
        return None
    seen: dict[str, NodeProto] = {}
    waiting = [step.input[0]]
    while waiting:
        name = waiting.pop()
        if name in seen or name == source or name in found.constants or not name:
            continue
        seen[name] = found.producers[name]
        waiting += seen[name].input
    nodes = [node for name, node in found.producers.items() if name in seen]
    starts = [node for node in nodes if node.input[0] == source]
    kinds = {found.constants[node.input[2]].data_type for node in (*starts, step)}
    if len(kinds) != 1 or not kinds <= set(BYTES):
        return None
    output = Quantised(step.output[0], step.input[1], step.input[2])
    if len(nodes) == 1 and alike(Quantised(*starts[0].input), output, found):
        return None
    return _Function(source, nodes, step)


def _values(function: _Function, found: Index, opset: int) -> NDArray[Any]:
    """The bytes that onnxruntime gives for all 256."""
    nodes: list[NodeProto] = []
    constants: dict[str, TensorProto] = {}
    for node in function.nodes:
        if is_standard(node, "QuantizeLinear"):
            continue
        if is_standard(node, "DequantizeLinear") and (before := found.producers.get(node.input[0])) in function.nodes:
            bounds = _bounds(node, found)
            constants |= {tensor.name: tensor for tensor in bounds}
            names = [before.input[0], *[tensor.name for tensor in bounds]]
            nodes.append(helper.make_node("Clip", names, [node.output[0]]))
        else:
            nodes.append(node)
    nodes.append(function.step)
    named = {name for node in nodes for name in node.input}
    constants |= {name: tensor for name, tensor in found.constants.items() if name in named}
    kind = found.constants[function.step.input[2]].data_type
    ends = [helper.make_tensor_value_info(name, kind, [256]) for name in (function.source, function.step.output[0])]
    graph = helper.make_graph(nodes, "table", ends[:1], ends[1:])
    for name, tensor in constants.items():
        graph.initializer.add().CopyFrom(tensor)
        graph.initializer[-1].name = name
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=OLDEST_IR)
    # As it stands: onnxruntime's optimisations would put its integer operators in place of these.
    opened = session(
        model.SerializeToString(), library=False, graph_optimization_level=GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    every = np.arange(256, dtype=np.uint8).view(helper.tensor_dtype_to_np_dtype(kind))
    return run(opened, {function.source: every}, where=function.step.name)[0].reshape(-1)


def _bounds(node: NodeProto, found: Index) -> list[TensorProto]:
    """The least and the largest number that bytes of DequantizeLinear stand for: 0, or half a step beyond their own."""
    scale, zero_point = (numpy_helper.to_array(found.constants[name]).reshape(()) for name in node.input[1:])
    limits = np.iinfo(zero_point.dtype)
    steps = [limit - int(zero_point) for limit in (limits.min, limits.max)]
    numbers = [np.float32(step + 0.5 * np.sign(step)) * scale for step in steps]
    names = [f"{node.output[0]}.{end}" for end in ("least", "largest")]
    return [numpy_helper.from_array(np.asarray(number), name) for number, name in zip(numbers, names, strict=True)]
