"""Which tensors of a network have an int8 form, and the ranges that a training observed of them."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import ModelProto

from sparsepipe.graph.index import index, is_standard
from sparsepipe.quantization.calibrate import Ranges, with_ranges
from sparsepipe.quantization.normal import normal_form


def quantised_tensors(model: ModelProto) -> set[str]:
    """The tensors that hold bytes in the int8 form of `model`, by the names that they have in `model`.

    A layer before a ReLU or a Clip hands on bytes only behind it, so its own output is none of them.

    Args:
        model: float32, with batch normalisations folded.

    Raises:
        GraphError: onnxruntime cannot quantise it.
    """
    model = normal_form(model)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    names = {value.name for value in graph.input if value.name not in weights}
    names |= {name for node in graph.node for name in node.output if name}
    made = with_ranges(model, dict.fromkeys(names, (0.0, 1.0)))  # which tensors they are does not depend on ranges
    found = {node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    # What is quantised of an output of the network has another name, and what comes back has the output's.
    found |= {node.output[0] for node in made.graph.node if node.op_type == "DequantizeLinear"}
    return found & names


def completed(model: ModelProto, observed: Ranges) -> tuple[Ranges, set[str]]:
    """The observed ranges of tensors of `model`, and the quantised tensors for which there is none.

    A layer before a ReLU or Clip that alone uses its output gets the range behind it, as onnxruntime's tools would give
    it.

    Raises:
        GraphError: onnxruntime cannot quantise the model.
    """
    made = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    found: dict[str, tuple[float, float]] = {name: limits for name, limits in observed.items() if name in made}
    users = index(model.graph)
    for node in model.graph.node:
        if is_standard(node, "Relu", "Clip") and node.output[0] in found:
            before = node.input[0]
            if len(users.consumers[before]) == 1 and not users.pinned(before):
                found.setdefault(before, found[node.output[0]])
    return found, quantised_tensors(model) - found.keys()


def layer_inputs(model: ModelProto, weights: Mapping[str, str]) -> dict[str, str]:
    """The tensors that go into layers.

    Args:
        model: any.
        weights: layer -> name of its weight.

    Returns:
        Layer -> tensor, for those whose weight is an operand of a convolution or a product.
    """
    by_weight = {
        node.input[1]: node.input[0] for node in model.graph.node if is_standard(node, "Conv", "Gemm", "MatMul")
    }
    return {layer: by_weight[weight] for layer, weight in weights.items() if weight in by_weight}
