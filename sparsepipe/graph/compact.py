"""A node of domain `sparsepipe`, read and checked: its weight, and what it means in standard operators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.index import label
from sparsepipe.native import operators, quantized

NEWER = "It was written by a newer version of sparsepipe, or by something else; install the newest one."
Array = NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """What the operators of one name have in common.

    Attributes:
        inputs: the names of their inputs.
        function: the fallback body; it makes the dense weight `W`, or takes it, where nothing is encoded.
        sizes: attributes with the first dimensions of the weight; empty where it is stored dense.
        kernel: the attribute with its further ones.
        decode: (values, deltas, shape, block) -> weight.
        outputs_last: `W` is the transposed weight.
        width: inputs of a block.
        taps: the further dimensions of the weight, where all nodes have the same.
    """

    inputs: Sequence[str]
    function: Callable[[NodeProto, int], FunctionProto]
    sizes: Sequence[str] = ()
    kernel: str | None = None
    decode: Callable[[Any, Any, Sequence[int], int], Array] = operators.decode
    outputs_last: bool = False
    width: int = 1
    taps: Sequence[int] = ()


CHANNELS, FEATURES = ("out_channels", "in_channels"), ("out_features", "in_features")
KINDS: Mapping[str, Kind] = {
    "SparseConv": Kind(operators.INPUTS["SparseConv"], operators.function_for, CHANNELS, "kernel_shape"),
    "SparseLinear": Kind(operators.INPUTS["SparseLinear"], operators.function_for, FEATURES, outputs_last=True),
    "SparseSeparableConv": Kind(
        operators.INPUTS["SparseSeparableConv"], operators.function_for, CHANNELS, taps=(1, 1)
    ),
    "DepthwiseConv": Kind(operators.INPUTS["DepthwiseConv"], operators.function_for),
    "StemConv": Kind(operators.INPUTS["StemConv"], operators.function_for),
    "SparseQConv": Kind(
        quantized.INPUTS["SparseQConv"], quantized.function_for, CHANNELS, "kernel_shape", quantized.decode,
        width=quantized.QUAD,
    ),
    "SparseQLinear": Kind(
        quantized.INPUTS["SparseQLinear"], quantized.function_for, FEATURES, decode=quantized.decode,
        width=quantized.QUAD,
    ),
    "QDepthwiseConv": Kind(quantized.INPUTS["QDepthwiseConv"], quantized.function_for),
}  # fmt: skip

_BASES = {
    **operators.BASES,
    **{
        operators.operator_name(base, activation, residual=residual): base
        for base in quantized.INPUTS.keys() & KINDS.keys()
        for activation in operators.ACTIVATIONS
        for residual in {False, "residual" in KINDS[base].inputs}
    },
}
"""The name of an operator -> the key of `KINDS` that it is a variant of."""


class CompactNode:
    """A node of the domain.

    Args:
        node: the node.
        where: what to call the file in an error.

    Attributes:
        proto: the node itself.
        base: the key of its kind.
        kind: its kind.
        attributes: by name.
        inputs: the names of its inputs, by what they are.
        shape: of its weight, [O, ...]; () where the weight is stored dense.
        block: rows of the blocks.
        mode: how the kernel packs its input: one of `operators.MODES`, or its number where that is not known.

    Raises:
        GraphError: the operator is not known here, or an attribute is missing or makes no sense.
    """

    def __init__(self, node: NodeProto, where: str) -> None:
        self.where = f"{where}, node '{label(node)}'"
        if node.op_type not in _BASES:
            raise GraphError(f"The operator '{node.op_type}' is not known.", where=self.where, advice=NEWER)
        self.proto, self.base = node, _BASES[node.op_type]
        self.kind = KINDS[self.base]
        self.attributes = {given.name: helper.get_attribute_value(given) for given in node.attribute}
        named = zip(self.kind.inputs, node.input, strict=False)
        self.inputs = {name: str(value) for name, value in named if value}
        if not all(isinstance(name, str) for name in self.attributes):  # protobuf gives what is not UTF-8 as bytes
            raise self.malformed("the name of an attribute is no text")
        activation = self._get("activation", bytes).decode(errors="replace")
        residual, pool = "residual" in self.inputs, "pool_shape" in self.attributes
        first = self._get("depthwise_activation", bytes, b"none").decode(errors="replace")
        known = {activation, first} <= operators.ACTIVATIONS.keys()
        if not known or node.op_type != operators.operator_name(
            self.base, activation, residual=residual, pool=pool, depthwise=first
        ):
            between = f", that between its convolutions '{first}'" if "depthwise_W" in self.kind.inputs else ""
            has = [f"{'a' if given else 'no'} {what}" for what, given in (("residual", residual), ("pooling", pool))]
            raise self.malformed(f"its activation is '{activation}'{between}, and it has {' and '.join(has)}")
        self.shape = self._shape()
        self.block, mode = self._get("block", int, 1), self._get("mode", int, 0)
        modes = operators.MODES.get(self.base, ("auto",))
        self.mode = modes[mode] if 0 <= mode < len(modes) else str(mode)

    @property
    def stored_as(self) -> str:
        """The format of its weight, as `inspect` names it."""
        if not self.shape:
            return "dense"
        return "csr" if self.block == self.kind.width == 1 else f"bsr {self.block}x{self.kind.width}"

    def malformed(self, reason: str) -> GraphError:
        """The error that says so."""
        return GraphError(f"{self.proto.op_type} is malformed: {reason}.", where=self.where)

    def decoded(self, values: TensorProto, deltas: TensorProto) -> Array:
        """The weight as the body's standard operators take it.

        Raises:
            GraphError: the arrays do not fit each other or the shape.
        """
        try:
            arrays = [numpy_helper.to_array(tensor) for tensor in (values, deltas)]
            weight = self.kind.decode(arrays[0], arrays[1], self.shape, self.block)
        except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
            raise self.malformed(str(error).rstrip(".")) from error
        return np.ascontiguousarray(weight.T) if self.kind.outputs_last else weight

    def steps(self, version: int, without: Collection[str] = ()) -> list[NodeProto]:
        """What follows from `W` and the inputs, as standard operators of opset `version`; the last one writes `Y`.

        Attributes refer to those of the node (`ref_attr_name`).

        Args:
            version: of the standard operators.
            without: inputs that take no part.
        """
        proto = NodeProto()
        proto.CopyFrom(self.proto)
        for place, name in enumerate(self.kind.inputs[: len(proto.input)]):
            if name in without:
                proto.input[place] = ""
        needed, kept = {"Y"}, []
        for step in reversed(self.kind.function(proto, version).node):
            if not needed.isdisjoint(step.output) and "W" not in step.output:
                kept.append(step)
                needed.update(step.input)
        return kept[::-1]

    def _shape(self) -> tuple[int, ...]:
        sizes: Sequence[Any] = [self._get(name, int) for name in self.kind.sizes]
        if self.kind.kernel is not None:
            sizes = [*sizes, *self._get(self.kind.kernel, list)]
        sizes = [*sizes, *self.kind.taps]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise self.malformed(f"its weight has the shape {list(sizes)}")
        return tuple(sizes)

    def _get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.attributes.get(name, default)
        if not isinstance(value, kind):
            raise self.malformed(f"its attribute '{name}' is {value!r}")
        return value
