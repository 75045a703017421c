"""OpenVINO and MNN as the benchmark runs them: stand-ins for both packages keep a journal of what they are asked.

The real packages are not needed. Settings, shares and limits are those that the README and the registry tell readers.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsepipe.benchmark import calls
from sparsepipe.benchmark.peers import openvino as openvino_peer
from sparsepipe.benchmark.peers.mnn import Mnn
from sparsepipe.benchmark.peers.openvino import OpenVino, OpenVinoInt8
from sparsepipe.benchmark.runtimes import Preparation
from sparsepipe.settings import check
from sparsepipe.stages import peers

STUBS = Path(__file__).resolve().parents[1] / "support" / "peer_stubs"
MODULES = ("openvino", "nncf", "MNN", "MNN.nn", "MNN.expr", "_tools", "peer_stub")
NAMES = ("openvino", "openvino-int8", "mnn")
ROWS, FEATURES, CLASSES = 24, 16, 5


@pytest.fixture(autouse=True)
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-ins can be imported, here and by processes that are started; the path of their journal."""
    folder = shutil.copytree(STUBS, tmp_path / "stubs")
    for name, version in (("nncf", "9.8"), ("MNN", "9.7")):
        (folder / f"{name}-{version}.dist-info").mkdir()
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([inherited] if inherited else [])]))
    monkeypatch.setenv("SPARSEPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PEER_STUB_JOURNAL", str(tmp_path / "journal"))
    yield tmp_path / "journal"
    for name in MODULES:
        sys.modules.pop(name, None)


def events(journal: Path, name: str) -> list[dict[str, Any]]:
    return [line for text in journal.read_text().splitlines() if (line := json.loads(text))["event"] == name]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((CLASSES, FEATURES)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["input", "weight"], ["output"], transB=1)],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(weight, "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, NDArray[Any]]:
    """The name of a dataset, and its training images, which are told from its test images by their sign."""
    random = np.random.default_rng(1)
    training = random.uniform(0.5, 1.0, (ROWS, FEATURES)).astype(np.float32)
    np.savez(
        tmp_path / "data.npz", x_train=training, y_train=np.arange(ROWS) % CLASSES, x_test=-training,
        y_test=np.arange(ROWS) % CLASSES,
    )  # fmt: skip
    return f"npz:{tmp_path / 'data.npz'}", training


def measured(model: Path, **settings: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    config = check(peers.Peers, {"peers": NAMES, "seconds": 0.02, **settings}, where="bench")
    result = peers.measure([model], config)
    return {row["runtime"]: row for row in result["results"] if row["threads"] == config.threads[-1]}, result


def has_vnni() -> bool:
    """Whether products of 8 bits do not saturate here; only x86 knows the question."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    return bool({"avx512_vnni", "avx_vnni"}.intersection(flags))


def test_both_are_set_checked_and_timed_as_readers_are_told(
    model: Path, data: tuple[str, NDArray[Any]], journal: Path
) -> None:
    name, training = data
    rows, result = measured(model, threads=[1, 2], samples=10, calibrate=name)
    assert list(rows) == ["onnxruntime", *NAMES]
    assert all(row["samples"] > 0 for row in rows.values()), {name: row["note"] for name, row in rows.items()}

    compiled = events(journal, "compile_model")
    shared = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": False}
    for place, precision in (("openvino fp32", {"INFERENCE_PRECISION_HINT": "f32"}), ("openvino int8", {})):
        asked = [line["config"] for line in compiled if line["model"] == place]
        assert {one.pop("INFERENCE_NUM_THREADS") for one in asked} == {1, 2}
        assert all(one == {**shared, **precision} for one in asked)
    assert {line["device"] for line in compiled} == {"CPU"}
    loaded = [line["settings"] for line in events(journal, "load_module_from_file")]
    assert {one["numThread"] for one in loaded} == {1, 2}
    assert all((one["backend"], one["precision"]) == ("CPU", "high") for one in loaded)
    (converted,) = events(journal, "mnnconvert")
    assert converted["flags"] == ["--detectSparseSpeedUp"]
    assert converted["options"]["-f"] == "ONNX"

    (quantised,) = events(journal, "quantize")
    assert quantised["overflow_fix"] == ("FIRST_LAYER" if has_vnni() else "ENABLE")
    samples = np.concatenate([call["input"] for call in quantised["calls"]]).astype(np.float32)
    assert len(samples) == 10
    normalised = (training - training.mean(axis=0)) / training.std(axis=0)
    assert all((np.abs(normalised - row).max(axis=1) < 1e-3).any() for row in samples)  # none of the test images
    assert [line["compress_to_fp16"] for line in events(journal, "save_model")] == [False]

    told = {}
    for one in result["environment"]["runtimes"]:
        key = "openvino-int8" if one["runtime"] == "openvino" and "int8" in one else one["runtime"]
        told[key] = one
    assert (told["openvino"]["version"], told["mnn"]["version"]) == ("2099.1.0", "9.7")
    # In the words of the device, which may take something else than it was asked for.
    assert told["openvino"]["inference_precision_hint"] == "<Type: 'float32'>"
    assert told["openvino-int8"]["inference_precision_hint"] == "<Type: 'bfloat16'>"
    assert "nncf 9.8" in told["openvino-int8"]["int8"]

    # Every file's size is that of what the runtime loads, weights beside it included.
    size = rows["onnxruntime"]["file_bytes"]
    assert rows["openvino"]["file_bytes"] == rows["mnn"]["file_bytes"] == size
    assert rows["openvino-int8"]["file_bytes"] > len("<net/>") + 4 * CLASSES * FEATURES
    # Outputs that every call writes to the same memory are compared one by one.
    for name in ("openvino", "mnn"):
        assert rows[name]["fidelity"] == {"max_relative_error": 0.0, "top1_agreement": 1.0, "samples": 10}
    # Weights rounded to steps of 1/127 or 1/63 of the largest.
    assert 1e-4 < rows["openvino-int8"]["fidelity"]["max_relative_error"] < 0.1


@pytest.mark.parametrize(("off", "timed"), [(5e-4, set(NAMES)), (0.02, {"openvino-int8"}), (0.8, set())])
def test_what_computes_something_else_is_not_timed(
    off: float, timed: set[str], model: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error up to 1e-3 is that of another order of sums; int8 may be off by half of the largest output."""
    places = ("openvino fp32", "openvino int8", "mnn")
    monkeypatch.setenv("PEER_STUB_FAULTS", json.dumps({f"{place}: outputs": off for place in places}))
    rows, _ = measured(model, samples=6)
    assert rows["onnxruntime"]["samples"] > 0
    assert {name for name in NAMES if rows[name]["samples"]} == timed
    for name in NAMES:
        assert rows[name]["fidelity"]["max_relative_error"] == pytest.approx(
            off, rel=0.05, abs=0.02 * (name[-1] == "8")
        )
        if name not in timed:
            assert rows[name]["note"].startswith("not timed: its outputs differ")
            assert rows[name]["latency_ms"]["p50"] is None
    run: dict[int, int] = {}
    for line in events(journal, "wrong outputs"):
        run[line["process"]] = run.get(line["process"], 0) + 1
    # A first call and the six that are compared, and then no other.
    assert sorted(run.values())[: 3 - len(timed)] == [7] * (3 - len(timed))
    assert all(count > 7 for count in sorted(run.values())[3 - len(timed) :])


@pytest.mark.parametrize(
    ("faults", "reasons"),
    [
        (
            {"openvino fp32: compile": "no such plugin", "openvino int8: quantize": "no  range\nof input",
             "mnn: convert": True},
            {"openvino": "no such plugin", "openvino-int8": "no range of input",
             "mnn": "MNN's converter wrote no file"},
        ),
        ({"mnn: load": "a broken file"}, {"mnn": "a broken file"}),
    ],
)  # fmt: skip
def test_what_fails_is_a_row_with_the_reason_and_the_others_go_on(
    faults: dict[str, Any], reasons: dict[str, str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_STUB_FAULTS", json.dumps(faults))
    rows, _ = measured(model, samples=4)
    assert list(rows) == ["onnxruntime", *NAMES]
    for name, row in rows.items():
        assert (row["note"] == reasons[name]) if name in reasons else row["samples"] > 0
        assert (row["speedup"] is None) == (name in reasons)


def test_packages_are_imported_before_the_load_is_timed(model: Path, journal: Path) -> None:
    for kind, package in ((OpenVino, "openvino"), (Mnn, "MNN")):
        kind()
        assert events(journal, f"{package} is imported")
    assert not events(journal, "compile_model")
    assert not events(journal, "load_module_from_file")


@pytest.mark.parametrize(("saturates", "fix", "said"), [(True, "ENABLE", "7 bits"), (False, "FIRST_LAYER", "int8")])
def test_weights_get_7_bits_where_products_of_8_would_saturate(
    saturates: bool, fix: str, said: str, model: Path, tmp_path: Path, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_peer, "int8_saturates", lambda: saturates)
    monkeypatch.setattr(openvino_peer.logging, "disable", lambda level: None)
    samples = calls.write(tmp_path / "samples.npz", [{"input": np.ones((1, FEATURES), np.float32)}] * 2)
    runtime = OpenVinoInt8()
    made = runtime.prepare(Preparation(model, tmp_path, samples, ["input"], ["output"]))
    (asked,) = events(journal, "quantize")
    assert (asked["overflow_fix"], len(asked["calls"])) == (fix, 2)
    runtime.load(str(made), 1)
    assert runtime.describe()["int8"].endswith(f"weights {said}" if said == "int8" else f"{said} (no VNNI here)")


def test_mnn_gets_inputs_in_their_order_and_gives_outputs_in_that_of_the_file(tmp_path: Path) -> None:
    """It has no integers of 64 bits, and asks for memory without gaps."""
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "rows"], ["taken"]),
            helper.make_node("Neg", ["taken"], ["second"]),
            helper.make_node("Add", ["taken", "taken"], ["first"]),
        ],
        "two",
        [
            helper.make_tensor_value_info("rows", TensorProto.INT64, [2]),
            helper.make_tensor_value_info("table", TensorProto.FLOAT, [3, 4]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("first", "second")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "two.onnx"
    )
    (tmp_path / "made").mkdir()
    runtime = Mnn()
    work = Preparation(tmp_path / "two.onnx", tmp_path / "made", None, ["rows", "table"], ["first", "second"])
    runtime.load(str(runtime.prepare(work)), 1)
    table = np.arange(12, dtype=np.float32).reshape(4, 3).T  # its memory runs along the columns
    runtime.give({"table": table, "rows": np.array([2, 0], np.int64)})
    first, second = runtime.run()
    np.testing.assert_array_equal(first, [[4, 10, 16, 22], [0, 6, 12, 18]])
    np.testing.assert_array_equal(second, [[-2, -5, -8, -11], [0, -3, -6, -9]])
