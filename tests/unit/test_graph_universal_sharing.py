"""Weights that several nodes use, depthwise convolutions between sparse layers, and graphs inside of graphs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper
from universal_cases import check, model, ops, weight

from sparsepipe.graph.index import copy
from sparsepipe.graph.load import load
from sparsepipe.graph.restore import restore
from sparsepipe.graph.universal import choose, rewrite

pytestmark = pytest.mark.usefixtures("decided_by_size")

node = helper.make_node


def initializers(made: onnx.ModelProto) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in made.graph.initializer}


def test_nodes_that_share_a_weight_share_its_encoding() -> None:
    nodes = [
        node("Conv", ["x", "shared.weight", "b0"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "shared.weight", "b1"], ["c"], strides=[2, 2]),
        node("Conv", ["c", "shared.weight"], ["y"], dilations=[1, 2], pads=[1, 2, 1, 2]),
    ]
    shared = weight(16, 16, 3, 3, block=2)
    constants = {"shared.weight": shared, "b0": weight(16, density=1), "b1": weight(16, density=1)}
    after, choices = check(model(nodes, (16, "h", "w"), constants))
    assert ops(after) == ["SparseConvRelu", "SparseConv", "SparseConv"]
    encoded = {tuple(made.input[1:3]) for made in after.graph.node}
    assert len(encoded) == 1
    assert len({made.input[3] for made in after.graph.node}) == 3
    assert Counter(len(dims) for dims in initializers(after).values()) == Counter({1: 4, 2: 1})
    rows = list(choices.values())
    assert [row.sparse for row in rows] == [True] * 3
    assert [row.dense_bytes for row in rows] == [shared.nbytes, 0, 0]
    assert rows[0].bytes > 0
    assert rows[1].bytes == rows[2].bytes == 0
    assert all("same weight as in 'a'" in row.reason for row in rows[1:])


def test_a_matrix_and_its_transposition_are_encoded_apart() -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=1),
        node("Gemm", ["a", "w"], ["b"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["b", "t"], ["c"]),
        node("MatMul", ["c", "t"], ["y"]),
    ]
    after, choices = check(model(nodes, (48,), {"w": weight(48, 48)}))
    assert ops(after) == ["SparseLinear"] * 4
    assert all(choice.sparse for choice in choices.values())
    values = [made.input[1] for made in after.graph.node]
    assert values[0] == values[2] == values[3] != values[1]
    assert "w" not in initializers(after)


@pytest.mark.parametrize(
    ("extra", "outputs", "reason"),
    [
        (node("Gather", ["w", "ids"], ["z"]), ("y", "z"), "Gather 'z', which stays, uses the weight, too"),
        (node("Mul", ["w", "w"], ["z"]), ("y", "z"), "Mul 'z', which stays"),
        (node("Conv", ["w4", "w4"], ["z"]), ("y", "z"), ""),
        (node("Identity", ["w"], ["z"]), ("y", "z"), "Identity 'z', which stays"),
    ],
)
def test_a_weight_with_another_use_stays_dense(extra: NodeProto, outputs: tuple[str, ...], reason: str) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["y"]), extra]
    constants = {"w": weight(32, 32), "ids": np.array([3, 1]), "w4": weight(32, 32, 1, 1)}
    used = {name for made in nodes for name in made.input}
    before = model(nodes, (32,), {name: value for name, value in constants.items() if name in used}, outputs=outputs)
    after, choices = check(before)
    if reason:
        assert Counter(ops(after)) == Counter(made.op_type for made in nodes)
        assert all(reason in choices[name].reason for name in ("a", "y"))
        assert initializers(after)["w"] == [32, 32]
    else:  # the convolution of a weight with itself is another weight's affair
        assert Counter(ops(after)) == Counter({"SparseLinear": 2, "Conv": 1})


def test_a_weight_that_is_an_output_stays_dense() -> None:
    before = model([node("MatMul", ["x", "w"], ["y"])], (32,), {"w": weight(32, 32)})
    before.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 32]))
    after, choices = check(before)
    assert ops(after) == ["MatMul"]
    assert choices["y"].reason == "the weight is an output of the network"


def test_one_dense_use_of_a_shared_weight_keeps_all_dense() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Conv", ["a", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    after, choices = check(model(nodes, (16, "h", "w_"), {"w": weight(16, 16, 3, 3)}))
    assert ops(after) == ["Conv", "Conv"]
    assert "depends on the size" in choices["a"].reason
    assert "Conv 'a', which stays, uses the weight, too" in choices["y"].reason


@pytest.mark.parametrize("way", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_automatic_pads_of_stride_1(way: str, kernel: tuple[int, int]) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"], auto_pad=way)]
    assert ops(check(model(nodes, (16, "h", "w_"), {"w": weight(16, 16, *kernel)}))[0]) == ["SparseConv"]


@given(
    uses=st.lists(st.sampled_from(["Gemm", "GemmT", "MatMul", "Transposed", "Gather"]), min_size=1, max_size=5),
    biases=st.booleans(),
)
@settings(max_examples=15)
def test_any_mixture_of_uses(uses: list[str], biases: bool) -> None:
    """All of the uses are rewritten, or none: never is a weight stored twice."""
    nodes = [node("Transpose", ["w"], ["t"])] if "Transposed" in uses else []
    constants = {"w": weight(32, 32), "ids": np.arange(32)}
    current = "x"
    for place, use in enumerate(uses):
        output = "y" if place == len(uses) - 1 else f"a{place}"
        match use:
            case "Gather":
                nodes.append(node("Gather", ["w", "ids"], [f"g{place}"]))
                nodes.append(node("MatMul", [current, f"g{place}"], [output]))
            case "MatMul" | "Transposed":
                nodes.append(node("MatMul", [current, "w" if use == "MatMul" else "t"], [output]))
            case _:
                extra = [f"b{place}"] if biases else []
                constants |= {name: weight(32, density=1) for name in extra}
                nodes.append(node("Gemm", [current, "w", *extra], [output], transB=int(use == "GemmT")))
        current = output
    if "Gather" not in uses:
        del constants["ids"]
    after, choices = check(model(nodes, (32,), constants))
    written = Counter(ops(after))
    assert written["SparseLinear"] == (0 if "Gather" in uses else len(uses))
    assert ("w" in initializers(after)) == ("Gather" in uses)
    assert sum(choice.dense_bytes for choice in choices.values()) == constants["w"].nbytes


def mobile(
    activation: str,
    *,
    sparse: tuple[bool, bool] = (True, True),
    opset: int = 18,
    size: int = 3,
    stride: int = 2,
    window: dict[str, list[int]] | None = None,
) -> onnx.ModelProto:
    """1x1, depthwise, 1x1, with an activation after each of the first two.

    Args:
        activation: its operator.
        sparse: whether the first and the last layer are.
        opset: of the model.
        size: of the depthwise kernel.
        stride: of the depthwise convolution.
        window: further attributes of the last layer.
    """
    clip = ["low", "high"] if activation == "Clip" else []
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node(activation, ["a", *clip], ["b"]),
        node("Conv", ["b", "d.weight", "d.bias"], ["c"], group=32, strides=[stride] * 2, pads=[size // 2] * 4),
        node(activation, ["c", *clip], ["e"]),
        node("Conv", ["e", "w1"], ["y"], **(window or {})),
    ]
    constants = {
        "w0": weight(32, 16, 1, 1, density=0.1 if sparse[0] else 1),
        "d.weight": weight(32, 1, size, size, density=1),
        "d.bias": weight(32, density=1),
        "w1": weight(24, 32, 1, 1, density=0.1 if sparse[1] else 1),
    }
    if clip:
        constants |= {"low": np.array(0, np.float32), "high": np.array(0.75, np.float32)}
    return model(nodes, (16, "h", "w"), constants, opset=opset)


@pytest.mark.parametrize("activation", ["Relu", "Clip", "HardSwish"])
@pytest.mark.parametrize("opset", [14, 22])
def test_a_depthwise_convolution_between_sparse_layers(activation: str, opset: int) -> None:
    after, choices = check(mobile(activation, opset=opset, size=5), side=9)
    assert ops(after) == [f"SparseConv{activation}", f"DepthwiseConv{activation}", "SparseConv"]
    row = choices["c"]
    assert (row.sparse, row.kernel, row.bytes) == (False, "DepthwiseConv", row.dense_bytes)
    assert "between sparse layers" in row.reason
    assert initializers(after)["d.weight"] == [32, 1, 5, 5]


@pytest.mark.parametrize(
    ("activation", "opset"), [("Relu", 13), ("Clip", 13), ("HardSwish", 14), ("Relu", 22), ("HardSwish", 22)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_convolution_becomes_part_of_the_sparse_layer_after_it(
    activation: str, opset: int, stride: int
) -> None:
    after, choices = check(mobile(activation, opset=opset, stride=stride), side=9)
    assert ops(after) == [f"SparseConv{activation}", f"SparseSeparable{activation}Conv"]
    first, second = choices["c"], choices["y"]
    assert (first.sparse, first.kernel, first.bytes) == (False, "SparseSeparableConv", first.dense_bytes)
    assert (second.sparse, second.kernel, second.block) == (True, "SparseSeparableConv", 1)
    assert initializers(after)["d.weight"] == [32, 1, 3, 3]
    assert [name for name in after.graph.node[1].input if name.startswith("d")] == ["d.weight", "d.bias_"]


@pytest.mark.parametrize("last", ["Identity", "Relu"])
def test_the_steps_after_both_convolutions_become_part_of_the_operator(last: str) -> None:
    """But no activation after a sum: there is no operator for that."""
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["a", "d"], ["b"], group=32, pads=[1] * 4),
        node("Sigmoid", ["b"], ["g"]),
        node("Mul", ["b", "g"], ["c"]),
        node("Conv", ["c", "w1", "b1"], ["e"]),
        node("Add", ["x", "e"], ["f"]),
        node(last, ["f"], ["y"]),
    ]
    constants = {
        "w0": weight(32, 16, 1, 1),
        "d": weight(32, 1, 3, 3, density=1),
        "w1": weight(16, 32, 1, 1),
        "b1": weight(16, density=1),
    }
    after, _ = check(model(nodes, (16, "h", "w"), constants))
    if last == "Relu":
        assert ops(after) == ["SparseConv", "DepthwiseConvSilu", "SparseConvAddRelu"]
    else:
        assert ops(after) == ["SparseConv", "SparseSeparableSiluConvAdd", "Identity"]
        assert after.graph.node[1].input[-1] == "x"


@pytest.mark.parametrize(("stride", "fused"), [(1, True), (2, False)])
def test_behind_a_dense_layer_the_change_of_layout_must_not_grow(stride: int, fused: bool) -> None:
    after, choices = check(mobile("Relu", sparse=(False, True), stride=stride))
    assert ("SparseSeparableReluConv" in ops(after)) == fused
    assert choices["c"].kernel == ("SparseSeparableConv" if fused else "")


@pytest.mark.parametrize(
    "window", [{"strides": [2, 2]}, {"pads": [0, 1, 0, 0]}, {"strides": [1, 2], "pads": [1, 1, 1, 1]}]
)
def test_a_layer_with_a_window_of_its_own_is_not_fused(window: dict[str, list[int]]) -> None:
    assert ops(check(mobile("Relu", window=window))[0]) == ["SparseConvRelu", "DepthwiseConvRelu", "SparseConv"]


def test_a_depthwise_convolution_that_two_sparse_layers_read_is_not_fused() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["a", "d"], ["b"], group=16, pads=[1] * 4),
        node("Conv", ["b", "w1"], ["y"]),
        node("Conv", ["b", "w2"], ["z"]),
    ]
    constants = {name: weight(16, 16, 1, 1) for name in ("w0", "w1", "w2")} | {"d": weight(16, 1, 3, 3, density=1)}
    after, _ = check(model(nodes, (16, "h", "w"), constants, outputs=("y", "z")))
    assert ops(after) == ["SparseConv", "DepthwiseConv", "SparseConv", "SparseConv"]


def test_fused_and_other_layers_share_a_weight() -> None:
    nodes = [
        node("Conv", ["x", "w.weight"], ["a"]),
        node("Conv", ["a", "d.weight"], ["b"], group=16, pads=[1] * 4),
        node("Conv", ["b", "w.weight"], ["c"]),
        node("Conv", ["c", "d.weight"], ["e"], group=16, pads=[1] * 4),
        node("Conv", ["e", "w.weight"], ["y"]),
    ]
    constants = {"w.weight": weight(16, 16, 1, 1), "d.weight": weight(16, 1, 3, 3, density=1)}
    after, _ = check(model(nodes, (16, "h", "w"), constants))
    assert ops(after) == ["SparseConv", "SparseSeparableConv", "SparseSeparableConv"]
    assert {name: dims for name, dims in initializers(after).items() if len(dims) > 1}.keys() == {
        "w.values",
        "d.weight",
    }
    restored = copy(after)
    rows = restore(restored, where="test", limit=1 << 30)
    assert [(row.name, row.stored_as) for row in rows] == [("w.weight", "csr"), *[("d.weight", "dense")] * 2]
    assert ops(restored) == ["Conv"] * 5
    assert all(len(made.input) == 2 for made in restored.graph.node)
    again = rewrite(restored, choose(restored))
    assert ops(again) == ops(after)


def test_a_depthwise_convolution_in_one_dimension() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["a", "d"], ["b"], group=16, pads=[1, 1]),
        node("Sigmoid", ["b"], ["g"]),
        node("Mul", ["g", "b"], ["c"]),
        node("Conv", ["c", "w1"], ["y"]),
    ]
    constants = {"w0": weight(16, 16, 1), "d": weight(16, 1, 3, density=1), "w1": weight(16, 16, 1)}
    assert ops(check(model(nodes, (16, "t"), constants))[0]) == ["SparseConv", "DepthwiseConvSilu", "SparseConv"]


@pytest.mark.parametrize(
    ("sparse", "reason"),
    [((False, True), "what comes before it is not sparse"), ((True, False), "what follows it is not sparse")],
)
def test_a_depthwise_convolution_beside_a_dense_layer_stays(sparse: tuple[bool, bool], reason: str) -> None:
    after, choices = check(mobile("Relu", sparse=sparse))
    assert "Conv" in ops(after)
    assert not any(name.startswith("Depthwise") for name in ops(after))
    assert reason in choices["c"].reason


def test_a_depthwise_convolution_that_something_else_uses_stays() -> None:
    before = mobile("Relu")
    before.graph.output.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n", 32, None, None]))
    after, choices = check(before)
    assert "Conv" in ops(after)
    assert "its output leaves the network" in choices["c"].reason


def test_a_layer_turned_dense_later_takes_the_depthwise_convolution_with_it() -> None:
    """As a measurement may do: the reasons go by the layers that are left."""
    before = mobile("Relu")
    chosen = choose(before)
    assert [row.kernel for row in chosen] == ["SparseConv", "SparseSeparableConv", "SparseSeparableConv"]
    rows = [replace(row, sparse=row.sparse and row.output != "y", kernel="") for row in chosen]
    assert Counter(ops(rewrite(before, rows))) == Counter({"SparseConvRelu": 1, "Conv": 2, "Relu": 1})
    alone = [row for row in chosen if row.output != "c"]  # as a measurement of single layers has it
    assert ops(rewrite(before, alone)) == ["SparseConvRelu", "Conv", "Relu", "SparseConv"]


def test_a_channel_multiplier_is_a_grouped_convolution() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["a", "d"], ["b"], group=16),
        node("Conv", ["b", "w1"], ["y"]),
    ]
    constants = {"w0": weight(16, 16, 1, 1), "d": weight(32, 1, 3, 3, density=1), "w1": weight(16, 32, 1, 1)}
    after, choices = check(model(nodes, (16, 6, 6), constants))
    assert ops(after) == ["SparseConv", "Conv", "SparseConv"]
    assert choices["b"].reason == "convolution of 16 groups"


def test_the_names_of_a_function_are_its_own() -> None:
    """Its weight and its result are called as those of the depthwise convolution between two sparse layers."""
    constant = node("Constant", [], ["depthwise"], value=numpy_helper.from_array(weight(16, 16)))
    inner = [constant, node("MatMul", ["t", "depthwise"], ["b"])]
    function = helper.make_function("own", "Dense", ["t"], ["b"], inner, [helper.make_opsetid("", 18)])
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["a", "depthwise"], ["b"], group=16),
        node("Conv", ["b", "w1"], ["c"]),
        node("Transpose", ["c"], ["d"], perm=[0, 2, 3, 1]),
        node("Identity", ["d"], ["y"]),
    ]
    constants = {"w0": weight(16, 16, 1, 1), "depthwise": weight(16, 1, 3, 3, density=1), "w1": weight(16, 16, 1, 1)}
    before = model(nodes, (16, 6, 6), constants)
    before.graph.node[-1].CopyFrom(node("Dense", ["d"], ["y"], domain="own"))
    before.functions.append(function)
    before.opset_import.append(helper.make_opsetid("own", 1))
    after, _ = check(before)
    assert ops(after) == ["SparseConv", "SparseSeparableConv", "Transpose", "Dense"]
    rows = choose(before)
    assert [row.kernel for row in rows] == ["SparseConv", "SparseSeparableConv", "SparseSeparableConv", ""]
    assert rows[-1].dense_bytes == 16 * 16 * 4
    assert rows[-1].reason == "inside of the function 'Dense', which is left alone"


@pytest.mark.parametrize("opset", [13, 16, 22])
def test_loops_and_branches_see_the_tensors_of_rewritten_layers(opset: int) -> None:
    """A Loop that uses a layer's output and a weight of the graph, and an If with a layer of its own."""
    info = helper.make_tensor_value_info
    step = helper.make_graph(
        [
            node("MatMul", ["state", "outer"], ["m"]),
            node("Add", ["m", "b"], ["next"]),
            node("Identity", ["go"], ["go_on"]),
        ],
        "step",
        [
            info("i", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("state", TensorProto.FLOAT, ["n", 32]),
        ],
        [info("go_on", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, ["n", 32])],
    )
    branch = helper.make_graph(
        [node("MatMul", ["d", "inner"], ["f"])],
        "branch",
        [],
        [info("f", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(weight(32, 32), "inner")],
    )
    nodes = [
        node("MatMul", ["x", "w0"], ["a"]),
        node("Relu", ["a"], ["b"]),  # the loop sees it: fused, but not beyond
        node("Sigmoid", ["b"], ["c"]),
        node("Loop", ["times", "yes", "c"], ["d"], body=step),
        node("If", ["yes"], ["e"], then_branch=branch, else_branch=branch),
        node("MatMul", ["e", "w1"], ["y"]),
    ]
    constants = {
        "w0": weight(32, 32),
        "w1": weight(32, 32),
        "outer": weight(32, 32),
        "times": np.array(2),
        "yes": np.array(True),
    }
    after, choices = check(model(nodes, (32,), constants, opset=opset))
    assert ops(after) == ["SparseLinearRelu", "Sigmoid", "Loop", "If", "SparseLinear"]
    assert "inside of the body of Loop" in choices["m"].reason
    assert "inside of the then_branch of If" in choices["f"].reason


def test_external_data(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("Relu", ["a"], ["y"])]
    before = model(nodes, (16, "h", "w_"), {"w": weight(16, 16, 3, 3)})
    inside = before.SerializeToString()
    onnx.save(before, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert (tmp_path / "m.data").stat().st_size >= 16 * 16 * 9 * 4
    after, _ = check(load(tmp_path / "m.onnx"))
    assert ops(after) == ["SparseConvRelu"]
    alone = onnx.load_from_string(inside)
    for one, other in zip(after.graph.initializer, rewrite(alone, choose(alone)).graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


@pytest.mark.parametrize("opset", range(13, 23))
def test_every_opset(opset: int) -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        node("HardSigmoid", ["a"], ["g"], alpha=1 / 6, beta=0.5),
        node("Mul", ["a", "g"], ["b"]),
        node("Conv", ["b", "grouped"], ["c"], group=4),
        node("ConvTranspose", ["c", "transposed"], ["d"], strides=[2, 2]),
        node("Conv", ["d", "w1"], ["e"]),
        node("Add", ["e", "d"], ["f"]),
        node("Sigmoid", ["f"], ["h"]),
        node("Mul", ["h", "f"], ["i"]),
        node("GlobalAveragePool", ["i"], ["j"]),
        node("Flatten", ["j"], ["k"]),
        node("Gemm", ["k", "w2"], ["l"], transB=1),
        node("Div", ["l", "root"], ["m"]),
        node("Erf", ["m"], ["n_"]),
        node("Add", ["n_", "one"], ["o"]),
        node("Mul", ["l", "o"], ["p"]),
        node("Mul", ["p", "half"], ["y"]),
    ]
    constants = {
        "w0": weight(16, 16, 3, 3),
        "grouped": weight(16, 4, 1, 1),
        "transposed": weight(16, 16, 2, 2),
        "w1": weight(16, 16, 1, 1),
        "w2": weight(24, 16),
        "root": np.array(2**0.5, np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
    }
    after, choices = check(model(nodes, (16, "h", "w"), constants, opset=opset))
    assert ops(after) == [
        *["SparseConvHardSwish", "Conv", "ConvTranspose", "SparseConvAddSilu"],
        *["GlobalAveragePool", "Flatten", "SparseLinearGelu"],
    ]
    assert choices["c"].reason == "convolution of 4 groups"
    assert choices["d"].reason == "transposed convolution"
    assert all(choice.reason for choice in choices.values())
