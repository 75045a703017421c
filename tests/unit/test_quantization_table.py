"""Elementwise steps between int8 layers become one table, which holds what the function itself gives for each byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel
from scipy import special

from sparsepipe.graph.finish import serialise
from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.runtime import library_path, run, session

Array = NDArray[Any]
FEATURES = 64
LIBRARY = pytest.param(True, marks=pytest.mark.skipif(library_path() is None, reason="the library was not built"))


class Steps:
    """Nodes under construction; a number becomes a constant of the shape `like`."""

    def __init__(self, like: tuple[int, ...] = ()) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        self._like = like

    def __call__(self, op_type: str, *inputs: str | float, **attributes: Any) -> str:
        names = []
        for value in inputs:
            if isinstance(value, str):
                names.append(value)
                continue
            names.append(f"number{len(self.constants)}")
            self.constants[names[-1]] = np.full(self._like, value, np.float32)
        self.nodes.append(helper.make_node(op_type, names, [f"step{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])


def gelu_by_erf(add: Steps, x: str) -> str:
    gate = add("Add", add("Erf", add("Mul", x, 0.5**0.5)), 1.0)
    return add("Mul", add("Mul", x, gate), 0.5)


def gelu_by_tanh(add: Steps, x: str) -> str:
    inner = add("Mul", add("Add", x, add("Mul", add("Pow", x, 3.0), 0.044715)), (2 / np.pi) ** 0.5)
    return add("Mul", add("Mul", x, 0.5), add("Add", add("Tanh", inner), 1.0))


def hard_swish_in_pieces(add: Steps, x: str) -> str:
    add.constants |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return add("Div", add("Mul", x, add("Clip", add("Add", x, 3.0), "zero", "six")), 6.0)


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + special.erf(x / np.sqrt(2))))


def hard_swish(x: Array) -> Array:
    return np.asarray(x * np.clip(x + 3, 0, 6) / 6)


CASES: Mapping[str, tuple[Callable[[Steps, str], str], Callable[[Array], Array]]] = {
    "gelu by erf": (gelu_by_erf, gelu),
    "gelu by tanh": (gelu_by_tanh, lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    "silu": (lambda add, x: add("Mul", x, add("Sigmoid", x)), lambda x: x * special.expit(x)),
    "sigmoid": (lambda add, x: add("Sigmoid", x), special.expit),
    "tanh": (lambda add, x: add("Tanh", x), np.tanh),
    "hard swish": (lambda add, x: add("HardSwish", x), hard_swish),
    "hard swish in pieces": (hard_swish_in_pieces, hard_swish),
    "leaky": (lambda add, x: add("LeakyRelu", x, alpha=0.1), lambda x: np.where(x < 0, 0.1 * x, x)),
    "elu": (lambda add, x: add("Elu", x, alpha=0.5), lambda x: np.where(x < 0, 0.5 * np.expm1(x), x)),
    "residual": (lambda add, x: add("Add", x, gelu_by_erf(add, x)), lambda x: x + gelu(x)),
}


def network(between: Callable[[Steps, str], str], like: tuple[int, ...] = ()) -> onnx.ModelProto:
    """Two sparse layers, and some steps between them."""
    random = np.random.default_rng(0)
    add = Steps(like)
    constants = {}
    for name in ("first", "second"):
        kept = (random.random((FEATURES // 4, FEATURES // 4)) < 0.25).repeat(4, 0).repeat(4, 1)
        constants[f"{name}.weight"] = (random.standard_normal((FEATURES, FEATURES)) * kept / 3).astype(np.float32)
        constants[f"{name}.bias"] = random.standard_normal(FEATURES).astype(np.float32)
    first = add("Gemm", "x", "first.weight", "first.bias", transB=1)
    last = add("Gemm", between(add, first), "second.weight", "second.bias", transB=1)
    constants |= add.constants
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        add.nodes,
        "net",
        [info("x", TensorProto.FLOAT, ["n", FEATURES])],
        [info(last, TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples() -> list[dict[str, Array]]:
    return [{"x": np.random.default_rng(1).standard_normal((32, FEATURES)).astype(np.float32)}]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def values_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def outputs(model: onnx.ModelProto, library: bool = False) -> list[Array]:
    """As the file says: optimised, products of bytes saturate in onnxruntime on CPUs without VNNI."""
    level = GraphOptimizationLevel.ORT_ENABLE_ALL if library else GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = session(serialise(model, where="net"), library=library, graph_optimization_level=level)
    return run(opened, samples()[0])


@pytest.mark.parametrize("like", [(), (1,), (1, 1)])
@pytest.mark.parametrize("case", CASES)
def test_a_table_is_the_function_of_each_byte(case: str, like: tuple[int, ...]) -> None:
    between, function = CASES[case]
    model = network(between, like)
    made, _ = rewrite(quantise(model, samples()))
    assert operators(made) == {"QuantizeLinear": 1, "SparseQLinear": 2, "QLookup": 1, "DequantizeLinear": 1}
    first, table, second = (node for node in made.graph.node if node.domain)
    values = values_of(made)
    x_scale, x_zero = (values[name].astype(np.float64) for name in first.input[6:8])
    y_scale, y_zero = (values[name].astype(np.float64) for name in second.input[1:3])
    exact = function((np.arange(256) - x_zero) * x_scale) / y_scale + y_zero
    expected = np.clip(exact, 0, 255)
    assert np.ptp(expected) > 100
    # To the nearest byte, but for what float32 adds to the halves, where the samples had such numbers. onnxruntime's
    # tools make of a Clip the range of its bytes, which ends half a step beyond 6.
    stored = values_of(model)
    seen = samples()[0]["x"] @ stored["first.weight"].T + stored["first.bias"]
    low, high = (np.rint(end / x_scale + x_zero).astype(int) for end in (seen.min(), seen.max()))
    assert 0 <= low < 50
    assert 200 < high <= 255
    errors = np.abs(values[table.input[1]] - expected)[low + 1 : high]
    assert errors.max() <= (1 if "pieces" in case else 0.5 + 1e-3)


@pytest.mark.parametrize("library", [False, LIBRARY])
@pytest.mark.parametrize("case", CASES)
def test_the_file_is_no_further_from_fp32_than_plain_int8(case: str, library: bool) -> None:
    model = network(CASES[case][0])
    plain = quantise(model, samples())
    made, _ = rewrite(plain)
    exact = outputs(model)[0]
    errors = [np.square(outputs(*one)[0] - exact).mean() ** 0.5 for one in ((plain,), (made, library))]
    assert 0 < errors[1] <= 1.02 * errors[0]


def per_feature(add: Steps, x: str) -> str:
    add.constants["slopes"] = np.linspace(0.5, 2, FEATURES, dtype=np.float32)
    return add("Mul", x, "slopes")


def of_two_tensors(add: Steps, x: str) -> str:
    return add("Mul", add("Sigmoid", x), "x")


def with_more_dimensions(add: Steps, x: str) -> str:
    return add("Squeeze", add("Sigmoid", add("Mul", x, "wide")), "axis")


@pytest.mark.parametrize("between", [per_feature, of_two_tensors])
def test_what_is_no_function_of_one_byte_stays(between: Callable[[Steps, str], str]) -> None:
    plain = quantise(network(between), samples())
    made, _ = rewrite(plain)
    left = operators(made)
    assert left["SparseQLinear"] == 2
    assert left["Mul"] == 1
    expected, found = outputs(plain)[0], outputs(made)[0]
    assert np.abs(expected - found).max() <= 0.02 * np.ptp(expected)


def test_a_constant_of_more_dimensions_changes_the_shape_and_stays() -> None:
    def between(add: Steps, x: str) -> str:
        add.constants |= {"wide": np.full((1, 1, 1), 2, np.float32), "axis": np.array([0])}
        return with_more_dimensions(add, x)

    made, _ = rewrite(quantise(network(between), samples()))
    assert operators(made)["Mul"] == 1
    assert outputs(made)[0].shape == (32, FEATURES)


def test_a_tensor_that_is_needed_on_the_way_gets_a_table_of_its_own() -> None:
    model = network(gelu_by_erf)
    gate = next(node for node in model.graph.node if node.op_type == "Erf").output[0]
    third = helper.make_node("Gemm", [gate, "second.weight"], ["other"], transB=1)
    model.graph.node.append(third)
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", FEATURES]))
    plain = quantise(model, samples())
    made, _ = rewrite(plain)
    assert operators(made)["QLookup"] == 2
    assert not {"Erf", "Mul", "Add"} & set(operators(made))
    for expected, found in zip(outputs(plain), outputs(made), strict=True):
        assert np.abs(expected - found).max() <= 0.1 * np.ptp(expected)


def test_a_network_without_sparse_layers_stays_as_it_is() -> None:
    model = network(gelu_by_erf)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weight"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.01), tensor.name))
    plain = quantise(model, samples())
    assert operators(rewrite(plain)[0]) == operators(plain)
