"""`sparsepipe profile` on a small network: layers, operations and bytes by hand; never times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.errors import GraphError
from sparsepipe.recipe import Export
from sparsepipe.runtime import sessions
from sparsepipe.runtime.library import library_path
from sparsepipe.stages import export, profile

CONFIG = profile.ProfileConfig(seconds=0.05)
SIDE, CHANNELS, CLASSES = 32, 32, 10
MAP = 4 * CHANNELS * SIDE * SIDE  # bytes
# weight -> (shape, output positions, bytes of input, weight, bias and output; of `second` also of the sum's other term)
LAYERS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "first": ((CHANNELS, CHANNELS, 3, 3), SIDE * SIDE, MAP + 4 * (CHANNELS * CHANNELS * 9 + CHANNELS) + MAP),
    "second": ((CHANNELS, CHANNELS, 1, 1), SIDE * SIDE, 2 * MAP + 4 * (CHANNELS * CHANNELS + CHANNELS) + MAP),
    "last": ((CLASSES, CHANNELS), 1, 4 * (CHANNELS + CHANNELS * CLASSES + CLASSES + CLASSES)),
}


def write_network(path: Path, density: float = 0.1, *, names: bool = True) -> Path:
    random = np.random.default_rng(0)
    initializers = []
    for name, (shape, _, _) in LAYERS.items():
        weight = random.standard_normal(shape).astype(np.float32)
        weight *= random.random(shape) < density
        initializers += [
            numpy_helper.from_array(weight, f"{name}.weight"),
            numpy_helper.from_array(random.standard_normal(shape[0]).astype(np.float32), f"{name}.bias"),
        ]

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=f"node_{output}" if names else "", **attributes)

    graph = helper.make_graph(
        [
            node("Conv", ["x", "first.weight", "first.bias"], "a", kernel_shape=[3, 3], pads=[1] * 4),
            node("Relu", ["a"], "b"),
            node("Conv", ["b", "second.weight", "second.bias"], "c", kernel_shape=[1, 1]),
            node("Add", ["c", "b"], "d"),
            node("Relu", ["d"], "e"),
            node("GlobalAveragePool", ["e"], "f"),
            node("Flatten", ["f"], "g"),
            node("Gemm", ["g", "last.weight", "last.bias"], "y", transB=1),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("profile")
    source = write_network(folder / "source.onnx")
    targets = ("dense", "portable", "universal")
    made = export.from_onnx(source, Export(targets=targets), folder / "export")
    return {target: made.file(export.file_name(target)) for target in targets} | {"source": source}


def nonzeros(path: Path) -> dict[str, int]:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {name: int(np.count_nonzero(constants[f"{name}.weight"])) for name in LAYERS}


def check_layers(result: dict[str, Any], nnz: dict[str, int]) -> None:
    """Names, operations and times of all layers, and that the parts are the whole."""
    assert [row["name"].split(".")[0] for row in result["layers"]] == list(LAYERS)
    for row, (name, (shape, positions, _)) in zip(result["layers"], LAYERS.items(), strict=True):
        assert sorted(row["shape"]) == sorted(shape)
        assert (row["nnz"], row["size"]) == (nnz[name], np.prod(shape))
        assert row["flops"] == 2 * nnz[name] * positions
        assert row["us"] > 0
        assert row["gflops"] == pytest.approx(row["flops"] / row["us"] / 1e3)
        assert row["peak_share"] == pytest.approx(row["gflops"] / result["roofline"]["peak_gflops"])
        assert row["bandwidth_gbs"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    total = result["total"]
    assert total["us"] == pytest.approx(total["layers_us"] + total["other_us"] + total["between_us"])
    assert total["us"] == pytest.approx(
        sum(row["us"] for row in result["layers"]) + sum(row["us"] for row in result["other"])
    )
    ran = {row["op"] for row in result["other"]}
    assert "GlobalAveragePool" in ran
    assert not ran & {"Conv", "FusedConv", "Gemm", "MatMul", "Relu", "Add"}


@pytest.mark.parametrize("target", ["dense", "portable"])
def test_operators_that_onnxruntime_fused_and_renamed_are_found_again(files: dict[str, Path], target: str) -> None:
    result = profile.measure(files[target], CONFIG)
    check_layers(result, nonzeros(files["source"]))
    # What an operator reads and writes differs from layer to layer, so it tells whether times are of the right one.
    assert {row["name"].split(".")[0]: row["bytes"] for row in result["layers"]} == {
        name: size for name, (_, _, size) in LAYERS.items()
    }
    assert result["layers"][0]["reasons"][0].startswith("dense operator")


@pytest.mark.skipif(library_path() is None, reason="the kernel library was not built")
def test_a_universal_file_beside_its_dense_one(files: dict[str, Path], tmp_path: Path) -> None:
    artefact = profile.record(files["universal"], CONFIG, tmp_path / "out", files["dense"])
    result = json.loads(artefact.file("profile.json").read_text())
    assert result["schema_version"] == 1
    check_layers(result, nonzeros(files["source"]))
    sparse = [row for row in result["layers"] if row["stored_as"] != "dense"]
    assert sparse
    for row in sparse:
        assert row["op"].startswith("Sparse")
        _, _, size = LAYERS[row["name"].split(".")[0]]
        dense_weight = 4 * row["size"]
        assert size - dense_weight < row["bytes"] < size
    for row in result["layers"]:
        assert row["dense"]["name"] == row["name"]
        assert row["dense"]["speedup"] == pytest.approx(row["dense"]["us"] / row["us"])
        assert row["dense"]["fewer_operations"] == pytest.approx(row["size"] / row["nnz"])
    assert sum(row["dense"]["us"] for row in result["layers"]) == pytest.approx(result["dense"]["total"]["layers_us"])
    table = artefact.file("profile.md").read_text()
    assert all(f"| {row['name']} |" in table for row in result["layers"])
    picture = artefact.file("roofline.svg").read_text()
    assert picture.startswith("<svg ")
    assert "var(--" not in picture
    assert all(word in picture for word in ("sparse kernel", "peak", "memory"))


def test_without_the_library_a_universal_file_runs_dense_and_keeps_its_names(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "library_path", lambda: None)
    result = profile.measure(files["universal"], CONFIG)
    check_layers(result, nonzeros(files["source"]))
    assert all(not row["op"].startswith("Sparse") for row in result["layers"])
    assert result["layers"][0]["reasons"][0].startswith("dense operator")


def test_nodes_need_no_names_and_the_batch_counts(tmp_path: Path) -> None:
    path = write_network(tmp_path / "nameless.onnx", names=False)
    result = profile.measure(path, CONFIG.model_copy(update={"batch": 2}))
    flops = {row["name"].split(".")[0]: row["flops"] for row in result["layers"]}
    nnz = nonzeros(path)
    assert flops == {name: 2 * 2 * nnz[name] * positions for name, (_, positions, _) in LAYERS.items()}
    assert all(row["us"] > 0 for row in result["layers"])


def test_files_that_take_different_inputs_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 7])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), other)
    with pytest.raises(GraphError, match="cannot be compared"):
        profile.measure(files["dense"], CONFIG, other)
