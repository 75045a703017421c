"""Malformed models end in an onnxruntime error that names the node: never in a crash or a wrong result."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from sparsepipe.native import operators

WEIGHT = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
FILTERS = np.ones((4, 1, 3, 3), np.float32)
X = np.ones((1, 4, 6, 6), np.float32)


def good(block: int = 1) -> tuple[Any, dict[str, Any]]:
    values, deltas = operators.encode(WEIGHT, block)
    node = operators.sparse_conv(
        ["X", "values", "deltas", "B"], "Y", weight_shape=WEIGHT.shape, pads=[1] * 4, block=block, name="the_node"
    )
    return node, {"values": values, "deltas": deltas, "B": np.zeros(8, np.float32)}


def good_linear() -> tuple[Any, dict[str, Any]]:
    values, deltas = operators.encode(WEIGHT.reshape(8, -1), 1)
    node = operators.sparse_linear(["X", "values", "deltas", "B"], "Y", weight_shape=(8, 36), name="the_node")
    return node, {"values": values, "deltas": deltas, "B": np.zeros(8, np.float32)}


def good_depthwise() -> tuple[Any, dict[str, Any]]:
    node = operators.depthwise_conv(
        ["X", "W", "B"], "Y", weight_shape=FILTERS.shape, pads=[1] * 4, activation="clip", limits=(-1.0, 1.0),
        name="the_node",
    )  # fmt: skip
    return node, {"W": FILTERS, "B": np.zeros(4, np.float32)}


def good_stem() -> tuple[Any, dict[str, Any]]:
    weight = np.ones((8, 4, 7, 7), np.float32)
    node = operators.stem_conv(
        ["X", "W", "B"], "Y", weight_shape=weight.shape, strides=[2, 2], pads=[3] * 4, activation="relu",
        pool=([3, 3], [1] * 4), name="the_node",
    )  # fmt: skip
    return node, {"W": weight, "B": np.zeros(8, np.float32)}


def good_separable() -> tuple[Any, dict[str, Any]]:
    values, deltas = operators.encode(WEIGHT[:, :, 1, 1])
    node = operators.sparse_separable_conv(
        ["X", "depthwise_W", "depthwise_B", "values", "deltas", "B"], "Y", weight_shape=(8, 4), pads=[1] * 4,
        depthwise_activation="clip", depthwise_limits=(-1.0, 1.0), name="the_node",
    )  # fmt: skip
    constants = {"depthwise_W": FILTERS, "depthwise_B": np.zeros(4, np.float32), "values": values, "deltas": deltas}
    return node, constants | {"B": np.zeros(8, np.float32)}


GOOD = {
    "conv": good,
    "linear": good_linear,
    "depthwise": good_depthwise,
    "separable": good_separable,
    "stem": good_stem,
}


def replaced(node: Any, **attributes: Any) -> Any:
    """The node with attributes changed, or left out where the value is None."""
    new = copy.deepcopy(node)
    kept = [a for a in node.attribute if a.name not in attributes]
    del new.attribute[:]
    new.attribute.extend(kept)
    new.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
    return new


def refused(session: Any, file: Any, *words: str) -> None:
    with pytest.raises(Exception, match="the_node") as caught:
        session(file)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"kernel_shape": None}, "kernel_shape"),
        ({"kernel_shape": [3]}, "strides"),
        ({"kernel_shape": [3, 3, 3]}, "kernel_shape"),
        ({"kernel_shape": [0, 3]}, "kernel_shape"),
        ({"kernel_shape": [-3, 3]}, "kernel_shape"),
        ({"kernel_shape": [2**40, 3]}, "kernel_shape"),
        ({"kernel_shape": 3.0}, "kernel_shape"),
        ({"kernel_shape": [1] * 1000}, "kernel_shape"),
        ({"strides": [0, 1]}, "strides"),
        ({"strides": [2**62, 1]}, "strides"),
        ({"strides": [1]}, "strides"),
        ({"dilations": [1, -1]}, "dilations"),
        ({"pads": [1, 1]}, "pads"),
        ({"pads": [-1, 0, 0, 0]}, "pads"),
        ({"group": 2}, "group"),
        ({"in_channels": None}, "in_channels"),
        ({"in_channels": 2**50}, "in_channels"),
        ({"in_channels": 1}, "more than"),
        ({"out_channels": None}, "out_channels"),
        ({"out_channels": 0}, "out_channels"),
        ({"out_channels": 2**63 - 1}, "out_channels"),
        ({"out_channels": 4}, "more than"),
        ({"block": 3}, "block"),
        ({"block": 8}, "block"),
        ({"block": 2}, "values"),
        ({"activation": "tanh"}, "activation"),
        ({"activation": 7}, "activation"),
        ({"activation": "clip", "min": 1.0, "max": -1.0}, "min"),
        ({"activation": "clip", "min": float("nan"), "max": 1.0}, "min"),
        ({"mode": -1}, "mode"),
        ({"mode": 6}, "mode"),
    ],
)
def test_attributes(session: Any, model: Any, attributes: dict[str, Any], word: str) -> None:
    node, constants = good()
    refused(session, model(replaced(node, **attributes), constants), word)


@pytest.mark.parametrize("mode", [-1, 3])
def test_unknown_modes_of_linear_layers(session: Any, model: Any, mode: int) -> None:
    node, constants = good_linear()
    refused(session, model(replaced(node, mode=mode), constants), "mode")


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"in_features": 0}, "in_features"),
        ({"in_features": 2**63 - 1}, "in_features"),
        ({"in_features": 36.0}, "in_features"),
        ({"in_features": 3}, "more than"),
        ({"in_features": 35}, "more than"),
        ({"out_features": -8}, "out_features"),
        ({"out_features": 2**40}, "out_features"),
        ({"out_features": 7}, "more than"),
        ({"out_features": 16}, "B"),
        ({"block": 0}, "block"),
        ({"block": 3}, "block"),
        ({"block": 4}, "values"),
        ({"activation": "silu"}, "activation"),
        ({"activation": "clip", "min": 1.0, "max": float("nan")}, "min"),
        ({"mode": 2**40}, "mode"),
    ],
)
def test_attributes_of_linear_layers(session: Any, model: Any, attributes: dict[str, Any], word: str) -> None:
    node, constants = good_linear()
    refused(session, model(replaced(node, **attributes), constants), word)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"channels": 0}, "channels"),
        ({"channels": 3}, "W"),
        ({"channels": 2**62}, "channels"),
        ({"kernel_shape": [3]}, "strides"),
        ({"kernel_shape": [3, 2]}, "W"),
        ({"kernel_shape": [2**31, 3]}, "kernel_shape"),
        ({"strides": [1, 0]}, "strides"),
        ({"dilations": [4097, 1]}, "dilations"),
        ({"pads": [0, 0, 0, 2**20]}, "pads"),
        ({"activation": "gelu"}, "activation"),
        ({"min": 2.0}, "min"),
    ],
)
def test_attributes_of_depthwise_layers(session: Any, model: Any, attributes: dict[str, Any], word: str) -> None:
    node, constants = good_depthwise()
    refused(session, model(replaced(node, **attributes), constants), word)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"kernel_shape": [7]}, "strides"),
        ({"kernel_shape": [7, 5]}, "W"),
        ({"strides": [1, 2]}, "pooling needs a window of 7 x 7"),
        ({"dilations": [1, 2]}, "pooling needs a window of 7 x 7"),
        ({"pads": [-1] * 4}, "pads"),
        ({"pool_shape": [3]}, "pool_shape"),
        ({"pool_shape": None}, "'pool_shape' is missing"),
        ({"pool_shape": [3, 4]}, "pool_shape"),
        ({"pool_strides": [1, 2]}, "pool_strides"),
        ({"pool_pads": [0, 0, 3, 0]}, "pool_pads"),
        ({"pool_pads": [0, 0, 0, -1]}, "pool_pads"),
        ({"pool_shape": [3, 2], "pool_pads": [0, 2, 0, 0]}, "smaller than the window"),
        ({"activation": "gelu"}, "activation"),
    ],
)
def test_attributes_of_first_layers(session: Any, model: Any, attributes: dict[str, Any], word: str) -> None:
    node, constants = good_stem()
    refused(session, model(replaced(node, **attributes), constants), word)


@pytest.mark.parametrize("shape", [(8, 5, 7, 7), (8, 0, 7, 7), (0, 4, 7, 7), (8, 4, 7), (8, 4, 5, 7), (8,), ()])
def test_weights_of_first_layers_of_other_shapes(session: Any, model: Any, shape: tuple[int, ...]) -> None:
    node, constants = good_stem()
    refused(session, model(node, constants | {"W": np.ones(shape, np.float32)}), "W")


@pytest.mark.parametrize("name", ["W", "B"])
def test_first_layers_that_are_not_finite(session: Any, model: Any, name: str) -> None:
    node, constants = good_stem()
    refused(session, model(node, constants | {name: np.full_like(constants[name], np.nan)}), name, "finite")


def test_an_image_smaller_than_the_pooling(session: Any, model: Any) -> None:
    node, constants = good_stem()
    native = session(model(replaced(node, pads=[0] * 4, pool_pads=[0] * 4), constants))
    assert native.run(None, {"X": np.ones((1, 4, 11, 11), np.float32)})[0].shape == (1, 8, 1, 1)
    for side in (6, 10):
        with pytest.raises(Exception, match=r"the_node.*smaller than the kernel"):
            native.run(None, {"X": np.ones((1, 4, side, side), np.float32)})


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"kernel_shape": [3]}, "strides"),
        ({"kernel_shape": [3], "strides": [1], "dilations": [1], "pads": [1, 1]}, "kernel_shape"),
        ({"kernel_shape": [3, 5]}, "kernel_shape"),
        ({"kernel_shape": [1, 1]}, "kernel_shape"),
        ({"kernel_shape": [2**31, 3]}, "kernel_shape"),
        ({"strides": [1, 2]}, "strides"),
        ({"strides": [3, 3]}, "strides"),
        ({"strides": [0, 0]}, "strides"),
        ({"dilations": [2, 2]}, "dilations"),
        ({"pads": [0, 0, 0, 2**20]}, "pads"),
        ({"pads": [-1, 0, 0, 0]}, "pads"),
        ({"group": 4}, "group"),
        ({"in_channels": 3}, "depthwise_W"),
        ({"in_channels": 2**50}, "in_channels"),
        ({"out_channels": 7}, "more than"),
        ({"out_channels": 16}, "B"),
        ({"block": 2}, "values"),
        ({"block": 3}, "block"),
        ({"activation": "gelu"}, "activation"),
        ({"depthwise_activation": "gelu"}, "depthwise_activation"),
        ({"depthwise_activation": "relu"}, "depthwise_activation"),
        ({"depthwise_min": 2.0}, "depthwise_min"),
        ({"depthwise_max": float("nan")}, "depthwise_min"),
        ({"activation": "clip", "min": 1.0, "max": -1.0}, "min"),
    ],
)
def test_attributes_of_separable_layers(session: Any, model: Any, attributes: dict[str, Any], word: str) -> None:
    node, constants = good_separable()
    refused(session, model(replaced(node, **attributes), constants), word)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("separable", "kernel_shape"),
        ("separable", "in_channels"),
        ("separable", "out_channels"),
        ("conv", "kernel_shape"),
        ("conv", "in_channels"),
        ("conv", "out_channels"),
        ("linear", "in_features"),
        ("linear", "out_features"),
        ("depthwise", "kernel_shape"),
        ("depthwise", "channels"),
        ("stem", "kernel_shape"),
    ],
)
def test_missing_attributes(session: Any, model: Any, op: str, name: str) -> None:
    node, constants = GOOD[op]()
    refused(session, model(replaced(node, **{name: None}), constants), f"'{name}' is missing")


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        *[
            (op, {"pads": [65535] * 4, "dilations": [dilation] * 2})
            for op in ("conv", "depthwise")
            for dilation in (1, 4096)
        ],
        ("separable", {"pads": [65535] * 4}),
        ("stem", {"pads": [65535] * 4}),
    ],
)
def test_outputs_that_are_too_large(session: Any, model: Any, op: str, attributes: dict[str, Any]) -> None:
    node, constants = GOOD[op]()
    native = session(model(replaced(node, **attributes), constants))
    with pytest.raises(Exception, match=r"the_node.*too large"):
        native.run(None, {"X": X})


def with_constant(name: str, value: Any) -> dict[str, Any]:
    return good()[1] | {name: value}


VALUES, DELTAS = operators.encode(WEIGHT)
BAD_CONSTANTS = {
    "index out of range": ("deltas", np.full_like(DELTAS, 255), "outside"),
    "last index out of range": ("deltas", np.array([*DELTAS[:-1], 2], np.uint8), "outside"),
    "first index out of range": ("deltas", np.array([255, 255, *DELTAS[2:]], np.uint8), "outside"),
    "not ascending": ("deltas", np.array([*DELTAS[:5], 0, *DELTAS[6:]], np.uint8), "ascend"),
    "too few deltas": ("deltas", DELTAS[:-1], "values"),
    "deltas of two dimensions": ("deltas", DELTAS[:, None], "dimension"),
    "scalar deltas": ("deltas", np.array(1, np.uint8), "dimension"),
    "deltas of another type": ("deltas", DELTAS.astype(np.int64), "uint8"),
    "signed deltas": ("deltas", DELTAS.astype(np.int8), "uint8"),
    "too few values": ("values", VALUES[:-1], "values"),
    "flat values": ("values", VALUES[:, 0], "values"),
    "NaN": ("values", np.where(np.arange(len(VALUES))[:, None] == 3, np.nan, VALUES).astype(np.float32), "finite"),
    "infinity": ("values", np.where(np.arange(len(VALUES))[:, None] == 3, np.inf, VALUES).astype(np.float32), "finite"),
    "no blocks, but deltas": ("values", VALUES[:0], "values"),
    "values of another type": ("values", VALUES.astype(np.float64), "Type"),
    "bias that is not a number": ("B", np.full(8, np.nan, np.float32), "finite"),
    "short bias": ("B", np.zeros(7, np.float32), "B"),
    "bias of two dimensions": ("B", np.zeros((8, 1), np.float32), "B"),
}


@pytest.mark.parametrize("case", BAD_CONSTANTS)
def test_constants(session: Any, model: Any, case: str) -> None:
    name, value, word = BAD_CONSTANTS[case]
    refused(session, model(good()[0], with_constant(name, value)), word)
    if "bias" in case or "NaN" in case or "infinity" in case:
        node, constants = good_separable()
        refused(session, model(node, constants | {name: value[: len(constants[name])]}), word)
    if case != "first index out of range":
        node, constants = good_linear()
        refused(session, model(node, constants | {name: value}), word)


BAD_FILTERS = {
    "fewer channels": FILTERS[:3],
    "one channel": FILTERS[:1],
    "a larger kernel": np.ones((4, 1, 3, 4), np.float32),
    "two filters a channel": np.ones((4, 2, 3, 3), np.float32),
    "flat": FILTERS.reshape(-1),
    "empty": np.ones((4, 1, 0, 3), np.float32),
}


@pytest.mark.parametrize("case", BAD_FILTERS)
def test_filters_of_other_shapes(session: Any, model: Any, case: str) -> None:
    node, constants = good_depthwise()
    refused(session, model(node, constants | {"W": BAD_FILTERS[case]}), "W", "[4, 1, 3, 3]")
    node, constants = good_separable()
    refused(session, model(node, constants | {"depthwise_W": BAD_FILTERS[case]}), "depthwise_W", "[4, 1, 3, 3]")


@pytest.mark.parametrize("name", ["W", "B"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_filters_that_are_not_finite(session: Any, model: Any, name: str, number: float) -> None:
    node, constants = good_depthwise()
    damaged = constants[name].copy()
    damaged[2] = number
    refused(session, model(node, constants | {name: damaged}), name, "finite")
    node, constants = good_separable()
    refused(session, model(node, constants | {f"depthwise_{name}": damaged}), f"depthwise_{name}", "finite")


CONSTANTS = [(op, name) for op in GOOD for name in GOOD[op]()[1]]


@pytest.mark.parametrize(("op", "name"), [case for case in CONSTANTS if case[1] != "deltas"])
def test_inputs_must_be_constant(session: Any, model: Any, op: str, name: str) -> None:
    node, constants = GOOD[op]()
    del constants[name]
    refused(session, model(node, constants), name, "constant")


@pytest.mark.parametrize(("op", "name"), CONSTANTS)
def test_truncated_tensor(session: Any, model: Any, op: str, name: str) -> None:
    file = model(*GOOD[op]())
    tensor = next(t for t in file.graph.initializer if t.name == name)
    tensor.raw_data = tensor.raw_data[:-5]
    with pytest.raises(Exception, match=name):
        session(file)


@pytest.mark.parametrize(("op", "name"), [case for case in CONSTANTS if case[1] != "B"])
def test_inputs_left_out(session: Any, model: Any, op: str, name: str) -> None:
    node, constants = GOOD[op]()
    del constants[name]
    node.input[list(node.input).index(name)] = ""
    with pytest.raises(Exception, match="the_node"):
        session(model(node, constants)).run(None, {"X": X})


BAD_SHAPES: list[tuple[int, ...]] = [
    (1, 4, 6), (1, 3, 6, 6), (4, 6, 6), (1, 4, 0, 6), (1, 4, 6, 0), (1, 4, 6, 6, 1), (4,), (), (0, 4, 2**30, 2**20)
]  # fmt: skip


@pytest.mark.parametrize("shape", BAD_SHAPES)
@pytest.mark.parametrize(
    ("op", "after"),
    [("conv", (1, 8, 6, 6)), ("depthwise", (1, 4, 6, 6)), ("separable", (1, 8, 6, 6)), ("stem", (1, 8, 2, 2))],
)
def test_inputs_of_other_shapes(
    session: Any, model: Any, op: str, after: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    native = session(model(*GOOD[op]()))
    with pytest.raises(Exception, match="the_node"):
        native.run(None, {"X": np.zeros(shape, np.float32)})
    # The session stays usable.
    assert native.run(None, {"X": X})[0].shape == after


@pytest.mark.parametrize("shape", [(), (35,), (36, 1), (2, 0), (0, 37)])
def test_inputs_of_linear_layers_of_other_shapes(session: Any, model: Any, shape: tuple[int, ...]) -> None:
    native = session(model(*good_linear()))
    with pytest.raises(Exception, match="the_node"):
        native.run(None, {"X": np.zeros(shape, np.float32)})
    assert native.run(None, {"X": np.ones((2, 36), np.float32)})[0].shape == (2, 8)


def test_input_smaller_than_the_kernel(session: Any, model: Any) -> None:
    node, constants = good()
    native = session(model(replaced(node, pads=[0] * 4), constants))
    with pytest.raises(Exception, match=r"the_node.*smaller than the kernel"):
        native.run(None, {"X": X[:, :, :2]})


@pytest.mark.parametrize(("op", "name"), [("conv", "SparseConvAdd"), ("separable", "SparseSeparableClipConvAdd")])
def test_residual_of_another_shape(session: Any, model: Any, op: str, name: str) -> None:
    node, constants = GOOD[op]()
    node.input.append("R")
    node.op_type = name
    native = session(model(node, constants))
    for shape in [(1, 8, 6, 5), (1, 8, 6), (8, 6, 6), (2, 8, 6, 6), (1,)]:
        with pytest.raises(Exception, match=r"the_node.*residual"):
            native.run(None, {"X": X, "R": np.zeros(shape, np.float32)})


def test_empty_batch(session: Any, model: Any) -> None:
    assert session(model(*good())).run(None, {"X": X[:0]})[0].shape == (0, 8, 6, 6)


def test_unknown_instruction_set(session: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPIPE_ISA", "mmx")
    refused(session, model(*good()), "SPARSEPIPE_ISA=mmx", "portable")


NUMBERS = st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**63 - 1))
SIZES = {
    "conv": ["in_channels", "out_channels", "block", "group"],
    "linear": ["in_features", "out_features", "block"],
    "depthwise": ["channels"],
    "separable": ["in_channels", "out_channels", "block", "group"],
}


@st.composite
def damaged(draw: st.DrawFn, op: str) -> tuple[Any, dict[str, Any]]:
    """A node and its constants with random attributes, indices and sizes."""
    node, constants = GOOD[op]()
    changes: dict[str, Any] = {}
    if op in SIZES and draw(st.booleans()):
        changes[draw(st.sampled_from(SIZES[op]))] = draw(NUMBERS)
    if op != "linear" and draw(st.booleans()):
        name = draw(st.sampled_from(["kernel_shape", "strides", "pads", "dilations"]))
        changes[name] = draw(st.lists(NUMBERS, max_size=5)) or None
    if op == "stem" and draw(st.booleans()):
        name = draw(st.sampled_from(["pool_shape", "pool_strides", "pool_pads"]))
        changes[name] = draw(st.lists(NUMBERS, max_size=5)) or None
    if op in ("depthwise", "stem") and draw(st.booleans()):
        constants["W"] = np.ones(draw(st.lists(st.integers(0, 5), max_size=5)), np.float32)
    if op == "separable" and draw(st.booleans()):
        name = draw(st.sampled_from(["depthwise_W", "depthwise_B"]))
        constants[name] = np.ones(draw(st.lists(st.integers(0, 5), max_size=5)), np.float32)
    if op not in ("depthwise", "stem") and draw(st.booleans()):
        kind = draw(st.sampled_from([np.uint8, np.uint16]))
        count = draw(st.integers(0, 40))
        deltas = draw(st.lists(st.integers(0, int(np.iinfo(kind).max)), min_size=count, max_size=count))
        rows = count + draw(st.sampled_from([0, 0, 0, 1, -1]))
        columns = draw(st.sampled_from([0, 1, 1, 2, 4]))
        constants |= {"deltas": np.array(deltas, kind), "values": np.ones((max(rows, 0), columns), np.float32)}
    return replaced(node, **changes), constants


@pytest.mark.parametrize("op", GOOD)
@settings(max_examples=150)
@given(data=st.data())
def test_random_damage(session: Any, model: Any, op: str, data: st.DataObject) -> None:
    """The session either refuses, naming the node, or runs."""
    file = model(*data.draw(damaged(op)))
    shape = data.draw(st.sampled_from([(1, 4, 6, 6), (2, 4, 9, 3), (1, 4, 1, 1), (1, 1, 36), (3, 36)]))
    message = "the_node"
    try:
        session(file).run(None, {"X": np.ones(shape, np.float32)})
    except Exception as error:
        message = str(error)
    assert "the_node" in message


def renamed(node: Any, op_type: str) -> Any:
    new = copy.deepcopy(node)
    new.op_type = op_type
    return new


@pytest.mark.parametrize("op_type", ["SparseConvRelu", "SparseConvSilu", "SparseConvAddHardSwish"])
def test_the_name_and_the_activation_must_agree(session: Any, model: Any, op_type: str) -> None:
    node, constants = good()
    refused(session, model(renamed(node, op_type), constants), op_type, "activation", "'none'")
    node = replaced(node, activation="clip", min=0.0, max=1.0)
    refused(session, model(node, constants), "the operator SparseConv has", "'clip'")


def test_the_name_and_the_activation_of_other_operators_must_agree(session: Any, model: Any) -> None:
    node, constants = good_linear()
    refused(session, model(renamed(node, "SparseLinearGelu"), constants), "SparseLinearGelu", "'gelu'", "'none'")
    depthwise = {"W": np.ones((4, 1, 3, 3), np.float32)}
    for written, name in [("none", "DepthwiseConvRelu"), ("relu", "DepthwiseConv")]:
        node = operators.depthwise_conv(["X", "W"], "Y", weight_shape=(4, 1, 3, 3), activation=written, name="the_node")
        refused(session, model(renamed(node, name), depthwise), f"the operator {name} has", f"'{written}'")


@pytest.mark.parametrize("name", ["SparseSeparableConvClip", "SparseSeparableReluConv", "SparseSeparableClipConvClip"])
def test_the_name_and_both_activations_must_agree(session: Any, model: Any, name: str) -> None:
    node, constants = good_separable()
    refused(session, model(renamed(node, name), constants), f"the operator {name} has", "activation")


@pytest.mark.parametrize("activation", ["", "Relu"])
def test_the_name_and_the_residual_must_agree(session: Any, model: Any, activation: str) -> None:
    node, constants = good()
    node = replaced(node, activation=activation.lower() or "none")
    for op_type, more, word in [
        (f"SparseConvAdd{activation}", [], "missing"),
        (f"SparseConv{activation}", ["R"], "given"),
    ]:
        changed = renamed(node, op_type)
        changed.input.extend(more)
        refused(session, model(changed, constants), op_type, "residual", word)
