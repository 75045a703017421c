"""Folding: onnxruntime's outputs before and after, zeros that stay zeros, and what must not be folded."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.graph.fold import fold

CHANNELS = 6
NORM_PARTS = ("gamma", "beta", "mean", "var")
RANDOM = np.random.default_rng(7)


def norm_values(channels: int = CHANNELS) -> dict[str, NDArray[Any]]:
    """Scales of both signs and one of zero."""
    gamma = np.resize([1.3, 0.0, -0.7, -2.1, 0.4, 0.9], channels)
    values = {
        "gamma": gamma,
        "beta": RANDOM.standard_normal(channels),
        "mean": RANDOM.standard_normal(channels),
        "var": RANDOM.uniform(0.2, 2.0, channels),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def sparse(*shape: int) -> NDArray[Any]:
    weight = RANDOM.standard_normal(shape) * (RANDOM.random(shape) < 0.4)
    return weight.astype(np.float32)


def norm(source: str, target: str, **attributes: Any) -> NodeProto:
    return helper.make_node("BatchNormalization", [source, *NORM_PARTS], [target], name="norm", **attributes)


def model(
    nodes: list[NodeProto],
    constants: dict[str, NDArray[Any]],
    shape: tuple[int, ...],
    outputs: tuple[str, ...] = ("y",),
    opset: int = 18,
    dtype: int = TensorProto.FLOAT,
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, ["n", *shape])],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    made = onnx.shape_inference.infer_shapes(made)
    onnx.checker.check_model(made)
    return made


def evaluate(made: ModelProto, shape: tuple[int, ...], **further: NDArray[Any]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.random.default_rng(1).standard_normal((3, *shape)).astype(np.float32)
    return [
        np.asarray(value)
        for value in onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": x, **further})
    ]


def stored(made: ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}


def op_types(made: ModelProto) -> list[str]:
    return [node.op_type for node in made.graph.node]


LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "Conv": ({"pads": [1, 1, 1, 1]}, (CHANNELS, 4, 3, 3), (4, 5, 5)),
    "Conv grouped": ({"group": 2, "strides": [2, 2]}, (CHANNELS, 2, 3, 3), (4, 5, 5)),
    "Conv depthwise": ({"group": CHANNELS}, (CHANNELS, 1, 3, 3), (CHANNELS, 5, 5)),
    "Conv 1d": ({"dilations": [2]}, (CHANNELS, 4, 2), (4, 7)),
    "ConvTranspose": ({"strides": [2, 2]}, (4, CHANNELS, 3, 3), (4, 4, 4)),
    "ConvTranspose grouped": ({"group": 2}, (4, CHANNELS // 2, 3, 3), (4, 4, 4)),
    "Gemm turned": ({"transB": 1, "alpha": 0.5, "beta": 2.0}, (CHANNELS, 4), (4,)),
    "Gemm": ({}, (4, CHANNELS), (4,)),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("opset", [13, 18])
def test_a_folded_layer_computes_the_same_from_as_many_zeros(kind: str, with_bias: bool, opset: int) -> None:
    attributes, weight_shape, shape = LAYERS[kind]
    constants = {"c.weight": sparse(*weight_shape), **norm_values()}
    if with_bias:
        constants["c.bias"] = RANDOM.standard_normal(CHANNELS).astype(np.float32)
    inputs = ["x", "c.weight", *(["c.bias"] if with_bias else [])]
    layer = helper.make_node(kind.split()[0], inputs, ["c"], name="c", **attributes)
    before = model([layer, norm("c", "bn", epsilon=1e-3), helper.make_node("Relu", ["bn"], ["y"])], constants, shape)
    untouched = before.SerializeToString()

    after, unfolded = fold(before)

    assert unfolded == []
    assert before.SerializeToString() == untouched
    onnx.checker.check_model(after, full_check=True)
    assert op_types(after) == [kind.split()[0], "Relu"]
    assert after.graph.node[0].output == ["bn"]
    assert after.graph.node[0].name == "c"
    np.testing.assert_allclose(evaluate(after, shape)[0], evaluate(before, shape)[0], rtol=2e-5, atol=2e-6)
    values = stored(after)
    assert set(values) == {"c.weight", "c.bias"}
    zeros = values["c.weight"][constants["c.weight"] == 0]
    assert zeros.size
    assert not zeros.any()
    assert not np.signbit(zeros).any()


def test_the_arithmetic_is_that_of_float64() -> None:
    """The statistics are such that float32 arithmetic loses the shift: (b - mean) cancels."""
    constants = {"w": np.ones((1, 1, 1, 1), np.float32), "b": np.float32([1e8]), **norm_values(1)}
    constants |= {
        "gamma": np.float32([3]),
        "beta": np.float32([0.25]),
        "mean": np.float32([1e8]),
        "var": np.float32([9]),
    }
    layer = helper.make_node("Conv", ["x", "w", "b"], ["c"])
    after, _ = fold(model([layer, norm("c", "y", epsilon=0.0)], constants, (1, 2, 2)))
    assert stored(after)["b"].tolist() == [0.25]
    assert stored(after)["w"].ravel().tolist() == [1.0]


def test_a_chain_of_norms_and_drop_outs_is_folded_whole() -> None:
    constants = {"w": sparse(CHANNELS, CHANNELS, 1, 1), **norm_values()}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        norm("c", "n1"),
        helper.make_node("Identity", ["n1"], ["same"]),
        helper.make_node("BatchNormalization", ["same", *NORM_PARTS], ["n2"]),
        helper.make_node("Dropout", ["n2"], ["kept"]),
        helper.make_node("Identity", ["kept"], ["y"]),
    ]
    before = model(nodes, constants, (CHANNELS, 3, 3))
    after, unfolded = fold(before)
    assert unfolded == []
    assert op_types(after) == ["Conv"]
    assert after.graph.node[0].output == ["y"]
    np.testing.assert_allclose(*(evaluate(m, (CHANNELS, 3, 3))[0] for m in (before, after)), rtol=1e-4, atol=1e-5)


def left_alone(nodes: list[NodeProto], changes: dict[str, Any], outputs: tuple[str, ...] = ("y",)) -> str:
    """Fold, expect the same outputs and one unfolded norm, and return its reason."""
    shape = (CHANNELS, 3, 3)
    constants = {"w": sparse(CHANNELS, CHANNELS, 1, 1), **norm_values(), **changes}
    before = model(nodes, constants, shape, outputs)
    after, unfolded = fold(before)
    assert "BatchNormalization" in op_types(after)
    for old, new in zip(evaluate(before, shape), evaluate(after, shape), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [entry.node for entry in unfolded] == ["norm"]
    return unfolded[0].reason


def test_an_output_that_others_use_keeps_its_norm() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["c"], name="conv")
    both = [conv, norm("c", "n"), helper.make_node("Add", ["c", "n"], ["y"])]
    assert "the output of 'conv' is used elsewhere" in left_alone(both, {})
    assert "the output of 'conv' is used elsewhere" in left_alone([conv, norm("c", "y")], {}, ("y", "c"))


def test_an_output_that_a_subgraph_captures_keeps_its_norm() -> None:
    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("Relu", ["c"], [name])], name, [], [out])

    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        norm("c", "y"),
        helper.make_node("If", ["yes"], ["z"], then_branch=branch("a"), else_branch=branch("b")),
    ]
    assert "used elsewhere" in left_alone(nodes, {"yes": np.array(True)}, ("y", "z"))


def test_a_shared_weight_keeps_its_norm() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        norm("c", "n"),
        helper.make_node("Conv", ["n", "w"], ["y"]),
    ]
    assert left_alone(nodes, {}) == "the weight 'w' is shared"


@pytest.mark.parametrize("name", ["w", "b", *NORM_PARTS])
def test_what_a_caller_may_override_keeps_its_norm(name: str) -> None:
    constants = {"w": sparse(CHANNELS, CHANNELS, 1, 1), "b": np.ones(CHANNELS, np.float32), **norm_values()}
    before = model([helper.make_node("Conv", ["x", "w", "b"], ["c"]), norm("c", "y")], constants, (CHANNELS, 3, 3))
    default = next(tensor for tensor in before.graph.initializer if tensor.name == name)
    before.graph.input.append(helper.make_tensor_value_info(name, default.data_type, default.dims))
    after, unfolded = fold(before)
    assert "is not constant" in unfolded[0].reason
    given = {name: np.full_like(constants[name], 3)}
    np.testing.assert_array_equal(*(evaluate(m, (CHANNELS, 3, 3), **given)[0] for m in (before, after)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"var": np.full(CHANNELS, -1, np.float32)}, "variance is not positive"),
        ({"gamma": np.full(CHANNELS, 1e38, np.float32), "w": np.full((CHANNELS, CHANNELS, 1, 1), 1e38, np.float32)},
         "does not fit into float32"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_stored_keep_their_norm(changes: dict[str, Any], reason: str) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["c"])
    before = model(
        [conv, norm("c", "y")], {"w": sparse(CHANNELS, CHANNELS, 1, 1), **norm_values(), **changes}, (6, 3, 3)
    )
    after, unfolded = fold(before)
    assert after.SerializeToString() == before.SerializeToString()
    assert reason in unfolded[0].reason


def test_a_norm_before_the_layer_stays() -> None:
    assert "follows the input of the network" in left_alone([norm("x", "y")], {"w": np.zeros(0, np.float32)})
    nodes = [helper.make_node("Relu", ["x"], ["r"]), norm("r", "y")]
    assert "it follows Relu 'r'" in left_alone(nodes, {"w": np.zeros(0, np.float32)})


def test_a_bias_that_others_use_is_left_to_them() -> None:
    constants = {"a.weight": sparse(CHANNELS, CHANNELS, 1, 1), "v": sparse(CHANNELS, CHANNELS, 1, 1), **norm_values()}
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "gamma"], ["c"]),
        norm("c", "n"),
        helper.make_node("Conv", ["n", "v", "gamma"], ["y"]),
    ]
    before = model(nodes, constants, (CHANNELS, 3, 3))
    after, unfolded = fold(before)
    assert unfolded == []
    assert sorted(stored(after)) == ["a.bias", "a.weight", "gamma", "v"]
    np.testing.assert_allclose(*(evaluate(m, (CHANNELS, 3, 3))[0] for m in (before, after)), rtol=1e-4, atol=1e-5)


def test_what_a_subgraph_or_an_input_pins_is_not_passed_through() -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    before = model(nodes, {}, (2,), ("y", "z"))
    after, _ = fold(before)
    assert op_types(after) == ["Identity", "Identity"]


def test_a_dropout_in_training_or_with_a_mask_stays() -> None:
    constants = {"ratio": np.array(0.5, np.float32), "on": np.array(True), "off": np.array(False)}
    nodes = [
        helper.make_node("Dropout", ["x", "ratio", "on"], ["a"]),
        helper.make_node("Dropout", ["a", "ratio", "off"], ["b"]),
        helper.make_node("Dropout", ["b"], ["c", "mask"]),
        helper.make_node("Where", ["mask", "b", "c"], ["y"]),
    ]
    after, _ = fold(model(nodes, constants, (2,)))
    assert [node.output[0] for node in after.graph.node] == ["a", "c", "y"]


def test_unused_initializers_go_and_float16_stays_float16() -> None:
    constants = {name: value.astype(np.float16) for name, value in norm_values().items()}
    constants |= {"w": sparse(CHANNELS, CHANNELS, 1, 1).astype(np.float16), "unused": np.zeros(9, np.float32)}
    made = model(
        [helper.make_node("Conv", ["x", "w"], ["c"]), norm("c", "y")],
        constants,
        (CHANNELS, 3, 3),
        dtype=TensorProto.FLOAT16,
    )
    after, unfolded = fold(made)
    assert unfolded == []
    assert {name: value.dtype for name, value in stored(after).items()} == {"w": np.float16, "w.bias": np.float16}


def test_nodes_that_no_output_needs_go() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["seen"], ["inner"])], "b", [], [helper.make_tensor_value_info("inner", 1, None)]
    )
    nodes = [
        helper.make_node("Exp", ["x"], ["seen"]),
        helper.make_node("Abs", ["x"], ["dead"]),
        helper.make_node("Split", ["dead"], ["first", "second"], axis=1, num_outputs=2),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("Split", ["x"], ["unused", "z"], axis=1, num_outputs=2),
    ]
    after, _ = fold(model(nodes, {"yes": np.array(True), "idle": np.zeros(3)}, (2,), ("y", "z")))
    assert op_types(after) == ["Exp", "If", "Split"]
    assert list(stored(after)) == ["yes"]
    assert "dead" not in {value.name for value in after.graph.value_info}
