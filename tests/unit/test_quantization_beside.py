"""What lies between sparse int8 layers: images, depthwise convolutions and poolings take part, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.runtime import library_path

CHANNELS = 16


def network(*, density: float = 0.2, **pooling: Any) -> onnx.ModelProto:
    """An image convolution, a pooling, a depthwise convolution and a sparse one, each but the pooling with ReLU."""
    random = np.random.default_rng(0)
    weights = {
        "image": random.standard_normal((CHANNELS, 3, 3, 3)),
        "depthwise": random.standard_normal((CHANNELS, 1, 3, 3)),
        "sparse": random.standard_normal((2 * CHANNELS, CHANNELS, 1, 1))
        * (random.random((CHANNELS // 2, CHANNELS // 4)) < density).repeat(4, 0).repeat(4, 1)[:, :, None, None],
    }
    nodes, x = [], "x"
    for name, weight in weights.items():
        group = CHANNELS if name == "depthwise" else 1
        pads = [weight.shape[2] // 2] * 4
        bias = f"{name}.bias"
        nodes.append(helper.make_node("Conv", [x, f"{name}.weight", bias], [f"{name}.y"], pads=pads, group=group))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [name]))
        x = name
        if name == "image":
            window = {"kernel_shape": [2, 2], "strides": [2, 2], **pooling}
            nodes.append(helper.make_node("MaxPool", [x], ["pooled"], **window))
            x = "pooled"
    stored = [numpy_helper.from_array(value.astype(np.float32), f"{name}.weight") for name, value in weights.items()]
    for name, value in weights.items():
        bias = random.standard_normal(len(value)).astype(np.float32)
        stored.append(numpy_helper.from_array(bias, f"{name}.bias"))
    info = helper.make_tensor_value_info
    shape = ["n", 3, 18, 18]
    graph = helper.make_graph(
        nodes, "net", [info("x", TensorProto.FLOAT, shape)], [info(x, TensorProto.FLOAT, None)], stored
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((2, 3, 18, 18)).astype(np.float32)} for _ in range(count)]


def run(model: onnx.ModelProto, library: bool, level: Any = ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, samples(3)[-1])[0]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain == "sparsepipe")


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("pooling", [{}, {"kernel_shape": [3, 3], "pads": [1] * 4}, {"auto_pad": b"VALID"}])
def test_all_layers_exchange_bytes_and_give_the_bits_of_the_dense_file(pooling: Any, library: bool) -> None:
    if library and library_path() is None:
        pytest.skip("the kernel library was not built")
    dense = quantise(network(**pooling), samples(2))
    sparse, choices = rewrite(dense)
    assert operators(sparse) == {"SparseQConv": 2, "QMaxPool": 1, "QDepthwiseConv": 1}
    assert [choice.kernel for choice in choices] == ["SparseQConv", "QDepthwiseConv", "SparseQConv"]
    steps = Counter(node.op_type for node in sparse.graph.node if node.domain != "sparsepipe")
    assert steps == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    # Optimised, products of bytes saturate in onnxruntime on CPUs without VNNI: without the library in both files.
    level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL if library else ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    expected = run(dense, library=False, level=level)
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(run(sparse, library), expected)


def test_a_network_without_sparse_layers_stays_as_it_is() -> None:
    sparse, choices = rewrite(quantise(network(density=1.0), samples(2)))
    assert not operators(sparse)
    assert {choice.kernel for choice in choices} == {""}


def test_a_pooling_that_the_kernel_does_not_take() -> None:
    dense = quantise(network(kernel_shape=[3, 3], ceil_mode=1), samples(2))
    sparse, _ = rewrite(dense)
    assert operators(sparse) == {"SparseQConv": 2, "QDepthwiseConv": 1}
    np.testing.assert_array_equal(run(sparse, library=False), run(dense, library=False))
