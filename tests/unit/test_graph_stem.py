"""The first convolution of an image, which the library runs where a sparse layer follows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from universal_cases import check, model, ops, weight

from sparsepipe.graph.restore import restore

pytestmark = pytest.mark.usefixtures("decided_by_size")

node = helper.make_node
STAYED = ["Conv", "Relu", "MaxPool", "SparseConv"]
POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}


def network(
    kernel: tuple[int, int] = (7, 7), *, stride: int = 2, pool: dict[str, Any] | None = None, follows: float = 0.1,
    opset: int = 18, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """A convolution of an image with a ReLU and perhaps a pooling, and a 1x1 one of the density `follows`."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], strides=[stride] * 2, pads=[kernel[0] // 2] * 4, **attributes),
        node("Relu", ["a"], ["b"]),
        *([node("MaxPool", ["b"], ["p"], **pool)] if pool else []),
        node("Conv", ["p" if pool else "b", "w1"], ["y"]),
    ]
    constants = {
        "w0": weight(32, 3, *kernel, density=1),
        "b0": weight(32, density=1),
        "w1": weight(16, 32, 1, 1, density=follows),
    }
    return model(nodes, (3, "h", "w"), constants, opset=opset)


@pytest.mark.parametrize("opset", [13, 22])
def test_a_resnet_begins_with_one_operator(opset: int) -> None:
    after, choices = check(network(pool=POOL, opset=opset), side=33)
    assert ops(after) == ["StemConvReluMaxPool", "SparseConv"]
    row = choices["a"]
    assert (row.sparse, row.kernel, row.bytes) == (False, "StemConv", row.dense_bytes)
    assert "first convolution, before a sparse layer" in row.reason
    again = onnx.ModelProto()
    again.CopyFrom(after)
    rows = restore(again, where="test", limit=1 << 30)
    assert ops(again) == ["Conv", "Relu", "MaxPool", "Conv"]
    assert [(row.op, row.stored_as) for row in rows] == [("StemConvReluMaxPool", "dense"), ("SparseConv", "csr")]


@pytest.mark.parametrize(
    "other",
    [{"strides": [1, 1]}, {"ceil_mode": 1}, {"dilations": [2, 2]}, {"kernel_shape": [5, 5], "pads": [2] * 4}],
    ids=str,
)
def test_before_other_poolings_it_stays(other: dict[str, Any]) -> None:
    assert ops(check(network(pool=POOL | other), side=33)[0]) == STAYED


def test_with_another_window_it_stays_before_a_pooling() -> None:
    assert ops(check(network((3, 3), pool=POOL), side=33)[0]) == STAYED


def test_what_something_else_uses_is_not_pooled() -> None:
    before = network(pool=POOL)
    before.graph.output.append(helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["n", 32, None, None]))
    assert ops(check(before, side=33)[0]) == STAYED


@pytest.mark.parametrize("stride", [1, 2])
def test_windows_of_3_by_3(stride: int) -> None:
    assert ops(check(network((3, 3), stride=stride), side=12)[0]) == ["StemConvRelu", "SparseConv"]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (network((5, 5)), "3 input channels"),
        (network((7, 7), stride=1), "as fast for strides"),
        (network((3, 3), dilations=[2, 2]), "as fast for strides"),
        (network(follows=1.0), "what follows it is not sparse"),
    ],
    ids=["5 by 5", "7 by 7 without stride", "dilated", "before a dense layer"],
)
def test_others_stay_with_onnxruntime(made: onnx.ModelProto, reason: str) -> None:
    after, choices = check(made, side=33)
    assert not any("Stem" in name for name in ops(after))
    assert reason in choices["a"].reason


def test_a_depthwise_convolution_between_it_and_a_sparse_layer() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"], strides=[2, 2], pads=[1] * 4),
        node("Clip", ["a", "low", "high"], ["b"]),
        node("Conv", ["b", "d"], ["c"], group=32, pads=[1] * 4),
        node("Conv", ["c", "w1"], ["y"]),
    ]
    constants = {
        "w0": weight(32, 3, 3, 3, density=1),
        "d": weight(32, 1, 3, 3, density=1),
        "w1": weight(16, 32, 1, 1),
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
    }
    after, choices = check(model(nodes, (3, "h", "w"), constants), side=20)
    assert ops(after) == ["StemConvClip", "SparseSeparableConv"]
    assert [choices[name].kernel for name in "acy"] == ["StemConv", *["SparseSeparableConv"] * 2]
