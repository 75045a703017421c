"""`train --modifier` and `validate --attack`, on a linear network, for which bounds of any attack are known."""

from __future__ import annotations

import json
import logging
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from sparsepipe import data
from sparsepipe.cli.main import sparsepipe
from sparsepipe.errors import SparsepipeError

EPSILON = 0.05
RECIPE = """
data = "digits"
model = {name = "mlp", hidden = 0}
method = {name = "erk-static", sparsity = 0.5}
modifiers = [{name = "adversarial", epsilon = 0.05, begin = 0.5, steps = 2}]
train = {epochs = 4, threads = 1}
"""


def invoke(*arguments: Any) -> Result:
    """Run the command line; the log is as before afterwards."""
    root, own = logging.getLogger(), logging.getLogger("sparsepipe")
    before = root.handlers[:], own.level
    try:
        return CliRunner().invoke(sparsepipe, [*map(str, arguments), "--quiet"])
    finally:
        root.handlers[:] = before[0]
        own.setLevel(before[1])


def call(*arguments: Any) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*arguments: Any) -> str:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SparsepipeError | SystemExit)
    return result.output + str(result.exception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "recipe.toml").write_text(RECIPE)
    call("train", folder / "recipe.toml", "--out", folder / "run", "--modifier", "adversarial")
    call("freeze", folder / "run")
    call("export", folder / "run", "--set", "export.targets=['dense','portable']")
    return folder / "run"


def test_accuracy_under_attack_lies_between_the_bounds_of_a_linear_network(folder: Path) -> None:
    file = folder / "export" / "model.dense.onnx"
    arguments = ("validate", file, "--against", folder, "--attack", "pgd", "--epsilon", EPSILON, "--json")
    result = json.loads(call(*arguments).stdout)
    weights, dataset = load_file(folder / "train" / "model.safetensors"), data.load("digits", {})
    raw = dataset.test.load(np.arange(len(dataset.test)))
    preprocessing, labels = dataset.preprocessing, np.asarray(dataset.test.labels)
    # In pixels of [0, 1]: z = W (x - mean) / std + b, so the margin of class y over j is linear in x.
    pixels = (raw * preprocessing.scale).reshape(len(raw), -1).astype(np.float64)
    weight = weights["head.weight"].astype(np.float64) / preprocessing.std[0]
    bias = weights["head.bias"] - weight.sum(1) * preprocessing.mean[0]
    everyone = np.arange(len(labels))
    logits = pixels @ weight.T + bias
    difference = weight[labels][:, None] - weight[None]  # [n, class, pixel]
    others = np.ones_like(logits, bool)
    others[everyone, labels] = False
    # The best attack on one margin, with pixels in their range; each sample's worst one is exact for a linear network.
    up, down = np.minimum(EPSILON, 1 - pixels)[:, None], np.minimum(EPSILON, pixels)[:, None]
    loss = (np.maximum(difference, 0) * down + np.maximum(-difference, 0) * up).sum(2)
    margins = logits[everyone, labels][:, None] - logits - loss
    robust = int((np.where(others, margins, np.inf).min(1) > 0).sum())
    clean = int((logits.argmax(1) == labels).sum())
    attack = result["attack"]
    found = attack["network"]["correct"]
    assert result["candidates"][0]["reference_accuracy"]["correct"] == clean
    assert robust <= found < clean - 10
    assert found - robust <= 0.03 * len(labels)  # PGD climbs the cross-entropy, not the smallest margin
    assert [file["accuracy"]["correct"] for file in attack["files"]] == [found]
    assert "transferred" in attack["note"]
    shown = call(*arguments[:-1]).stdout
    assert f"{attack['network']['value']:.2%}" in shown
    assert "white-box" in shown


def test_an_attack_needs_a_network_with_gradients_and_labels(folder: Path) -> None:
    dense, portable = (folder / "export" / f"model.{target}.onnx" for target in ("dense", "portable"))
    assert "gradients" in refused("validate", portable, "--against", dense, "--attack", "pgd")
    assert "belongs to --attack" in refused("validate", portable, "--against", folder, "--epsilon", 0.1)


def test_a_training_with_other_modifiers_is_another_one(folder: Path, tmp_path: Path) -> None:
    written = tomllib.loads((folder / "recipe.toml").read_text())
    assert written["modifiers"] == [{"name": "adversarial", "epsilon": 0.05, "begin": 0.5, "steps": 2}]
    before = (folder / "train" / "manifest.json").read_text()
    call("train", folder / "recipe.toml", "--out", folder, "--resume")
    assert (folder / "train" / "manifest.json").read_text() == before
    assert json.loads(before)["config"]["modifiers"] == written["modifiers"]
    other = ("train", folder / "recipe.toml", "--out", tmp_path / "run", "--modifier", "adversary")
    assert "There is no modifier 'adversary'" in refused(*other)


def test_branches_go_through_the_chain_and_are_attacked_alone_and_together(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        """
data = "digits"
model = {name = "mlp", hidden = 2, width = 32}
method = {name = "rigl", sparsity = 0.8, update_every = 20}
modifiers = [
    {name = "adversarial", epsilon = 0.05, begin = 0.0, schedule = false, steps = 2},
    {name = "bort", branches = 3},
]
train = {epochs = 3, threads = 1}
"""
    )
    run = tmp_path / "run"
    call("train", tmp_path / "recipe.toml", "--out", run)
    metrics = json.loads((run / "train" / "manifest.json").read_text())["metrics"]
    assert metrics["epoch_selected"] == 9  # three branches of three epochs; adversarial ones keep the last
    assert set(metrics["snapshots"]) == {"branch-0", "branch-1"}
    served = load_file(run / "train" / "model.safetensors")
    for kind, scores in metrics["snapshots"].items():
        branch = load_file(run / "train" / f"{kind}.safetensors")
        assert np.array_equal(branch["hidden.0.weight"], served["hidden.0.weight"])
        assert not np.array_equal(branch["hidden.1.weight"] != 0, served["hidden.1.weight"] != 0)
        assert scores["sparsity"] == metrics["sparsity"] == pytest.approx(0.8, abs=1e-3)
    call("freeze", run)
    call("export", run, "--set", "export.targets=['dense','portable']")
    files = [run / "export" / f"model.{target}.onnx" for target in ("dense", "portable")]
    arguments = ("validate", *files, "--against", run, "--attack", "pgd", "--epsilon", EPSILON)
    result = json.loads(call(*arguments, "--json").stdout)
    assert result["passed"]
    for each in result["results"]:
        attack = each["attack"]
        assert attack["branches"] == 3
        clean = each["candidates"][0]["reference_accuracy"]["correct"]
        # An attack on three branches at once is a weaker one on each of them.
        assert attack["network"]["correct"] <= attack["joint"]["correct"] + 3
        assert attack["joint"]["correct"] < clean
    shown = call(*arguments).stdout
    assert shown.count("on 3 branches together") == shown.count("white-box") == 1
    assert shown.count("transferred") - shown.count("(transferred)") == 2
    assert result["results"][0]["attack"]["files"][0]["file"] == "model.dense.onnx"
    assert result["results"][1]["attack"]["files"][0]["file"] == "model.portable.onnx"
