"""`--max-drop`: layers stay fp32 until the accuracy is kept."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

for package in ("torch", "onnxscript", "sklearn"):
    pytest.importorskip(package)

from int8_digits import exit_code, outputs  # noqa: E402

from sparsepipe import recipe  # noqa: E402
from sparsepipe.quantization import calibrate, sensitivity  # noqa: E402
from sparsepipe.stages import export, int8_selection  # noqa: E402


@pytest.fixture(scope="module")
def fragile(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function, but what goes into `hidden` has one channel a thousand times as large as the others."""
    model = onnx.load(fp32)
    graph = model.graph
    gemm = next(node for node in graph.node if node.input[1:2] == ["hidden.weight"])
    (tensor,) = [one for one in graph.initializer if one.name == "hidden.weight"]
    weight = numpy_helper.to_array(tensor).copy()
    channel = int(np.abs(weight).sum(0).argmin())
    factors = np.ones(weight.shape[1], np.float32)
    factors[channel] = 1000
    tensor.CopyFrom(numpy_helper.from_array(weight / factors, "hidden.weight"))
    graph.initializer.append(numpy_helper.from_array(factors, "factors"))
    graph.initializer.append(numpy_helper.from_array(np.float32(channel == np.arange(len(factors))), "offset"))
    place = list(graph.node).index(gemm)
    graph.node.insert(place, helper.make_node("Add", [gemm.input[0], "offset"], ["shifted"]))
    graph.node.insert(place + 1, helper.make_node("Mul", ["shifted", "factors"], ["scaled"]))
    gemm.input[0] = "scaled"
    bias = next(one for one in graph.initializer if one.name == "hidden.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - weight[:, channel], "hidden.bias"))
    path = tmp_path_factory.mktemp("fragile") / "fragile.onnx"
    onnx.save(model, path)
    return path


def config(digits: Path, **settings: float) -> recipe.Export:
    return recipe.Export(targets=("universal",), precision="int8", calibrate=f"npz:{digits}", **settings)


def accuracy(path: Path, prepared: tuple[np.ndarray, np.ndarray]) -> float:  # type: ignore[type-arg]
    return float((outputs(path, prepared[0]).argmax(1) == prepared[1]).mean())


def test_the_layer_that_loses_stays_fp32(
    fragile: Path,
    digits: Path,
    prepared: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,  # type: ignore[type-arg]
) -> None:
    whole = export.from_onnx(fragile, config(digits), tmp_path / "whole")
    wanted = accuracy(fragile, prepared)
    assert accuracy(whole.file("model.universal.onnx"), prepared) < wanted - 0.05
    made = export.from_onnx(fragile, config(digits, max_drop=1.0), tmp_path / "kept")
    assert accuracy(made.file("model.universal.onnx"), prepared) > wanted - 0.02
    reasons = {row["name"]: row["reason"] for row in made.metrics["int8_kernels"]}
    assert "dB" in reasons["hidden.weight"]
    assert "first layer" in reasons["stem.weight"]
    assert "last layer" in reasons["head.weight"]
    assert "--max-drop" not in reasons["two.weight"]
    facts = made.metrics["selection"]
    assert facts["drop_points"]["value"] <= 1.0
    assert facts["samples"] == 1000


def test_nothing_stays_fp32_where_nothing_is_lost(fp32: Path, digits: Path, int8: Path, tmp_path: Path) -> None:
    limited = recipe.Export(targets=("dense",), precision="int8", calibrate=f"npz:{digits}", max_drop=50)
    made = export.from_onnx(fp32, limited, tmp_path / "out")
    graph = onnx.load(made.file("model.dense.onnx")).graph
    assert graph.SerializeToString() == onnx.load(int8 / "model.dense.onnx").graph.SerializeToString()


def test_what_cannot_be_reached_is_an_error(
    fragile: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer may be lost: the ranking is turned round, so that the layer that loses is never kept."""
    turned = sensitivity.rank

    def last_first(*arguments: object) -> list[sensitivity.Sensitive]:
        return turned(*arguments)[::-1]  # type: ignore[arg-type]

    monkeypatch.setattr(int8_selection, "rank", last_first)
    arguments = ["export", str(fragile), "--precision", "int8", "--calibrate", f"npz:{digits}"]
    out = tmp_path / "out"
    assert exit_code([*arguments, "--max-drop", "1", "--out", str(out)]) == 2
    assert "within 1 points" in capsys.readouterr().err
    assert not out.exists()


def test_the_test_split_decides_nothing(fp32: Path, digits: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(digits))
    other = tmp_path / "other.npz"
    np.savez(other, **{**arrays, "y_test": arrays["y_test"][::-1], "x_test": arrays["x_test"] * 0})
    made = [
        export.from_onnx(fp32, config(path, max_drop=0.0), tmp_path / path.stem).metrics["selection"]
        for path in (digits, other)
    ]
    assert made[0] == made[1]


def test_the_ranking_is_by_the_noise_of_one_layer_alone() -> None:
    """Two layers in a row, the second with one weight a hundred times the others': by hand, it is the noisier one."""
    random = np.random.default_rng(0)
    first = np.eye(8, dtype=np.float32)
    second = np.eye(8, dtype=np.float32)
    second[0] = 100  # its column scale leaves one step for the ones
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])],
        "pair",
        [value("x", 1, ["n", 8])],
        [value("y", 1, ["n", 8])],
        [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = [{"x": random.standard_normal((64, 8)).astype(np.float32) * np.float32(np.r_[0.001, [1] * 7])}]
    ranked = sensitivity.rank(model, calibrate.ranges(model, samples), samples)
    assert [one.output for one in ranked] == ["y", "h"]
    assert ranked[0].sqnr_db < ranked[1].sqnr_db < math.inf


def test_bisection_finds_the_first_that_is_enough() -> None:
    sets = [frozenset(map(str, range(count))) for count in range(20)]
    for needed in range(20):
        asked: list[int] = []

        def accurate(fp32: frozenset[str], needed: int = needed, asked: list[int] = asked) -> bool:
            asked.append(len(fp32))
            return len(fp32) >= needed

        assert sensitivity.fewest(sets, accurate) == sets[needed]
        assert len(asked) <= 6
    assert sensitivity.fewest(sets, lambda fp32: False) is None
