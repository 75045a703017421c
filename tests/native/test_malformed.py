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


def with_constant(name: str, value: Any) -> dict[str, Any]:
    return good()[1] | {name: value}


VALUES, DELTAS = operators.encode(WEIGHT)
BAD_CONSTANTS = {
    "index out of range": ("deltas", np.full_like(DELTAS, 255), "outside"),
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
    "short bias": ("B", np.zeros(7, np.float32), "B"),
    "bias of two dimensions": ("B", np.zeros((8, 1), np.float32), "B"),
}


@pytest.mark.parametrize("case", BAD_CONSTANTS)
def test_constants(session: Any, model: Any, case: str) -> None:
    name, value, word = BAD_CONSTANTS[case]
    refused(session, model(good()[0], with_constant(name, value)), word)
    if case != "first index out of range":
        node, constants = good_linear()
        refused(session, model(node, constants | {name: value}), word)


@pytest.mark.parametrize("name", ["values", "B"])
def test_inputs_must_be_constant(session: Any, model: Any, name: str) -> None:
    node, constants = good()
    del constants[name]
    refused(session, model(node, constants), name, "constant")


def test_truncated_tensor(session: Any, model: Any) -> None:
    node, constants = good()
    file = model(node, constants)
    tensor = next(t for t in file.graph.initializer if t.name == "values")
    tensor.raw_data = tensor.raw_data[:-5]
    with pytest.raises(Exception, match="values"):
        session(file)


@pytest.mark.parametrize(
    "shape", [(1, 4, 6), (1, 3, 6, 6), (4, 6, 6), (1, 4, 0, 6), (1, 4, 6, 0), (1, 4, 6, 6, 1), (4,), ()]
)
def test_inputs_of_other_shapes(session: Any, model: Any, shape: tuple[int, ...]) -> None:
    native = session(model(*good()))
    with pytest.raises(Exception, match="the_node"):
        native.run(None, {"X": np.zeros(shape, np.float32)})
    # The session stays usable.
    assert native.run(None, {"X": X})[0].shape == (1, 8, 6, 6)


def test_input_smaller_than_the_kernel(session: Any, model: Any) -> None:
    node, constants = good()
    native = session(model(replaced(node, pads=[0] * 4), constants))
    with pytest.raises(Exception, match=r"the_node.*smaller than the kernel"):
        native.run(None, {"X": X[:, :, :2]})


def test_residual_of_another_shape(session: Any, model: Any) -> None:
    node, constants = good()
    node.input.append("R")
    node.op_type = "SparseConvAdd"
    native = session(model(node, constants))
    for shape in [(1, 8, 6, 5), (1, 8, 6), (8, 6, 6), (2, 8, 6, 6), (1,)]:
        with pytest.raises(Exception, match=r"the_node.*residual"):
            native.run(None, {"X": X, "R": np.zeros(shape, np.float32)})


def test_empty_batch(session: Any, model: Any) -> None:
    assert session(model(*good())).run(None, {"X": X[:0]})[0].shape == (0, 8, 6, 6)


def test_unknown_instruction_set(session: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPIPE_ISA", "mmx")
    refused(session, model(*good()), "SPARSEPIPE_ISA=mmx", "portable")


@pytest.mark.parametrize("linear", [False, True])
@settings(max_examples=150)
@given(data=st.data())
def test_random_damage(session: Any, model: Any, linear: bool, data: st.DataObject) -> None:
    """Random attributes, indices and sizes: the session either refuses, naming the node, or runs."""
    node, constants = good_linear() if linear else good()
    numbers = st.one_of(st.integers(-2, 9), st.integers(-(2**63), 2**63 - 1))
    names = ["in_features", "out_features", "block"] if linear else ["in_channels", "out_channels", "block", "group"]
    changes: dict[str, Any] = {}
    if data.draw(st.booleans()):
        changes[data.draw(st.sampled_from(names))] = data.draw(numbers)
    if not linear and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(["kernel_shape", "strides", "pads", "dilations"]))
        changes[name] = data.draw(st.lists(numbers, max_size=5))
        if not changes[name]:
            changes[name] = None
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from([np.uint8, np.uint16]))
        count = data.draw(st.integers(0, 40))
        deltas = data.draw(st.lists(st.integers(0, int(np.iinfo(kind).max)), min_size=count, max_size=count))
        rows = count + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
        columns = data.draw(st.sampled_from([0, 1, 1, 2, 4]))
        constants |= {"deltas": np.array(deltas, kind), "values": np.ones((max(rows, 0), columns), np.float32)}
    file = model(replaced(node, **changes), constants)
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
