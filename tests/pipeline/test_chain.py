"""The whole chain with a tiny network on real images: every verb on the output of the one before, and `run`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sparsepipe import pipeline, recipe
from sparsepipe.artefact import Artefact
from sparsepipe.data import load, prepare
from sparsepipe.runtime import library_path
from sparsepipe.spec import ModelSpec

pytest.importorskip("torch")

SPARSEPIPE = (sys.executable, "-c", "from sparsepipe.cli.main import main; main()")

RECIPE = """
name = "tiny"
data = "mnist5k"
[model]
name = "resnet8"
width = 4
[method]
sparsity = 0.8
c = 1e-3
update_every = 5
[train]
epochs = 2
threads = 1
batch_size = 128
dense_twin = true
[bench]
seconds = 0.3
"""


def command(*arguments: object, code: int = 0) -> Any:
    """Runs `sparsepipe ... --json` as a user would; returns the parsed stdout."""
    done = subprocess.run(
        [*SPARSEPIPE, *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("run") / "tiny"
    return out, command("run", recipe_file, "--out", out)


def test_run_ends_with_a_table_and_a_report(finished: tuple[Path, Any]) -> None:
    out, result = finished
    assert Path(result["report"]).is_file()
    summary = result["summary"]
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert 0 < summary["accuracy"]["sparse"]["value"] <= 1
    assert summary["accuracy"]["dense"] is not None
    assert summary["files"]["sparse"]["bytes"] == (out / "export" / "model.universal.onnx").stat().st_size
    assert not any(stage["skipped"] for stage in result["stages"].values())


def test_exported_files_score_as_the_trained_network_did(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    spec = ModelSpec.read(out / "convert" / "model.json")
    test = load("mnist5k", {}).test
    inputs = prepare(test.load(np.arange(len(test))), spec.preprocessing)
    for name in ("model.dense.onnx", "model.portable.onnx", "model.universal.onnx"):
        session = onnxruntime.InferenceSession(str(out / "export" / name))
        (logits,) = session.run(None, {session.get_inputs()[0].name: inputs})
        correct = int((np.argmax(logits, axis=1) == test.labels).sum())
        assert correct == Artefact.read(out / "train").metrics["test_correct"]


def test_validation_also_runs_the_universal_file_without_the_library(finished: tuple[Path, Any]) -> None:
    rows = Artefact.read(finished[0] / "validate").metrics["candidates"]
    names = ["model.dense.onnx", "model.portable.onnx", "model.universal.onnx"]
    names += ["model.universal.onnx without the kernel library"] if library_path() else []
    assert [(row["file"], row["passed"]) for row in rows] == [(name, True) for name in names]


def test_a_second_run_skips_every_stage(finished: tuple[Path, Any], recipe_file: Path) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name == "manifest.json"}
    again = command("run", recipe_file, "--out", out)
    assert all(stage["skipped"] for stage in again["stages"].values())
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name == "manifest.json"}


def test_a_changed_key_runs_only_what_depends_on_it(finished: tuple[Path, Any], recipe_file: Path) -> None:
    out, _ = finished
    changed = command("run", recipe_file, "--out", out, "--set", "bench.seconds=0.2")
    ran = [name for name, stage in changed["stages"].items() if not stage["skipped"]]
    assert ran == ["bench", "report"]


def test_what_only_decides_the_last_bits_trains_nothing_again(
    finished: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = finished
    for override, kept in (
        ("train.threads=2", True),
        ("train.checkpoint_every=2", True),
        ("train.device=cpu", True),
        ("train.epochs=3", False),
        ("seed=1", False),
    ):
        caplog.clear()
        stage = pipeline.stages(recipe.load(out / "recipe.toml", [override]))[0]
        with caplog.at_level("INFO", "sparsepipe"):
            assert (pipeline.unchanged(stage, {}, out / "train") is not None) is kept
        assert ("What was trained before is kept, though" in caplog.text) is kept


def test_a_tampered_artefact_is_made_again(finished: tuple[Path, Any]) -> None:
    out, _ = finished
    loaded = recipe.load(out / "recipe.toml")
    chain = {stage.name: stage for stage in pipeline.stages(loaded)}
    inputs = {name: Artefact.read(out / name) for name in chain["convert"].needs}
    assert pipeline.unchanged(chain["convert"], inputs, out / "convert") is not None
    file = out / "convert" / "layers.json"
    original = file.read_bytes()
    file.write_bytes(original + b" ")
    assert pipeline.unchanged(chain["convert"], inputs, out / "convert") is None
    file.write_bytes(original)


def test_the_verbs_one_by_one_give_what_run_gives(
    finished: tuple[Path, Any], recipe_file: Path, tmp_path: Path
) -> None:
    out, _ = finished
    folder = tmp_path / "steps"
    command("train", recipe_file, "--out", folder)
    for verb in ("freeze", "convert"):
        command(verb, folder)
    command("export", folder, "--format", "onnx")
    for name in ("model.dense.onnx", "model.portable.onnx", "model.universal.onnx"):
        assert (folder / "export" / name).stat().st_size == pytest.approx(
            (out / "export" / name).stat().st_size, abs=200
        )
    verdict = command("validate", folder / "export" / "model.portable.onnx", "--against", folder, "--data", "mnist5k")
    assert verdict["passed"] is True
    bench = command(
        "bench", folder / "export" / "model.dense.onnx", folder / "export" / "model.portable.onnx", "--seconds", "0.2"
    )
    assert [row["threads"] for row in bench["results"]] == [1, 1]
    assert Path(command("report", folder)["files"]["report.html"]).is_file()
    assert command("inspect", folder)["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_weights_train_to_the_same_bits_again(finished: tuple[Path, Any], recipe_file: Path, tmp_path: Path) -> None:
    out, _ = finished
    command("train", recipe_file, "--out", tmp_path / "again")
    first, second = (Artefact.read(folder / "train").manifest.outputs for folder in (out, tmp_path / "again"))
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["masks.safetensors"] == second["masks.safetensors"]


NETWORK = """
from torch import nn

def network(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, classes))
"""


def test_a_changed_network_is_trained_again_and_a_finished_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file, code = tmp_path / "own.toml", tmp_path / "own_net.py"
    recipe_file.write_text('model = "own_net:network"\ndata = "digits"\n[train]\nepochs = 1\nthreads = 1\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code.write_text(NETWORK.format(width=20))
    first = command("train", recipe_file, "--out", tmp_path / "run")
    again = command("train", recipe_file, "--out", tmp_path / "run", "--resume")
    assert again["digest"] == first["digest"]
    code.write_text(NETWORK.format(width=30))
    loaded = recipe.load(recipe_file)
    monkeypatch.syspath_prepend(tmp_path)
    assert pipeline.unchanged(pipeline.stages(loaded)[0], {}, tmp_path / "run" / "train") is None


def test_a_folder_in_which_another_training_is_at_work_is_refused(tmp_path: Path, recipe_file: Path) -> None:
    import fcntl

    with (tmp_path / ".train.partial.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [*SPARSEPIPE, "train", str(recipe_file), "--out", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "Another process is training into this folder" in done.stderr


def test_a_recipe_that_does_not_train_leaves_the_one_of_the_finished_run(
    finished: tuple[Path, Any], recipe_file: Path
) -> None:
    out, _ = finished
    before = (out / "recipe.toml").read_bytes()
    done = subprocess.run(
        [*SPARSEPIPE, "run", str(recipe_file), "--out", str(out), "--set", "method=nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (out / "recipe.toml").read_bytes() == before
