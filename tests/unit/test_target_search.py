"""The search for the strength of methods without a target sparsity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

from sparsepipe.errors import RecipeError
from sparsepipe.recipe import parse
from sparsepipe.stages import target, train


@pytest.mark.parametrize("first", [1e-6, 1e-3, 10.0])
@pytest.mark.parametrize("wanted", [0.3, 0.9, 0.99])
def test_a_rising_curve_is_searched_to_the_tolerance_from_anywhere(first: float, wanted: float) -> None:
    trials = target.bisect(lambda knob: knob / (knob + 1e-2), first, wanted, 0.005, 40)
    assert abs(trials[-1][1] - wanted) <= 0.005
    assert len(trials) < 25
    assert all(abs(sparsity - wanted) > 0.005 for _, sparsity in trials[:-1])


def test_a_target_out_of_reach_ends_after_the_trials_allowed() -> None:
    assert len(target.bisect(lambda knob: 0.5, 1.0, 0.9, 0.01, 6)) == 6


def config(method: str) -> train.TrainConfig:
    table = {
        "model": {"name": "mlp", "hidden": 1, "width": 32},
        "data": "digits",
        "method": method,
        "train": {"epochs": 4, "batch_size": 32, "threads": 1},
        "optimizer": {"momentum": 0.0, "nesterov": False},
    }
    return train.TrainConfig.from_recipe(parse(table))


def test_the_closest_trial_becomes_the_result_and_all_are_reported(tmp_path: Path) -> None:
    artefact, used, trials = target.run(config("directional"), tmp_path / "train", sparsity=0.5, tolerance=0.05)
    assert artefact.metrics["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert artefact.folder == tmp_path / "train"
    written = json.loads((tmp_path / "trials.json").read_text())
    assert written["trials"] == trials
    assert used.method.options["c"] == trials[-1]["c"]
    assert len(trials) > 1


def test_methods_with_a_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no knob"):
        target.run(config("rigl"), tmp_path / "train", sparsity=0.5)


def test_the_advice_for_gates_names_the_finish_that_meets_a_target(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method\.sparsity, and method\.finish = .top-k."):
        target.run(config("l0-constrained"), tmp_path / "train", sparsity=0.5)
    with pytest.raises(RecipeError, match=r"Set method\.sparsity\. Methods"):
        target.run(config("rigl"), tmp_path / "train", sparsity=0.5)
