"""Files that others pruned, in all the ways in which they write weights: every target computes what the file does.

What is rewritten is compared with the file itself in onnxruntime without the kernel library; what stays says why.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from universal_cases import Array, model, ops, weight

from sparsepipe.artefact import Artefact
from sparsepipe.recipe import Export
from sparsepipe.runtime import run, session
from sparsepipe.runtime.inputs import inputs_of, random_inputs
from sparsepipe.stages import export

pytestmark = pytest.mark.usefixtures("decided_by_size")

node = helper.make_node


def check(path: Path, out: Path, sizes: Mapping[str, tuple[int, ...]] | None = None) -> tuple[Artefact, ModelProto]:
    """Export the file to all targets and compare each with it; (the export, the universal file)."""
    made = export.from_onnx(path, Export(), out)
    original = session(path, library=False)
    feeds = random_inputs(inputs_of(original), 2, 0)
    feeds |= {name: np.random.default_rng(1).standard_normal(size, np.float32) for name, size in (sizes or {}).items()}
    expected = run(original, feeds)
    assert all(np.isfinite(one).all() for one in expected)
    for target in ("dense", "portable", "universal"):
        for library in (True, False):
            found = run(session(made.file(f"model.{target}.onnx"), library=library), feeds)
            for one, other in zip(found, expected, strict=True):
                scale = float(np.abs(other.astype(np.float64)).max())
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale if target == "universal" else 0)
    return made, onnx.load(made.file("model.universal.onnx"))


def reasons(made: Artefact) -> dict[str, str]:
    """Output of a node, or the name of one inside of a function -> "sparse", or why it stays."""
    return {
        row["output"] or row["node"]: "sparse" if row["sparse"] else row["reason"] for row in made.metrics["kernels"]
    }


def constant(name: str, value: Array, inner: str = "") -> NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(value, inner))


def test_weights_behind_other_nodes(tmp_path: Path) -> None:
    quantised = np.clip(np.round(weight(32, 32) * 20), -127, 127).astype(np.int8)
    nodes = [
        node("Identity", ["w0"], ["v0"]),
        node("Gemm", ["x", "v0"], ["identity"], transB=1),
        node("Transpose", ["w1"], ["v1"]),
        node("MatMul", ["identity", "v1"], ["transpose"]),
        node("Identity", ["w2"], ["i2"]),
        node("Transpose", ["i2"], ["v2"], perm=[1, 0]),
        node("MatMul", ["transpose", "v2"], ["both"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["v3"]),
        node("MatMul", ["both", "v3"], ["dequantize"]),
        node("Cast", ["w4"], ["v4"], to=TensorProto.FLOAT),
        node("MatMul", ["dequantize", "v4"], ["cast"]),
        node("Reshape", ["w5", "shape"], ["v5"]),
        node("MatMul", ["cast", "v5"], ["reshape"]),
        node("Squeeze", ["w6", "axis"], ["v6"]),
        node("MatMul", ["reshape", "v6"], ["squeeze"]),
        node("Mul", ["w7", "scale"], ["v7"]),
        node("MatMul", ["squeeze", "v7"], ["y"]),
    ]
    constants = {
        **{f"w{place}": weight(32, 32) for place in (0, 1, 2, 7)},
        "q": quantised,
        "scale": np.array(0.05, np.float32),
        "zero": np.array(0, np.int8),
        "w4": weight(32, 32).astype(np.float16),
        "w5": weight(16, 64),
        "shape": np.array([32, 32]),
        "w6": weight(1, 32, 32),
        "axis": np.array([0]),
    }
    onnx.save(model(nodes, (32,), constants), tmp_path / "theirs.onnx")
    made, universal = check(tmp_path / "theirs.onnx", tmp_path / "export")
    assert reasons(made) == {
        "identity": "sparse",
        "transpose": "sparse",
        "both": "sparse",
        "dequantize": "the weight goes through DequantizeLinear",
        "cast": "the weight goes through Cast",
        "reshape": "the weight goes through Reshape",
        "squeeze": "the weight goes through Squeeze",
    }
    assert ops(universal).count("SparseLinear") == 3


def test_weights_in_constant_nodes(tmp_path: Path) -> None:
    """Two of which have the same inner name; numbers that Constant nodes hold as plain attributes."""
    statistics = [constant(name, np.abs(weight(32, density=1)) + 0.5) for name in ("gamma", "beta", "mean", "var")]
    nodes = [
        constant("w0", weight(32, 16, 3, 3), "value"),
        node("Constant", [], ["b0"], value_floats=[0.25 * place for place in range(32)]),
        node("Conv", ["x", "w0", "b0"], ["a"]),
        *statistics,
        node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"]),
        node("Constant", [], ["low"], value_float=0.0),
        node("Constant", [], ["high"], value_float=1.5),
        node("Clip", ["b", "low", "high"], ["c"]),
        constant("w1", weight(32, 32, 1, 1), "value"),
        node("Conv", ["c", "w1"], ["d"]),
        node("Constant", [], ["axes"], value_ints=[2, 3]),
        node("ReduceMean", ["d", "axes"], ["e"], keepdims=0),
        node("Constant", [], ["axis"], value_int=0),
        node("Gather", ["e", "axis"], ["y"]),
    ]
    onnx.save(model(nodes, (16, 6, 6), {}), tmp_path / "theirs.onnx")
    made, universal = check_close(tmp_path)
    assert reasons(made) == {"b": "sparse", "d": "sparse"}
    assert ops(universal)[:2] == ["SparseConvClip", "SparseConv"]


def check_close(tmp_path: Path) -> tuple[Artefact, ModelProto]:
    return check(tmp_path / "theirs.onnx", tmp_path / "export")


def test_forms_of_gemm(tmp_path: Path) -> None:
    row, one = weight(1, 32, density=1), np.array([3.0], np.float32)
    nodes = [
        node("Gemm", ["x", "w0", "row"], ["beta"], transB=1, beta=2.0),
        node("Gemm", ["beta", "w1", "one"], ["one_bias"]),
        node("Gemm", ["one_bias", "w2", "square"], ["matrix_of_one"]),
        node("Gemm", ["matrix_of_one", "w3", "row"], ["alpha"], alpha=0.5),
        node("Gemm", ["w4", "alpha", "column"], ["left"], transB=1),
        node("Gemm", ["left", "w5"], ["turned"], transA=1),
        node("Gemm", ["turned", "w6", "rows"], ["y"]),
    ]
    constants = {"row": row, "one": one, "square": np.full((1, 1), 2, np.float32), "rows": weight(2, 32, density=1)}
    constants |= {f"w{place}": weight(32, 32) for place in range(7)} | {"column": weight(32, 1, density=1)}
    before = model(nodes, (32,), constants, outputs=("y",))
    before.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(before, tmp_path / "theirs.onnx")
    made, universal = check_close(tmp_path)
    assert reasons(made) == {
        "beta": "sparse",
        "one_bias": "sparse",
        "matrix_of_one": "sparse",
        "alpha": "no kernel for transA, or alpha other than 1",
        "left": "the weight is the left factor",
        "turned": "no kernel for transA, or alpha other than 1",
        "y": "the bias differs from row to row",
    }
    assert ops(universal).count("SparseLinear") == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_of_float_stay(dtype: Any, tmp_path: Path) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    before = model([node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])], (64,), {"w": weight(64, 64)})
    before.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight(64, 64).astype(dtype), "w"))
    for value in (*before.graph.input, *before.graph.output, *before.graph.value_info):
        value.type.tensor_type.elem_type = kind
    onnx.save(before, tmp_path / "theirs.onnx")
    made, universal = check_close(tmp_path)
    assert reasons(made) == {"a": f"the weight is {TensorProto.DataType.Name(kind)}, not FLOAT"}
    assert list(universal.graph.node) == list(before.graph.node)


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_had_to_be_inputs(first: bool, tmp_path: Path) -> None:
    """Before IR version 4 every weight was an input, too. Later, one that still is may be overridden by a caller."""
    before = model(
        [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])], (16, 5, 5), {"w": weight(16, 16, 1, 1)}
    )
    before.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [16, 16, 1, 1]))
    before.ir_version = 3 if first else 8
    onnx.save(before, tmp_path / "theirs.onnx")
    made, universal = check_close(tmp_path)
    assert reasons(made) == {"a": "sparse" if first else "the weight is an input of the network"}
    assert [value.name for value in universal.graph.input] == (["x"] if first else ["x", "w"])
    assert len(onnx.load(made.file("model.dense.onnx")).graph.input) == 2


@pytest.mark.parametrize("opset", [7, 9, 12, 23])
def test_opsets_outside_of_the_range(opset: int, tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("GlobalAveragePool", ["b"], ["y"])]
    onnx.save(model(nodes, (16, 5, 5), {"w": weight(16, 16, 1, 1)}, opset=opset), tmp_path / "theirs.onnx")
    made, _ = check_close(tmp_path)
    assert reasons(made) == {"a": "sparse" if opset > 13 else f"opset {opset} is older than 13"}
    newer = export.from_onnx(tmp_path / "theirs.onnx", Export(targets=("universal",), opset=17), tmp_path / "newer")
    assert reasons(newer) == {"a": "sparse"}


def test_functions_of_others(tmp_path: Path) -> None:
    """One that holds a weight, and one that is given a weight which the graph uses, too."""
    imports = [helper.make_opsetid("", 18)]
    inner = [constant("k", weight(32, 32)), node("MatMul", ["a", "k"], ["b"])]
    functions = [
        helper.make_function("own", "Holds", ["a"], ["b"], inner, imports),
        helper.make_function("own", "Takes", ["a", "k"], ["b"], [node("MatMul", ["a", "k"], ["b"])], imports),
    ]
    nodes = [
        node("Holds", ["x"], ["a"], domain="own"),
        node("Takes", ["a", "shared"], ["c"], domain="own"),
        node("MatMul", ["c", "shared"], ["d"]),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(weight(32, 32), name) for name in ("shared", "w")],
    )
    both = [*imports, helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=both, functions=functions, ir_version=8), tmp_path / "theirs.onnx")
    made, universal = check_close(tmp_path)
    assert reasons(made) == {
        "d": "Takes 'c', which stays, uses the weight, too",
        "y": "sparse",
        "b": "inside of the function 'Holds', which is left alone",
    }
    assert [one.name for one in universal.functions] == ["Holds", "Takes", "SparseLinear"]


def small_network() -> ModelProto:
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "w1", "b1"], ["y"], transB=1),
    ]
    constants = {"w0": weight(32, 16, 3, 3, density=0.05), "b0": weight(32, density=1)}
    constants |= {"w1": weight(64, 32, density=0.05), "b1": weight(64, density=1)}
    return model(nodes, (16, 6, 6), constants, opset=17)


def quantised(source: Path, target: Path, form: str) -> None:
    from onnxruntime import quantization

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
        left = iter([{"x": np.random.default_rng(0).standard_normal((2, 16, 6, 6), np.float32)}])

        def get_next(self) -> Any:
            return next(self.left, None)

    logging.disable(logging.WARNING)
    try:
        if form == "dynamic":
            quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QInt8)
        else:
            quantization.quantize_static(
                source, target, Samples(), quant_format=quantization.QuantFormat[form], per_channel=True,
                weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("QDQ", {"Conv": "goes through DequantizeLinear", "Gemm": "goes through DequantizeLinear"}),
        ("QOperator", {"QLinearConv": "no kernel for QLinearConv", "QGemm": "no kernel for QGemm"}),
        ("dynamic", {"ConvInteger": "no kernel for ConvInteger", "MatMulInteger": "no kernel for MatMulInteger"}),
    ],
)
def test_quantised_files_stay_and_their_zeros_are_stored_sparse(
    form: str, expected: dict[str, str], tmp_path: Path
) -> None:
    onnx.save(small_network(), tmp_path / "plain.onnx")
    quantised(tmp_path / "plain.onnx", tmp_path / "theirs.onnx", form)
    made, _ = check_close(tmp_path)
    rows = made.metrics["kernels"]
    assert {row["op"] for row in rows} == expected.keys()
    assert not any(row["sparse"] for row in rows)
    assert all(re.search(expected[row["op"]], row["reason"]) for row in rows)
    assert all(row["sparse"] for row in made.metrics["layers"])


def test_a_graph_that_onnxruntime_has_optimised(tmp_path: Path) -> None:
    onnx.save(small_network(), tmp_path / "plain.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "theirs.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(tmp_path / "plain.onnx", options)
    made, universal = check_close(tmp_path)
    assert [row["op"] for row in made.metrics["kernels"]] == ["FusedConv", "Gemm"]
    assert reasons(made)["y"] == "sparse"
    assert "FusedConv" in ops(universal)


def torch_network(recurrent: bool) -> Any:
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Images(nn.Module):  # type: ignore[misc]
        """Batch normalisation, depthwise, grouped and transposed convolutions, a sum, and a weight used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
            self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
            self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
            self.point, self.up = nn.Conv2d(32, 32, 1), nn.ConvTranspose2d(32, 16, 2, 2)
            self.down, self.hidden, self.head = nn.Conv2d(16, 32, 3, 2), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x: Any) -> Any:
            x = nn.functional.hardswish(self.deep(torch.relu(self.norm(self.stem(x)))))
            x = nn.functional.relu6(self.point(self.grouped(x))) + x
            x = nn.functional.silu(self.down(self.up(x))).mean((2, 3))
            return self.head(self.hidden(nn.functional.gelu(self.hidden(x))))

    class Words(nn.Module):  # type: ignore[misc]
        """An embedding whose table is the last layer, and recurrent layers."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.lstm = nn.Embedding(50, 32), nn.LSTM(32, 32, batch_first=True)
            self.gru, self.join = nn.GRU(32, 32, batch_first=True, bidirectional=True), nn.Linear(64, 32)

        def forward(self, x: Any) -> Any:
            x = self.gru(self.lstm(self.table(x))[0])[0]
            return self.join(x) @ self.table.weight.T

    torch.manual_seed(0)
    network = (Words() if recurrent else Images()).eval()
    for value in network.parameters():
        if value.ndim > 1:
            value.data *= torch.rand_like(value) < 0.1
    if not recurrent:
        network.norm.running_mean.normal_()
        network.norm.running_var.uniform_(0.5, 2)
    return network


def exported_by_torch(network: Any, example: Any, path: Path, **options: Any) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), path, input_names=["x"], verbose=False, **options)


DYNAMIC: dict[str, Callable[[Any], dict[str, Any]]] = {
    "traced": lambda torch: {"dynamo": False, "dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}}, "opset_version": 13},
    "not folded": lambda torch: {
        "dynamo": False,
        "do_constant_folding": False,
        "training": torch.onnx.TrainingMode.PRESERVE,
        "dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}},
    },
    "inputs": lambda torch: {
        "dynamo": False,
        "keep_initializers_as_inputs": True,
        "dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}},
    },
    "dynamo": lambda torch: {
        "dynamo": True,
        "external_data": True,
        "dynamic_shapes": (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),),
    },
}


@pytest.mark.parametrize("way", DYNAMIC)
def test_images_exported_by_torch(way: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "theirs.onnx"
    exported_by_torch(torch_network(recurrent=False), torch.randn(2, 16, 9, 7), path, **DYNAMIC[way](torch))
    made, universal = check(path, tmp_path / "export", {"x": (3, 16, 11, 8)})
    by_shape = {(row["op"], tuple(row["shape"])): row for row in made.metrics["kernels"]}
    if way == "inputs":
        assert all("the weight is an input of the network" in row["reason"] for row in made.metrics["kernels"])
        return
    stays = {(op, shape): row["reason"] for (op, shape), row in by_shape.items() if not row["sparse"]}
    assert stays == {
        ("Conv", (32, 1, 3, 3)): "depthwise convolution: what follows it is not sparse",
        ("Conv", (32, 8, 3, 3)): "convolution of 4 groups",
        ("ConvTranspose", (32, 16, 2, 2)): "transposed convolution",
    }
    point = "SparseConv" if way == "not folded" else "SparseConvClip"  # the bounds of its Clip go through a Cast
    assert [name for name in ops(universal) if name.startswith("Sparse")] == [
        *["SparseConvRelu", point, "SparseConvSilu", "SparseLinearGelu", "SparseLinear", "SparseLinear"]
    ]


@pytest.mark.parametrize("dynamo", [False, True])
def test_words_exported_by_torch(dynamo: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "theirs.onnx"
    exported_by_torch(torch_network(recurrent=True), torch.randint(0, 50, (2, 5)), path, dynamo=dynamo)
    made, _ = check_close(tmp_path)
    stays = {row["op"]: row["reason"] for row in made.metrics["kernels"] if not row["sparse"]}
    assert {op: stays[op] for op in ("LSTM", "GRU")} == {op: f"no kernel for {op}" for op in ("LSTM", "GRU")}
    assert "no kernel for Gather" in stays["Gather"]
    assert any(row["sparse"] and row["op"] in ("MatMul", "Gemm") for row in made.metrics["kernels"])
