"""The bias that an exporter of transformers writes as an Add behind a MatMul becomes one of the int8 layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.native import quantized
from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.runtime import library_path

FEATURES, OUTPUTS = 64, 32
RANDOM = np.random.default_rng(0)
KEPT = (RANDOM.random((FEATURES // 4, OUTPUTS // 4)) < 0.3).repeat(4, 0).repeat(4, 1)
WEIGHT = (RANDOM.standard_normal((FEATURES, OUTPUTS)) * KEPT).astype(np.float32)
BIAS = (3 * RANDOM.standard_normal(OUTPUTS)).astype(np.float32)
SAMPLES = [{"x": RANDOM.standard_normal((2, 5, FEATURES)).astype(np.float32)} for _ in range(3)]


def network(bias: Any, *, swapped: bool = False) -> onnx.ModelProto:
    terms = ["bias", "product"] if swapped else ["product", "bias"]
    nodes = [helper.make_node("MatMul", ["x", "linear.weight"], ["product"]), helper.make_node("Add", terms, ["y"])]
    constants = [numpy_helper.from_array(WEIGHT, "linear.weight"), numpy_helper.from_array(bias, "bias")]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", TensorProto.FLOAT, [2, 5, FEATURES])],
        [info("y", TensorProto.FLOAT, [2, 5, OUTPUTS])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_the_sum_is_rounded_once(library: bool, swapped: bool) -> None:
    if library and library_path() is None:
        pytest.skip("the kernel library was not built")
    sparse, _ = rewrite(quantise(network(BIAS, swapped=swapped), SAMPLES))
    assert [node.op_type for node in sparse.graph.node] == ["QuantizeLinear", "SparseQLinear", "DequantizeLinear"]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in sparse.graph.initializer}
    _, x_scale, x_zero, values, deltas, w_scale, step, zero, _ = (
        constants.get(name) for name in sparse.graph.node[1].input
    )
    x = np.clip(np.rint(SAMPLES[2]["x"] / x_scale) + x_zero, 0, 255) - x_zero
    weight = quantized.decode(values, deltas, (OUTPUTS, FEATURES), 4).astype(np.float64) * w_scale[:, None]
    # The quantiser of onnxruntime has made 256 steps of the range of the bias, zero within it.
    rounded = (max(BIAS.max(), 0) - min(BIAS.min(), 0)) / 255
    exact = np.clip(x * float(x_scale) @ weight.T + BIAS, -float(zero) * step, (255.0 - zero) * step)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library_path()))
    else:  # optimised, products of bytes saturate in onnxruntime on CPUs without VNNI
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(sparse.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, SAMPLES[2])[0]
    assert np.ptp(exact) > 50 * step
    assert np.abs(found - exact).max() <= 0.5 * step + 0.5 * rounded + (w_scale * x_scale).max()


def test_a_sum_that_is_no_bias_stays() -> None:
    row = RANDOM.standard_normal((5, OUTPUTS)).astype(np.float32)
    sparse, _ = rewrite(quantise(network(row), SAMPLES))
    kinds = [node.op_type for node in sparse.graph.node]
    assert "Add" in kinds
    assert "SparseQLinear" in kinds


@pytest.mark.parametrize("first", [False, True])
def test_layers_with_and_without_a_bias_in_one_file(first: bool) -> None:
    """They are one operator with one body: without the library a bias would be missing, or one too many."""
    names = ["with", "without"] if first else ["without", "with"]
    nodes, x = [], "x"
    constants = {"bias": np.resize(BIAS, OUTPUTS if first else FEATURES)}
    for name, weight in zip(names, (WEIGHT, WEIGHT.T.copy()), strict=True):
        constants[f"{name}.weight"] = weight
        terms = [x, f"{name}.weight", *(["bias"] if name == "with" else [])]
        x = f"{name}.y"
        nodes.append(helper.make_node("Gemm", terms, [x]))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", TensorProto.FLOAT, ["n", FEATURES])],
        [info(x, TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": SAMPLES[0]["x"].reshape(-1, FEATURES)}
    plain = quantise(model, [feeds])
    sparse, _ = rewrite(plain)
    assert [node.op_type for node in sparse.graph.node].count("SparseQLinear") == 2
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected, found = (
        ort.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for one in (plain, sparse)
    )
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(found, expected, atol=0.01 * np.ptp(expected))
