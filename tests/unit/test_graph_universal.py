"""The universal target against dense onnxruntime, with the kernel library (where it was built) and without it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from universal_cases import check, model, ops, weight

from sparsepipe.graph.fold import fold
from sparsepipe.recipe import Export
from sparsepipe.runtime import run, session
from sparsepipe.stages import export

pytestmark = pytest.mark.usefixtures("decided_by_size")

node = helper.make_node


@pytest.mark.parametrize("opset", [13, 15, 18, 20, 22])
def test_many_layers_of_one_kind_share_a_body(opset: int) -> None:
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w1"], ["c"], strides=[2, 2], pads=[0, 1, 2, 0], dilations=[2, 1]),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", "w2"], ["e"], auto_pad="VALID"),
        node("GlobalAveragePool", ["e"], ["f"]),
        node("Flatten", ["f"], ["g"]),
        node("Gemm", ["g", "w3", "b3"], ["h"], transB=1, beta=0.5),
        node("Relu", ["h"], ["i"]),
        node("MatMul", ["i", "w4"], ["j"]),
        node("Add", ["b4", "j"], ["y"]),
    ]
    constants = {
        "w0": weight(16, 8, 3, 3),
        "b0": np.ones(16, np.float32),
        "w1": weight(24, 16, 3, 3, block=4),
        "w2": weight(20, 24, 1, 1, block=2),
        "w3": weight(40, 20),
        "b3": weight(40, density=1),
        "w4": weight(12, 40).T.copy(),
        "b4": weight(12, density=1),
    }
    after, choices = check(model(nodes, (8, "h", "w"), constants, opset=opset, ir_version=7), side=11)
    assert ops(after) == [
        *["SparseConvRelu", "SparseConvRelu", "SparseConv", "GlobalAveragePool", "Flatten"],
        *["SparseLinearRelu", "SparseLinear"],
    ]
    assert [choices[name].block for name in "ace"] == [1, 4, 2]
    names = [function.name for function in after.functions]
    assert names == ["SparseConv", "SparseConvRelu", "SparseLinear", "SparseLinearRelu"]
    assert after.ir_version == 8
    assert all(choice.bytes < choice.dense_bytes / 4 for choice in choices.values())


def test_activations_and_residuals_are_fused() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Conv", ["x", "w1"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("Clip", ["c", "low", "high"], ["d"]),
        node("Conv", ["d", "w2"], ["e"]),
        node("HardSwish", ["e"], ["f"]),
        node("Conv", ["f", "w3"], ["g"]),
        node("Add", ["d", "g"], ["h"]),
        node("Relu", ["h"], ["i"]),
        node("Conv", ["i", "w4"], ["j"]),
        node("Clip", ["j", "", "high"], ["k"]),
        node("Conv", ["k", "w5"], ["y"]),
    ]
    constants = {f"w{place}": weight(16, 16, 1, 1) for place in range(6)}
    constants |= {"low": np.array(0, np.float32), "high": np.array(0.5, np.float32)}
    after, _ = check(model(nodes, (16, 6, 6), constants))
    assert Counter(ops(after)) == Counter(
        {"SparseConv": 2, "SparseConvAddClip": 1, "SparseConvHardSwish": 1, "SparseConvAddRelu": 1, "SparseConvClip": 1}
    )


def test_what_is_used_twice_is_not_fused() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w1"], ["c"]),
        node("Add", ["c", "c"], ["d"]),
        node("Conv", ["d", "w2"], ["e"]),
        node("Add", ["e", "row"], ["f"]),
        node("Conv", ["f", "w3"], ["g"]),
        node("GlobalAveragePool", ["f"], ["h"]),
        node("Add", ["g", "h"], ["y"]),
    ]
    constants = {f"w{place}": weight(16, 16, 1, 1) for place in range(4)} | {"row": weight(1, 16, 1, 1, density=1)}
    after, _ = check(model(nodes, (16, 6, 6), constants, outputs=("y", "a")))
    assert Counter(ops(after)) == Counter({"SparseConv": 4, "Relu": 1, "Add": 3, "GlobalAveragePool": 1})


def test_layers_that_stay_say_why() -> None:
    shared, view = weight(32, 32), weight(64, 32)
    layers: list[tuple[str, NodeProto, str]] = [
        ("grouped", node("Conv", ["x", "grouped"], ["y0"], group=2), "convolution of 2 groups"),
        ("depthwise", node("Conv", ["x", "depthwise"], ["y1"], group=32), "depthwise.*what comes before it is not"),
        ("transposed", node("ConvTranspose", ["x", "transposed"], ["y2"]), "transposed convolution"),
        ("full", node("Conv", ["x", "full"], ["y3"]), "predicted 1.25 of the dense time.*: pays below 0.7"),
        ("small", node("Conv", ["x", "small"], ["y4"]), "64 values are too few to matter"),
        ("same", node("Conv", ["x", "same"], ["y5"], auto_pad="SAME_LOWER", strides=[2, 2]), "SAME_LOWER depends on"),
        ("twice", node("MatMul", ["x", "twice"], ["y6"]), "Add 'y7', which stays, uses the weight, too"),
        ("square", node("MatMul", ["square", "square"], ["y16"]), "the weight is the left factor"),
        ("left", node("MatMul", ["left", "x"], ["y8"]), "the weight is the left factor"),
        ("batch", node("MatMul", ["x", "batch"], ["y9"]), "a weight of 3 dimensions is several matrices"),
        ("input", node("MatMul", ["x", "input"], ["y10"]), "the weight is an input of the network"),
        ("nan", node("MatMul", ["x", "nan"], ["y11"]), "a value is not finite"),
        ("outer", node("MatMul", ["x", "outer"], ["y12"]), "a subgraph uses the weight"),
        ("cast", node("MatMul", ["x", "casted"], ["y13"]), "the weight goes through Cast"),
        ("view", node("MatMul", ["x", "viewed"], ["y14"]), "predicted 0.[0-9]+ of the dense time"),
    ]
    constants = {
        "grouped": weight(32, 16, 3, 3),
        "depthwise": weight(32, 1, 3, 3),
        "transposed": weight(32, 16, 3, 3),
        "full": weight(32, 32, 1, 1, density=1),
        "small": weight(2, 32, 1, 1),
        "same": weight(32, 32, 3, 3),
        "twice": shared,
        "square": shared.copy(),
        "left": shared.copy(),
        "batch": weight(32, 32, 32),
        "input": shared.copy(),
        "nan": np.where(shared == shared.max(), np.nan, shared).astype(np.float32),
        "outer": shared.copy(),
        "cast": shared.astype(np.float64),
        "view": view,
        "yes": np.array(True),
    }
    branch = helper.make_graph(
        [node("MatMul", ["y14", "inner"], ["i0"]), node("MatMul", ["i0", "outer"], ["i"])],
        "then",
        [],
        [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight(64, 32), "inner")],
    )
    nodes = [
        node("Cast", ["cast"], ["casted"], to=TensorProto.FLOAT),
        node("Transpose", ["view"], ["viewed"], perm=[1, 0]),
        *[made for _, made, _ in layers],
        node("Add", ["y6", "twice"], ["y7"]),
        node("If", ["yes"], ["y15"], then_branch=branch, else_branch=branch),
    ]
    outputs = tuple(f"y{place}" for place in range(17) if place not in (6, 11))
    after, choices = check(model(nodes, (32, 32, 32), constants, outputs=outputs, inputs=("input",)), batches=(2,))
    for (name, made, reason), choice in zip(layers, choices.values(), strict=False):
        assert (choice.name, choice.op, choice.sparse) == (name, made.op_type, name == "view")
        assert re.search(reason, choice.reason), choice
    assert "_branch of If" in choices["i"].reason
    assert [entry for entry in ops(after) if entry.startswith("Sparse")] == ["SparseLinear"]
    assert "view" not in {tensor.name for tensor in after.graph.initializer}


def test_an_old_opset_stays_dense() -> None:
    before = model([node("Conv", ["x", "w"], ["y"])], (16, 4, 4), {"w": weight(16, 16, 1, 1)}, opset=12)
    after, choices = check(before)
    assert choices["y"].reason == "opset 12 is older than 13"
    assert after == before


@pytest.mark.parametrize("nonzeros", [0, 1])
def test_weights_of_nearly_nothing(nonzeros: int) -> None:
    kernel, matrix = np.zeros((16, 16, 3, 3), np.float32), np.zeros((16, 16), np.float32)
    kernel.flat[2000 : 2000 + nonzeros], matrix.flat[200 : 200 + nonzeros] = 2, 3
    nodes = [
        node("Conv", ["x", "k"], ["a"], pads=[1, 1, 1, 1]),
        node("MatMul", ["a", "m"], ["b"]),
        node("Add", ["x", "b"], ["y"]),
    ]
    after, _ = check(model(nodes, (16, 16, 16), {"k": kernel, "m": matrix}))
    assert ops(after) == ["SparseConv", "SparseLinearAdd"]


def test_a_convolution_in_one_dimension() -> None:
    before = model([node("Conv", ["x", "w"], ["y"], pads=[2, 1])], (16, "t"), {"w": weight(16, 16, 5)})
    assert ops(check(before)[0]) == ["SparseConv"]


@pytest.mark.parametrize("name", ["mlp", "resnet8", "mobilenet-v1", "vit-tiny"])
def test_networks_of_the_zoo(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from sparsepipe.graph.build import build
    from sparsepipe.models.registry import create

    torch.manual_seed(0)
    shape = (3, 32, 32)
    network = create(name, input_shape=shape, classes=5).eval()
    for values in network.parameters():
        if values.ndim > 1:
            values.data *= torch.rand_like(values) < 0.1
    after, choices = check(fold(build(network, shape, opset=18))[0], batches=(2,))
    assert any(choice.sparse for choice in choices.values())
    assert sum(entry.startswith("Sparse") for entry in ops(after)) == sum(one.sparse for one in choices.values())


def test_a_file_pruned_elsewhere_is_folded_and_rewritten(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="first"),
        node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"]),
        node("Relu", ["b"], ["y"]),
    ]
    statistics = {name: np.abs(weight(16, density=1)) + 0.5 for name in ("gamma", "beta", "mean", "var")}
    before = model(nodes, (16, 8, 8), {"w": weight(16, 16, 3, 3), **statistics})
    onnx.save(before, tmp_path / "theirs.onnx")
    result = export.from_onnx(tmp_path / "theirs.onnx", Export(targets=("universal",)), tmp_path / "export")
    path = result.file("model.universal.onnx")
    assert ops(onnx.load(path)) == ["SparseConvRelu"]
    (row,) = result.metrics["kernels"]
    assert (row["node"], row["sparse"], row["block"]) == ("first", True, 1)
    x = {"x": np.random.default_rng(3).standard_normal((2, 16, 8, 8)).astype(np.float32)}
    expected = run(session(before.SerializeToString()), x)[0]
    for library in (True, False):
        np.testing.assert_allclose(run(session(path, library=library), x)[0], expected, rtol=1e-4, atol=1e-5)
