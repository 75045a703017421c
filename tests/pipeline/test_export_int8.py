"""int8 exports: the sparse file against onnxruntime's own quantised one, and against the fp32 file on real digits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

for package in ("torch", "onnxscript", "sklearn"):
    pytest.importorskip(package)

from int8_digits import SPARSE, exit_code, outputs  # noqa: E402

from sparsepipe import recipe  # noqa: E402
from sparsepipe.inspection import inspect  # noqa: E402
from sparsepipe.inspection_int8 import int8_blocks  # noqa: E402
from sparsepipe.native import quantized  # noqa: E402
from sparsepipe.runtime import library_path  # noqa: E402
from sparsepipe.stages import export  # noqa: E402


def step_of(path: Path) -> float:
    """The scale of the network's output: what a difference of 1 is."""
    graph = onnx.load(path).graph
    last = next(node for node in graph.node if node.output[0] == graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return float(constants[last.input[1]])


def test_files_of_both_targets_and_no_other(int8: Path) -> None:
    assert sorted(path.name for path in int8.glob("*.onnx")) == ["model.dense.onnx", "model.universal.onnx"]


def test_sparse_layers_run_on_the_int8_operators_and_take_their_sums(int8: Path) -> None:
    graph = onnx.load(int8 / "model.universal.onnx").graph
    ours = Counter(node.op_type for node in graph.node if node.domain == "sparsepipe")
    assert ours == {"SparseQConv": 3, "SparseQConvAdd": 1, "QDepthwiseConv": 1, "SparseQLinear": 1}


def test_consecutive_sparse_layers_exchange_bytes(int8: Path) -> None:
    graph = onnx.load(int8 / "model.universal.onnx").graph
    producers = {node.output[0]: node for node in graph.node}
    summing = next(node for node in graph.node if node.op_type == "SparseQConvAdd")
    assert producers[summing.input[0]].op_type == "SparseQConv"
    for node in graph.node:
        if node.domain == "sparsepipe":
            assert producers[node.input[0]].op_type != "DequantizeLinear"


@pytest.mark.parametrize("library", [False, True])
def test_the_sparse_file_computes_what_the_plain_int8_file_does(
    int8: Path, prepared: tuple[Any, Any], library: bool
) -> None:
    if library and library_path() is None:
        pytest.skip("the kernel library was not built")
    expected = outputs(int8 / "model.dense.onnx", prepared[0])
    found = outputs(int8 / "model.universal.onnx", prepared[0], library=library)
    assert np.ptp(expected) > 20 * step_of(int8 / "model.dense.onnx")
    # A sum may differ by 1, and with it, through two layers, few outputs: most are equal.
    steps = np.abs(found - expected) / step_of(int8 / "model.dense.onnx")
    assert steps.max() < 1.5
    assert np.mean(steps > 0.5) < 0.02


def test_accuracy_is_that_of_fp32_within_a_point(fp32: Path, int8: Path, prepared: tuple[Any, Any]) -> None:
    images, labels = prepared
    expected = (outputs(fp32, images).argmax(1) == labels).mean()
    found = (outputs(int8 / "model.universal.onnx", images, library=True).argmax(1) == labels).mean()
    assert expected > 0.85
    assert found >= expected - 0.01


def test_zeros_stay_zero(fp32: Path, int8: Path) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(fp32).graph.initializer}
    model = onnx.load(int8 / "model.universal.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    seen = 0
    for name in SPARSE:
        weight = weights[f"{name}.weight"]
        values, deltas = stored[f"{name}.values"], stored[f"{name}.deltas"]
        decoded = quantized.decode(values, deltas, weight.shape, values.shape[1])
        assert not decoded[weight == 0].any()
        assert np.count_nonzero(decoded) > 0.9 * np.count_nonzero(weight)
        assert values.shape[1] == 4
        seen += 1
    assert seen == len(SPARSE)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_calibrations(method: str, fp32: Path, digits: Path, prepared: tuple[Any, Any], tmp_path: Path) -> None:
    config = recipe.Export(
        targets=("universal",), precision="int8", calibrate=f"npz:{digits}", calibration=method, calibration_samples=64
    )
    made = export.from_onnx(fp32, config, tmp_path / "out")
    assert made.metrics["calibration_samples"] == 64
    images, labels = prepared
    found = outputs(made.file("model.universal.onnx"), images).argmax(1)
    assert (found == labels).mean() > 0.8


def test_the_same_samples_give_the_same_file(fp32: Path, digits: Path, int8: Path, tmp_path: Path) -> None:
    config = recipe.Export(targets=("dense",), precision="int8", calibrate=f"npz:{digits}")
    made = export.from_onnx(fp32, config, tmp_path / "out")
    again = onnx.load(made.file("model.dense.onnx")).graph
    assert again.SerializeToString() == onnx.load(int8 / "model.dense.onnx").graph.SerializeToString()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--calibrate"),
        (["--target", "portable", "--calibrate", "{digits}"], "portable"),
        (["--measure", "--calibrate", "{digits}"], "cost model"),
        (["--calibrate", "{other}"], "shape"),
        (["--calibrate", "npz:/there/is/none.npz"], "none.npz"),
    ],
)
def test_refusals(
    options: list[str], word: str, fp32: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros((20, 9, 9, 1), np.uint8), y=np.arange(20) % 2)
    given = [option.format(digits=f"npz:{digits}", other=f"npz:{other}") for option in options]
    out = tmp_path / "out"
    assert exit_code(["export", str(fp32), "--precision", "int8", "--out", str(out), *given]) == 2
    assert word in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["model.dense.onnx", "model.universal.onnx"])
def test_int8_files_are_not_quantised_again(
    name: str, int8: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(int8 / name), "--precision", "int8", "--calibrate", f"npz:{digits}"]
    assert exit_code([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_loads_but_does_not_run_is_not_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime makes int8 of a constant left factor, opens the file, and fails whenever it runs."""
    monkeypatch.setattr("sparsepipe.quantization.calibrate.stay_fp32", lambda model: set())
    left = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["left", "x"], ["product"]),
            onnx.helper.make_node("ReduceMax", ["product"], ["pooled"], axes=[1, 2], keepdims=0),
            onnx.helper.make_node("Concat", ["pooled"] * 10, ["y"], axis=1),
        ],
        "left",
        [info("x", onnx.TensorProto.FLOAT, ["n", 1, 8, 8])],
        [info("y", onnx.TensorProto.FLOAT, ["n", "classes"])],
        [numpy_helper.from_array(left, "left")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    source = tmp_path / "left.onnx"
    onnx.save(model, source)
    out = tmp_path / "out"
    arguments = ["export", str(source), "--precision", "int8", "--calibrate", f"npz:{digits}", "--out", str(out)]
    assert exit_code(arguments) == 2
    assert "cannot run it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["left.onnx"]


def test_a_universal_int8_file_becomes_a_plain_one_again(int8: Path, prepared: tuple[Any, Any], tmp_path: Path) -> None:
    source = int8 / "model.universal.onnx"
    made = export.from_onnx(source, recipe.Export(targets=("dense",)), tmp_path / "out")
    graph = onnx.load(made.file("model.dense.onnx")).graph
    assert all(node.domain != "sparsepipe" for node in graph.node)
    expected, found = (outputs(path, prepared[0]) for path in (source, made.file("model.dense.onnx")))
    assert np.abs(found - expected).max() < 1.5 * step_of(source)


def test_inspect_tells_what_blocks_cost(int8: Path, fp32: Path) -> None:
    rows = {row["name"]: row for row in inspect(int8 / "model.universal.onnx")["layers"]}
    dense = {row["name"]: row for row in inspect(fp32)["layers"]}
    stored = {tensor.name: tensor for tensor in onnx.load(int8 / "model.universal.onnx").graph.initializer}
    for name in ("one", "two", "point", "hidden"):
        values = numpy_helper.to_array(stored[f"{name}.values"])
        deltas = numpy_helper.to_array(stored[f"{name}.deltas"])
        row = rows[f"{name}.weight"]
        assert row["int8"]["block"] == "4x4"
        assert row["int8"]["eligible"]
        # No delta was too large, so that there are no blocks of nothing but zeros.
        assert row["int8"]["stored_zeros"] == pytest.approx(np.mean(values == 0))
        assert row["bytes_per_nonzero"] == (values.nbytes + deltas.nbytes) / np.count_nonzero(values)
        assert dense[f"{name}.weight"]["int8"]["stored_zeros"] < 0.05  # the zeros fill blocks
    assert not dense["head.weight"]["int8"]["eligible"]


def test_scattered_zeros_do_not_pay_in_int8() -> None:
    weight = np.zeros((64, 64), np.float32)
    weight[::4, ::4] = 1  # one in each block of 4 x 4
    found = int8_blocks(weight)
    assert found is not None
    # By hand: blocks of 1x4 store the fewest zeros, three of four values; of 4x4 15 of 16.
    assert found["block"] in ("1x4", "2x4", "4x4")
    assert found["stored_zeros"] == pytest.approx({"1x4": 3 / 4, "2x4": 7 / 8, "4x4": 15 / 16}[found["block"]])
    assert int8_blocks(np.zeros((4, 4), np.float32)) is None
