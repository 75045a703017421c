"""`validate` of int8 files: good ones pass, broken ones fail, and the layer that was broken is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

for package in ("torch", "onnxscript", "sklearn"):
    pytest.importorskip(package)

from int8_digits import exit_code, outputs  # noqa: E402

from sparsepipe.quantization import noise  # noqa: E402
from sparsepipe.recipe import Choice  # noqa: E402
from sparsepipe.runtime import library_path  # noqa: E402
from sparsepipe.stages.validate import ValidateConfig, compare  # noqa: E402


def with_scale(source: Path, target: Path, name: str, factor: float) -> Path:
    """The file with the scale `name` multiplied."""
    model = onnx.load(source)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(model, target)
    return target


def scales_of(path: Path) -> dict[str, str]:
    """fp32 name of a tensor -> name of the scale of its bytes, in a plain int8 file."""
    return {n.input[0]: n.input[1] for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"}


def test_files_of_an_export_pass_with_their_accuracy(
    int8: Path, fp32: Path, digits: Path, prepared: tuple[Any, Any]
) -> None:
    for name in ("model.dense.onnx", "model.universal.onnx"):
        result = compare(int8 / name, fp32, Choice(name=f"npz:{digits}"))
        json.dumps(result, allow_nan=False)
        assert result["passed"]
        assert len(result["candidates"]) == (2 if "universal" in name and library_path() else 1)
        images, labels = prepared
        row = result["candidates"][-1]
        right, was_right = (outputs(path, images).argmax(1) == labels for path in (int8 / name, fp32))
        assert row["precision"] == "int8"
        assert row["accuracy"]["correct"] == right.sum()
        assert row["drop_points"]["value"] == pytest.approx(100 * (was_right.mean() - right.mean()))
        assert row["drop_points"]["low"] <= row["drop_points"]["value"] <= row["drop_points"]["high"]
        expected = outputs(fp32, images)
        rms = np.sqrt(np.mean((outputs(int8 / name, images) - expected) ** 2)) / np.ptp(expected)
        assert row["rms_of_range"] == pytest.approx(rms, rel=1e-3)


def test_a_broken_scale_fails_and_its_layer_is_named(int8: Path, fp32: Path, digits: Path, tmp_path: Path) -> None:
    dense = int8 / "model.dense.onnx"
    middle = list(scales_of(dense).items())[3]
    broken = with_scale(dense, tmp_path / "broken.onnx", middle[1], 0.02)
    result = compare(broken, fp32, Choice(name=f"npz:{digits}"))
    (row,) = result["candidates"]
    assert not result["passed"]
    assert row["drop_points"]["low"] > 1
    assert row["noisiest_layers"][0]["layer"] == middle[0]
    assert exit_code(["validate", str(broken), "--against", str(fp32), "--data", f"npz:{digits}"]) == 1


def test_without_data_the_dataset_of_the_calibration_is_taken(
    int8: Path, fp32: Path, digits: Path, tmp_path: Path
) -> None:
    dense = int8 / "model.dense.onnx"
    found = compare(dense, fp32)
    assert (found["passed"], found["data"], found["samples"]) == (True, f"npz:{digits}", 597)
    name = list(scales_of(dense).values())[3]
    assert not compare(with_scale(dense, tmp_path / "broken.onnx", name, 0.02), fp32)["passed"]


def test_random_inputs_are_told_to_be_no_fair_test(int8: Path, fp32: Path, tmp_path: Path) -> None:
    model = onnx.load(int8 / "model.dense.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "anonymous.onnx")
    (row,) = compare(tmp_path / "anonymous.onnx", fp32)["candidates"]
    assert not row["passed"]
    assert "random inputs" in row["note"]


def test_the_limits_can_be_set(int8: Path, fp32: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", str(int8 / "model.dense.onnx"), "--against", str(fp32), "--data", f"npz:{digits}"]
    assert exit_code([*arguments, "--max-drop", "0.5"]) == 0
    assert "points lost" in capsys.readouterr().out
    assert exit_code([*arguments, "--max-error", "1e-6"]) == 1


def test_few_samples_do_not_fail_a_file_by_chance_but_are_told(int8: Path, fp32: Path, digits: Path) -> None:
    config = ValidateConfig(int8_max_drop=0.0, data=Choice(name=f"npz:{digits}"))
    (row,) = compare(int8 / "model.dense.onnx", fp32, config=config)["candidates"]
    assert row["passed"] == (row["drop_points"]["low"] <= 0)
    assert ("may be above" in (row["note"] or "")) == row["passed"]


def test_noise_by_hand(tmp_path: Path) -> None:
    """A layer whose bytes are off by a tenth has 20 dB; the next, exact on what it gets, adds nothing."""
    node = helper.make_node
    constants = {"step": np.float32(0.5), "zero": np.uint8(10)}
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["x_bytes"]),
        node("DequantizeLinear", ["x_bytes", "step", "zero"], ["x1"]),
        node("Neg", ["x1"], ["y"]),
        node("QuantizeLinear", ["y", "step", "zero"], ["y_bytes"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "two",
        [value("x", 1, [None])],
        [value("y_bytes", 2, [None])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    order = noise.tensors(graph)
    assert [(one.stands_for, one.scale, one.zero_point, one.before) for one in order] == [
        ("x", 0.5, 10, ()),
        ("y", 0.5, 10, ("x_bytes",)),
    ]
    stored = np.array([20, 30, 40], np.uint8)
    decoded = (stored.astype(np.float32) - 10) * 0.5
    found = noise.noise(order, {"x": decoded / 0.9, "y": decoded / 0.9}, {"x_bytes": stored, "y_bytes": stored})
    assert [row.sqnr_db for row in found] == pytest.approx([20.0, 20.0], abs=1e-4)
    assert found[0].added == pytest.approx(0.01, rel=1e-4)
    assert found[1].added == pytest.approx(0.0, abs=1e-9)
