"""int8 of the forms that real exporters write layers in, and of graphs that look at what lies between the layers.

The oracle is the fp32 model in onnxruntime: bytes are within a percent or two of the range of its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.graph.finish import serialise
from sparsepipe.quantization import sensitivity
from sparsepipe.quantization.calibrate import quantise
from sparsepipe.quantization.normal import normal_form
from sparsepipe.quantization.points import completed
from sparsepipe.quantization.rewrite import rewrite
from sparsepipe.runtime import library_path, session

SIZE = 64
WORST = 0.01
node = helper.make_node
Arrays = Mapping[str, Any]


def blocks(*shape: int, seed: int = 0) -> Any:
    """A weight of which about a sixth of the blocks of 4 x 4 are kept."""
    random = np.random.default_rng(seed)
    kept = random.random((shape[0] // 4, shape[1] // 4, *shape[2:])) < 0.16
    return (random.standard_normal(shape) * kept.repeat(4, 0).repeat(4, 1)).astype(np.float32)


def full(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(
    nodes: Sequence[NodeProto], constants: Arrays, x: Sequence[Any] = ("n", SIZE), outputs: Sequence[str] = ("y",)
) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", TensorProto.FLOAT, x)],
        [info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for found, inferred in zip(graph.output, onnx.shape_inference.infer_shapes(model).graph.output, strict=True):
        found.CopyFrom(inferred)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(shape: Sequence[int] = (4, SIZE)) -> list[Arrays]:
    return [{"x": full(*shape, seed=seed)} for seed in (2, 3, 4)]


def run(model: onnx.ModelProto, feeds: Arrays) -> list[Any]:
    """By stock onnxruntime, as it stands."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    opened = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in opened.run(None, dict(feeds))]


def errors(model: onnx.ModelProto, calls: Sequence[Arrays]) -> tuple[list[float], onnx.ModelProto, dict[str, Any]]:
    """The root mean square error of the int8 files, for each output and file; the universal file; its rows."""
    dense = quantise(model, calls)
    sparse, rows = rewrite(dense)
    found = []
    for made, library in ((dense, False), (sparse, False), (sparse, True)):
        if library and library_path() is None:
            continue
        opened = session(serialise(made, where="int8"), library=library)
        for feeds in calls:
            for expected, output in zip(run(model, feeds), opened.run(None, dict(feeds)), strict=True):
                assert np.ptp(expected) > 0
                found.append(float(np.sqrt(np.mean((expected - output) ** 2)) / np.ptp(expected)))
    return found, sparse, {row.name: row for row in rows}


def kinds(model: onnx.ModelProto) -> list[str]:
    return [found.op_type for found in model.graph.node if found.domain == "sparsepipe"]


def linear(**attributes: Any) -> list[NodeProto]:
    return [node("Gemm", ["x", "w", "c"], ["y"], **attributes)]


WEIGHT = blocks(SIZE, SIZE)
BIAS = 5 * full(SIZE, seed=5)
FORMS: Mapping[str, tuple[list[NodeProto], Arrays]] = {
    "alpha": (linear(transB=1, alpha=2.0), {"w": WEIGHT, "c": BIAS}),
    "beta": (linear(transB=1, beta=0.1), {"w": WEIGHT, "c": BIAS}),
    "alpha, beta, not transposed": (linear(alpha=0.5, beta=3.0), {"w": WEIGHT, "c": BIAS}),
    "a bias of one number": (linear(), {"w": WEIGHT, "c": np.float32([20])}),
    "a number as bias": (linear(beta=-2.0), {"w": WEIGHT, "c": np.float32(20)}),
    "a row as bias": (linear(), {"w": WEIGHT, "c": BIAS[None]}),
    "in Constant nodes": (
        [
            node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT)),
            node("Constant", [], ["c"], value=numpy_helper.from_array(BIAS)),
            *linear(transB=1),
        ],
        {},
    ),
    "behind Transpose": (
        [node("Transpose", ["stored"], ["w"], perm=[1, 0]), node("MatMul", ["x", "w"], ["y"])],
        {"stored": WEIGHT},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_linear_layer_becomes_a_sparse_one(form: str) -> None:
    model = network(*FORMS[form])
    found, sparse, rows = errors(model, samples())
    assert max(found) < WORST
    assert kinds(sparse) == ["SparseQLinear"]
    assert len(rows) == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_normal_form_computes_the_same(form: str) -> None:
    model = network(*FORMS[form])
    expected, found = (run(one, samples()[0])[0] for one in (model, normal_form(model)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


CHAIN = [
    node("Gemm", ["x", "w", "c"], ["a"], transB=1),
    node("Relu", ["a"], ["r"]),
    node("Gemm", ["r", "w", "c"], ["y"], transB=1),
]


@pytest.mark.parametrize("weight", [WEIGHT, full(SIZE, SIZE)], ids=["sparse", "dense"])
def test_layers_that_share_a_weight_share_its_bytes(weight: Any) -> None:
    model = network(CHAIN, {"w": weight, "c": BIAS})
    found, sparse, _ = errors(model, samples())
    assert max(found) < WORST
    stored = [tensor for tensor in sparse.graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.dims]
    weights = [tensor for tensor in stored if len(tensor.dims) > 1]
    assert len(weights) == 1
    assert len(kinds(sparse)) == (2 if weight is WEIGHT else 0)
    # Stock onnxruntime loads it, too, also where its int8 shall be exact.
    if weight is WEIGHT:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        ort.InferenceSession(sparse.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_the_bytes_of_a_shared_weight_are_counted_once() -> None:
    _, rows = rewrite(quantise(network(CHAIN, {"w": WEIGHT, "c": BIAS}), samples()))
    assert [row.dense_bytes for row in rows] == [SIZE * SIZE, 0]
    assert "same weight" in rows[1].reason


def test_a_weight_along_both_axes() -> None:
    """Scales of outputs along one axis would be those of inputs along the other."""
    uneven = (WEIGHT * np.geomspace(0.01, 1, SIZE)[:, None]).astype(np.float32)
    nodes = [*CHAIN[:2], node("Gemm", ["r", "w"], ["y"])]
    found, sparse, _ = errors(network(nodes, {"w": uneven, "c": BIAS}), samples())
    assert max(found) < WORST
    assert len(kinds(sparse)) == 2


def test_a_table_that_is_also_a_weight() -> None:
    """Tied embeddings: a row of the table for an index, and products with all of its rows."""
    nodes = [
        node("Gather", ["w", "rows"], ["embedded"]),
        node("Add", ["x", "embedded"], ["a"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["a", "t"], ["y"]),
    ]
    found, sparse, _ = errors(network(nodes, {"w": WEIGHT, "rows": np.array([0, 3, 9, 2])}, x=(4, SIZE)), samples())
    assert max(found) < WORST
    assert kinds(sparse) == ["SparseQLinear"]


KEPT: Mapping[str, tuple[list[NodeProto], Arrays, Sequence[int], str]] = {
    "left": ([node("MatMul", ["w", "x"], ["y"])], {"w": WEIGHT}, (SIZE, 8), "left factor"),
    "several matrices": (
        [node("MatMul", ["x", "w"], ["y"])],
        {"w": np.stack([WEIGHT, WEIGHT.T])},
        (2, 5, SIZE),
        "several matrices",
    ),
    "a bias for each row": (linear(), {"w": WEIGHT, "c": full(4, SIZE)}, (4, SIZE), "from row to row"),
    "a column as bias": (linear(beta=2.0), {"w": WEIGHT, "c": full(SIZE, 1)}, (SIZE, SIZE), "from row to row"),
    "groups": (
        [node("ConvTranspose", ["x", "w", "c"], ["y"], group=2)],
        {"w": full(8, 4, 3, 3), "c": full(8)},
        (2, 8, 6, 6),
        "ConvTranspose",
    ),
}


@pytest.mark.parametrize("form", KEPT)
def test_what_onnxruntime_has_no_int8_form_of_stays_fp32_and_says_why(form: str) -> None:
    nodes, constants, shape, word = KEPT[form]
    found, _, rows = errors(network(nodes, constants, x=shape), samples(shape))
    assert max(found) < 1e-6
    assert word in rows["w"].reason
    assert not rows["w"].sparse
    assert sensitivity.layers(network(nodes, constants, x=shape)) == []


ACTIVATIONS: Mapping[str, Sequence[NodeProto]] = {
    "Relu": [node("Relu", ["a"], ["r"])],
    "Clip": [node("Clip", ["a", "low", "high"], ["r"])],
}
LIMITS = {"low": np.float32(0), "high": np.float32(6)}
FIRST = {
    "Gemm": (node("Gemm", ["x", "w", "c"], ["a"], transB=1), WEIGHT, (4, SIZE)),
    "Conv": (node("Conv", ["x", "w", "c"], ["a"], pads=[1] * 4), blocks(SIZE, 32, 3, 3), (2, 32, 6, 6)),
}


@pytest.mark.parametrize("layer", FIRST)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("seen", ["output", "another node", "both"])
def test_what_comes_before_an_activation_keeps_its_range_where_it_is_seen(
    layer: str, activation: str, seen: str
) -> None:
    first, weight, shape = FIRST[layer]
    nodes = [first, *ACTIVATIONS[activation]]
    outputs = ["r", *(["a"] if seen != "another node" else []), *(["s"] if seen != "output" else [])]
    if seen != "output":
        nodes.append(node("Neg", ["a"], ["s"]))
    model = network(nodes, {"w": weight, "c": BIAS, **LIMITS}, x=("n", *shape[1:]), outputs=outputs)
    found, sparse, _ = errors(model, samples(shape))
    assert max(found) < WORST
    assert len([kind for kind in kinds(sparse) if kind.startswith("SparseQ")]) == 1


@pytest.mark.parametrize("with_condition", [False, True])
@pytest.mark.parametrize("activation", [False, True])
def test_subgraphs_that_use_what_lies_between(with_condition: bool, activation: bool) -> None:
    """`k` is a constant, or computed behind the layer whose output the branches take."""
    info = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph([node(op, ["a"], [name])], name, [], [info(name, TensorProto.FLOAT, None)])
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    nodes = [CHAIN[0]]
    outputs = ["y"]
    if activation:
        nodes.append(node("Relu", ["a"], ["r"]))
        outputs.append("r")
    if with_condition:
        nodes += [node("ReduceMax", ["x"], ["top"], keepdims=0), node("Greater", ["top", "zero"], ["k"])]
    nodes.append(node("If", ["k"], ["y"], **branches))
    constants = {"w": WEIGHT, "c": BIAS, "zero": np.float32(0), **({} if with_condition else {"k": np.bool_(True)})}
    found, _, rows = errors(network(nodes, constants, outputs=outputs), samples())
    assert max(found) < WORST
    assert rows["w"].reason


def test_a_sum_of_open_height_and_width_is_part_of_a_layer() -> None:
    nodes = [
        node("Conv", ["x", "w", "c"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "v", "c"], ["b"], pads=[1] * 4),
        node("Add", ["b", "r"], ["s"]),
        node("Relu", ["s"], ["y"]),
    ]
    constants = {"w": blocks(SIZE, 32, 3, 3), "v": blocks(SIZE, SIZE, 3, 3, seed=7), "c": BIAS}
    found, sparse, _ = errors(network(nodes, constants, x=("n", 32, "h", "w")), samples((2, 32, 6, 6)))
    assert max(found) < WORST
    assert kinds(sparse) == ["SparseQConv", "SparseQConvAdd"]


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_types_are_refused_with_the_way_out(kind: type) -> None:
    nodes = [node("Cast", ["x"], ["h"], to=helper.np_dtype_to_tensor_dtype(np.dtype(kind)))]
    nodes += [node("MatMul", ["h", "w"], ["p"]), node("Cast", ["p"], ["y"], to=TensorProto.FLOAT)]
    with pytest.raises(GraphError, match=r"float32 networks.*network\.float\(\)"):
        quantise(network(nodes, {"w": WEIGHT.astype(kind)}), samples())


def test_observed_ranges_behind_an_activation_say_nothing_of_what_others_see_before_it() -> None:
    alone = network([CHAIN[0], *ACTIVATIONS["Relu"]], {"w": WEIGHT, "c": BIAS}, outputs=["r"])
    seen = network([CHAIN[0], *ACTIVATIONS["Relu"]], {"w": WEIGHT, "c": BIAS}, outputs=["r", "a"])
    observed = {"x": (-3.0, 3.0), "r": (0.0, 5.0)}
    assert completed(alone, observed) == ({**observed, "a": (0.0, 5.0)}, set())
    assert completed(seen, observed) == (observed, {"a"})
