"""`sparsepipe emc`: nested samples, a search in every cell, trials that are kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sparsepipe import data
from sparsepipe.cli.main import sparsepipe
from sparsepipe.comparison import Grid
from sparsepipe.emc import measure
from sparsepipe.emc.samples import NestedSamples
from sparsepipe.emc.search import Trial
from sparsepipe.errors import RecipeError, SparsepipeError
from sparsepipe.reporting import emc as reporting
from sparsepipe.stages.train import TrainConfig

RECIPE = """
name = "tiny"
data = "digits"
model = {name = "mlp", hidden = 1, width = 4}
method = {name = "dst-ee", sparsity = 0.5, update_every = 20}
optimizer = {name = "adamw", lr = 3e-2, weight_decay = 0.0}
[train]
batch_size = 256
threads = 1
"""
TASK = measure.Task(labels="random", tolerance=0.3, steps=60)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(("labels", "inputs"), [("semantic", "data"), ("random", "data"), ("random", "random")])
def test_samples_are_nested_and_differ_by_seed(labels: measure.Labels, inputs: measure.Inputs) -> None:
    digits = data.load("digits")
    samples = NestedSamples(digits, 3, labels=labels, inputs=inputs)
    whole, part = samples.first(200), samples.first(37)
    np.testing.assert_array_equal(part.inputs, whole.inputs[:37])
    np.testing.assert_array_equal(part.labels, whole.labels[:37])
    other = NestedSamples(digits, 4, labels=labels, inputs=inputs).first(200)
    assert not np.array_equal(other.inputs, whole.inputs)
    assert not np.array_equal(other.labels, whole.labels)
    if labels == "semantic":
        stored = {
            raw.tobytes(): label
            for raw, label in zip(digits.train.load(np.arange(len(digits.train))), digits.train.labels, strict=True)
        }
        assert [stored[raw.tobytes()] for raw in whole.inputs] == whole.labels.tolist()
    else:
        assert set(whole.labels.tolist()) == set(range(10))


def test_every_cell_is_searched_and_nothing_is_trained_twice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int, int]] = []
    train = measure.train

    def counted(config: measure.TrainConfig, samples: NestedSamples, count: int, steps: int) -> measure.Trial:
        made.append((config.method.name, count, steps))
        if len(made) == stop_at:
            raise KeyboardInterrupt
        return train(config, samples, count, steps)

    monkeypatch.setattr(measure, "train", counted)
    grid = Grid(("dense", "static"), (0.5,), (0, 1), {})
    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        measure.measure(recipe, grid, TASK, tmp_path / "out")
    stop_at = -1
    result = measure.measure(recipe, grid, TASK, tmp_path / "out")
    assert json.loads((tmp_path / "out/emc.json").read_text()) == result
    trials = sum(len(run["trials"]) for run in result["runs"])
    assert len(made) == trials + 1  # the one that was interrupted
    for run in result["runs"]:
        fitting = [trial["samples"] for trial in run["trials"] if trial["fits"]]
        assert run["emc"] == max(fitting)
        assert run["upper"] - run["emc"] <= max(1, 0.3 * run["emc"])
        # 64 x 4 and 4 x 10 weights, 14 biases; half of the weights is masked
        assert run["nonzero"] == (310 if run["method"] == "dense" else 310 - 296 // 2)
        assert run["emc_per_nonzero"] == run["emc"] / run["nonzero"]
        assert run["emc"] < run["nonzero"]
    dense = [run["emc"] for run in result["runs"] if run["method"] == "dense"]
    assert result["table"][0]["means"]["emc"]["value"] == pytest.approx(np.mean(dense))
    before = len(made)
    measure.measure(recipe, grid, TASK, tmp_path / "out")
    assert len(made) == before
    measure.measure(recipe, Grid(("dense",), (), (0,), {}), TASK, tmp_path / "out", overrides=["optimizer.lr=0.02"])
    assert len(made) > before  # other settings, other trials
    assert "static" in reporting.table(result).markdown()
    drawn = reporting.figure(result)
    assert drawn is not None
    assert "EMC per nonzero parameter" in drawn


def test_the_command_prints_a_table_and_json(recipe: Path, tmp_path: Path) -> None:
    arguments = ["emc", str(recipe), "--methods", "static", "--sparsities", "0.5", "--seeds", "0"]
    arguments += ["--labels", "random", "--tolerance", "0.5", "--max-steps", "20", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(sparsepipe, arguments)
    assert shown.exit_code == 0, shown.output
    assert "EMC per nonzero" in shown.output
    again = CliRunner().invoke(sparsepipe, [*arguments, "--json", "--quiet"])
    result = json.loads(again.stdout)
    assert result["table"][0]["seeds"] == [0]
    assert result["labels"] == "random"
    assert "static" in (tmp_path / "out/emc.md").read_text()


def test_a_search_that_fails_does_not_end_the_others(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = measure.train

    def unlucky(config: TrainConfig, samples: NestedSamples, count: int, steps: int) -> Trial:
        if config.seed == 0:
            raise SparsepipeError("The loss became nan.")
        return train(config, samples, count, steps)

    monkeypatch.setattr(measure, "train", unlucky)
    arguments = ["emc", str(recipe), "--methods", "dense", "--seeds", "0,1", "--out", str(tmp_path / "out"), "--json"]
    arguments += ["--labels", "random", "--tolerance", "0.5", "--max-steps", "20", "--quiet"]
    done = CliRunner().invoke(sparsepipe, arguments)
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert [run["seed"] for run in result["runs"]] == result["table"][0]["seeds"] == [1]
    assert result["failed"] == [{"method": "dense", "sparsity": None, "seed": 0, "error": "The loss became nan."}]
    assert "Failed: dense, seed 0\nThe loss became nan." in done.stderr
    assert json.loads((tmp_path / "out/emc.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inputs", "random", "--labels", "semantic"], "no semantic labels"),
        (["--methods", "rigle"], "rigl"),
        (["--sparsities", "1.5"], "sparsity"),
        (["--seeds", ""], "the list is empty"),
        (["--set", "model=resnet8"], "resnet8"),
        (["--set", "modifiers=adversary"], "adversar"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    recipe: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = CliRunner().invoke(sparsepipe, ["emc", str(recipe), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code != 0
    assert said in f"{done.output} {done.exception}"
    assert not (tmp_path / "out").exists()


def test_an_unreadable_file_of_trials_is_made_again(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out/trials").mkdir(parents=True)
    (tmp_path / "out/trials/dense_s0.json").write_text('{"identity":')
    task = measure.Task(labels="random", tolerance=1.0, steps=20)
    measure.measure(recipe, Grid(("dense",), (), (0,), {}), task, tmp_path / "out")
    assert json.loads((tmp_path / "out/trials/dense_s0.json").read_text())["trials"]


def test_semantic_labels_of_random_inputs_are_an_error() -> None:
    with pytest.raises(RecipeError, match="no semantic labels"):
        NestedSamples(data.load("digits"), 0, labels="semantic", inputs="random")
