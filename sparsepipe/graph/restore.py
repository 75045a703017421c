"""The way back from the `universal` target: operators of domain `sparsepipe` as standard ones with dense weights.

A compact weight is decoded, and what its operator means is written out as the fallback body has it: a product, then
perhaps a bias, a sum and an activation. Whatever reads ONNX files then sees ordinary weights that hold zeros, and an
export of the result encodes the same weights again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import all_nodes, graphs, index, label, mentioned, opset, subgraphs
from sparsepipe.graph.tidy import tidy
from sparsepipe.native import operators

NEWER = "It was written by a newer version of sparsepipe, or by something else; install the newest one."
FLOAT_BYTES = 4
_SIZES = {
    "SparseConv": ("out_channels", "in_channels"),
    "SparseLinear": ("out_features", "in_features"),
    "DepthwiseConv": (),
}
"""The attributes with the first dimensions of a compact weight."""
Array = NDArray[Any]


@dataclass(frozen=True)
class Compact:
    """How a universal file stores one weight.

    Attributes:
        name: of the dense weight that has taken its place.
        op: the operator that uses it.
        block: rows of its blocks; 0 for the weight of a DepthwiseConv, which is stored dense.
        mode: how the kernel packs its input: one of `operators.MODES`, or its number where that is not known.
        bytes: of its values and deltas.
    """

    name: str
    op: str
    block: int
    mode: str
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
    if sum(math.prod(node.shape) for node in _compact_nodes(model, where)) * FLOAT_BYTES > limit:
        raise GraphError("Its weights have more than 2 GB when they are dense; no ONNX file holds that.", where=where)
    restorer = _Restorer(opset(model), mentioned(model.graph), where)
    restorer.restore(model.graph, {})
    if not any(_is_ours(node) for node in all_nodes(model)):
        for functions in [one for one in model.functions if one.domain == operators.DOMAIN]:
            model.functions.remove(functions)
        for entry in [one for one in model.opset_import if one.domain == operators.DOMAIN]:
            model.opset_import.remove(entry)
    return restorer.rows


def _is_ours(node: NodeProto) -> bool:
    return node.domain == operators.DOMAIN


class _Node:
    """A node of the domain, read and checked.

    Attributes:
        base: a key of `operators.INPUTS`.
        inputs: the names of its inputs, by what they are.
        attributes: by name.
        shape: of its weight, [O, ...]; of a DepthwiseConv (): its weight is dense.
        block: rows of the blocks.
        mode: as of `Compact`.
    """

    def __init__(self, node: NodeProto, where: str) -> None:
        base = operators.base_of(node.op_type)
        self.where = f"{where}, node '{label(node)}'"
        if base is None:
            raise GraphError(f"The operator '{node.op_type}' is not known.", where=self.where, advice=NEWER)
        self.proto, self.base = node, base
        self.attributes = {given.name: helper.get_attribute_value(given) for given in node.attribute}
        names = zip(operators.INPUTS[base], node.input, strict=False)
        self.inputs = {name: str(value) for name, value in names if value}
        activation = self._get("activation", bytes, b"none").decode(errors="replace")
        residual = "residual" in self.inputs
        known = activation in operators.ACTIVATIONS
        if not known or node.op_type != operators.operator_name(base, activation, residual=residual):
            raise self.malformed(f"its activation is '{activation}', and it has {'a' if residual else 'no'} residual")
        self.shape = self._shape()
        self.block, mode = self._get("block", int, 1), self._get("mode", int, 0)
        modes = operators.MODES.get(base, ("auto",))
        self.mode = modes[mode] if 0 <= mode < len(modes) else str(mode)

    def malformed(self, reason: str) -> GraphError:
        return GraphError(f"{self.proto.op_type} is malformed: {reason}.", where=self.where)

    def _shape(self) -> tuple[int, ...]:
        sizes: Sequence[Any] = [self._get(name, int) for name in _SIZES[self.base]]
        if self.base == "SparseConv":
            sizes = [*sizes, *self._get("kernel_shape", list)]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise self.malformed(f"its weight has the shape {list(sizes)}")
        return tuple(sizes)

    def _get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        if not isinstance(value, kind):
            raise self.malformed(f"its attribute '{name}' is {value!r}")
        return value


def _compact_nodes(model: ModelProto, where: str) -> Iterator[_Node]:
    """The nodes of which each compact weight is counted once."""
    seen: set[tuple[Any, ...]] = set()
    for number, graph in enumerate(graphs(model)):
        for node in filter(_is_ours, graph.node):
            read = _Node(node, where)
            key = (number, *node.input[1:3], *read.shape)
            if read.shape and key not in seen:
                seen.add(key)
                yield read


class _Restorer:
    """Restores graph after graph; `rows` says what was found."""

    def __init__(self, version: int, taken: set[str], where: str) -> None:
        self._opset, self._taken, self._where = version, taken, where
        self.rows: list[Compact] = []

    def restore(self, graph: GraphProto, outer: Mapping[str, TensorProto]) -> None:
        """Restore the nodes of `graph` and of its subgraphs; `outer` are the constants around it."""
        inputs = {value.name for value in graph.input}
        constants = {**outer, **index(graph).constants}
        constants = {name: tensor for name, tensor in constants.items() if name not in inputs}
        weights: dict[tuple[Any, ...], str] = {}
        nodes: list[NodeProto] = []
        for node in graph.node:
            for inner in subgraphs(node):
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
        node = _Node(proto, self._where)
        held = [node.inputs.get(name, "") for name in ("values", "deltas")] if node.shape else []
        if any(name not in constants for name in held):
            return [proto]
        if node.shape:
            key = (*held, node.base, *node.shape, node.block)
            if key not in weights:
                weights[key] = self._decoded(node, graph, *(constants[name] for name in held))
            weight = weights[key]
        else:
            weight = node.inputs.get("W", "")
            self.rows.append(Compact(weight, proto.op_type, 0, node.mode, 0))
        return self._written_out(node, weight, constants)

    def _decoded(self, node: _Node, graph: GraphProto, values: TensorProto, deltas: TensorProto) -> str:
        """The name of the dense weight of `node`, which becomes an initializer."""
        try:
            arrays = [numpy_helper.to_array(tensor) for tensor in (values, deltas)]
            weight: Array = operators.decode(arrays[0], arrays[1], node.shape, node.block)
        except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
            raise node.malformed(str(error).rstrip(".")) from error
        if node.base == "SparseLinear":
            weight = np.ascontiguousarray(weight.T)
        name = self._fresh(f"{node.inputs['values'].removesuffix('.values')}.weight")
        graph.initializer.append(numpy_helper.from_array(weight, name))
        size = sum(array.nbytes for array in arrays)
        self.rows.append(Compact(name, node.proto.op_type, node.block, node.mode, size))
        return name

    def _written_out(self, node: _Node, weight: str, constants: Mapping[str, TensorProto]) -> list[NodeProto]:
        """The standard nodes, with names and attributes of their own."""
        proto = NodeProto()
        proto.CopyFrom(node.proto)
        place = operators.INPUTS[node.base].index("B")
        if len(proto.input) > place and _is_nothing(constants.get(proto.input[place])):
            proto.input[place] = ""
        names = {**node.inputs, "W": weight, "Y": proto.output[0]}
        made = operators.standard_nodes(proto, self._opset)
        if made[-1].op_type == "Identity":  # of no activation
            names[made.pop().input[0]] = proto.output[0]
        for step in made:
            inputs, outputs = list(step.input), list(step.output)
            names |= {name: self._fresh(f"{label(proto)}/{name}") for name in outputs if name not in names}
            del step.input[:], step.output[:]
            step.input.extend(names[name] for name in inputs)
            step.output.extend(names[name] for name in outputs)
            resolved = [_resolved(given, node.attributes) for given in step.attribute]
            del step.attribute[:]
            step.attribute.extend(given for given in resolved if given is not None)
        made[0].name = proto.name
        return made

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _is_nothing(bias: TensorProto | None) -> bool:
    """Whether a bias is +0 everywhere: the layer had none."""
    return bias is not None and bias.data_type == TensorProto.FLOAT and not any(numpy_helper.to_array(bias).tobytes())


def _resolved(given: AttributeProto, attributes: Mapping[str, Any]) -> AttributeProto | None:
    """An attribute of a body with the value that the node gives it; None where it gives none.

    A number in a Constant node becomes a tensor, as other parts expect it there.
    """
    if not given.ref_attr_name:
        return given
    if given.ref_attr_name not in attributes:
        return None
    value = attributes[given.ref_attr_name]
    if given.name == "value_float":
        return helper.make_attribute("value", numpy_helper.from_array(np.array(value, np.float32)))
    return helper.make_attribute(given.name, value)
