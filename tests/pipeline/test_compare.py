"""`sparsepipe compare`: a grid of trainings, its means and paired differences, interruption and failures."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import local_jobs
import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from sparsepipe import comparison, jobs
from sparsepipe.artefact import Artefact
from sparsepipe.cli.main import sparsepipe
from sparsepipe.comparison import Grid
from sparsepipe.errors import RecipeError
from sparsepipe.reporting.comparison import table

RECIPE = """
name = "tiny"
model = "mlp"
data = "digits"
method = {name = "dst-ee", sparsity = 0.8, update_every = 5}
[train]
epochs = 1
threads = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Trainings run in this process, one after another; the list has the arguments of each."""
    return local_jobs.run_here(monkeypatch, failing="seed=13")


def test_means_and_paired_differences(recipe: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    grid = Grid(("rigl", "set", "dense"), (0.8, 0.9), (0, 1, 2), {})
    result = comparison.compare(recipe, grid, tmp_path / "out", workers=1)
    assert len(calls) == 3 * (2 + 2 + 1)
    assert json.loads((tmp_path / "out/comparison.json").read_text()) == result
    accuracy = {}
    for name in ("rigl_0.8", "set_0.8", "dense"):
        artefacts = [Artefact.read(tmp_path / f"out/{name}_s{seed}/train") for seed in (0, 1, 2)]
        accuracy[name] = np.array([artefact.metrics["test_accuracy"] for artefact in artefacts])
    rows = {(row["method"], row["sparsity"]): row for row in result["table"]}
    assert list(rows) == [("rigl", 0.8), ("rigl", 0.9), ("set", 0.8), ("set", 0.9), ("dense", None)]
    row = rows["set", 0.8]
    assert row["means"]["sparsity"]["value"] == pytest.approx(0.8, abs=2e-3)
    assert row["means"]["test_accuracy"]["value"] == pytest.approx(accuracy["set_0.8"].mean())
    low, high = stats.ttest_1samp(accuracy["set_0.8"], 0).confidence_interval(0.95)
    assert row["means"]["test_accuracy"]["low"] == pytest.approx(low)
    assert row["means"]["test_accuracy"]["high"] == pytest.approx(high)
    low, high = stats.ttest_rel(accuracy["set_0.8"], accuracy["rigl_0.8"]).confidence_interval(0.95)
    assert row["minus"]["low"] == pytest.approx(low)
    assert row["minus"]["high"] == pytest.approx(high)
    assert row["minus"]["pairs"] == 3
    assert row["minus_dense"]["value"] == pytest.approx((accuracy["set_0.8"] - accuracy["dense"]).mean())
    # Dense training has one row, which stands beside several of the reference.
    assert rows["dense", None]["minus"] is None
    assert rows["rigl", 0.8]["minus"] is None


def test_what_is_finished_is_not_trained_again(recipe: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    out = tmp_path / "out"
    comparison.compare(recipe, Grid(("rigl",), (), (0,), {}), out, workers=1)
    comparison.compare(recipe, Grid(("rigl",), (), (0,), {}), out, workers=1)
    assert len(calls) == 1
    wider = comparison.compare(recipe, Grid(("rigl", "set"), (), (0,), {}), out, workers=1)
    assert len(calls) == 2
    assert "method.name=set" in calls[1]
    assert [run["metrics"] is not None for run in wider["runs"]] == [True, True]
    only = wider["table"][1]
    assert only["means"]["test_accuracy"]["low"] is None  # one value has no spread
    comparison.compare(recipe, Grid(("rigl",), (), (0,), {}), out, workers=1, overrides=["train.epochs=2"])
    assert len(calls) == 3


def test_rows_stand_for_trainings_whose_folders_are_gone(recipe: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    rows, grid = tmp_path / "rows", Grid(("rigl", "dense"), (0.8,), (0, 1), {})
    first = comparison.compare(recipe, grid, tmp_path / "one", workers=1, kept=rows)
    assert sorted(path.name for path in rows.iterdir()) == [
        "dense_s0.json",
        "dense_s1.json",
        "rigl_0.8_s0.json",
        "rigl_0.8_s1.json",
    ]
    artefact = Artefact.read(tmp_path / "one/rigl_0.8_s1/train")
    row = json.loads((rows / "rigl_0.8_s1.json").read_text())
    assert row["config"] == artefact.manifest.config
    assert row["recipe_digest"] == json.loads(artefact.file("model.json").read_text())["recipe_digest"]
    for key, value in row["metrics"].items():
        assert value == artefact.metrics[key], key
    assert row["metrics"]["cpu_seconds"] > 0
    assert row["config"]["seed"] == 1
    (epoch,) = row["epochs"]
    assert epoch["validation_accuracy"] == pytest.approx(row["metrics"]["validation_accuracy"], rel=1e-4)
    assert set(epoch["inactive_gradient_mean"]) == set(artefact_masks(artefact))
    shutil.rmtree(tmp_path / "one")
    again = comparison.compare(recipe, grid, tmp_path / "two", workers=1, kept=rows)
    assert len(calls) == 4
    assert again["table"] == first["table"]
    # What a row was made by is what it says: its command makes it again.
    arguments = row["command"].split()[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "three")
    assert CliRunner().invoke(sparsepipe, arguments).exit_code == 0
    assert Artefact.read(tmp_path / "three/train").metrics["test_accuracy"] == row["metrics"]["test_accuracy"]
    wider = comparison.compare(
        recipe, Grid(("rigl",), (0.8,), (0, 2), {}), tmp_path / "two", workers=1, overrides=[], kept=rows
    )
    assert wider["table"][0]["seeds"] == [0, 2]
    assert len(calls) == 5


def artefact_masks(artefact: Artefact) -> list[str]:
    from sparsepipe.formats.masks import load_masks

    return [name for name, mask in load_masks(artefact.file("masks.safetensors")).items() if not mask.all()]


def test_a_row_of_another_recipe_is_refused_and_kept(recipe: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    arguments = ["compare", str(recipe), "--methods", "set", "--seeds", "0", "--rows", str(tmp_path / "rows")]
    assert CliRunner().invoke(sparsepipe, [*arguments, "--out", str(tmp_path / "one")]).exit_code == 0
    before = (tmp_path / "rows/set_s0.json").read_bytes()
    # Threads do not decide what is learnt.
    done = CliRunner().invoke(sparsepipe, [*arguments, "--set", "train.threads=2", "--out", str(tmp_path / "two")])
    assert done.exit_code == 0
    assert len(calls) == 1
    done = CliRunner().invoke(sparsepipe, [*arguments, "--set", "optimizer.lr=0.2", "--out", str(tmp_path / "three")])
    assert isinstance(done.exception, RecipeError)
    assert "optimizer.lr" in str(done.exception)
    assert "set_s0.json" in str(done.exception)
    assert (tmp_path / "rows/set_s0.json").read_bytes() == before
    assert len(calls) == 1
    # A setting that recipes did not have when the row was made had its default.
    older = json.loads(before)
    del older["config"]["train"]["ema"]
    (tmp_path / "rows/set_s0.json").write_text(json.dumps(older))
    assert CliRunner().invoke(sparsepipe, [*arguments, "--out", str(tmp_path / "four")]).exit_code == 0
    assert len(calls) == 1
    (tmp_path / "rows/set_s0.json").write_text("{}")
    done = CliRunner().invoke(sparsepipe, [*arguments, "--out", str(tmp_path / "one")])
    assert "not the row of a training" in str(done.exception)


def test_the_commit_of_a_row_tells_of_changes_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsepipe import rows

    def git(*arguments: str) -> str:
        name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *name, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    source = tmp_path / "sparsepipe/rows.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(rows, "__file__", str(source))
    assert rows.source_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    assert rows.source_commit() == git("rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("not a source")
    assert rows.source_commit() == git("rev-parse", "HEAD")
    source.write_text("changed = True")
    assert rows.source_commit() == git("rev-parse", "HEAD") + "+"


def test_other_keys_vary_where_a_method_has_them(recipe: Path) -> None:
    grid = Grid(("dst-ee", "rigl", "dense"), (0.9,), (0,), {"method.c": ("1e-4", "1e-2"), "optimizer.lr": ("0.1", "1")})
    found = [(row.method, row.sparsity, dict(row.others)) for row in grid.settings()]
    rates = [{"optimizer.lr": rate} for rate in ("0.1", "1")]
    assert found == [
        *(("dst-ee", 0.9, {"method.c": c, **rate}) for c in ("1e-4", "1e-2") for rate in rates),
        *(("rigl", 0.9, rate) for rate in rates),
        *(("dense", None, rate) for rate in rates),
    ]


def test_the_title_says_what_is_common_to_all(recipe: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    grid = Grid(("set",), (), (0,), {"train.epochs": ("1", "2")})
    result = comparison.compare(recipe, grid, tmp_path / "out", overrides=["method={update_every=2}"], workers=1)
    assert result["epochs"] is None
    title = table(result).title
    assert title is not None
    assert title.startswith(f"{recipe} on digits; mean")


def test_as_many_trainings_at_once_as_there_are_cores(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system does not say which cores a process may use, as macOS."""
    asked: list[int] = []
    monkeypatch.setitem(jobs.BACKENDS, "local", lambda commands, at_once: asked.append(at_once) or iter(()))
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.delattr("psutil.Process.cpu_affinity")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    comparison.compare(recipe, Grid(("set",), (), (0,), {}), tmp_path / "out")
    assert asked == [3]


def test_a_failed_training_is_a_row_with_its_reason(recipe: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    arguments = ["compare", str(recipe), "--methods", "set", "--seeds", "13,1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(sparsepipe, arguments)
    assert done.exit_code == 1
    assert "unlucky" in done.output
    result: dict[str, Any] = comparison.read(tmp_path / "out")
    assert [(run["metrics"] is None, run["error"]) for run in result["runs"]] == [
        (True, "Error: unlucky"),
        (False, None),
    ]
    assert result["table"][0]["seeds"] == [1]
    assert "set" in (tmp_path / "out/comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "rigle"], "rigl"),
        (["--sparsities", "1.5"], "sparsity"),
        (["--sparsities", "much"], "list of numbers"),
        (["--vary", "method.c"], "KEY=VALUE"),
        (["--vary", "method.see=1"], "see"),
        (["--set", "seed=7"], "--set seed=7: What trainings are compared in is said by --seeds"),
        (["--set", "method=rigl"], "--methods"),
        (["--vary", "method.name=rigl,set"], "--methods"),
        (["--sparsities", "0.8", "--set", "method.sparsity=0.9"], "--sparsities"),
        (["--seeds", ""], "the list is empty"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path, calls: list[list[str]], arguments: list[str], said: str
) -> None:
    done = CliRunner().invoke(sparsepipe, ["compare", str(recipe), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code != 0
    assert said in f"{done.output} {done.exception}"
    assert not calls
    assert not (tmp_path / "out").exists()


def test_another_file_is_not_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(RecipeError, match="not the result of a comparison"):
        comparison.read(tmp_path / "x.json")


def test_processes_run_side_by_side_and_report_how_they_ended(tmp_path: Path) -> None:
    ended = sorted(jobs.local([["methods", "set"], ["no-such-verb"]], 2), key=lambda done: done.index)
    assert [done.code for done in ended] == [0, 2]
    assert "no-such-verb" in ended[1].error


def test_on_a_ray_of_two_workers(recipe: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        grid = Grid(("rigl", "set"), (), (0,), {})
        result = comparison.compare(recipe, grid, tmp_path / "out", workers=2, backend="ray")
    finally:
        ray.shutdown()
    assert [run["error"] for run in result["runs"]] == [None, None]
    here = comparison.compare(recipe, grid, tmp_path / "here", workers=1)
    # A cluster computes what this machine does.
    assert [row["means"]["test_accuracy"] for row in result["table"]] == [
        row["means"]["test_accuracy"] for row in here["table"]
    ]
