"""The way back from the `universal` target: operators of domain `sparsepipe` as standard ones with dense weights.

A compact weight is decoded, and what its operator means is written out as the fallback body has it: a product, then
perhaps a bias, a sum and an activation. Whatever reads ONNX files then sees ordinary weights that hold zeros, and an
export of the result encodes the same weights again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.compact import NEWER, CompactNode
from sparsepipe.graph.index import NUMBERS, Names, all_nodes, graphs, index, label, opset, subgraphs
from sparsepipe.graph.tidy import tidy
from sparsepipe.native import operators, quantized

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Compact:
    """How a universal file stores one weight.

    Attributes:
        name: of the dense weight that has taken its place.
        op: the operator that uses it.
        stored_as: its format: "csr", "bsr 4x1", or "dense" for that of a depthwise convolution.
        mode: how the kernel packs its input; None where the weight is dense.
        bytes: of its values and deltas.
    """

    name: str
    op: str
    stored_as: str
    mode: str | None
    bytes: int


def restore(model: ModelProto, *, where: str, limit: int) -> list[Compact]:
    """Turn the nodes of domain `sparsepipe` into standard ones, in place, with the weights as initializers.

    Nodes that share a compact weight share the dense one. A weight `stem.values` becomes `stem.weight`. Nodes whose
    weight is not constant stay, with their function.

    Args:
        model: any model.
        where: what to call it in an error.
        limit: most bytes that the weights may have when they are dense.

    Returns:
        A row for each such weight, in the order of the graph.

    Raises:
        GraphError: an operator is not known here, a node is malformed, or the weights are too large.
    """
    if not any(_is_ours(node) for node in all_nodes(model)):
        return []
    version = next((entry.version for entry in model.opset_import if entry.domain == operators.DOMAIN), 0)
    if version > operators.VERSION:
        raise GraphError(f"Its operators are of version {version}, not {operators.VERSION}.", where=where, advice=NEWER)
    for node in all_nodes(model):
        if _is_ours(node) and node.op_type == "QMaxPool":  # without a weight: the standard operator itself
            node.domain, node.op_type = "", "MaxPool"
    if sum(math.prod(shape) for shape in _shapes(model, where)) * FLOAT_BYTES > limit:
        raise GraphError("Its weights have more than 2 GB when they are dense; no ONNX file holds that.", where=where)
    restorer = _Restorer(opset(model), Names(model.graph), where)
    restorer.restore(model.graph, {})
    if not any(_is_ours(node) for node in all_nodes(model)):
        for function in [one for one in model.functions if one.domain == operators.DOMAIN]:
            model.functions.remove(function)
        for entry in [one for one in model.opset_import if one.domain == operators.DOMAIN]:
            model.opset_import.remove(entry)
    return restorer.rows


def _is_ours(node: NodeProto) -> bool:
    return node.domain == operators.DOMAIN


def _has_weight(node: NodeProto) -> bool:
    return _is_ours(node) and node.op_type != "QLookup"


def _shapes(model: ModelProto, where: str) -> Iterator[tuple[int, ...]]:
    """The shapes of all compact weights, each weight once."""
    seen: set[tuple[Any, ...]] = set()
    for number, graph in enumerate(graphs(model)):
        for proto in filter(_has_weight, graph.node):
            node = CompactNode(proto, where)
            key = (number, node.inputs.get("values"), node.shape)
            if node.shape and key not in seen:
                seen.add(key)
                yield node.shape


class _Restorer:
    """Restores graph after graph; `rows` says what was found."""

    def __init__(self, version: int, names: Names, where: str) -> None:
        self._opset, self._fresh, self._where = version, names.fresh, where
        self.rows: list[Compact] = []

    def restore(self, graph: GraphProto, outer: Mapping[str, TensorProto]) -> None:
        """Restore the nodes of `graph` and of its subgraphs; `outer` are the constants around it."""
        inputs = {value.name for value in graph.input}
        constants = {**outer, **index(graph).constants}
        constants = {name: tensor for name, tensor in constants.items() if name not in inputs}
        weights: dict[tuple[Any, ...], str] = {}
        nodes: list[NodeProto] = []
        for node in graph.node:
            for _, inner in subgraphs(node):
                self.restore(inner, constants)
            nodes += self._standard(node, graph, constants, weights) if _is_ours(node) else [node]
        del graph.node[:]
        graph.node.extend(nodes)
        tidy(graph)

    def _standard(
        self,
        proto: NodeProto,
        graph: GraphProto,
        constants: Mapping[str, TensorProto],
        weights: dict[tuple[Any, ...], str],
    ) -> list[NodeProto]:
        """What stands in the place of one node."""
        if proto.op_type == "QLookup":
            return self._looked_up(proto)
        node = CompactNode(proto, self._where)
        held = [node.inputs.get(name, "") for name in ("values", "deltas")] if node.shape else []
        if any(name not in constants for name in held):
            return [proto]
        for dense in [node.inputs[name] for name in ("depthwise_W",) if name in node.inputs]:
            self.rows.append(Compact(dense, proto.op_type, "dense", None, 0))
        key = (*held, node.kind.outputs_last, *node.shape, node.block)
        if not node.shape:
            weight = node.inputs.get("W", "")
            self.rows.append(Compact(weight, proto.op_type, node.stored_as, None, 0))
        elif key in weights:
            weight = weights[key]
        else:
            weight = weights[key] = self._decode(node, graph, *(constants[name] for name in held))
        biases = {name: constants.get(node.inputs.get(name, "")) for name in ("B", "depthwise_B")}
        return self._written_out(node, weight, [name for name, bias in biases.items() if _is_nothing(bias)])

    def _looked_up(self, proto: NodeProto) -> list[NodeProto]:
        """A table written out as the body of its operator."""
        made = list(quantized.function_for(proto, self._opset).node)
        if len(proto.input) != 2 or len(proto.output) != 1:
            raise GraphError("QLookup is malformed: it has not two inputs and an output.", where=self._where)
        names = {"X": proto.input[0], "table": proto.input[1], "Y": proto.output[0]}
        for step in made:
            names |= {name: self._fresh(f"{label(proto)}/{name}") for name in step.output if name not in names}
            step.input[:] = [names[name] for name in step.input]
            step.output[:] = [names[name] for name in step.output]
        made[-1].name = proto.name
        return made

    def _decode(self, node: CompactNode, graph: GraphProto, values: TensorProto, deltas: TensorProto) -> str:
        """The name of the dense weight of `node`, which becomes an initializer."""
        name = self._fresh(f"{node.inputs['values'].removesuffix('.values')}.weight")
        graph.initializer.append(numpy_helper.from_array(node.decoded(values, deltas), name))
        size = sum(numpy_helper.to_array(tensor).nbytes for tensor in (values, deltas))
        self.rows.append(Compact(name, node.proto.op_type, node.stored_as, node.mode, size))
        return name

    def _written_out(self, node: CompactNode, weight: str, without: Collection[str]) -> list[NodeProto]:
        """The standard nodes, with names and attributes of their own; inputs `without` are left out."""
        result = node.proto.output[0]
        made = node.steps(self._opset, without)
        names = {**node.inputs, "W": weight, "Y": result}
        if made[-1].op_type == "Identity":  # of no activation
            names[made.pop().input[0]] = result
        for step in made:
            inputs, outputs = list(step.input), list(step.output)
            names |= {name: self._fresh(f"{label(node.proto)}/{name}") for name in outputs if name not in names}
            del step.input[:], step.output[:]
            step.input.extend(names[name] for name in inputs)
            step.output.extend(names[name] for name in outputs)
            resolved = [_resolved(given, node.attributes) for given in step.attribute]
            del step.attribute[:]
            step.attribute.extend(given for given in resolved if given is not None)
        next(step for step in made if weight in step.input).name = node.proto.name
        for step in made:
            if node.inputs.get("depthwise_W") in step.input:
                step.name = f"{label(node.proto)}/depthwise"
        return made


def _is_nothing(bias: TensorProto | None) -> bool:
    """Whether a bias is +0 everywhere: the layer had none."""
    return bias is not None and bias.data_type == TensorProto.FLOAT and not any(numpy_helper.to_array(bias).tobytes())


def _resolved(given: AttributeProto, attributes: Mapping[str, Any]) -> AttributeProto | None:
    """An attribute of a body with the value that the node gives it; None where it gives none.

    Numbers in a Constant node become a tensor, as other parts expect them there.
    """
    if not given.ref_attr_name:
        return given
    if given.ref_attr_name not in attributes:
        return None
    value = attributes[given.ref_attr_name]
    if given.name in NUMBERS:
        return helper.make_attribute("value", numpy_helper.from_array(np.array(value, NUMBERS[given.name])))
    return helper.make_attribute(given.name, value)
