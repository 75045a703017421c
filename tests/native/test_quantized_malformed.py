"""Malformed int8 models end in an onnxruntime error that names the node: never in a crash or a wrong result."""

from __future__ import annotations

import copy
from typing import Any

import int8_models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sparsepipe.native import quantized

SHAPE = (8, 6, 3, 3)  # the last group of inputs is half empty


def good(*, residual: bool = False, linear: bool = False, block: int = 4) -> int8_models.Layer:
    random = np.random.default_rng(0)
    shape = (8, 54) if linear else SHAPE
    weight = int8_models.blocked_weight(random, shape, block, 1.0)
    values, deltas = quantized.encode(weight, block)
    constants = {**int8_models.quantization(random, weight, np.uint8, True), "values": values, "deltas": deltas}
    constants["w_scale"] = np.full(8, 0.01, np.float32)
    if linear:
        names = quantized.INPUTS["SparseQLinear"][: 14 if residual else 9]
        feeds = {"X": np.ones((5, 54), np.uint8)}
        if residual:
            constants |= int8_models.residual_quantization(random, constants["y_scale"], np.uint8)
            feeds["residual"] = np.ones((5, 8), np.uint8)
        node = quantized.sparse_qlinear(names, "Y", weight_shape=shape, block=block, name="the_node")
        return int8_models.Layer(node, constants, feeds, weight)
    feeds = {"X": np.ones((1, 6, 6, 6), np.uint8)}
    names = quantized.INPUTS["SparseQConv"][: 14 if residual else 9]
    if residual:
        constants |= int8_models.residual_quantization(random, constants["y_scale"], np.uint8)
        feeds["residual"] = np.ones((1, 8, 6, 6), np.uint8)
    node = quantized.sparse_qconv(names, "Y", weight_shape=shape, pads=[1] * 4, block=block, name="the_node")
    return int8_models.Layer(node, constants, feeds, weight)


def replaced(layer: int8_models.Layer, **attributes: Any) -> int8_models.Layer:
    """The layer with attributes of its node changed, or left out where the value is None."""
    new = copy.deepcopy(layer)
    kept = [a for a in layer.node.attribute if a.name not in attributes]
    del new.node.attribute[:]
    new.node.attribute.extend(kept)
    new.node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    return new


def refused(session: Any, layer: int8_models.Layer, *words: str) -> None:
    with pytest.raises(Exception, match="the_node") as caught:
        session(layer.model(body=False))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"kernel_shape": None}, "kernel_shape"),
        ({"kernel_shape": [3]}, "strides"),
        ({"kernel_shape": [0, 3]}, "kernel_shape"),
        ({"kernel_shape": [2**40, 3]}, "kernel_shape"),
        ({"kernel_shape": [1, 1]}, "more than"),
        ({"strides": [0, 1]}, "strides"),
        ({"dilations": [1, -1]}, "dilations"),
        ({"pads": [1, 1]}, "pads"),
        ({"pads": [-1, 0, 0, 0]}, "pads"),
        ({"group": 2}, "group"),
        ({"in_channels": None}, "in_channels"),
        ({"in_channels": 2**50}, "in_channels"),
        ({"in_channels": 4}, "more than"),
        ({"in_channels": 5}, "beyond the 5"),
        ({"out_channels": None}, "out_channels"),
        ({"out_channels": 0}, "out_channels"),
        ({"out_channels": 10}, "multiple"),
        ({"out_channels": 4}, "more than"),
        ({"out_channels": 12}, "w_scale"),
        ({"block": None}, "block"),
        ({"block": 3}, "block"),
        ({"block": 8}, "block"),
        ({"block": 2}, "values"),
        ({"activation": "gelu"}, "activation"),
        ({"activation": 7}, "activation"),
        ({"activation": "clip"}, "min"),
        ({"activation": "clip", "min": 3, "max": 2}, "min"),
        ({"activation": "clip", "min": -1, "max": 2}, "min"),
        ({"activation": "clip", "min": 0, "max": 256}, "max"),
        ({"activation": "clip", "min": 0.0, "max": 2.0}, "min"),
    ],
)
def test_attributes(session: Any, attributes: dict[str, Any], word: str) -> None:
    refused(session, replaced(good(), **attributes), word)


VALUES, DELTAS = good().constants["values"], good().constants["deltas"]
BEYOND = np.zeros_like(VALUES)
BEYOND[-1, 2, 3] = 1  # of input channel 7
SCALES = {"zero": 0.0, "negative": -0.1, "NaN": np.nan, "infinite": np.inf}
BAD_CONSTANTS = {
    "index out of range": ("deltas", np.full_like(DELTAS, 255), "outside"),
    "first index out of range": ("deltas", np.array([255, *DELTAS[1:]], np.uint8), "outside"),
    "not ascending": ("deltas", np.array([*DELTAS[:5], 0, *DELTAS[6:]], np.uint8), "ascend"),
    "too few deltas": ("deltas", DELTAS[:-1], "values"),
    "deltas of two dimensions": ("deltas", DELTAS[:, None], "dimension"),
    "scalar deltas": ("deltas", np.array(1, np.uint8), "dimension"),
    "deltas of another type": ("deltas", DELTAS.astype(np.int64), "uint8"),
    "too few values": ("values", VALUES[:-1], "values"),
    "flat values": ("values", VALUES.reshape(len(VALUES), -1), "values"),
    "values of another block": ("values", VALUES[:, :2], "values"),
    "values beyond the inputs": ("values", BEYOND, "beyond"),
    "short bias": ("B", np.zeros(7, np.int32), "B"),
    "bias of two dimensions": ("B", np.zeros((8, 1), np.int32), "B"),
    "a scale too few": ("w_scale", np.ones(7, np.float32), "w_scale"),
    "scales of two dimensions": ("w_scale", np.ones((8, 1), np.float32), "w_scale"),
    "two zero points": ("x_zero_point", np.zeros(2, np.uint8), "x_zero_point"),
    "no zero point": ("y_zero_point", np.zeros(0, np.uint8), "y_zero_point"),
    "two scales of the input": ("x_scale", np.ones(2, np.float32), "x_scale"),
    "no scale of the output": ("y_scale", np.ones(0, np.float32), "y_scale"),
    "scales too far apart": ("y_scale", np.array(1e-44, np.float32), "too far apart"),
    **{f"{kind} x_scale": ("x_scale", np.array(value, np.float32), "x_scale") for kind, value in SCALES.items()},
    **{f"{kind} y_scale": ("y_scale", np.array(value, np.float32), "y_scale") for kind, value in SCALES.items()},
    **{
        f"{kind} w_scale": ("w_scale", np.array([0.1] * 5 + [value] + [0.1] * 2, np.float32), "number 5")
        for kind, value in SCALES.items()
    },
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("case", BAD_CONSTANTS)
def test_constants(session: Any, case: str, linear: bool) -> None:
    name, value, word = BAD_CONSTANTS[case]
    layer = good(linear=linear)
    if len(layer.constants["deltas"]) != len(DELTAS) and name in ("values", "deltas"):
        word = "the_node"  # the sizes differ, too
    layer.constants[name] = value
    refused(session, layer, word)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("residual_scale", np.array(0, np.float32), "residual_scale"),
        ("residual_scale", np.array(np.nan, np.float32), "residual_scale"),
        ("sum_scale", np.array(-1, np.float32), "sum_scale"),
        ("sum_scale", np.array(1e-44, np.float32), "too far apart"),
        ("sum_scale", np.ones(2, np.float32), "sum_scale"),
        ("residual_zero_point", np.zeros(3, np.uint8), "residual_zero_point"),
        ("sum_zero_point", np.zeros(3, np.uint8), "sum_zero_point"),
    ],
)
def test_constants_of_the_sum(session: Any, name: str, value: Any, word: str, linear: bool) -> None:
    layer = good(residual=True, linear=linear)
    layer.constants[name] = value
    refused(session, layer, word)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("B", np.zeros(8, np.float32)),
        ("B", np.zeros(8, np.int64)),
        ("values", VALUES.astype(np.uint8)),
        ("values", VALUES.astype(np.float32)),
        ("x_scale", np.array(1.0)),
        ("w_scale", np.ones(8, np.float16)),
        ("x_zero_point", np.array(0, np.int8)),
        ("y_zero_point", np.array(0, np.int8)),
        ("y_zero_point", np.array(0, np.int32)),
        ("sum_zero_point", np.array(0, np.int8)),
        ("residual_zero_point", np.array(0, np.float32)),
    ],
)
def test_other_types_are_refused(session: Any, name: str, value: Any) -> None:
    """By onnxruntime, which checks the types of the operator, or by the kernel."""
    layer = good(residual=True)
    layer.constants[name] = value
    with pytest.raises(Exception, match="the_node"):
        session(layer.model(body=False))


def test_types_of_tensors_must_agree(session: Any) -> None:
    for wrong in ("X", "residual"):
        layer = good(residual=True)
        layer.feeds[wrong] = layer.feeds[wrong].astype(np.int8)
        with pytest.raises(Exception, match="the_node"):
            session(layer.model(body=False))


NEEDED = ["x_scale", "x_zero_point", "values", "deltas", "w_scale", "y_scale", "y_zero_point", "B"]


@pytest.mark.parametrize("name", [*NEEDED, "residual_scale", "residual_zero_point", "sum_scale", "sum_zero_point"])
def test_inputs_must_be_constant_and_given(session: Any, name: str) -> None:
    layer = good(residual=True)
    constant = layer.constants.pop(name)
    layer.feeds[name] = constant
    refused(session, layer, name, "constant")
    if name != "B":
        layer.feeds.pop(name)
        at = list(layer.node.input).index(name)
        layer.node.input[at] = ""
        with pytest.raises(Exception, match="the_node"):
            session(layer.model(body=False))


def test_truncated_tensor(session: Any) -> None:
    file = good().model(body=False)
    tensor = next(t for t in file.graph.initializer if t.name == "values")
    tensor.raw_data = tensor.raw_data[:-5]
    with pytest.raises(Exception, match="values"):
        session(file)


@pytest.mark.parametrize(
    "shape", [(1, 6, 6), (1, 3, 6, 6), (6, 6, 6), (1, 6, 0, 6), (1, 6, 6, 0), (1, 6, 6, 6, 1), (6,), ()]
)
def test_inputs_of_other_shapes(session: Any, shape: tuple[int, ...]) -> None:
    for layer, size in ((good(), (1, 8, 6, 6)), (good(linear=True), (5, 8))):
        native = session(layer.model(body=False))
        with pytest.raises(Exception, match="the_node"):
            native.run(None, {"X": np.zeros(shape, np.uint8)})
        # The session stays usable.
        assert native.run(None, layer.feeds)[0].shape == size


def test_input_smaller_than_the_kernel(session: Any) -> None:
    layer = replaced(good(), pads=[0] * 4)
    with pytest.raises(Exception, match=r"the_node.*smaller than the kernel"):
        session(layer.model(body=False)).run(None, {"X": layer.feeds["X"][:, :, :2]})


@pytest.mark.parametrize("linear", [False, True])
def test_residual_of_another_shape(session: Any, linear: bool) -> None:
    layer = good(residual=True, linear=linear)
    native = session(layer.model(body=False))
    for shape in [(1, 8, 6, 5), (1, 8, 6), (8, 6, 6), (2, 8, 6, 6), (1,), (5, 7), (4, 8), (1, 5, 8), ()]:
        with pytest.raises(Exception, match=r"the_node.*residual"):
            native.run(None, layer.feeds | {"residual": np.zeros(shape, np.uint8)})


@pytest.mark.parametrize(
    ("window", "word"),
    [
        ({"kernel_shape": [0, 3]}, "kernel_shape"),
        ({"kernel_shape": [2, 3], "pads": [2, 0, 0, 0]}, "pads"),
        ({"kernel_shape": [2, 3], "pads": [0, 0, 0, 3]}, "pads"),
        ({"kernel_shape": [2, 3], "strides": [0, 1]}, "strides"),
        ({"kernel_shape": [2, 3], "dilations": [1, -1]}, "dilations"),
    ],
)
def test_windows_of_max_pool(session: Any, window: dict[str, Any], word: str) -> None:
    node = quantized.qmax_pool("X", "Y", name="the_node", **window)
    feeds = {"X": np.ones((1, 2, 5, 5), np.uint8)}
    with pytest.raises(Exception, match=f"(?s)the_node.*{word}"):
        session(int8_models.model([node], {}, feeds))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2), (1, 2, 5), (1, 2, 1, 5), (1, 2, 0, 5), (1, 2, 3, 4, 5)])
def test_shapes_of_max_pool(session: Any, shape: tuple[int, ...]) -> None:
    node = quantized.qmax_pool("X", "Y", kernel_shape=[2, 3], name="the_node")
    native = session(int8_models.model([node], {}, {"X": np.ones((1, 2, 5, 5), np.uint8)}))
    with pytest.raises(Exception, match="the_node"):
        native.run(None, {"X": np.zeros(shape, np.uint8)})


TABLE = np.arange(256, dtype=np.uint8)
BAD_TABLES = {
    "short": (TABLE[:255], "table"),
    "long": (np.zeros(257, np.uint8), "table"),
    "empty": (TABLE[:0], "table"),
    "scalar": (np.array(1, np.uint8), "table"),
    "matrix": (TABLE.reshape(16, 16), "table"),
    "column": (TABLE[:, None], "table"),
    "float32": (TABLE.astype(np.float32), ""),
    "of the other type": (TABLE.view(np.int8), ""),
}


def lookup(table: Any, *, constant: bool = True) -> Any:
    node = quantized.qlookup("X", "table", "Y", name="the_node")
    feeds = {"X": np.ones((2, 3), np.uint8)}
    if constant:
        return int8_models.model([node], {"table": table}, feeds)
    return int8_models.model([node], {}, feeds | {"table": table})


@pytest.mark.parametrize("case", BAD_TABLES)
def test_tables(session: Any, case: str) -> None:
    table, word = BAD_TABLES[case]
    with pytest.raises(Exception, match=f"(?s)the_node.*{word}"):
        session(lookup(table))


def test_a_table_must_be_constant_and_given(session: Any) -> None:
    with pytest.raises(Exception, match=r"the_node.*constant"):
        session(lookup(TABLE, constant=False))
    file = lookup(TABLE)
    for inputs in ([], ["X"], ["X", ""], ["", "table"], ["X", "table", "X"]):
        file.graph.node[0].input[:] = inputs
        with pytest.raises(Exception, match=r"the_node|QLookup"):
            session(file)


def test_the_values_of_a_table_may_be_cut_off(session: Any) -> None:
    file = lookup(TABLE)
    file.graph.initializer[0].raw_data = file.graph.initializer[0].raw_data[:-5]
    with pytest.raises(Exception, match="table"):
        session(file)


def good_depthwise() -> int8_models.Layer:
    random = np.random.default_rng(0)
    weight = random.integers(-128, 128, (8, 1, 3, 3)).astype(np.int8)
    constants = {**int8_models.quantization(random, weight, np.uint8, True), "W": weight}
    names = quantized.INPUTS["QDepthwiseConv"]
    node = quantized.qdepthwise_conv(names, "Y", weight_shape=weight.shape, pads=[1] * 4, name="the_node")
    return int8_models.Layer(node, constants, {"X": np.ones((1, 8, 6, 6), np.uint8)}, weight)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"channels": None}, "channels"),
        ({"channels": 0}, "channels"),
        ({"channels": 2**50}, "channels"),
        ({"channels": 4}, "W"),
        ({"kernel_shape": [3, 1]}, "W"),
        ({"kernel_shape": [3]}, "strides"),
        ({"kernel_shape": [0, 3]}, "kernel_shape"),
        ({"strides": [0, 1]}, "strides"),
        ({"dilations": [1, -1]}, "dilations"),
        ({"pads": [-1, 0, 0, 0]}, "pads"),
        ({"activation": "gelu"}, "activation"),
        ({"activation": "clip", "min": 0, "max": 256}, "max"),
    ],
)
def test_attributes_of_a_depthwise_convolution(session: Any, attributes: dict[str, Any], word: str) -> None:
    refused(session, replaced(good_depthwise(), **attributes), word)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("W", np.zeros((8, 1, 3, 3), np.uint8)),
        ("W", np.zeros((8, 1, 3), np.int8)),
        ("W", np.zeros((8, 2, 3, 3), np.int8)),
        ("W", np.zeros((0, 1, 3, 3), np.int8)),
        ("w_scale", np.ones(7, np.float32)),
        ("w_scale", np.full(8, np.nan, np.float32)),
        ("y_scale", np.array(0, np.float32)),
        ("x_scale", np.array(np.inf, np.float32)),
        ("x_zero_point", np.zeros(2, np.uint8)),
        ("y_zero_point", np.array(0, np.int8)),
        ("B", np.zeros(7, np.int32)),
        ("B", np.zeros(8, np.float32)),
    ],
)
def test_constants_of_a_depthwise_convolution(session: Any, name: str, value: Any) -> None:
    layer = good_depthwise()
    layer.constants[name] = value
    with pytest.raises(Exception, match="the_node"):
        session(layer.model(body=False))


@pytest.mark.parametrize("shape", [(1, 8, 6), (1, 3, 6, 6), (8, 6, 6), (1, 8, 0, 6), (1, 8, 6, 6, 1), (8,), ()])
def test_inputs_of_a_depthwise_convolution(session: Any, shape: tuple[int, ...]) -> None:
    layer = good_depthwise()
    native = session(layer.model(body=False))
    with pytest.raises(Exception, match="the_node"):
        native.run(None, {"X": np.zeros(shape, np.uint8)})
    assert native.run(None, layer.feeds)[0].shape == (1, 8, 6, 6)


@settings(max_examples=150)
@given(data=st.data())
def test_random_damage_of_a_depthwise_convolution(session: Any, data: st.DataObject) -> None:
    """The session either refuses, naming the node, or runs."""
    numbers = st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**63 - 1))
    name = data.draw(st.sampled_from(["kernel_shape", "strides", "pads", "dilations"]))
    changes: dict[str, Any] = {name: data.draw(st.lists(numbers, max_size=5)) or None}
    shape = data.draw(st.sampled_from([(1, 8, 6, 6), (2, 8, 9, 3), (1, 8, 1, 1), (1, 8, 54)]))
    message = "the_node"
    try:
        layer = replaced(good_depthwise(), **changes)
        session(layer.model(body=False)).run(None, {"X": np.ones(shape, np.uint8)})
    except Exception as error:
        message = str(error)
    assert "the_node" in message


def test_empty_batch(session: Any) -> None:
    layer = good()
    assert session(layer.model(body=False)).run(None, {"X": layer.feeds["X"][:0]})[0].shape == (0, 8, 6, 6)


@pytest.mark.parametrize(
    ("op_type", "word"),
    [("SparseQConvRelu", "activation"), ("SparseQConvAdd", "residual"), ("SparseQConvAddClip", "activation")],
)
def test_the_name_and_the_node_must_agree(session: Any, op_type: str, word: str) -> None:
    layer = good()
    layer.node.op_type = op_type
    refused(session, layer, op_type, word)
    layer = good(residual=True)
    layer.node.op_type = "SparseQConv"
    refused(session, layer, "residual", "given")


@pytest.mark.parametrize("linear", [False, True])
@settings(max_examples=150)
@given(data=st.data())
def test_random_damage(session: Any, linear: bool, data: st.DataObject) -> None:
    """Random attributes, indices and sizes: the session either refuses, naming the node, or runs."""
    layer = good(linear=linear)
    numbers = st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**63 - 1))
    names = ["in_features", "out_features", "block"] if linear else ["in_channels", "out_channels", "block", "group"]
    changes: dict[str, Any] = {}
    if data.draw(st.booleans()):
        changes[data.draw(st.sampled_from(names))] = data.draw(numbers)
    if not linear and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["kernel_shape", "strides", "pads", "dilations"]))
        changes[name] = data.draw(st.lists(numbers, max_size=5)) or None
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from([np.uint8, np.uint16]))
        count = data.draw(st.integers(0, 40))
        deltas = data.draw(st.lists(st.integers(0, int(np.iinfo(kind).max)), min_size=count, max_size=count))
        rows = count + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
        block = data.draw(st.sampled_from([0, 1, 2, 4, 4]))
        layer.constants |= {"deltas": np.array(deltas, kind), "values": np.ones((max(rows, 0), block, 4), np.int8)}
    if data.draw(st.booleans()):
        scale = data.draw(st.floats(width=32))
        layer.constants[data.draw(st.sampled_from(["x_scale", "w_scale", "y_scale"]))] = np.array(scale, np.float32)
    shape = data.draw(st.sampled_from([(1, 6, 6, 6), (2, 6, 9, 3), (1, 6, 1, 1), (1, 1, 54), (3, 54)]))
    message = "the_node"
    try:
        session(replaced(layer, **changes).model(body=False)).run(None, {"X": np.ones(shape, np.uint8)})
    except Exception as error:
        message = str(error)
    assert "the_node" in message
