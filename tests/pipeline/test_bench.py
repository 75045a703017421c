"""The stage `bench` on tiny networks: structure and counts, never times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.artefact import Artefact, draft
from sparsepipe.benchmark import harness
from sparsepipe.benchmark.harness import Contestant, Setting
from sparsepipe.benchmark.results import rows
from sparsepipe.errors import ArtefactError, GraphError
from sparsepipe.recipe import Bench, Export
from sparsepipe.stages import bench

ROW_KEYS = {
    "file", "target", "threads", "batch", "samples", "latency_ms", "speedup", "cpu_ms", "load_ms", "first_call_ms",
    "rss_bytes", "peak_rss_bytes", "file_bytes", "noisy", "note",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)


def write_model(path: Path, width: int, *, target: str | None = None, batch: int | str = "batch") -> Path:
    weight = np.random.default_rng(0).standard_normal((16, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, width])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if target:
        helper.set_model_props(model, {"sparsepipe.target": target})
    onnx.save(model, path)
    return path


def test_files_are_measured_at_every_setting(tmp_path: Path) -> None:
    sparse = write_model(tmp_path / "model.portable.onnx", 8, target="portable")
    dense = write_model(tmp_path / "model.dense.onnx", 256, target="dense")
    config = Bench(seconds=0.05, batch=(1, 3))
    result = bench.record([sparse, dense], config, tmp_path / "bench").metrics
    assert result["baseline"] == "model.dense.onnx"
    assert [(row["file"], row["batch"]) for row in result["results"]] == [
        ("model.portable.onnx", 1), ("model.dense.onnx", 1), ("model.portable.onnx", 3), ("model.dense.onnx", 3),
    ]  # fmt: skip
    for row in result["results"]:
        assert row.keys() >= ROW_KEYS
        assert row["blocks"] >= 1
        for name, needed in (("p50", 6), ("p90", 36), ("p99", 368)):
            estimate = row["latency_ms"][name]
            assert (estimate is not None) is (row["samples"] >= needed)
            assert estimate is None or 0 < estimate["low"] <= estimate["value"] <= estimate["high"]
        assert row["load_ms"] > 0
        assert row["first_call_ms"] > 0
        assert row["peak_rss_bytes"] >= row["idle_rss_bytes"] > 0
        assert row["file_bytes"] == (tmp_path / row["file"]).stat().st_size
        if row["target"] == "dense" and row["blocks"] - row["blocks_dropped"] >= 6:
            assert row["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    environment = result["environment"]
    assert environment["cpu"]
    assert environment["versions"]["onnxruntime"]
    assert environment["settings"]["seconds"] == 0.05
    assert environment["runtimes"][0]["optimisation"] == "ORT_ENABLE_ALL"
    written = Artefact.read(tmp_path / "bench", "bench")
    assert json.loads(written.file("bench.json").read_text()).items() <= result.items()
    assert set(written.manifest.inputs) == {"model.portable.onnx", "model.dense.onnx"}


def test_the_stage_measures_the_files_of_an_export(tmp_path: Path) -> None:
    with draft(tmp_path / "export", "export", Export(), {}) as building:
        path = write_model(building.folder / "model.dense.onnx", 4, target="dense")
        building.metrics["files"] = {"dense": {"name": path.name, "bytes": path.stat().st_size}}
    export = Artefact.read(tmp_path / "export")
    artefact = bench.run(Bench(seconds=0.01, pin=False), {"export": export}, tmp_path / "bench")
    assert artefact.metrics["baseline"] == "model.dense.onnx"
    assert artefact.manifest.inputs == {"export": export.digest}
    assert artefact.metrics["environment"]["settings"]["pin"] is False


def test_files_that_cannot_be_measured_are_rows_with_a_reason(tmp_path: Path) -> None:
    good = write_model(tmp_path / "good.onnx", 4)
    fixed = write_model(tmp_path / "fixed.onnx", 4, batch=1)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(good.read_bytes()[:-40])
    result = bench.measure([good, fixed, broken], Bench(seconds=0.01, batch=(2,)))
    notes = {row["file"]: row["note"] for row in result["results"]}
    assert {row["file"] for row in result["results"] if row["samples"]} == {"good.onnx"}
    assert "fixed at 1" in notes["fixed.onnx"]
    assert "was cut off" in notes["broken.onnx"]
    assert result["baseline"] == "good.onnx"
    with pytest.raises(GraphError, match="cut off"):
        bench.measure([broken], Bench(seconds=0.01))
    with pytest.raises(GraphError, match="no answer to 'load' within"):
        bench.measure([good], Bench(seconds=0.01, timeout=0.001))
    with pytest.raises(ArtefactError, match="no such ONNX file"):
        bench.measure([good, tmp_path / "absent.onnx"], Bench(seconds=0.01))


def test_a_worker_that_is_killed_becomes_a_row_with_a_note(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx", 4)
    # The real worker, in which the tenth call of the model ends the process as a lack of memory would.
    code = """
import os, signal
from sparsepipe.benchmark import runtimes, worker
class Doomed(runtimes.OnnxRuntime):
    calls = 0
    def run(self):
        self.calls += 1
        if self.calls == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run()
runtimes.RUNTIMES["doomed"] = Doomed
worker.serve()
"""
    contestants = [Contestant(model), Contestant(model, runtime="doomed", command=(sys.executable, "-c", code))]
    setting = Setting(threads=1, batch=1, seconds=0.01, cpus=None)
    survivor, victim = rows(["first", "second"], harness.measure(contestants, setting), setting, baseline=0)
    assert "signal 9" in victim["note"]
    assert victim["samples"] == 0
    assert survivor["samples"] > 0


def test_the_same_file_twice_and_files_of_the_same_name_can_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = write_model(tmp_path / "m.onnx", 4), write_model(tmp_path / "other" / "m.onnx", 4)
    labels: list[Any] = [row["file"] for row in bench.measure([first, second], Bench(seconds=0.01))["results"]]
    assert labels == [str(first), str(second)]
