"""`export --measure`: the fastest form of each layer is written, within the time, and the whole network decides."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sparsepipe.benchmark import candidates, measure
from sparsepipe.benchmark.interleaved import Timing
from sparsepipe.cli import main
from sparsepipe.graph.choice import choose
from sparsepipe.graph.sizes import sizes_of
from sparsepipe.native import operators
from sparsepipe.runtime import library_path, run, session

needs_library = pytest.mark.skipif(library_path() is None, reason="the kernel library was not built")
Fake = Callable[[Sequence[ModelProto]], list[float]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two convolutions, one 1 x 1 and one 3 x 3, and a linear layer over 8 rows; 95% zeros."""
    random = np.random.default_rng(0)
    shapes = {"point": (64, 64, 1, 1), "window": (64, 64, 3, 3), "matrix": (64, 256)}
    weights = {
        name: (random.standard_normal(shape) * (random.random(shape) < 0.05)).astype(np.float32)
        for name, shape in shapes.items()
    }
    nodes = [
        helper.make_node("Conv", ["x", "point"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "window"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c"], ["d"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["d", "matrix"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 64, 14, 14])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 256])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx"
    )
    return tmp_path / "net.onnx"


Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def export(path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Export:
    """Exports the network with these options; returns (exit code, stdout, stderr)."""

    def run_verb(*options: str, target: str = "universal") -> tuple[int, str, str]:
        arguments = [str(path), "--target", target, "--out", str(path.parent / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["sparsepipe", "export", *arguments])
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run_verb


def metrics(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)["metrics"]
    return found


def pretend(monkeypatch: pytest.MonkeyPatch, layers: Fake, whole: float) -> None:
    """Give single layers the times that `layers` says, dense ones 100, and the network `whole` of the dense time."""
    monkeypatch.setattr(measure, "layer_times", lambda dense, sparse, *rest, **options: [100.0, *layers(sparse)])
    timings = [Timing((np.full(4, time),)) for time in (1e6, whole * 1e6)]
    monkeypatch.setattr(measure, "interleave", lambda calls, seconds: timings)


def attributes(path: Path) -> dict[str, Mapping[str, int]]:
    """Output -> block and mode of each sparse node."""
    nodes = [node for node in onnx.load(path).graph.node if node.domain == operators.DOMAIN]
    return {
        node.output[0]: {entry.name: entry.i for entry in node.attribute if entry.name in ("block", "mode")}
        for node in nodes
    }


def test_predictions_are_in_the_manifest(path: Path, export: Export) -> None:
    found = metrics(export("--json", "--isa", "avx512"))
    assert found["measured"] is None
    rows = {row["name"]: row for row in found["kernels"]}
    assert set(rows) == {"point", "window", "matrix"}
    for row in rows.values():
        assert list(row["predicted"]) == (["1", "2", "4"])
        assert f"predicted {min(row['predicted'].values()):.2f} of the dense time" in row["reason"]
        assert row["dense_us"] > 0
        assert row["mode"] == "auto"
        assert row["measured"] is None
    assert "196 positions" in rows["window"]["reason"]
    assert "8 rows" in rows["matrix"]["reason"]


@needs_library
def test_layers_are_timed_and_the_file_computes_the_same(path: Path, export: Export) -> None:
    found = metrics(export("--json", "--measure", "--measure-seconds", "0.3"))
    assert found["measured"]["timed"] + found["measured"]["missed"] == 3
    assert found["measured"]["timed"] > 0
    assert found["measured"]["dense_ms"] is None or found["measured"]["dense_ms"] > 0
    assert found["measured"]["machine"]["cpu"]
    for row in found["kernels"]:
        assert (row["measured"] is None) == ("not measured" in row["reason"])
        if row["measured"] is not None:
            assert f"measured {row['measured']:.2f} of the dense time" in row["reason"]
            assert not row["sparse"] or row["measured"] < measure.WINS_BELOW
    x = {"x": np.random.default_rng(1).standard_normal((8, 64, 14, 14)).astype(np.float32)}
    expected = run(session(path.read_bytes(), library=False), x)[0]
    result = run(session(path.parent / "out" / "model.universal.onnx"), x)[0]
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@needs_library
def test_the_fastest_block_and_mode_are_written(path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "NEAR_BEST", 1e9)

    def times(forms: Sequence[ModelProto]) -> list[float]:
        found = []
        for form in forms:
            node = form.graph.node[0]
            kept = {entry.name: entry.i for entry in node.attribute}
            modes = operators.MODES["SparseLinear" if node.op_type.startswith("SparseLinear") else "SparseConv"]
            found.append({"flat": 20.0, "shift": 20.0, "vector": 29.0}.get(modes[kept["mode"]], 30.0 + kept["block"]))
        return found

    pretend(monkeypatch, times, 0.3)
    found = metrics(export("--json", "--measure"))
    assert {row["name"]: (row["mode"], row["measured"]) for row in found["kernels"]} == {
        "point": ("flat", 0.2),
        "window": ("shift", 0.2),
        "matrix": ("vector", 0.29),
    }
    assert {key: value for key, value in found["measured"].items() if key != "machine"} == {
        "ratio": 0.3, "dense_ms": 1.0, "timed": 3, "missed": 0,
    }  # fmt: skip
    written = attributes(path.parent / "out" / "model.universal.onnx")
    assert sorted(entry["mode"] for entry in written.values()) == [1, 2, 5]
    assert sorted(entry["block"] for entry in written.values()) == sorted(row["block"] for row in found["kernels"])
    shown = export("--measure")[1]
    assert "measured 0.20 of the dense time (predicted" in shown
    assert "mode flat" in shown
    assert "The whole network takes 0.30 of the dense time, which is 1 ms." in shown


@needs_library
def test_a_slower_layer_stays_dense(path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda forms: [97.0] * len(forms), 0.5)
    shown = export("--measure")[1]
    assert "measured 0.97 of the dense time" in shown
    assert "pays below 0.95" in shown
    assert "No sparse layer makes the whole network faster: all stay dense." in shown
    assert not attributes(path.parent / "out" / "model.universal.onnx")


@needs_library
def test_the_whole_network_has_the_last_word(path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda forms: [30.0] * len(forms), 1.02)
    found = metrics(export("--json", "--measure"))
    assert (found["measured"]["ratio"], found["measured"]["dense_ms"]) == (None, 1.0)
    for row in found["kernels"]:
        assert not row["sparse"]
        assert "but the whole network took 1.02 of the dense time" in row["reason"]
    assert not attributes(path.parent / "out" / "model.universal.onnx")


@needs_library
def test_layers_beyond_the_time_keep_their_prediction(
    path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {row["name"]: row for row in metrics(export("--json"))["kernels"]}
    pretend(monkeypatch, lambda forms: [1.0] * len(forms), 0.5)
    result = export("--json", "--measure", "--measure-seconds", "1e-9")
    for row in metrics(result)["kernels"]:
        assert row["reason"] == before[row["name"]]["reason"] + "; not measured, the time was over"
        assert (row["sparse"], row["block"], row["measured"]) == (
            before[row["name"]]["sparse"], before[row["name"]]["block"], None,
        )  # fmt: skip
    shown = export("--measure", "--measure-seconds", "1e-9")[1]
    assert "Measured 0 layers" in shown
    assert "The time did not suffice for 3 of them." in shown


def test_without_the_library_nothing_is_measured(path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "library_path", lambda: None)
    code, _, err = export("--measure")
    assert code == 2
    assert "the kernel library was not built" in " ".join(err.split())
    assert "leave out --measure" in " ".join(err.split())
    assert not (path.parent / "out").exists()


def test_forms_that_cannot_win_are_not_tried(path: Path) -> None:
    """4 x 1 blocks of unstructured zeros hold four times as many values."""
    model = onnx.load(path)
    found = candidates.candidates_of(model, choose(model), sizes_of(model).sizes)
    assert [{(form.block, form.mode) for form in entry.forms} >= {(1, "auto")} for entry in found] == [True] * 3
    assert all(form.block < 4 for form in found[1].forms)
    assert {form.mode for form in found[2].forms} == {"auto", "vector", "tiles"}


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [("dense", [], "only the target universal"), ("universal", ["--precision", "int8"], "cannot be measured")],
)
def test_measuring_where_nothing_can_be_chosen_is_refused(
    tmp_path: Path, export: Export, target: str, options: list[str], said: str
) -> None:
    code, _, error = export("--measure", *options, target=target)
    assert code == 2
    assert said in " ".join(error.split())
    assert not (tmp_path / "out").exists()
