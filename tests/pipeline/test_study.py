"""The study in examples/: its tables say what its rows say, and its grid goes on from rows alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import local_jobs
import numpy as np
import pytest
from scipy import stats

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import matplotlib

from sparsepipe.comparison import Grid
from sparsepipe.errors import RecipeError

ROOT = Path(__file__).parents[2]

RECIPE = """
name = "tiny"
model = {name = "resnet8", width = 8, stem_stride = 2}
data = "digits"
method = {name = "dst-ee", sparsity = 0.95, update_every = 2, drop_fraction = 0.3, stop_at = 0.75}
[train]
epochs = 2
batch_size = 64
threads = 1
"""


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, run from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples/study"))
    import study

    return study


@pytest.fixture
def tiny(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a small grid on embedded data."""
    pytest.importorskip("sklearn")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    shutil.copy(study.DOCUMENT, tmp_path / "RESULTS.md")
    monkeypatch.setattr(study, "RECIPE", tmp_path / "tiny.toml")
    monkeypatch.setattr(study, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(study, "FILES", tmp_path / "files")
    monkeypatch.setattr(study, "OUT", tmp_path / "runs")
    monkeypatch.setattr(study, "C", "1e6")
    monkeypatch.setattr(study.study_rows, "INPUT_SHAPE", (1, 8, 8))
    grids = (
        Grid(("dst-ee",), (0.95,), (0,), {"method.c": ("1e-3",)}),
        Grid(("dst-ee", "rigl"), (0.95,), (0, 1), {"method.c": ("1e6",)}),
        Grid(("dense",), (), (0,), {}),
    )
    monkeypatch.setattr(study, "PARTS", grids)
    return study


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Trainings run in this process; the list has the arguments of each."""
    return local_jobs.run_here(monkeypatch)


def table(document: str, name: str) -> list[dict[str, str]]:
    """The rows of the table that stands at a place of a document."""
    block = document.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")
    ]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


def coordinates(picture: str) -> list[float]:
    """All numbers of a picture but those in identifiers, which are digests of exact coordinates."""
    return [float(found) for found in re.findall(r"(?<![\w.#-])-?\d+\.?\d*(?![\w-])", picture)]


def numbers(cell: str) -> list[float]:
    return [float(found) for found in re.findall(r"[+-]?\d+\.?\d*", cell.replace("−", "-"))]


def by_setting(folder: Path) -> dict[tuple[str, float, str, str], dict[int, dict[str, Any]]]:
    """Method, sparsity, c and pattern -> seed -> row, read without the code of the study; the recipe's updates only."""
    found: dict[tuple[str, float, str, str], dict[int, dict[str, Any]]] = {}
    for path in folder.glob("*.json"):
        row = json.loads(path.read_text())
        if "method.update_every=" in row["command"] or "method.stop_at=" in row["command"]:
            continue
        method = row["config"]["method"]
        dense = method["name"] == "dense"
        key = (
            method["name"],
            0.0 if dense else method["sparsity"],
            str(method.get("c", "")),
            method.get("pattern", "unstructured"),
        )
        found.setdefault(key, {})[row["config"]["seed"]] = row
    return found


def check_methods(document: str, rows: Path, c: str) -> int:
    """Every figure of the table of methods against numpy and scipy; returns how many lines it has."""
    found = by_setting(rows)
    lines = table(document, "study: methods")
    for line in lines:
        sparsity = numbers(line["sparsity"])[0] / 100 if line["method"] != "dense" else 0.0
        own = found[line["method"], sparsity, str(float(c)) if line["method"] == "dst-ee" else "", "unstructured"]
        accuracy = np.array([row["metrics"]["test_accuracy"] for row in own.values()])
        assert int(line["seeds"]) == len(own)
        assert numbers(line["test accuracy"])[0] == pytest.approx(100 * accuracy.mean(), abs=0.0051)
        if len(own) > 1:
            low, high = stats.ttest_1samp(accuracy, 0).confidence_interval(0.95)
            assert numbers(line["test accuracy"])[1] == pytest.approx(50 * (high - low), abs=0.0051)
        if line["DST-EE minus it"] == "–":
            continue
        reference = found["dst-ee", sparsity, str(float(c)), "unstructured"]
        seeds = sorted(own.keys() & reference.keys())
        first, second = (
            np.array([runs[seed]["metrics"]["test_accuracy"] for seed in seeds]) for runs in (reference, own)
        )
        shown = numbers(line["DST-EE minus it"])
        assert shown[0] == pytest.approx(100 * (first - second).mean(), abs=0.0051)
        assert shown[-1] == len(seeds)
        if len(seeds) > 1:
            low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
            assert shown[1] == pytest.approx(50 * (high - low), abs=0.0051)
    return len(lines)


def test_the_tables_of_the_results_are_what_the_rows_give(study: ModuleType, tmp_path: Path) -> None:
    document = tmp_path / "RESULTS.md"
    shutil.copy(study.DOCUMENT, document)
    shutil.copytree(study.ROWS, tmp_path / "results/study")
    study.report(tmp_path / "results/study", study.FILES, document)
    committed = study.DOCUMENT.read_text()
    assert document.read_text() == committed
    assert check_methods(committed, study.ROWS, study.C) >= 1
    drawn = {path.name: path.read_text() for path in (tmp_path / "results").glob("*.svg")}
    kept = {path.name: path.read_text() for path in study.ROWS.parent.glob(f"{study.ROWS.name}_*.svg")}
    assert kept.keys() == drawn.keys()
    if f"matplotlib=={matplotlib.__version__}\n" in (ROOT / "constraints.txt").read_text():  # others draw otherwise
        for name, picture in kept.items():
            assert coordinates(picture) == pytest.approx(coordinates(drawn[name]), abs=0.1), name
    for name in re.findall(r"\((results/[^)]*\.svg)\)", committed):
        assert (study.DOCUMENT.parent / name).is_file(), name


def test_every_row_is_of_a_training_that_the_study_lists(study: ModuleType) -> None:
    listed = {training.folder.name: training for training in study.trainings()}
    for path in study.ROWS.glob("*.json"):
        assert path.stem in listed, f"no part of the study has {path.stem}"
        row = listed[path.stem].finished(study.RECIPE, study.ROWS)  # raises where the row is of another recipe
        assert row["commit"]
        assert row["machine"]["cpu"]
        assert row["metrics"]["cpu_seconds"] > 0


def test_a_grid_goes_on_from_rows_alone(tiny: ModuleType, tmp_path: Path, calls: list[list[str]]) -> None:
    tiny.run(1)
    assert len(calls) == 6
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "rows/rigl_0.95_s1.json").unlink()
    tiny.run(1)
    assert len(calls) == 7
    assert "method.name=rigl" in calls[-1]
    assert "seed=1" in calls[-1]
    document = tmp_path / "RESULTS.md"
    written = tiny.report(tmp_path / "rows", tmp_path / "files", document)
    assert check_methods(document.read_text(), tmp_path / "rows", "1e6") == 3
    assert {path.name for path in written} == {
        "RESULTS.md",
        "rows_accuracy.svg",
        "rows_exploration.svg",
        "rows_c.svg",
    }
    before = document.read_bytes()
    tiny.report(tmp_path / "rows", tmp_path / "files", document)
    assert document.read_bytes() == before
    # A bonus far above all gradients grows what was never active first, which is what reaches the bound.
    line = next(each for each in table(document.read_text(), "study: methods") if each["method"] == "dst-ee")
    rate, bound = numbers(line["exploration rate (bound)"])
    assert rate == pytest.approx(bound, abs=0.03)
    assert rate > 2 * 0.05
    assert [row["c"] for row in table(document.read_text(), "study: c")] == ["1e-3", "1e6"]


def test_rows_and_files_of_other_trainings_are_refused(
    tiny: ModuleType, tmp_path: Path, calls: list[list[str]]
) -> None:
    tiny.run(1)
    document, rows = tmp_path / "RESULTS.md", tmp_path / "rows"
    before = document.read_bytes()
    name = rows / "rigl_0.95_s1.json"
    kept = name.read_text()
    row = json.loads(kept)
    row["config"]["train"]["epochs"] = 1
    name.write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=r"train\.epochs"):
        tiny.report(rows, tmp_path / "files", document)
    name.rename(rows / "rigl_0.95_epochs=1_s1.json")
    with pytest.raises(RecipeError, match="no such training"):
        tiny.report(rows, tmp_path / "files", document)
    (rows / "rigl_0.95_epochs=1_s1.json").unlink()
    assert document.read_bytes() == before

    (tmp_path / "files").mkdir()
    file = {"accuracy": {"value": 0.5}, "reference_accuracy": {"value": 0.125}}
    text = json.dumps({"training": "dense_s0", "files": {"dense": file}})
    (tmp_path / "files/dense_s0.json").write_text(text)
    with pytest.raises(RecipeError, match="its accuracy is another"):
        tiny.report(rows, tmp_path / "files", document)


def test_a_training_can_be_made_again_in_place_of_its_row(
    tiny: ModuleType, tmp_path: Path, calls: list[list[str]]
) -> None:
    tiny.run(1)
    made, shown = len(calls), json.loads((tmp_path / "rows/rigl_0.95_s0.json").read_text())
    shown["metrics"]["test_accuracy"] = 0.0
    (tmp_path / "rows/rigl_0.95_s0.json").write_text(json.dumps(shown))
    weights = tmp_path / "runs/rigl_0.95_s0/train/model.safetensors"
    before = weights.stat().st_ino
    for gone in (False, True):
        if gone:
            shutil.rmtree(tmp_path / "runs")
        assert tiny.again(["rigl_0.95_s0", "rigl_0.95_s0"], 1) == 0
        assert len(calls) == made + 1 + gone
        assert json.loads((tmp_path / "rows/rigl_0.95_s0.json").read_text())["metrics"]["test_accuracy"] > 0.1
        # What was removed first may get its old number back.
        assert gone or weights.stat().st_ino != before, "what is finished is trained again too"
    with pytest.raises(RecipeError, match="The study has no training"):
        tiny.again(["rigl_0.5_s0"], 1)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.004, 0.006, 0.005, 0.007, 0.003, 0.005, 0.004, 0.006], "**DST-EE is better**"),
        ([-0.004, -0.006, -0.005, -0.007, -0.003, -0.005, -0.004, -0.006], "**DST-EE is worse**"),
        ([0.004, -0.006, 0.005, -0.007, 0.003, -0.002, 0.001, -0.003], "**not told apart**"),
        ([0.01] * 7, "7 of 8 pairs"),
        # Outside its own interval at 95%, but not at the level that two comparisons share.
        ([0.009, 0.003, 0.001, 0.008, 0.002, 0.003, -0.0015, 0.001], "**not told apart**"),
    ],
)
def test_a_verdict_is_given_on_all_planned_pairs_only(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, differences: list[float], said: str
) -> None:
    def runs(values: list[float]) -> dict[int, Any]:
        return {seed: SimpleNamespace(metrics={"test_accuracy": value}) for seed, value in enumerate(values)}

    found = {"dst-ee": runs([0.6 + each for each in differences]), "rigl": runs([0.6] * len(differences)), "set": {}}
    results = SimpleNamespace(by_seed=lambda method, sparsity: found[method])
    (greedy, uniform) = study.study_words.verdicts(results).splitlines()
    assert said in greedy
    assert "0 of 8 pairs" in uniform
    if len(differences) == 8:
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.975)
        assert numbers(greedy.split("interval")[1])[:2] == pytest.approx([100 * low, 100 * high], abs=0.0051)


@pytest.mark.parametrize(
    ("by_c", "said", "unsaid"),
    [
        ({"1e-6": (0.70, 0.44), "1e-4": (0.71, 0.46), "1e-1": (0.69, 0.75)}, "explores little more", "comparison has"),
        ({"1e-6": (0.70, 0.44), "1e-4": (0.71, 0.70), "1e-1": (0.69, 0.75)}, "is c = 1e-4.", "explores little"),
        ({"1e-6": (0.70, 0.44), "1e-4": (0.71, 0.46), "1e-1": (0.72, 0.75)}, "is c = 1e-1; the comparison has", "%%"),
    ],
)
def test_what_c_means_follows_the_rows(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, by_c: dict[str, tuple[float, float]], said: str, unsaid: str
) -> None:
    found = [
        SimpleNamespace(c=c, metrics={"validation_accuracy": accuracy, "exploration_rate": rate})
        for c, (accuracy, rate) in by_c.items()
    ]
    monkeypatch.setattr(study.study_words, "sweep", lambda _: found)
    words = study.study_words.meaning(SimpleNamespace(c="1e-4"))
    assert said in words
    assert unsaid not in words


def test_distances_are_paired_and_name_what_they_cost(study: ModuleType) -> None:
    def runs(values: list[float], flops: float) -> dict[int, Any]:
        return {
            seed: SimpleNamespace(metrics={"test_accuracy": value, "training_flops_multiple": flops})
            for seed, value in enumerate(values)
        }

    found = {
        ("dense", 0.0): runs([0.81, 0.80, 0.82], 1.0),
        ("dst-ee", 0.9): runs([0.73, 0.74, 0.735], 0.16),
        ("gmp", 0.9): runs([0.77, 0.78], 0.32),
    }
    results = SimpleNamespace(by_seed=lambda method, sparsity=0.0: found.get((method, sparsity), {}))
    dense, gmp = study.study_words.distances(results).splitlines()
    low, high = stats.ttest_rel([0.73, 0.74, 0.735], [0.81, 0.80, 0.82]).confidence_interval(0.95)
    assert numbers(dense)[-4:] == pytest.approx([50 * (low + high), 50 * (high - low), 90, 0.16], abs=0.0051)
    assert numbers(gmp)[-4:] == pytest.approx([-4, 0, 90, 0.5], abs=0.0051)


@pytest.mark.usefixtures("decided_by_size")
def test_networks_end_as_files_with_their_accuracy(tiny: ModuleType, tmp_path: Path, calls: list[list[str]]) -> None:
    tiny.run(1)
    tiny.files()
    made = json.loads((tmp_path / "files/dense_s0.json").read_text())
    row = json.loads((tmp_path / "rows/dense_s0.json").read_text())
    assert set(made["files"]) == {"dense", "universal", "dense.int8", "universal.int8"}
    dense = made["files"]["dense"]
    assert dense["accuracy"]["value"] == pytest.approx(row["metrics"]["test_accuracy"], abs=0.003)
    assert dense["bytes"] == (tmp_path / "runs/dense_s0/export/model.dense.onnx").stat().st_size
    sparse = json.loads((tmp_path / "files/dst-ee_0.95_c=1e6_s0.json").read_text())["files"]["universal"]
    assert sparse["bytes"] < dense["bytes"]
    tiny.speed(0.1)
    document = tmp_path / "RESULTS.md"
    tiny.report(tmp_path / "rows", tmp_path / "files", document)
    lines = {line["file"]: line for line in table(document.read_text(), "study: files")}
    assert list(lines) == ["dense fp32", "dense int8", "dst-ee 95% unstructured fp32"]
    assert numbers(lines["dense fp32"]["test accuracy in onnxruntime"])[0] == pytest.approx(
        100 * dense["accuracy"]["value"], abs=0.0051
    )
    assert all("ms" in line["median latency"] for line in lines.values())
    assert (tmp_path / "rows_latency.svg").is_file()
