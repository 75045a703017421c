"""Runs of a recipe with int8 files, alone and beside those in fp32: every stage, and what is said of each file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

for package in ("torch", "onnxscript", "sklearn", "lightning_fabric", "jinja2", "matplotlib"):
    pytest.importorskip(package)

from int8_digits import exit_code, main_ok, outputs  # noqa: E402

from sparsepipe import recipe  # noqa: E402
from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.errors import ArtefactError, RecipeError  # noqa: E402
from sparsepipe.quantization.noise import is_quantised  # noqa: E402
from sparsepipe.reporting import summary  # noqa: E402
from sparsepipe.runtime import library_path  # noqa: E402
from sparsepipe.settings import check  # noqa: E402
from sparsepipe.stages import bench_report, reference  # noqa: E402

RECIPE = """
name = "tiny"
data = "npz:{digits}"
model = {{ name = "resnet8", width = 16 }}
method = {{ sparsity = 0.75, pattern = "4x4", update_every = 5 }}
train = {{ epochs = 2, threads = 1 }}
[export]
precision = "int8"
calibrate = "npz:{digits}"
calibration_samples = 32
[validate]
int8_max_drop = 20.0
[bench]
seconds = 0.05
"""
BOTH = {
    "dense": ("model.dense.onnx", "fp32"),
    "portable": ("model.portable.onnx", "fp32"),
    "universal": ("model.universal.onnx", "fp32"),
    "dense.int8": ("model.dense.int8.onnx", "int8"),
    "universal.int8": ("model.universal.int8.onnx", "int8"),
}


@pytest.fixture(scope="module")
def recipe_file(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE.format(digits=digits))
    return path


@pytest.fixture(scope="module")
def alone(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "tiny"
    main_ok(["run", str(recipe_file), "--out", str(out), "--quiet"])
    return out


@pytest.fixture(scope="module")
def both(recipe_file: Path, alone: Path) -> Path:
    """The same training, with files of both precisions."""
    out = alone.with_name("both")
    shutil.copytree(alone, out)
    main_ok(["run", str(recipe_file), "--out", str(out), "--set", 'export.precision=["int8", "fp32"]', "--quiet"])
    return out


def test_a_run_in_int8_alone_ends_with_a_report(alone: Path) -> None:
    assert {path.name for path in (alone / "export").glob("*.onnx")} == {"model.dense.onnx", "model.universal.onnx"}
    assert all(is_quantised(onnx.load(path)) for path in (alone / "export").glob("*.onnx"))
    rows = Artefact.read(alone / "validate").metrics["candidates"]
    assert {row["precision"] for row in rows} == {"int8"}
    assert (alone / "report" / "report.html").is_file()


def test_the_recipe_that_a_run_leaves_can_be_used_again(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    main_ok(["export", str(alone), "--out", str(out), "--quiet"])
    assert {path.name for path in out.glob("*.onnx")} == {"model.dense.onnx", "model.universal.onnx"}
    assert recipe.load(alone / "recipe.toml").export.precision == ("int8",)


def test_an_int8_file_does_not_stand_for_the_network(alone: Path, both: Path) -> None:
    with pytest.raises(ArtefactError, match="fp32"):
        reference.dense_file(Artefact.read(alone / "export"), alone)
    assert reference.dense_file(Artefact.read(both / "export"), both).name == "model.dense.onnx"


def test_both_precisions_stand_side_by_side(both: Path) -> None:
    files = Artefact.read(both / "export").metrics["files"]
    assert {key: (file["name"], file["precision"]) for key, file in files.items()} == BOTH
    for key, (name, precision) in BOTH.items():
        model = onnx.load(both / "export" / name)
        stored = {entry.key: entry.value for entry in model.metadata_props}
        assert is_quantised(model) == (precision == "int8")
        assert stored["sparsepipe.precision"] == precision
        assert stored["sparsepipe.target"] == key.partition(".")[0]
        assert ("sparsepipe.calibration" in stored) == (precision == "int8")


def test_the_int8_files_are_those_of_an_export_in_int8_alone(alone: Path, both: Path) -> None:
    for target in ("dense", "universal"):
        expected = onnx.load(alone / "export" / f"model.{target}.onnx").graph.SerializeToString()
        assert onnx.load(both / "export" / f"model.{target}.int8.onnx").graph.SerializeToString() == expected


def test_each_file_is_judged_by_the_tolerance_of_its_precision(both: Path) -> None:
    rows = Artefact.read(both / "validate").metrics["candidates"]
    judged = {row["file"]: row["precision"] for row in rows if "without" not in row["file"]}
    assert judged == dict(BOTH.values())
    assert sum("without" in row["file"] for row in rows) == (2 if library_path() else 0)
    for row in rows:
        assert row["passed"]
        # fp32 is far below its limit of 1e-3, which no int8 file can keep.
        assert (row["max_relative"] > 1e-3) == (row["precision"] == "int8")


def test_all_files_are_timed_in_the_same_turns(both: Path) -> None:
    found = Artefact.read(both / "bench").metrics
    assert found["baseline"] == "model.dense.onnx"
    assert {row["file"]: row["precision"] for row in found["results"]} == dict(BOTH.values())
    rounds = {row["blocks"] for row in found["results"]}
    assert len(rounds) == 1
    over = {row["file"]: row["speedup_over_int8"]["value"] for row in found["results"]}
    assert over["model.dense.int8.onnx"] == 1


def test_the_summary_has_a_row_for_each_file(both: Path, prepared: tuple[Any, Any]) -> None:
    images, labels = prepared
    stages = ("train", "export", "validate", "bench")
    found = summary.summarise({stage: Artefact.read(both / stage) for stage in stages})
    timed = {row["file"]: row for row in Artefact.read(both / "bench").metrics["results"]}
    assert [(row["file"], row["precision"]) for row in found["exports"]] == [*BOTH.values()]
    for row in found["exports"]:
        path = both / "export" / row["file"]
        assert row["bytes"] == path.stat().st_size
        right = outputs(path, images, library=True).argmax(1) == labels
        # One sample may be a tie in bytes, which a batch of another size breaks otherwise.
        assert row["accuracy"]["value"] == pytest.approx(right.mean(), abs=1.5 / len(labels))
        assert row["latency"]["value"] == timed[row["file"]]["latency_ms"]["p50"]["value"]
        assert (row["drop_points"] is not None) == (row["precision"] == "int8")
    headers, lines = summary.files(found)
    assert headers[-1] == "over dense int8"
    assert all(len(line) == len(headers) for line in lines)
    # The table of dense against sparse stays that of fp32.
    assert found["files"]["sparse"]["name"] == "model.universal.onnx"


def test_a_run_in_fp32_has_no_such_table() -> None:
    assert summary.files(summary.summarise({}))[1] == []


def test_the_report_tells_the_files_apart(both: Path) -> None:
    page = (both / "report" / "report.html").read_text()
    assert "The files by precision" in page
    assert "over dense int8" in page
    for label in ("dense, 1 thread", "universal, 1 thread", "dense int8, 1 thread", "universal int8, 1 thread"):
        assert f"{label}: " in page, "in the text of the figure"
    assert "points lost" in page
    assert "Allowed for int8 files: a loss of 20 points" in page


def test_the_page_of_benchmarks_has_the_dense_int8_file_as_a_row(both: Path, tmp_path: Path) -> None:
    data = bench_report.write([both], tmp_path / "page.html")
    kinds = {row["label"]: row["kind"] for row in data["rows"]}
    assert kinds == {
        "model.dense.onnx": "dense",
        "model.portable.onnx": "sparse",
        "model.universal.onnx": "sparse",
        "model.dense.int8.onnx": "int8",
        "model.universal.int8.onnx": "sparse",
    }
    assert all(row["accuracy"] and row["file_bytes"] and row["latency_ms"] for row in data["rows"])
    text = (tmp_path / "page.md").read_text()
    assert "| model.dense.int8.onnx |" in text
    assert "| model.universal.int8.onnx |" in text


def test_a_glob_of_the_files_has_the_same_baseline(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(str(path) for path in (both / "export").glob("model.dense*.onnx"))
    assert "int8" in paths[0]
    main_ok(["bench", *paths, "--seconds", "0.02", "--json", "--quiet"])
    assert json.loads(capsys.readouterr().out)["baseline"] == "model.dense.onnx"


def test_forms_of_precision() -> None:
    def export(**settings: Any) -> recipe.Export:
        return check(recipe.Export, settings, where="export")

    assert export(precision="int8").precision == ("int8",)
    assert export(precision=["int8", "fp32", "int8"]).precision == ("fp32", "int8")
    assert export(precision=["fp32", "int8"], measure=True).measure
    for precision in ([], ["fp16"], "fp16"):
        with pytest.raises(RecipeError, match="precision"):
            export(precision=precision)
    with pytest.raises(RecipeError, match="cost model"):
        export(precision="int8", measure=True)


@pytest.mark.parametrize("targets", [["portable"], ["dense", "portable"]])
def test_portable_beside_int8(targets: list[str], both: Path, tmp_path: Path) -> None:
    words = [f"--target={target}" for target in targets]
    out = tmp_path / "out"
    code = exit_code(
        ["export", str(both), "--out", str(out), "--precision=fp32", "--precision=int8", "--quiet", *words]
    )
    if targets == ["portable"]:
        assert code == 2
        assert not out.exists()
    else:
        assert code == 0
        names = {path.name for path in out.glob("*.onnx")}
        assert names == {"model.dense.onnx", "model.portable.onnx", "model.dense.int8.onnx"}
