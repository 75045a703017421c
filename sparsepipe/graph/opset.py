"""Change the opset of a model.

The dynamo exporter of torch writes opset 18 or newer, and onnx.version_converter cannot lower even a Relu to opset 13.
So lowering is done here, operator by operator, where the older operator does the same; everything else, and all
raising, is left to onnx.version_converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, defs, helper, numpy_helper, version_converter

from sparsepipe.errors import GraphError, first_line
from sparsepipe.graph.index import (
    STANDARD_DOMAINS,
    Index,
    Names,
    all_nodes,
    copy,
    index,
    integer,
    is_standard,
    label,
    number,
    opset,
    subgraphs,
)
from sparsepipe.graph.load import check_made
from sparsepipe.graph.tidy import tidy

_UNCHANGED = """
Acos Acosh Add Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Constant ConstantOfShape Conv ConvTranspose Cos
Cosh CumSum DequantizeLinear Div Dropout Elu Equal Flatten GlobalAveragePool GlobalMaxPool GreaterOrEqual HardSigmoid
HardSwish Identity If InstanceNormalization IsInf IsNaN LeakyRelu LessOrEqual Loop LpNormalization LpPool MaxPool Mul
PRelu Pad Pow QuantizeLinear ReduceMax ReduceMin Relu Reshape Round ScatterElements ScatterND Selu Shape Sin Sinh Size
Softplus Softsign Split Squeeze Sub Tan ThresholdedRelu Transpose Unsqueeze Where
"""
UNCHANGED = frozenset(_UNCHANGED.split())
"""Operators whose versions between opsets 13 and 22 differ in the allowed types and in attributes and inputs that were
added; with those at their defaults, every version computes the same. (Compared with the schemas of onnx 1.23.)"""
LATER_VALUES = frozenset({b"wrap", b"max", b"min"})
"""Values of an attribute of these operators that older versions do not know: Pad's mode, the reduction of a scatter."""
FIRST_LOWERED = 13
"""The oldest opset for which UNCHANGED was compared."""
SHAPE_RANGE_SINCE, LAYER_NORMALIZATION_SINCE = 15, 17
DEFAULT_EPSILON = 1e-5  # of LayerNormalization in the ONNX standard


class _CannotLower(Exception):
    """Why one operator has no equal in the older opset."""


def convert(model: ModelProto, target: int, *, where: str) -> ModelProto:
    """A copy of `model` that uses opset `target`; tensor names are kept.

    Args:
        model: a valid model without sparse initializers.
        target: the opset to use.
        where: what to call the model in an error.

    Raises:
        GraphError: an operator has no equal in that opset.
    """
    if opset(model) == target:
        return copy(model)
    advice = f"Keep opset {opset(model)}, or export the model anew with opset {target}."
    if model.functions:
        raise GraphError(
            f"The model cannot be converted from opset {opset(model)} to {target}: it has functions of its own, such "
            f"as '{model.functions[0].name}', and onnx.version_converter loses them.",
            where=where,
            advice=f"{advice} onnx.inliner.inline_local_functions writes functions out.",
        )
    reason = ""
    if FIRST_LOWERED <= target < opset(model):
        try:
            return _lower(model, target, where)
        except (_CannotLower, GraphError) as error:
            reason = f"{first_line(error)}; "
    try:
        converted = version_converter.convert_version(model, target)
        check_made(converted, model, where=where)
    except Exception as error:  # the converter is written in C++ and raises RuntimeError and others
        raise GraphError(
            f"The model cannot be converted from opset {opset(model)} to {target}: {reason}"
            f"onnx.version_converter: {first_line(error)}.",
            where=where,
            advice=advice,
        ) from error
    _keep_metadata(model, converted)
    return converted


def smallest_ir_version(model: ModelProto) -> int:
    """The oldest version of the file format that has the model's opsets: the most runtimes can read that."""
    version: int = helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    return version


def _keep_metadata(model: ModelProto, converted: ModelProto) -> None:
    """Copy the metadata of the model, its graph and its nodes, which onnx.version_converter loses."""
    nodes = {tuple(node.output): node for node in all_nodes(model)}
    pairs: list[tuple[Any, Any]] = [(model, converted), (model.graph, converted.graph)]
    pairs += [(nodes[key], node) for node in all_nodes(converted) if (key := tuple(node.output)) in nodes]
    for before, after in pairs:
        del after.metadata_props[:]
        after.metadata_props.extend(before.metadata_props)


def _lower(model: ModelProto, target: int, where: str) -> ModelProto:
    lowered = copy(model)
    _lower_graph(lowered.graph, Names(lowered.graph), opset(model), target)
    for entry in lowered.opset_import:
        if entry.domain in STANDARD_DOMAINS:
            entry.version = target
    check_made(lowered, model, where=where)
    return lowered


def _lower_graph(graph: GraphProto, names: Names, source: int, target: int) -> None:
    found = index(graph)
    lowered = [new for node in graph.node for new in _lower_node(graph, names, found, node, source, target)]
    del graph.node[:]
    graph.node.extend(lowered)
    tidy(graph)


def _lower_node(
    graph: GraphProto, names: Names, found: Index, node: NodeProto, source: int, target: int
) -> Sequence[NodeProto]:
    if node.domain not in STANDARD_DOMAINS:
        return [node]
    for _, inner in subgraphs(node):
        _lower_graph(inner, names, source, target)
    if is_standard(node, "LayerNormalization") and target < LAYER_NORMALIZATION_SINCE:
        return _layer_normalization(graph, names, node)
    if is_standard(node, "Shape") and target < SHAPE_RANGE_SINCE:
        return _shape(graph, names, node)
    try:
        new, old = (defs.get_schema(node.op_type, version, "") for version in (source, target))
    except defs.SchemaError as error:
        raise _CannotLower(f"opset {target} has no {node.op_type} ('{label(node)}')") from error
    if new.since_version == old.since_version:
        return [node]
    if "axes" in old.attributes and "axes" not in new.attributes:
        return [_axes_to_attribute(node, found)]
    if node.op_type not in UNCHANGED or len(node.input) > len(old.inputs):
        raise _CannotLower(f"{node.op_type} ('{label(node)}') is not the same in opset {target}")
    if any(given.s in LATER_VALUES for given in node.attribute):
        raise _CannotLower(f"{node.op_type} ('{label(node)}') has a mode that opset {target} lacks")
    for extra in [given for given in node.attribute if given.name not in old.attributes]:
        if not _is_default(extra, new.attributes[extra.name], node, graph, found):
            raise _CannotLower(f"{node.op_type} ('{label(node)}') has no attribute {extra.name} in opset {target}")
        node.attribute.remove(extra)
    return [node]


def _is_default(
    given: AttributeProto, schema: defs.OpSchema.Attribute, node: NodeProto, graph: GraphProto, found: Index
) -> bool:
    """Whether leaving out the attribute changes nothing."""
    if given.name == "allowzero":
        return given.i == 0 or _has_no_zero(node.input[1], found)
    if given.name == "dilations":  # has a default in the text of the standard only
        return all(step == 1 for step in given.ints)
    if given.name == "num_outputs":  # before, parts were equal unless they were given
        return _has_equal_parts(node, graph)
    return bool(helper.get_attribute_value(given) == helper.get_attribute_value(schema.default_value))


def _has_no_zero(name: str, found: Index) -> bool:
    """Whether the shape `name` asks for no dimension of size 0, sizes of dynamic inputs aside."""
    if name in found.constants:
        return bool(numpy_helper.to_array(found.constants[name]).all())
    producer = found.producers.get(name)
    if producer is None or not is_standard(producer, "Concat"):
        return False
    return all(part not in found.constants or _has_no_zero(part, found) for part in producer.input)


def _has_equal_parts(node: NodeProto, graph: GraphProto) -> bool:
    axis = integer(node, "axis", 0)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in [*graph.value_info, *graph.output]}
    sizes = {shapes[name][axis].dim_value if shapes.get(name) else 0 for name in node.output}
    return len(sizes) == 1 and 0 not in sizes


def _axes_to_attribute(node: NodeProto, found: Index) -> NodeProto:
    """A reduction as it was before opset 18: the axes are an attribute."""
    axes = node.input[1] if len(node.input) > 1 else ""
    if axes and axes not in found.constants:
        raise _CannotLower(f"the axes of {node.op_type} ('{label(node)}') are computed")
    values = numpy_helper.to_array(found.constants[axes]).tolist() if axes else []
    if not values and integer(node, "noop_with_empty_axes", 0):
        raise _CannotLower(f"{node.op_type} ('{label(node)}') reduces no axis")
    del node.input[1:]
    for given in [given for given in node.attribute if given.name == "noop_with_empty_axes"]:
        node.attribute.remove(given)
    if values:
        node.attribute.append(helper.make_attribute("axes", values))
    return node


def _shape(graph: GraphProto, names: Names, node: NodeProto) -> list[NodeProto]:
    """Shape of some axes in older operators: all of the shape, then a slice of it."""
    start, end = integer(node, "start", 0), integer(node, "end", np.iinfo(np.int64).max)
    del node.attribute[:]
    whole, result = names.fresh(f"{label(node)}/shape"), node.output[0]
    node.output[0] = whole
    bounds = [names.fresh(f"{label(node)}/{name}") for name in ("start", "end")]
    for name, value in zip(bounds, (start, end), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    return [node, helper.make_node("Slice", [whole, *bounds], [result])]


def _layer_normalization(graph: GraphProto, names: Names, node: NodeProto) -> list[NodeProto]:
    """LayerNormalization in older operators: (x - mean) / sqrt(variance + eps) * scale + bias over the last axes."""
    first_axis = integer(node, "axis", -1)
    if first_axis >= 0 or any(node.output[1:]):
        raise _CannotLower(f"LayerNormalization ('{label(node)}') counts its axes from the front or has many outputs")
    axes = list(range(first_axis, 0))
    result, stem = node.output[0], label(node)
    nodes: list[NodeProto] = []

    def add(op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        output = name if name == result else names.fresh(f"{stem}/{name}")
        nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(name: str, value: float) -> str:
        output = names.fresh(f"{stem}/{name}")
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), output))
        return output

    mean = add("ReduceMean", [node.input[0]], "mean", axes=axes, keepdims=1)
    centred = add("Sub", [node.input[0], mean], "centred")
    square = add("Mul", [centred, centred], "square")
    variance = add("ReduceMean", [square], "variance", axes=axes, keepdims=1)
    shifted = add("Add", [variance, constant("epsilon", number(node, "epsilon", DEFAULT_EPSILON))], "shifted")
    deviation = add("Sqrt", [shifted], "deviation")
    bias = node.input[2] if len(node.input) > 2 else ""
    normal = add("Div", [centred, deviation], "normal")
    scaled = add("Mul", [normal, node.input[1]], "scaled" if bias else result)
    if bias:
        add("Add", [scaled, bias], result)
    return nodes
