"""Attention stays float32 in int8 files, in whatever way it is scaled and masked; layers around it become int8."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel

from sparsepipe.graph.finish import serialise
from sparsepipe.quantization.attention import attention
from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.runtime import library_path, run, session

Array = NDArray[Any]
ORT_DISABLE_ALL, ORT_ENABLE_ALL = GraphOptimizationLevel.ORT_DISABLE_ALL, GraphOptimizationLevel.ORT_ENABLE_ALL
TOKENS, HEADS, WIDTH = 12, 2, 64
NEEDS_LIBRARY = pytest.mark.skipif(library_path() is None, reason="the kernel library was not built")


def network(scaling: str = "scores", mask: str = "", classifier: bool = False) -> onnx.ModelProto:
    """One layer of attention with sparse projections, whose biases are sums as exporters write them."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {"heads": np.array([0, TOKENS, HEADS, WIDTH // HEADS])}
    constants |= {"joined": np.array([0, TOKENS, WIDTH]), "scale": np.array(0.7, np.float32)}

    def add(op_type: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, list(inputs), [f"t{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def linear(x: str, name: str) -> str:
        kept = (random.random((WIDTH // 4, WIDTH // 4)) < 0.25).repeat(4, 0).repeat(4, 1)
        constants[f"{name}.weight"] = (random.standard_normal((WIDTH, WIDTH)) * kept / 8).astype(np.float32)
        constants[f"{name}.bias"] = (random.standard_normal(WIDTH) / 4).astype(np.float32)
        return add("Add", add("MatMul", x, f"{name}.weight"), f"{name}.bias")

    perms = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    q, k, v = (add("Transpose", add("Reshape", linear("x", name), "heads"), perm=perms[name]) for name in "qkv")
    if scaling == "factors":
        q, k = add("Mul", q, "scale"), add("Mul", k, "scale")
    scores = add("MatMul", q, k)
    if scaling == "scores":
        scores = add("Div", scores, "scale")
    if mask == "sum":
        constants["mask"] = np.where(np.tri(TOKENS) > 0, 0, -1e4).astype(np.float32)
        scores = add("Add", scores, "mask")
    elif mask == "where":
        constants |= {"kept": np.tri(TOKENS) > 0, "little": np.array(-1e4, np.float32)}
        scores = add("Where", "kept", scores, "little")
    y = add("MatMul", add("Softmax", scores, axis=-1), v)
    y = linear(add("Reshape", add("Transpose", y, perm=[0, 2, 1, 3]), "joined"), "o")
    if classifier:
        y = add("Softmax", linear(y, "classes"), axis=-1)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", TensorProto.FLOAT, ["n", TOKENS, WIDTH])],
        [info(y, TensorProto.FLOAT, ["n", TOKENS, WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples() -> list[dict[str, Array]]:
    return [{"x": np.random.default_rng(1).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)}]


def output(model: onnx.ModelProto, level: Any, library: bool = False) -> Array:
    opened = session(serialise(model, where="net"), library=library, graph_optimization_level=level)
    return run(opened, samples()[0])[0]


@pytest.mark.parametrize("mask", ["", "sum", "where"])
@pytest.mark.parametrize("scaling", ["scores", "factors", "none"])
def test_the_nodes_of_attention(scaling: str, mask: str) -> None:
    model = network(scaling, mask, classifier=True)
    chosen = attention(model)
    kinds = Counter(node.op_type for node in model.graph.node if node.output[0] in chosen)
    expected = Counter({"MatMul": 2, "Softmax": 2})
    expected += {"scores": Counter(Div=1), "factors": Counter(Mul=2), "none": Counter()}[scaling]
    expected += {"": Counter(), "sum": Counter(Add=1), "where": Counter(Where=1)}[mask]
    assert kinds == expected


@NEEDS_LIBRARY
@pytest.mark.parametrize("mask", ["", "sum", "where"])
@pytest.mark.parametrize("scaling", ["scores", "factors", "none"])
def test_bytes_up_to_the_attention_and_from_there_on(scaling: str, mask: str) -> None:
    model = network(scaling, mask)
    plain = quantise(model, samples())
    made, _ = rewrite(plain)
    kinds = Counter(node.op_type for node in made.graph.node)
    assert kinds["SparseQLinear"] == 4
    assert kinds["QLookup"] == 0
    quantised = {node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    assert quantised.isdisjoint(attention(model))
    exact = output(model, ORT_DISABLE_ALL)
    # As the files say, and with the kernels: optimised, products of bytes saturate in onnxruntime on CPUs without VNNI.
    for found in (output(plain, ORT_DISABLE_ALL), output(made, ORT_DISABLE_ALL), output(made, ORT_ENABLE_ALL, True)):
        assert np.square(found - exact).mean() ** 0.5 <= 0.01 * np.ptp(exact)


def test_a_softmax_of_classes_keeps_the_bias_of_its_layer() -> None:
    made, _ = rewrite(quantise(network(classifier=True), samples()))
    linear = [node for node in made.graph.node if node.op_type == "SparseQLinear"]
    assert len(linear) == 5
    assert all(node.input[8] for node in linear)
