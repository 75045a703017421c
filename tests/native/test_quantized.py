"""The int8 operators against QLinearConv and QLinearAdd of stock onnxruntime, bit for bit; their fallback bodies."""

from __future__ import annotations

import platform
from typing import Any

import int8_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from int8_models import Layer
from onnx import helper
from operator_cases import agree_at_once

from sparsepipe.environment import int8_saturates
from sparsepipe.native import quantized

ISAS = ["avx512vnni", "avxvnni", "avx512", "avx2", "sse4", "neondot", "neon", "portable"]
SAME_SUM = platform.machine() == "x86_64"  # elsewhere onnxruntime's QLinearAdd rounds in another way
INT8 = st.sampled_from([np.uint8, np.uint8, np.int8])


@pytest.fixture(scope="session", params=ISAS)
def isa(request: pytest.FixtureRequest, session: Any) -> str:
    """Every instruction set that this machine runs."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEPIPE_ISA", name)
        try:
            session(linear(4, 4, 4, 1.0, np.uint8, "none", (1,), True, False, 0).model())
        except Exception as error:
            if "unknown" in str(error) or "does not run" in str(error):
                pytest.skip(str(error))
            raise
    return name


def linear(
    outputs: int, features: int, block: int, density: float, dtype: Any, activation: str, leading: tuple[int, ...],
    bias: bool, saturated: bool, seed: int, residual: bool = False,
) -> Layer:  # fmt: skip
    random = np.random.default_rng(seed)
    weight = int8_models.blocked_weight(random, (outputs, features), block, density)
    values, deltas = quantized.encode(weight, block)
    constants = {**int8_models.quantization(random, weight, dtype, bias), "values": values, "deltas": deltas}
    feeds = {"X": int8_models.activations(random, (*leading, features), dtype, saturated)}
    names = list(quantized.INPUTS["SparseQLinear"])
    if residual:
        names[8] = "B" if bias else ""
        constants |= int8_models.residual_quantization(random, constants["y_scale"], dtype)
        feeds["residual"] = int8_models.activations(random, (*leading, outputs), dtype, saturated)
    else:
        names = names[: 9 if bias else 8]
    node = quantized.sparse_qlinear(
        names, "Y", weight_shape=weight.shape, block=block, activation=activation, name="the_node",
        limits=int8_models.limits_of(dtype) if activation == "clip" else None,
    )  # fmt: skip
    return Layer(node, constants, feeds, weight)


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    block = draw(st.sampled_from([1, 2, 4, 4]))
    rank = draw(st.sampled_from([2, 2, 2, 1]))
    point = draw(st.booleans())
    kernel = [1] * rank if point else draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    plain = point and draw(st.booleans())
    strides = [1] * rank if plain else draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = [1] * rank if plain else draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    pads = [0] * 2 * rank if plain else draw(st.lists(st.integers(0, 4), min_size=2 * rank, max_size=2 * rank))
    extents = [dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[rank + i] for i in range(rank)]
    return {
        "shape": (block * draw(st.integers(1, 6)), draw(st.integers(1, 24)), *kernel),
        "sizes": [max(1, extent) + draw(st.integers(0, 40)) for extent in extents],
        "strides": strides,
        "dilations": dilations,
        "pads": pads,
        "block": block,
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "dtype": draw(INT8),
        "activation": draw(st.sampled_from(quantized.ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "saturated": draw(st.booleans()),
        "batch": draw(st.integers(1, 3)),
        "threads": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def convolution(case: dict[str, Any]) -> Layer:
    random = np.random.default_rng(case["seed"])
    shape, sizes, dtype, strides = case["shape"], case["sizes"], case["dtype"], case["strides"]
    weight = int8_models.blocked_weight(random, shape, case["block"], case["density"])
    values, deltas = quantized.encode(weight, case["block"])
    constants = {**int8_models.quantization(random, weight, dtype, case["bias"]), "values": values, "deltas": deltas}
    feeds = {"X": int8_models.activations(random, (case["batch"], shape[1], *sizes), dtype, case["saturated"])}
    names = list(quantized.INPUTS["SparseQConv"])
    names[8] = "B" if case["bias"] else ""
    if case["residual"]:
        constants |= int8_models.residual_quantization(random, constants["y_scale"], dtype)
        rank = len(sizes)
        pads = [case["pads"][i] + case["pads"][rank + i] for i in range(rank)]
        extents = [case["dilations"][i] * (shape[2 + i] - 1) + 1 for i in range(rank)]
        outputs = [(sizes[i] + pads[i] - extents[i]) // strides[i] + 1 for i in range(rank)]
        out_shape = (case["batch"], shape[0], *outputs)
        feeds["residual"] = int8_models.activations(random, out_shape, dtype, case["saturated"])
    else:
        names = names[: 9 if case["bias"] else 8]
    node = quantized.sparse_qconv(
        names, "Y", weight_shape=shape, strides=strides, pads=case["pads"], dilations=case["dilations"],
        block=case["block"], activation=case["activation"], name="the_node",
        limits=int8_models.limits_of(dtype) if case["activation"] == "clip" else None,
    )  # fmt: skip
    return Layer(node, constants, feeds, weight)


def unoptimised(model: onnx.ModelProto, feeds: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    file = model.SerializeToString()
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def expected_of(layer: Layer, **options: Any) -> Any:
    model, feeds = int8_models.reference(layer, **options)
    return int8_models.bounded(layer, unoptimised(model, feeds))


def without_library(session: Any, model: onnx.ModelProto, layer: Layer) -> list[Any]:
    """What stock onnxruntime makes of convolutions, optimised and as they are, where it is exact.

    Without VNNI that is only where it is told to be so, optimises, and activations are uint8.
    """
    assume(not int8_saturates() or layer.feeds["X"].dtype == np.uint8)
    optimised = session(model, native=False).run(None, layer.feeds)[0]
    return [optimised] if int8_saturates() else [optimised, unoptimised(model, layer.feeds)]


def at_most_1(expected: Any, actual: Any) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert np.abs(expected.astype(int) - actual.astype(int)).max(initial=0) <= 1


def check_native(session: Any, isa: str, layer: Layer, expected: Any, threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEPIPE_ISA", isa)
        native = session(layer.model(), threads=threads)
    for _ in range(2):  # a second call takes the cached plan
        actual = native.run(None, layer.feeds)[0]
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


BIG = {
    "strides": [1, 1], "dilations": [1, 1], "pads": [1, 1, 1, 1], "block": 4, "density": 0.2, "activation": "relu",
    "bias": True, "residual": True, "batch": 1, "threads": 2, "seed": 0, "dtype": np.uint8, "saturated": False,
}  # fmt: skip
NO_PADS = {"pads": [0, 0, 0, 0]}


def check_convolution(session: Any, isa: str, case: dict[str, Any]) -> None:
    layer = convolution(case)
    if case["residual"]:
        at_most_1(expected_of(layer, sum_of_standard_operators=True), session(layer.model()).run(None, layer.feeds)[0])
        if not SAME_SUM:
            return
    check_native(session, isa, layer, expected_of(layer), case["threads"])


# Beyond the random small shapes: several bands, rows split over threads, tiles that end in the middle of a vector.
@example(BIG | {"shape": (64, 256, 3, 3), "sizes": [7, 7]})
@example(BIG | NO_PADS | {"shape": (64, 512, 1, 1), "sizes": [14, 14]})
@example(BIG | NO_PADS | {"shape": (64, 256, 1, 1), "sizes": [16, 16], "density": 0.5, "dtype": np.int8})
@example(BIG | {"shape": (64, 130, 3, 3), "sizes": [29, 31], "strides": [2, 2]})
@example(BIG | {"shape": (8, 4, 3, 3), "sizes": [300, 300], "block": 2, "threads": 1})
@example(BIG | {"shape": (8, 300, 3, 3), "sizes": [60, 70], "strides": [2, 1], "threads": 1, "density": 0.02})
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(case=convolutions())
def test_convolution(session: Any, isa: str, case: dict[str, Any]) -> None:
    check_convolution(session, isa, case)


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=convolutions())
def test_convolution_at_length(session: Any, isa: str, case: dict[str, Any]) -> None:
    check_convolution(session, isa, case)


LINEAR = {
    "rows": st.sampled_from([1, 2, 3, 4, 15, 16, 17, 33, 128, 250]),
    "features": st.integers(1, 300),
    "blocks": st.integers(1, 40),
    "block": st.sampled_from([1, 2, 4, 4]),
    "density": st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    "dtype": INT8,
    "activation": st.sampled_from(quantized.ACTIVATIONS),
    "bias": st.booleans(),
    "saturated": st.booleans(),
    "threads": st.integers(1, 2),
    "seed": st.integers(0, 2**16),
    "residual": st.booleans(),
}


def as_convolution(layer: Layer) -> Layer:
    """A linear layer as the convolution of one position."""
    features, outputs = layer.weight.shape[1], layer.weight.shape[0]
    node = helper.make_node("SparseQConv", [], [], kernel_shape=[1, 1])
    node.attribute.extend(a for a in layer.node.attribute if a.name in ("activation", "min", "max"))
    weight = layer.weight.reshape(outputs, features, 1, 1)
    feeds = {name: value.reshape(-1, value.shape[-1], 1, 1) for name, value in layer.feeds.items()}
    return Layer(node, layer.constants, feeds, weight)


def check_linear(session: Any, isa: str, rows: int, blocks: int, block: int, threads: int, **case: Any) -> None:
    layer = linear(blocks * block, block=block, leading=(rows,), **case)
    expected = expected_of(as_convolution(layer)).reshape(rows, -1)
    if layer.feeds.keys() == {"X"} or SAME_SUM:
        check_native(session, isa, layer, expected, threads)


OF_2048 = {
    "features": 2048, "blocks": 300, "dtype": np.uint8, "bias": True, "saturated": False, "seed": 0, "residual": True,
}  # fmt: skip


@example(rows=16, block=1, density=0.3, activation="clip", threads=2, **OF_2048)
@example(rows=1, block=4, density=0.3, activation="none", threads=2, **OF_2048)
@example(rows=130, block=4, density=0.3, activation="none", threads=2, **OF_2048)
@example(rows=1, block=2, density=0.1, activation="relu", threads=1, **OF_2048 | {"features": 70001, "blocks": 9})
@settings(max_examples=25)
@given(**LINEAR)
def test_linear(session: Any, isa: str, **case: Any) -> None:
    check_linear(session, isa, **case)


@pytest.mark.slow
@settings(max_examples=1000)
@given(**LINEAR)
def test_linear_at_length(session: Any, isa: str, **case: Any) -> None:
    check_linear(session, isa, **case)


@settings(max_examples=30)
@given(case=convolutions(), opset=st.sampled_from([13, 15, 17, 19, 21, 22]))
def test_the_body_of_a_convolution(session: Any, case: dict[str, Any], opset: int) -> None:
    layer = convolution(case)
    model = layer.model(opset)
    expected = expected_of(layer, sum_of_standard_operators=True)
    for actual in without_library(session, model, layer):
        at_most_1(expected, actual)
        if not case["residual"]:
            np.testing.assert_array_equal(actual, expected)


@settings(max_examples=20)
@given(opset=st.sampled_from([13, 15, 17, 19, 21, 22]), **{k: v for k, v in LINEAR.items() if k != "threads"})
def test_the_body_of_a_linear_layer(session: Any, opset: int, rows: int, blocks: int, block: int, **case: Any) -> None:
    layer = linear(blocks * block, block=block, leading=(rows,), **case)
    expected = expected_of(as_convolution(layer), sum_of_standard_operators=True).reshape(rows, -1)
    model = layer.model(opset)
    for actual in (session(model, native=False).run(None, layer.feeds)[0], unoptimised(model, layer.feeds)):
        at_most_1(expected, actual)


def test_stock_onnxruntime_runs_the_bodies_as_dense_int8(session: Any, tmp_path: Any) -> None:
    """No float product is left, and no weight is rebuilt at each call."""
    layers = {
        "QLinearConv": convolution(BIG | {"shape": (8, 8, 3, 3), "sizes": [9, 9], "activation": "none"}),
        "QGemm": linear(8, 12, 4, 0.5, np.uint8, "none", (5,), True, False, 0),
    }
    for op_type, layer in layers.items():
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{op_type}.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(layer.model().SerializeToString(), options, providers=["CPUExecutionProvider"])
        left = {node.op_type for node in onnx.load(tmp_path / f"{op_type}.onnx").graph.node}
        assert op_type in left
        assert not left & {"ScatterElements", "CumSum", "DequantizeLinear", "QuantizeLinear", "Gemm", "Conv", "Clip"}


@pytest.mark.parametrize("leading", [(), (2, 3), (1, 2, 2, 2), (0,), (0, 4)])
def test_leading_dimensions(session: Any, leading: tuple[int, ...]) -> None:
    layer = linear(8, 5, 4, 0.5, np.uint8, "none", leading, True, False, 0)
    expected = expected_of(as_convolution(layer)).reshape(*leading, 8)
    np.testing.assert_array_equal(session(layer.model()).run(None, layer.feeds)[0], expected)
    if leading:  # a vector becomes a matrix of one row, and an empty one has no shape for that
        np.testing.assert_array_equal(session(layer.model(), native=False).run(None, layer.feeds)[0], expected)


@st.composite
def poolings(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.sampled_from([2, 2, 1]))
    kernel = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    dilations = draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    return {
        "kernel_shape": kernel,
        "strides": draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)),
        "pads": [draw(st.integers(0, size - 1)) for size in kernel * 2],
        "dilations": dilations,
        "sizes": [dilations[i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 60)) for i in range(rank)],
    }


@settings(max_examples=60)
@given(case=poolings(), dtype=INT8, channels=st.integers(1, 5), batch=st.integers(0, 2), seed=st.integers(0, 99))
def test_max_pool(
    session: Any, isa: str, case: dict[str, Any], dtype: Any, channels: int, batch: int, seed: int
) -> None:
    sizes = case.pop("sizes")
    feeds = {"X": int8_models.activations(np.random.default_rng(seed), (batch, channels, *sizes), dtype, False)}
    node = quantized.qmax_pool("X", "Y", name="the_node", **case)
    expected = unoptimised(int8_models.model([helper.make_node("MaxPool", ["X"], ["Y"], **case)], {}, feeds), feeds)
    file = int8_models.model([node], {}, feeds, [quantized.function_for(node)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEPIPE_ISA", isa)
        native = session(file, threads=2)
    for runs in (native, session(file, native=False)):
        actual = runs.run(None, feeds)[0]
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@settings(max_examples=40)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 5, 31, 64, 300]), max_size=3),
    dtype=INT8,
    threads=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_lookup(session: Any, isa: str, shape: list[int], dtype: Any, threads: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    table = random.integers(0, 256, 256).astype(np.uint8)
    x = random.integers(0, 256, shape).astype(np.uint8)
    expected = np.asarray(table[x]).view(dtype)
    node = quantized.qlookup("X", "table", "Y", name="the_node")
    feeds = {"X": x.view(dtype)}
    file = int8_models.model([node], {"table": table.view(dtype)}, feeds, [quantized.function_for(node)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEPIPE_ISA", isa)
        native = session(file, threads=threads)
    for actual in (native.run(None, feeds)[0], session(file, native=False).run(None, feeds)[0]):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


DEPTHWISE = {"block": 1, "density": 1.0, "residual": False}


@st.composite
def depthwise_convolutions(draw: st.DrawFn) -> dict[str, Any]:
    case = draw(convolutions())
    channels = draw(st.sampled_from([1, 2, 3, 17, 40]))
    return case | DEPTHWISE | {"shape": (channels, 1, *case["shape"][2:])}


def depthwise(case: dict[str, Any]) -> Layer:
    """The numbers of a convolution of one input, with an input for each channel instead."""
    made, random = convolution(case), np.random.default_rng(case["seed"])
    constants = {name: value for name, value in made.constants.items() if name not in ("values", "deltas")}
    constants["W"] = made.weight
    names = list(quantized.INPUTS["QDepthwiseConv"])
    node = quantized.qdepthwise_conv(
        names if case["bias"] else names[:-1], "Y", weight_shape=case["shape"], strides=case["strides"],
        pads=case["pads"], dilations=case["dilations"], activation=case["activation"], name="the_node",
        limits=int8_models.limits_of(case["dtype"]) if case["activation"] == "clip" else None,
    )  # fmt: skip
    shape = (case["batch"], case["shape"][0], *case["sizes"])
    x = int8_models.activations(random, shape, case["dtype"], case["saturated"])
    return Layer(node, constants, {"X": x}, made.weight)


# Several bands; an odd number of rows; a window of more than four rows.
@example(BIG | DEPTHWISE | {"shape": (5, 1, 3, 3), "sizes": [112, 112]})
@example(BIG | DEPTHWISE | {"shape": (9, 1, 3, 3), "sizes": [113, 97], "strides": [2, 2], "dtype": np.int8})
@example(BIG | DEPTHWISE | {"shape": (40, 1, 5, 5), "sizes": [7, 7], "pads": [2] * 4})
@example(BIG | DEPTHWISE | {"shape": (2, 1, 3, 3), "sizes": [4, 5000], "strides": [1, 2], "dilations": [2, 3]})
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(case=depthwise_convolutions())
def test_depthwise_convolution(session: Any, isa: str, case: dict[str, Any]) -> None:
    layer = depthwise(case)
    check_native(session, isa, layer, expected_of(layer), case["threads"])


@pytest.mark.slow
@settings(max_examples=1500)
@given(case=depthwise_convolutions())
def test_depthwise_convolution_at_length(session: Any, isa: str, case: dict[str, Any]) -> None:
    layer = depthwise(case)
    check_native(session, isa, layer, expected_of(layer), case["threads"])


@settings(max_examples=20)
@given(case=depthwise_convolutions(), opset=st.sampled_from([13, 15, 17, 19, 21, 22]))
def test_the_body_of_a_depthwise_convolution(session: Any, case: dict[str, Any], opset: int) -> None:
    layer = depthwise(case)
    model = layer.model(opset)
    for actual in without_library(session, model, layer):
        np.testing.assert_array_equal(actual, expected_of(layer))


def test_operators_exchange_int8(session: Any) -> None:
    """Two convolutions and a sum in a row: nothing but bytes in between, and the bits of the dense chain."""
    first = convolution(BIG | {"shape": (16, 8, 3, 3), "sizes": [9, 11], "residual": False, "activation": "none"})
    second = convolution(BIG | {"shape": (16, 16, 3, 3), "sizes": [9, 11], "activation": "none", "seed": 1})
    middle = expected_of(first)
    residual = second.feeds["residual"]
    nodes, constants = [], {}
    for prefix, layer, source, target in (("a", first, "X", "t"), ("b", second, "t", "Y")):
        node = onnx.NodeProto()
        node.CopyFrom(layer.node)
        renamed = {"X": source, "residual": "residual"}
        node.input[:] = [renamed.get(name, f"{prefix}.{name}") for name in layer.node.input]
        node.output[:] = [target]
        node.name = prefix
        nodes.append(node)
        constants |= {f"{prefix}.{name}": value for name, value in layer.constants.items()}
    feeds = {"X": first.feeds["X"], "residual": residual}
    actual = session(int8_models.model(nodes, constants, feeds)).run(None, feeds)[0]
    expected = expected_of(Layer(second.node, second.constants, {"X": middle, "residual": residual}, second.weight))
    if SAME_SUM:
        np.testing.assert_array_equal(actual, expected)
    else:
        at_most_1(expected, actual)


def test_sums_beyond_32_bits_wrap_as_onnxruntimes_do(session: Any, isa: str) -> None:
    layer = linear(4, 70_000, 4, 1.0, np.uint8, "none", (17,), False, False, 0)
    layer.weight[:] = 127
    layer.constants["values"], layer.constants["deltas"] = quantized.encode(layer.weight, 4)
    layer.constants["x_zero_point"] = np.array(0, np.uint8)
    layer.feeds["X"][:] = 255
    check_native(session, isa, layer, expected_of(as_convolution(layer)).reshape(17, 4), 1)


def test_shapes_may_change_between_calls(session: Any) -> None:
    case = BIG | {"shape": (8, 6, 3, 3), "residual": False, "batch": 1}
    native = session(convolution(case | {"sizes": [5, 6]}).model())
    for size in [5, 9, 30, 5, 17, 64, 3, 9, 5]:
        layer = convolution(case | {"sizes": [size, size + 1], "batch": 1 + size % 2})
        np.testing.assert_array_equal(native.run(None, layer.feeds)[0], expected_of(layer))


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_calls_of_one_session(session: Any, threads: int) -> None:
    case = BIG | {"shape": (32, 64, 3, 3), "residual": False}
    layers = [convolution(case | {"sizes": [size, size]}) for size in (7, 8, 14, 20)]
    native = session(layers[0].model(), threads=threads)
    expected = [expected_of(layer) for layer in layers]
    agree_at_once(native, [layer.feeds for layer in layers], expected)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9)),
    block=st.sampled_from(quantized.BLOCKS),
    density=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from([np.uint8, np.uint16, None]),
    seed=st.integers(0, 1000),
)
def test_decoding_undoes_encoding(shape: Any, block: int, density: float, dtype: Any, seed: int) -> None:
    whole = (shape[0] * block, *shape[1:])
    weight = int8_models.blocked_weight(np.random.default_rng(seed), whole, block, density)
    values, deltas = quantized.encode(weight, block, dtype)
    assert values.shape == (len(deltas), block, 4)
    np.testing.assert_array_equal(quantized.decode(values, deltas, whole, block), weight)
