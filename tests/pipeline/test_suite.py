"""The suites of `bench`: rows, going on after an interruption, and the tables in documents; never times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from sparsepipe.benchmark import harness, networks, records
from sparsepipe.benchmark.records import SparseForm
from sparsepipe.cli import report as report_verb
from sparsepipe.cli.bench import command
from sparsepipe.errors import ArtefactError, GraphError, RecipeError
from sparsepipe.graph.prune import prune
from sparsepipe.reporting import bench_page, markdown, speed, verdicts
from sparsepipe.runtime import session
from sparsepipe.stages import suite, suite_row
from sparsepipe.stages.suite import Kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)


def test_a_row_measures_a_network_with_int8_and_two_kinds_of_timing() -> None:
    config = Kernels(networks=("resnet20",), sparsity=(0.9, 0.95), pattern=("4x1",), threads=(1, 2), seconds=0.2)
    result = suite.kernels(config)
    (row,) = result["rows"]
    assert (row["title"], row["pattern"]) == ("ResNet-20 CIFAR", "4x1")
    files: list[dict[str, Any]] = row["files"]
    assert [(file["kind"], file.get("sparsity")) for file in files] == [
        ("dense", None), ("int8", None), ("sparse", 0.9), ("sparse", 0.95),
    ]  # fmt: skip
    dense, int8, *sparse = files
    for file in files:
        cpu = file["cpu"]
        assert 0 < cpu["best_decile_ms"] <= cpu["median_ms"]
        assert cpu["speedup"]["low"] <= cpu["speedup"]["value"] <= cpu["speedup"]["high"]
        for name, other in (("speedup", dense), ("speedup_over_int8", int8)):
            expected = other["cpu"]["best_decile_ms"] / cpu["best_decile_ms"]
            assert cpu[f"{name}_best_decile"] == pytest.approx(expected)
        assert [process["threads"] for process in file["processes"]] == [1, 2]
        assert all(process["samples"] > 0 for process in file["processes"])
        one, two = (process["latency_ms"]["p50"]["value"] for process in file["processes"])
        assert file["processes"][1]["relative"]["threads_speedup"] == pytest.approx(one / two)
    assert dense["processes"][0]["relative"]["file"] == 1.0
    assert 0 < int8["max_relative_error"] < 0.5
    assert all(file["max_relative_error"] < 1e-5 for file in sparse)
    assert all(file["processes"][0]["relative"]["file"] < 0.5 for file in (int8, *sparse))
    assert {one["exact_int8"] for one in row["runtimes"]} == {False, True}
    assert [verdict["threads"] for verdict in row["verdicts"]] == [1, 2]
    assert verdicts.summary(row["verdicts"]) in speed.remarks(result)
    assert result["environment"]["cpu"]
    assert result["environment"]["versions"]["onnxruntime"]
    assert "CPU time" in result["method"]
    assert str(Path.home()) not in json.dumps(result)
    with pytest.raises(RecipeError, match="resnet50"):
        suite.kernels(Kernels(networks=("resnet9",)))


def test_a_row_of_int8_blocks_stands_beside_the_same_dense_files(tmp_path: Path) -> None:
    config = Kernels(seconds=0.05)
    base = suite_row.prepare("resnet20", tmp_path)
    row = suite_row.measure(base, SparseForm("int8", "4x4"), (0.8,), config, tmp_path, lambda count, note: None)
    assert (row["precision"], row["pattern"]) == ("int8", "4x4")
    dense, int8, sparse = row["files"]
    assert [file["processes"][0]["precision"] for file in row["files"]] == ["fp32", "fp32", "int8"]
    assert [file["processes"][0]["file"] for file in row["files"]] == ["dense", "int8", "int8-4x4 0.8"]
    for name, other in (("speedup", dense), ("speedup_over_int8", int8)):
        expected = other["cpu"]["best_decile_ms"] / sparse["cpu"]["best_decile_ms"]
        assert sparse["cpu"][f"{name}_best_decile"] == pytest.approx(expected)
        assert sparse["cpu"][name]["low"] <= sparse["cpu"][name]["value"] <= sparse["cpu"][name]["high"]
    assert all(file["processes"][0]["samples"] > 0 for file in row["files"])
    assert sparse["processes"][0]["speedup_over_int8"]["value"] > 0
    # 22 layers; no blocks of 4 x 4 fit the 10 outputs of the classifier.
    assert sparse["layers_sparse"] + sparse["layers_dense"] == 22
    assert 1 <= sparse["layers_sparse"] <= 21
    assert sparse["processes"][0]["file_bytes"] < int8["processes"][0]["file_bytes"]
    # The error is that of rounding, from the same weights in fp32: by plain onnxruntime, without the library.
    (path,) = tmp_path.glob("int8-4x4-*/*.onnx")
    feeds = base.calls()[0]
    weights = prune(networks.build("resnet20"), 0.8, "4x4")[0].SerializeToString()
    (expected,) = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"]).run(None, feeds)
    (found,) = session(path).run(None, feeds)
    assert sparse["max_relative_error"] == pytest.approx(np.abs(found - expected).max() / np.abs(expected).max(), 1e-3)
    assert 1e-4 < sparse["max_relative_error"] < 0.5


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.25, "high": value + 0.25}


def made_up(base: Any, form: SparseForm, sparsities: Any, *_: Any) -> dict[str, Any]:
    """A row as `suite_row.measure` gives it; dense takes 8 ms, int8 4 ms, sparse (1 - sparsity) * 10 or * 5 ms."""
    took, error = (10, 1e-7) if form.precision == "fp32" else (5, 0.02)

    def file(kind: str, taken: float, **facts: Any) -> dict[str, Any]:
        cpu = {"best_decile_ms": taken, "median_ms": taken * 1.25, "calls": 9}
        for name, other in (("speedup", 8.0), ("speedup_over_int8", 4.0)):
            cpu |= {f"{name}_best_decile": other / taken, name: estimate(other / taken)}  # type: ignore[dict-item]
        process = {
            "file": kind, "threads": 1, "batch": 1, "latency_ms": {"p50": estimate(taken)}, "noisy": kind == "int8",
            "samples": 9, "note": None, "speedup": None, "cpu_ms": taken, "rss_bytes": 1, "file_bytes": 1,
            "load_ms": 1.0, "first_call_ms": 1.0,
            "relative": {"threads_speedup": 1.0, "load": 0.5, "session_memory": 0.25, "file": 0.125},
        }  # fmt: skip
        return {"kind": kind, "cpu": cpu, "processes": [process], **facts}

    files = [file("dense", 8.0), file("int8", 4.0, max_relative_error=0.01)]
    files += [
        file("sparse", (1 - one) * took, sparsity=one, pattern=form.pattern, max_relative_error=error)
        for one in sparsities
    ]
    return {
        "network": base.name, "title": base.name.upper(), "precision": form.precision, "pattern": form.pattern,
        "files": files, "measured": "2031-01-02T03:04:05+00:00",
    }  # fmt: skip


class Rows:
    """Takes the place of the measurement: notes the rows that are asked for, and may be interrupted."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.interrupt_after = 99

    def __call__(self, base: Any, form: SparseForm, sparsities: Any, *rest: Any) -> dict[str, Any]:
        if len(self.asked) >= self.interrupt_after:
            raise KeyboardInterrupt
        self.asked.append((base.name, str(form)))
        return made_up(base, form, sparsities)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    asked = Rows()
    monkeypatch.setattr(suite_row, "measure", asked)
    monkeypatch.setattr(suite_row, "prepare", lambda name, folder: suite_row.Baselines(name, None, folder, folder))  # type: ignore[arg-type]
    return asked


def test_an_interrupted_suite_goes_on_with_the_rows_that_it_lacks(rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    config = Kernels(networks=("mlp", "resnet20"), pattern=("4x1", "unstructured"))
    rows.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        suite.kernels(config, out)
    assert [(row["network"], row["pattern"]) for row in suite.read(out)["rows"]] == [
        ("resnet20", "4x1"), ("mlp", "unstructured"), ("mlp", "4x1"),
    ]  # fmt: skip
    rows.interrupt_after = 99
    whole = suite.kernels(config, out)
    assert rows.asked == [("mlp", "4x1"), ("mlp", "unstructured"), ("resnet20", "4x1"), ("resnet20", "unstructured")]
    assert suite.read(out) == json.loads(json.dumps(whole))
    suite.kernels(config, out)
    assert len(rows.asked) == 4
    # Further networks join the file; a row with other sparsities is measured anew.
    suite.kernels(Kernels(networks=("encoder",), pattern=("4x1",)), out)
    suite.kernels(Kernels(networks=("mlp",), pattern=("4x1",), sparsity=(0.5,)), out)
    assert rows.asked[4:] == [("encoder", "4x1"), ("mlp", "4x1")]
    assert len(suite.read(out)["rows"]) == 5
    suite.kernels(config, out, force=True)
    assert len(rows.asked) == 10
    assert len(suite.read(out)["rows"]) == 4


def test_int8_rows_join_a_file_whose_rows_do_not_tell_their_precision(rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    before = suite.kernels(Kernels(networks=("mlp",), pattern=("4x4",)))
    for row in before["rows"]:
        del row["precision"]
    out.write_text(json.dumps(before))
    rows.asked.clear()
    config = Kernels(networks=("mlp", "encoder"), pattern=("4x1", "int8-4x4", "4x4"))
    found = suite.kernels(config, out)["rows"]
    assert ("mlp", "4x4") not in rows.asked
    assert [(row["network"], row.get("precision"), row["pattern"]) for row in found] == [
        ("mlp", "fp32", "4x1"), ("mlp", None, "4x4"), ("mlp", "int8", "4x4"),
        ("encoder", "fp32", "4x1"), ("encoder", "fp32", "4x4"), ("encoder", "int8", "4x4"),
    ]  # fmt: skip
    suite.kernels(config, out)
    assert len(rows.asked) == 5
    assert Kernels().pattern == ("unstructured", "4x1", "int8-4x4")
    with pytest.raises(GraphError, match="'9of9'"):
        suite.kernels(Kernels(networks=("mlp",), pattern=("int8-9of9",)), out)


def test_int8_rows_have_a_line_of_their_own_wherever_a_suite_is_shown(rows: Rows) -> None:
    patterns = ("4x4", "int8-4x4")
    result = suite.kernels(Kernels(networks=("mlp",), pattern=patterns, sparsity=(0.75, 0.95)))
    text = speed.markdown(result)
    assert "| MLP | 8.00\u202fms | 2.00 (2.00) | int8-4x4 | 6.40 (6.40) | 32.00 (32.00) |" in text
    assert "| MLP | int8-4x4 | 3.20 (3.20) | 16.00 (16.00) |" in text
    assert "| MLP | 4x4 | 1.60 (1.60) | 8.00 (8.00) |" in text
    assert "| MLP | int8-4x4 | 95% | 1 | 0.250\u202fms |" in text
    assert "sparse outputs from dense onnxruntime: 1.0e-07 of the largest output." in text
    assert "same weights: 2.0e-02 of the largest output; of those of dense int8: 1.0e-02 of the largest output." in text
    found = [record for record in records.read(result, where="r") if record.clock == "cpu"]
    assert [(record.label, record.kind, record.pattern) for record in found[4:]] == [
        ("dense beside int8-4x4", "dense", ""), ("int8 beside int8-4x4", "int8", ""),
        ("int8-4x4 0.75", "sparse", "int8-4x4"), ("int8-4x4 0.95", "sparse", "int8-4x4"),
    ]  # fmt: skip
    assert len({record.key for record in found}) == len(found) == 8
    page = bench_page.page({"a": result}, title="t")
    head, *_, last = [bench_page.table(page).headers, *bench_page.table(page).rows]
    assert dict(zip(head, last, strict=True))["over dense int8"] == "–"  # of the made-up process
    over = {row[1]: row[-1] for row in bench_page.table(page).rows if row[4].startswith("CPU")}
    assert over["int8-4x4 0.75"] == "3.20× (2.95–3.45)"
    (line,) = page["commands"]
    assert command.make_context("bench", line.split()[2:]).params["pattern"] == patterns
    result["rows"][1]["files"][2]["max_relative_error"] = None  # as where an output is NaN
    assert "same weights: not finite; of those" in speed.markdown(result)
    del result["rows"][0]
    assert "sparse outputs from dense onnxruntime" not in speed.markdown(result)


@pytest.mark.parametrize(
    ("part", "key"), [("settings", "seconds"), ("environment", "cpu"), ("environment", "versions")]
)
def test_rows_that_were_measured_otherwise_are_not_mixed(part: str, key: str, rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    config = Kernels(networks=("mlp",), pattern=("4x1",))
    held = suite.kernels(config, out)
    held[part][key] = "another"
    out.write_text(json.dumps(held))
    with pytest.raises(ArtefactError, match=f"not the same {key}.*--force"):
        suite.kernels(config, out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(held))
    suite.kernels(config, out, force=True)
    assert suite.read(out)[part][key] != "another"


@pytest.mark.parametrize("content", ["", "[]", '{"suite": "other"}', '{"suite": "kernels", "schema_version": 1}'])
def test_a_file_of_something_else_is_not_touched(content: str, rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    out.write_text(content)
    with pytest.raises(ArtefactError):
        suite.kernels(Kernels(networks=("mlp",)), out)
    assert out.read_text() == content
    assert not rows.asked


def test_the_tables_show_speed_over_dense_and_over_int8(rows: Rows) -> None:
    config = Kernels(networks=("resnet50", "mlp"), pattern=("unstructured",), sparsity=(0.75, 0.95))
    text = speed.markdown(suite.kernels(config))
    assert "| RESNET50 | 8.00\u202fms | 2.00 (2.00) | unstructured | 3.20 (3.20) | 16.00 (16.00) |" in text
    assert "| RESNET50 | unstructured | 1.60 (1.60) | 8.00 (8.00) |" in text
    assert "| MLP | unstructured | 95% | 1 | 0.500\u202fms | 1.00× | 0.50× | 0.25× | 0.12× |" in text
    assert "1.0e-07 of the largest output" in text
    assert "noisy in 2 of 8" in text
    assert "2031-01-02" in text


def test_one_command_measures_and_another_one_writes_the_document(rows: Rows, tmp_path: Path) -> None:
    out, document = tmp_path / "kernels.json", tmp_path / "README.md"
    document.write_text("Before.\n<!-- kernels.json -->\nold\n<!-- /kernels.json -->\nAfter.\n")
    measured = CliRunner().invoke(
        command, ["--suite", "kernels", "--network", "mlp", "--pattern", "4x1", "--out", str(out)]
    )
    assert measured.exit_code == 0, measured.output
    assert "MLP" in measured.stdout
    for _ in range(2):
        written = CliRunner().invoke(report_verb.command, [str(out), "--into", str(document)])
        assert written.exit_code == 0, written.output
    printed = CliRunner().invoke(report_verb.command, [str(out)]).stdout
    text = document.read_text()
    assert text == f"Before.\n<!-- kernels.json -->\n\n{printed}\n<!-- /kernels.json -->\nAfter.\n"
    assert markdown.block(text, "kernels.json", where="") == printed.strip()
    (tmp_path / "other.md").write_text("nothing here\n")
    refused = CliRunner().invoke(report_verb.command, [str(out), "--into", str(tmp_path / "other.md")])
    assert isinstance(refused.exception, ArtefactError)
    assert "<!-- kernels.json -->" in str(refused.exception)


def test_the_tables_of_the_readme_are_those_of_the_committed_figures() -> None:
    """`sparsepipe report examples/results/kernels.json --into README.md` makes them so."""
    figures = ROOT / "examples" / "results" / "kernels.json"
    shown = markdown.block((ROOT / "README.md").read_text(), figures.name, where="README.md")
    assert shown == (speed.markdown(suite.read(figures)) if figures.is_file() else "")
