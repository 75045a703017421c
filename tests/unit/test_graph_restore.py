"""Universal files as sources: the restored network against the dense one in onnxruntime, without the kernel library."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from universal_cases import Array, model, ops, weight

from sparsepipe.errors import GraphError
from sparsepipe.graph.finish import serialise
from sparsepipe.graph.load import LIMIT_BYTES, load
from sparsepipe.graph.restore import restore
from sparsepipe.graph.universal import choose, rewrite
from sparsepipe.native import operators, quantized
from sparsepipe.recipe import Export
from sparsepipe.runtime import run, session
from sparsepipe.stages import export

pytestmark = pytest.mark.usefixtures("decided_by_size")

node = helper.make_node


def universal(before: ModelProto) -> ModelProto:
    return rewrite(before, choose(before))


def matrices(made: ModelProto) -> list[bytes]:
    """All weights, whatever they are called and whichever way round a matrix is stored; -0.0 as +0.0."""
    arrays = [numpy_helper.to_array(tensor) for tensor in made.graph.initializer]
    found = []
    for array in arrays:
        if array.ndim >= 2:
            plain = np.ascontiguousarray(array) + np.float32(0)
            found.append(min(plain.tobytes(), np.ascontiguousarray(plain.T).tobytes()))
    return sorted(found)


def encoded(made: ModelProto) -> list[bytes]:
    """The bytes of all compact weights."""
    tensors = made.graph.initializer
    return sorted(one.raw_data for one in tensors if one.name.rstrip("_").endswith((".values", ".deltas")))


def check(before: ModelProto, batches: tuple[int, ...] = (1, 3), side: int = 9) -> ModelProto:
    """Write the universal form of `before`, restore it, and compare with `before`: outputs, weights, a new export."""
    made = universal(before)
    assert any(entry.domain == operators.DOMAIN for entry in made.graph.node)
    after = onnx.ModelProto()
    after.CopyFrom(made)
    rows = restore(after, where="test", limit=LIMIT_BYTES)
    assert {entry.domain for entry in after.graph.node} == {""}
    assert not after.functions
    assert [entry.domain for entry in after.opset_import] == [""]
    assert matrices(after) == matrices(before)
    one, other = (session(serialise(each, where="test"), library=False) for each in (before, after))
    (entry,) = one.get_inputs()
    for batch in batches:
        shape = [batch, *[size if isinstance(size, int) else side for size in entry.shape[1:]]]
        x = {entry.name: np.random.default_rng(batch).standard_normal(shape).astype(np.float32)}
        for found, wanted in zip(run(other, x), run(one, x), strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()) + 1e-30)
    again = universal(after)
    assert Counter(ops(again)) == Counter(ops(made))
    assert encoded(again) == encoded(made)
    assert sum(row.bytes for row in rows) == sum(len(data) for data in encoded(made))
    return after


@pytest.mark.parametrize("opset", [13, 18, 22])
def test_every_layer_activation_and_sum_comes_back(opset: int) -> None:
    nodes = [
        node("Conv", ["x", "c0.weight", "c0.bias"], ["a"], pads=[1, 0, 1, 2], strides=[2, 1], dilations=[1, 2]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "c1.weight"], ["c"]),
        node("Add", ["c", "b"], ["d"]),
        node("Clip", ["d", "low", "high"], ["e"]),
        node("Conv", ["e", "deep.weight", "deep.bias"], ["f"], group=32, pads=[1] * 4),
        node("Sigmoid", ["f"], ["g"]),
        node("Mul", ["f", "g"], ["h"]),
        node("Conv", ["h", "c2.weight", "c2.bias"], ["i"]),
        node("HardSigmoid", ["i"], ["j"], alpha=1 / 6, beta=0.5),
        node("Mul", ["i", "j"], ["k"]),
        node("Conv", ["k", "grouped"], ["l"], group=4),
        node("GlobalAveragePool", ["l"], ["m"]),
        node("Flatten", ["m"], ["n_"]),
        node("Gemm", ["n_", "fc.weight", "fc.bias"], ["o"], transB=1),
        node("Div", ["o", "root"], ["p"]),
        node("Erf", ["p"], ["q"]),
        node("Add", ["q", "one"], ["r"]),
        node("Mul", ["o", "r"], ["s"]),
        node("Mul", ["s", "half"], ["t"]),
        node("MatMul", ["t", "head"], ["y"]),
    ]
    constants = {
        "c0.weight": weight(32, 16, 3, 3),
        "c0.bias": weight(32, density=1),
        "c1.weight": weight(32, 32, 1, 1, block=4),
        "low": np.array(-0.25, np.float32),
        "high": np.array(0.75, np.float32),
        "deep.weight": weight(32, 1, 3, 3, density=1),
        "deep.bias": weight(32, density=1),
        "c2.weight": weight(24, 32, 3, 3, block=2),
        "c2.bias": weight(24, density=1),
        "grouped": weight(24, 6, 1, 1),
        "fc.weight": weight(40, 24),
        "fc.bias": weight(40, density=1),
        "root": np.array(2**0.5, np.float32),
        "one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
        "head": weight(32, 40).T.copy(),
    }
    after = check(model(nodes, (16, "h", "w"), constants, opset=opset))
    assert {"c0.weight", "c1.weight", "deep.weight", "fc.weight"} <= {one.name for one in after.graph.initializer}
    # A layer without a bias or an activation gets none.
    assert ops(after)[-1] == "MatMul"
    assert not any(entry.op_type == "Identity" for entry in after.graph.node)
    biased = {entry.output[0]: len(entry.input) for entry in after.graph.node if entry.op_type == "Conv"}
    assert sorted(biased.values()) == [2, 2, 3, 3, 3]


@pytest.mark.parametrize("opset", [13, 22])
def test_depthwise_separable_convolutions_come_back(opset: int) -> None:
    """Both convolutions, with or without biases, activations and a sum."""
    nodes = [
        node("Conv", ["x", "c0.weight"], ["a"]),
        node("Conv", ["a", "d0.weight", "d0.bias"], ["b"], group=32, pads=[1] * 4),
        node("Clip", ["b", "low", "high"], ["c"]),
        node("Conv", ["c", "p0.weight", "p0.bias"], ["d"]),
        node("Add", ["d", "x"], ["e"]),
        node("Conv", ["e", "d1.weight"], ["g"], group=16, pads=[0, 1, 1, 0], strides=[2, 2]),
        node("Conv", ["g", "p1.weight"], ["h"]),
        node("Clip", ["h", "low", "six"], ["y"]),
    ]
    constants = {
        "c0.weight": weight(32, 16, 1, 1),
        "d0.weight": weight(32, 1, 3, 3, density=1),
        "d0.bias": weight(32, density=1),
        "p0.weight": weight(16, 32, 1, 1, block=4),
        "p0.bias": weight(16, density=1),
        "d1.weight": weight(16, 1, 3, 3, density=1),
        "p1.weight": weight(24, 16, 1, 1),
        **{name: np.array(value, np.float32) for name, value in (("low", -0.25), ("high", 0.75), ("six", 6))},
    }
    before = model(nodes, (16, "h", "w"), constants, opset=opset)
    assert ops(universal(before)) == ["SparseConv", "SparseSeparableClipConvAdd", "SparseSeparableConvClip"]
    after = check(before)
    assert [name for name in ops(after) if name != "Constant"] == [made.op_type for made in nodes]
    assert [len(made.input) for made in after.graph.node if made.op_type == "Conv"] == [2, 3, 3, 2, 2]
    assert {"d0.weight", "d1.weight"} < {one.name for one in after.graph.initializer}


LAYER = st.sampled_from(["conv", "point", "linear"])


@given(st.data())
@settings(max_examples=20)
def test_any_single_layer(data: Any) -> None:
    kind, block = data.draw(LAYER), data.draw(st.sampled_from([1, 2, 4]))
    outputs, inputs = 4 * data.draw(st.integers(4, 9)), data.draw(st.integers(16, 40))
    density = data.draw(st.sampled_from([0.0, 0.01, 0.1]))
    kernel = {"conv": (3, 2), "point": (1, 1), "linear": ()}[kind]
    constants = {"w": weight(outputs, inputs, *kernel, density=density, block=block)}
    if biased := data.draw(st.booleans()):
        constants["b"] = weight(outputs, density=1)
    op = "Gemm" if kind == "linear" else "Conv"
    options = {"transB": 1} if kind == "linear" else {}
    nodes = [node(op, ["x", "w", *(["b"] if biased else [])], ["y"], **options)]
    check(model(nodes, (inputs,) if kind == "linear" else (inputs, "h", "w_"), constants), batches=(2,))


def test_nodes_that_share_a_weight_still_do() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w"], ["c"]),
        node("Gemm", ["c", "w"], ["d"]),
        node("Gemm", ["d", "w"], ["y"], transB=1),
    ]
    before = model(nodes, (48,), {"w": weight(48, 48)})
    after = universal(before)
    rows = restore(after, where="test", limit=LIMIT_BYTES)
    assert len(rows) == 2  # the matrix and its transposition
    names = [entry.input[1] for entry in after.graph.node if entry.op_type == "MatMul"]
    assert names[0] == names[1] == names[2] != names[3]
    x = {"x": np.random.default_rng(0).standard_normal((2, 48)).astype(np.float32)}
    expected = run(session(serialise(before, where=""), library=False), x)[0]
    np.testing.assert_array_equal(run(session(serialise(after, where=""), library=False), x)[0], expected)


def test_names_that_are_taken_are_left_to_their_owners() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Add", ["a", "w.weight"], ["a/y0"]),
        node("Sigmoid", ["a/y0"], ["y"]),
    ]
    constants = {"w": weight(16, 16, 1, 1), "w.weight": weight(1, 16, 1, 1, density=1)}
    before = model(nodes, (16, 4, 4), constants)
    after = check(before)
    kept = next(one for one in after.graph.initializer if one.name == "w.weight")
    np.testing.assert_array_equal(numpy_helper.to_array(kept), constants["w.weight"])


def test_layers_inside_of_branches_come_back() -> None:
    """Someone put a universal network into an If: its compact weights stand inside and outside of the branch."""
    layer = weight(32, 32)
    values, deltas = operators.encode(layer)
    held = [numpy_helper.from_array(values, "w.values"), numpy_helper.from_array(deltas, "w.deltas")]
    linear = operators.sparse_linear(["x", "w.values", "w.deltas"], "t", weight_shape=(32, 32))
    other = operators.sparse_linear(["x", "v", "d"], "e", weight_shape=(32, 32), activation="relu")
    inner = [numpy_helper.from_array(values, "v"), numpy_helper.from_array(deltas, "d")]
    info = helper.make_tensor_value_info
    then = helper.make_graph([linear], "then", [], [info("t", TensorProto.FLOAT, ["n", 32])])
    otherwise = helper.make_graph([other], "else", [], [info("e", TensorProto.FLOAT, ["n", 32])], inner)
    graph = helper.make_graph(
        [node("If", ["yes"], ["y"], then_branch=then, else_branch=otherwise)],
        "g",
        [info("yes", TensorProto.BOOL, []), info("x", TensorProto.FLOAT, ["n", 32])],
        [info("y", TensorProto.FLOAT, ["n", 32])],
        held,
    )
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("sparsepipe", 1)],
        functions=[operators.function_for(one) for one in (linear, other)],
        ir_version=8,
    )
    restore(made, where="test", limit=LIMIT_BYTES)
    opened = session(serialise(made, where="test"), library=False)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    expected = x @ layer.T
    found = [run(opened, {"x": x, "yes": np.array(yes)})[0] for yes in (True, False)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], np.maximum(expected, 0), rtol=1e-4, atol=1e-5)
    assert not made.functions
    assert not made.graph.initializer


@pytest.mark.parametrize("activation", quantized.ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_int8_operators_come_back(activation: str, biased: bool) -> None:
    """Bit for bit what their bodies compute; the weight is a constant of the standard operators again."""
    random = np.random.default_rng(3)
    kernel, matrix = (int8_weight(random, shape) for shape in ((16, 10, 3, 3), (12, 16)))
    limits = {"limits": (3, 90)} if activation == "clip" else {}
    constants: dict[str, Array] = {}
    for stem, layer in (("c", kernel), ("l", matrix)):
        constants[f"{stem}.values"], constants[f"{stem}.deltas"] = quantized.encode(layer, 4)
        constants[f"{stem}.bias"] = random.integers(-900, 900, len(layer)).astype(np.int32)
    for name in ("x", "c", "s", "l", "r"):
        constants[f"{name}_scale"] = np.array(random.uniform(0.01, 0.03), np.float32)
        constants[f"{name}_zero"] = np.array(random.integers(0, 9), np.uint8)
    constants["w_scale"], constants["v_scale"] = np.full(16, 0.02, np.float32), np.array(0.03, np.float32)
    conv = [
        "x",
        "x_scale",
        "x_zero",
        "c.values",
        "c.deltas",
        "w_scale",
        "c_scale",
        "c_zero",
        "c.bias" if biased else "",
    ]
    linear = ["p", "s_scale", "s_zero", "l.values", "l.deltas", "v_scale", "l_scale", "l_zero"]
    nodes = [
        quantized.sparse_qconv(
            [*conv, "r", "r_scale", "r_zero", "s_scale", "s_zero"], "a", weight_shape=kernel.shape, pads=[1] * 4,
            activation=activation, **limits,
        ),
        node("Transpose", ["a"], ["p"], perm=[0, 2, 3, 1]),
        quantized.sparse_qlinear(
            [*linear, *(["l.bias"] if biased else [])], "y", weight_shape=matrix.shape, activation=activation, **limits
        ),
    ]  # fmt: skip
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.UINT8, ["n", 10, 5, 5]), info("r", TensorProto.UINT8, ["n", 16, 5, 5])],
        [info("y", TensorProto.UINT8, ["n", 5, 5, 12])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    bodies = [quantized.function_for(one) for one in (nodes[0], nodes[2])]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("sparsepipe", 1)]
    made = helper.make_model(graph, opset_imports=imports, functions=bodies, ir_version=8)
    x = {
        name: random.integers(0, 255, (2, channels, 5, 5)).astype(np.uint8) for name, channels in (("x", 10), ("r", 16))
    }
    expected = run(session(made.SerializeToString(), library=False), x)[0]
    assert len(np.unique(expected)) > 20
    rows = restore(made, where="test", limit=LIMIT_BYTES)
    found = run(session(serialise(made, where="test"), library=False), x)[0]
    np.testing.assert_array_equal(found, expected)
    assert not made.functions
    assert [(row.name, row.stored_as) for row in rows] == [("c.weight", "bsr 4x4"), ("l.weight", "bsr 4x4")]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    np.testing.assert_array_equal(held["c.weight"], kernel)
    np.testing.assert_array_equal(held["l.weight"], matrix)
    assert "ScatterElements" not in ops(made)


def int8_weight(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (random.integers(-127, 128, shape) * (random.random(shape) < 0.2)).astype(np.int8)


def small(**changes: Any) -> tuple[NodeProto, dict[str, Array]]:
    """A SparseConv with some of its attributes changed; None leaves one out."""
    layer = weight(16, 16, 1, 1)
    values, deltas = operators.encode(layer)
    made = operators.sparse_conv(["x", "w.values", "w.deltas"], "y", weight_shape=layer.shape, name="the layer")
    kept = [given for given in made.attribute if given.name not in changes]
    del made.attribute[:]
    made.attribute.extend(kept)
    made.attribute.extend(helper.make_attribute(name, value) for name, value in changes.items() if value is not None)
    return made, {"w.values": values, "w.deltas": deltas}


def graph_of(made: NodeProto, constants: dict[str, Array], version: int = 1) -> ModelProto:
    graph = helper.make_graph(
        [made],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("sparsepipe", version)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out_channels": None}, "its attribute 'out_channels' is None"),
        ({"out_channels": -16}, r"its weight has the shape \[-16, 16, 1, 1\]"),
        ({"out_channels": 8}, "is outside of the weight's 128"),
        ({"in_channels": 2**50}, "more than 2 GB"),
        ({"kernel_shape": 3.0}, "its attribute 'kernel_shape' is 3.0"),
        ({"kernel_shape": [1] * 1000}, "malformed"),
        ({"kernel_shape": [0, 1]}, r"its weight has the shape \[16, 16, 0, 1\]"),
        ({"block": 2}, "do not fit each other"),
        ({"block": 0}, "does not divide"),
        ({"activation": "relu"}, "its activation is 'relu', and it has no residual"),
        ({"activation": "tanh"}, "its activation is 'tanh'"),
        ({"activation": 7}, "its attribute 'activation' is 7"),
        ({"activation": None}, "its attribute 'activation' is None"),
    ],
)
def test_malformed_nodes_are_named(changes: dict[str, Any], reason: str) -> None:
    made = graph_of(*small(**changes))
    with pytest.raises(GraphError, match=reason) as caught:
        restore(made, where="file.onnx", limit=LIMIT_BYTES)
    assert "file.onnx" in str(caught.value)
    assert "the layer" in str(caught.value) or "2 GB" in reason


@cache
def small_file() -> bytes:
    made, constants = small()
    whole = graph_of(made, constants)
    whole.functions.append(operators.function_for(made))
    return bytes(whole.SerializeToString())


@given(data=st.data())
@settings(max_examples=150)
def test_damaged_files_are_read_or_refused(data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(small_file())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "u.onnx"
    path.write_bytes(content)
    with suppress(GraphError):  # any other error fails
        choose(load(path))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("w.deltas", np.full(300, 255, np.uint8), "do not fit each other"),
        ("w.values", np.ones((3, 1), np.float32), "do not fit each other"),
        ("w.values", np.ones((3, 1), np.float64), "float64"),
    ],
)
def test_malformed_weights_are_named(name: str, value: Array, reason: str) -> None:
    made, constants = small()
    with pytest.raises(GraphError, match=f"'the layer'.*{reason}"):
        restore(graph_of(made, constants | {name: value}), where="file.onnx", limit=LIMIT_BYTES)


def test_operators_of_a_newer_version_are_named() -> None:
    made, constants = small()
    with pytest.raises(GraphError, match=r"operators are of version 2, not 1.*install the newest"):
        restore(graph_of(made, constants, version=2), where="file.onnx", limit=LIMIT_BYTES)
    made.op_type = "SparseLinearMul"
    with pytest.raises(GraphError, match="'SparseLinearMul' is not known"):
        restore(graph_of(made, constants), where="file.onnx", limit=LIMIT_BYTES)


def test_a_weight_that_a_caller_may_override_stays_compact() -> None:
    made, constants = small()
    before = graph_of(made, constants)
    before.graph.input.append(helper.make_tensor_value_info("w.values", TensorProto.FLOAT, constants["w.values"].shape))
    before.functions.append(operators.function_for(made))
    after = onnx.ModelProto()
    after.CopyFrom(before)
    assert restore(after, where="file.onnx", limit=LIMIT_BYTES) == []
    assert after == before


@pytest.mark.parametrize("target", ["dense", "portable", "universal"])
def test_a_universal_file_is_exported_to_every_target(target: Any, tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["a"], pads=[1] * 4),
        node("BatchNormalization", ["a", "gamma", "beta", "mean", "var"], ["b"]),
        node("Clip", ["b", "low", ""], ["c"]),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["e"]),
        node("Gemm", ["e", "w1", "b1"], ["y"], transB=1),
    ]
    statistics = {name: np.abs(weight(16, density=1)) + 0.5 for name in ("gamma", "beta", "mean", "var")}
    constants = {"w0": weight(16, 16, 3, 3), "b0": weight(16, density=1), "w1": weight(32, 16, block=2)}
    constants |= {"b1": weight(32, density=1), "low": np.array(0.1, np.float32)} | statistics
    before = model(nodes, (16, "h", "w"), constants, opset=17)
    onnx.save(before, tmp_path / "theirs.onnx")
    once = export.from_onnx(tmp_path / "theirs.onnx", Export(targets=("universal",)), tmp_path / "once")
    path = once.file("model.universal.onnx")
    # With its data in a file of its own, as other tools write large models.
    onnx.save(onnx.load(path), tmp_path / "u.onnx", save_as_external_data=True, location="u.bin", size_threshold=0)
    twice = export.from_onnx(tmp_path / "u.onnx", Export(targets=(target,)), tmp_path / "twice")
    found = onnx.load(twice.file(f"model.{target}.onnx"))
    assert twice.metrics["opset"] == 17
    assert {entry.key: entry.value for entry in found.metadata_props}["sparsepipe.target"] == target
    assert any(entry.domain == "sparsepipe" for entry in found.graph.node) == (target == "universal")
    if target == "universal":
        assert encoded(found) == encoded(onnx.load(path))
        assert ops(found) == ["SparseConvClip", "GlobalAveragePool", "Flatten", "SparseLinear"]
    x = {"x": np.random.default_rng(3).standard_normal((2, 16, 7, 5)).astype(np.float32)}
    expected = run(session(before.SerializeToString(), library=False), x)[0]
    for library in (True, False):
        result = run(session(twice.file(f"model.{target}.onnx"), library=library), x)[0]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_reading_restores(tmp_path: Path) -> None:
    before = model([node("Conv", ["x", "stem.weight"], ["y"])], (16, 4, 4), {"stem.weight": weight(16, 16, 1, 1)})
    made = universal(before)
    (tmp_path / "u.onnx").write_bytes(made.SerializeToString())
    (kept,) = load(tmp_path / "u.onnx").graph.initializer
    assert kept.name == "stem.weight"
    expected = numpy_helper.to_array(before.graph.initializer[0])
    np.testing.assert_array_equal(numpy_helper.to_array(kept), expected)
