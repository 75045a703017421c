"""What got slower between two results: by intervals that were chosen here."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsepipe.benchmark import comparison, records
from sparsepipe.cli import main as cli
from sparsepipe.errors import ArtefactError


def row(file: str, ms: float, low: float, value: float, high: float) -> dict[str, Any]:
    return {
        "file": file, "target": None, "threads": 1, "batch": 1,
        "latency_ms": {"p50": {"value": ms, "low": ms, "high": ms}, "p99": None},
        "speedup": {"value": value, "low": low, "high": high}, "cpu_ms": ms, "rss_bytes": 1, "file_bytes": 1,
        "load_ms": 1.0, "first_call_ms": 1.0, "noisy": False, "note": None,
    }  # fmt: skip


OLD = {
    "baseline": "dense.onnx",
    "results": [row("dense.onnx", 8.0, 1, 1, 1), row("a.onnx", 2.0, 3.8, 4.0, 4.2), row("b.onnx", 4.0, 1.9, 2.0, 2.1)],
}


def verdicts(new: dict[str, Any]) -> dict[str, str]:
    changes = comparison.compare(*(records.read(result, where="r") for result in (OLD, new)))
    return {change.label: change.verdict for change in changes}


def changed(file: str, **speedup: float) -> dict[str, Any]:
    new = copy.deepcopy(OLD)
    next(one for one in new["results"] if one["file"] == file)["speedup"] = speedup  # type: ignore[attr-defined, index]
    return new


def test_the_same_result_is_the_same() -> None:
    assert verdicts(OLD) == {"dense.onnx": "not comparable", "a.onnx": "same", "b.onnx": "same"}


def test_another_runtime_of_the_dense_file_is_compared_by_its_speedup() -> None:
    """Only the dense file that speed-ups are relative to is not: its own is 1 whatever happens."""

    def result(low: float, value: float, high: float) -> list[records.Record]:
        first = row("m.onnx, onnxruntime", 8.0, 1, 1, 1) | {"runtime": "onnxruntime", "target": "dense"}
        second = row("m.onnx, openvino", 4.0, low, value, high) | {"runtime": "openvino", "target": "dense"}
        return records.read({"baseline": first["file"], "results": [first, second]}, where="r")

    changes = comparison.compare(result(1.9, 2.0, 2.1), result(1.4, 1.5, 1.6))
    assert [change.verdict for change in changes] == ["not comparable", "slower"]


def test_a_slower_machine_is_no_slower_program() -> None:
    new = copy.deepcopy(OLD)
    for one in new["results"]:
        one["latency_ms"]["p50"]["value"] *= 2  # type: ignore[index]
    assert verdicts(new)["a.onnx"] == "same"


def test_speedups_over_different_files_are_not_compared() -> None:
    """As where the files were named in another order, or without the dense one."""
    other = {"baseline": "a.onnx", "results": [row("a.onnx", 2.0, 1, 1, 1), row("b.onnx", 4.0, 0.49, 0.5, 0.51)]}
    assert verdicts(other) == {"dense.onnx": "missing", "a.onnx": "not comparable", "b.onnx": "not comparable"}


@pytest.mark.parametrize(
    ("low", "value", "high", "verdict"),
    [
        (3.0, 3.2, 3.4, "slower"),
        (3.5, 3.7, 3.9, "same"),  # the intervals overlap
        (3.78, 3.785, 3.79, "slower"),
        (4.21, 4.3, 4.4, "faster"),
        (4.201, 4.21, 4.22, "faster"),
        (4.05, 4.11, 4.19, "same"),
    ],
)
def test_intervals_decide(low: float, value: float, high: float, verdict: str) -> None:
    assert verdicts(changed("a.onnx", low=low, value=value, high=high))["a.onnx"] == verdict


def test_rows_that_come_go_and_fail_are_told() -> None:
    new = copy.deepcopy(OLD)
    new["results"][1]["file"] = "c.onnx"  # type: ignore[index]
    new["results"][2] |= {"latency_ms": {"p50": None}, "speedup": None, "note": "it died"}  # type: ignore[operator, index]
    assert verdicts(new) == {
        "dense.onnx": "not comparable", "a.onnx": "missing", "b.onnx": "slower", "c.onnx": "new"
    }  # fmt: skip


def test_results_of_other_things_cannot_be_compared() -> None:
    other = {"baseline": "x.onnx", "results": [row("x.onnx", 1.0, 1, 1, 1)]}
    with pytest.raises(ArtefactError, match="in common"):
        verdicts(other)


def test_the_command_exits_with_1_where_something_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {"old": OLD, "same": OLD, "worse": changed("b.onnx", low=1.0, value=1.1, high=1.2)}
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))

    def call(new: str, *options: str) -> int:
        arguments = ["bench", "--compare", str(tmp_path / "old.json"), str(tmp_path / f"{new}.json"), *options]
        monkeypatch.setattr(sys, "argv", ["sparsepipe", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert call("same") == 0
    assert "0 of 3" in capfd.readouterr().out
    assert call("worse", "--json") == 1
    result = json.loads(capfd.readouterr().out)
    assert (result["schema_version"], result["slower"]) == (1, 1)
    assert [change["label"] for change in result["changes"] if change["verdict"] == "slower"] == ["b.onnx"]
