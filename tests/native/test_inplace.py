"""An output may take the memory of the residual that is added to it: nothing may be read after it was overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.graph.universal import choose, rewrite

pytestmark = pytest.mark.usefixtures("decided_by_size")


def chain(kernel: int, blocks: int) -> onnx.ModelProto:
    """Residual blocks x -> relu(conv(relu(conv(x))) + x), 80% zeros, whose sums are used once or twice."""
    random = np.random.default_rng(3)
    nodes, weights = [], []

    def conv(source: str, target: str) -> None:
        weight = random.standard_normal((32, 32, kernel, kernel)).astype(np.float32) * np.float32(0.2)
        weight[random.random(weight.shape) < 0.8] = 0
        weights.append(numpy_helper.from_array(weight, f"{target}.weight"))
        nodes.append(helper.make_node("Conv", [source, f"{target}.weight"], [target], pads=[kernel // 2] * 4))

    conv("x", "b0")
    for block in range(blocks):
        conv(f"b{block}", f"c{block}")
        nodes.append(helper.make_node("Relu", [f"c{block}"], [f"r{block}"]))
        conv(f"r{block}", f"d{block}")
        nodes.append(helper.make_node("Add", [f"d{block}", f"b{block}"], [f"s{block}"]))
        nodes.append(helper.make_node("Relu", [f"s{block}"], [f"b{block + 1}"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32, 30, 30])],
        [helper.make_tensor_value_info(f"b{blocks}", TensorProto.FLOAT, [2, 32, 30, 30])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
def test_residual_blocks_compute_what_the_dense_network_does(
    session: Any, library: Path, kernel: int, threads: int
) -> None:
    dense = chain(kernel, 3)
    sparse = rewrite(dense, choose(dense))
    assert sum(node.op_type == "SparseConvAddRelu" for node in sparse.graph.node) == 3
    x: NDArray[np.float32] = np.random.default_rng(4).standard_normal((2, 32, 30, 30)).astype(np.float32)
    expected = session(dense, native=False).run(None, {"x": x})[0]
    model = session(sparse, threads=threads)
    for _ in range(3):
        actual = model.run(None, {"x": x})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("expands", [True, False])
def test_residual_sums_of_separable_convolutions(session: Any, expands: bool, threads: int) -> None:
    """x -> conv(depthwise(conv(x))) + x, and without the first: then the residual is also what is convolved."""
    random = np.random.default_rng(6)
    nodes, weights = [helper.make_node("Relu", ["x"], ["b0"])], []

    def conv(source: str, target: str, shape: tuple[int, ...], **attributes: Any) -> None:
        weight = random.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        if shape[1] > 1:
            weight[random.random(shape) < 0.8] = 0
        weights.append(numpy_helper.from_array(weight, f"{target}.weight"))
        nodes.append(helper.make_node("Conv", [source, f"{target}.weight"], [target], **attributes))

    for block in range(3):
        if expands:
            conv(f"b{block}", f"e{block}", (48, 32, 1, 1))
        width, source = (48, f"e{block}") if expands else (32, f"b{block}")
        conv(source, f"d{block}", (width, 1, 3, 3), group=width, pads=[1] * 4)
        conv(f"d{block}", f"p{block}", (32, width, 1, 1))
        nodes.append(helper.make_node("Add", [f"p{block}", f"b{block}"], [f"b{block + 1}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 32, 30, 30]) for name in ("x", "b3")]
    graph = helper.make_graph(nodes, "separable", ends[:1], ends[1:], weights)
    dense = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sparse = rewrite(dense, choose(dense))
    assert sum(node.op_type == "SparseSeparableConvAdd" for node in sparse.graph.node) == 3
    x: NDArray[np.float32] = random.standard_normal((2, 32, 30, 30)).astype(np.float32)
    expected = session(dense, native=False).run(None, {"x": x})[0]
    model = session(sparse, threads=threads)
    for _ in range(3):
        actual = model.run(None, {"x": x})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("threads", [1, 3])
def test_residual_sums_of_linear_layers(session: Any, rows: int, threads: int) -> None:
    random = np.random.default_rng(5)
    nodes, weights = [helper.make_node("Relu", ["x"], ["b0"])], []
    for block in range(3):
        weight = random.standard_normal((256, 256)).astype(np.float32) * np.float32(0.1)
        weight[random.random(weight.shape) < 0.8] = 0
        weights.append(numpy_helper.from_array(weight, f"w{block}"))
        nodes.append(helper.make_node("MatMul", [f"b{block}", f"w{block}"], [f"a{block}"]))
        nodes.append(helper.make_node("Add", [f"a{block}", f"b{block}"], [f"s{block}"]))
        nodes.append(helper.make_node("Relu", [f"s{block}"], [f"b{block + 1}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 256]) for name in ("x", "b3")]
    graph = helper.make_graph(nodes, "linear", ends[:1], ends[1:], weights)
    dense = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sparse = rewrite(dense, choose(dense))
    assert [node.op_type for node in sparse.graph.node] == ["Relu", *["SparseLinearAddRelu"] * 3]
    x: NDArray[np.float32] = random.standard_normal((rows, 256)).astype(np.float32)
    expected = session(dense, native=False).run(None, {"x": x})[0]
    model = session(sparse, threads=threads)
    for _ in range(3):
        actual = model.run(None, {"x": x})[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
