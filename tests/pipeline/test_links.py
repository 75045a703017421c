"""Link prediction through the chain: graphs with a known answer, trained sparse, exported, checked in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from sparsepipe.artefact import Artefact
from sparsepipe.cli.main import sparsepipe

RECIPE = """
model = "MODEL"
data = { name = "edgelist:FILE", features = "FEATURES", dimensions = 4, negatives = "uniform" }
method = { name = "dst-ee", sparsity = 0.8, distribution = "uniform", update_every = 5, c = 1e-5 }
optimizer = { name = "adamw", lr = 1e-2 }
bench = { seconds = 0.1 }
train = { epochs = 12, batch_size = 64, validation = 0.2, threads = 1 }
"""
INSIDE, BETWEEN, BLOCKS = 0.25, 0.01, 4


def trained(folder: Path, probability: Any, model: str, verb: str) -> Path:
    """The folder of a run on a graph of 400 nodes in which each pair is joined with its own probability."""
    joined = np.random.default_rng(0).random((400, 400)) < probability
    np.savetxt(folder / "graph.txt", np.argwhere(np.triu(joined, 1)), fmt="%d")
    text = RECIPE.replace("MODEL", model).replace("FILE", str(folder / "graph.txt"))
    text = text.replace("FEATURES", "ends" if model == "link-gnn" else "product")
    (folder / "recipe.toml").write_text(text)
    done = CliRunner().invoke(sparsepipe, [verb, str(folder / "recipe.toml"), "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    return folder / "out"


@pytest.mark.parametrize("model", ["link-mlp", "link-gnn"])
def test_blocks_are_learnt_and_the_exported_files_rank_alike(model: str, tmp_path: Path) -> None:
    block = np.arange(400) % BLOCKS
    out = trained(tmp_path, np.where(block[:, None] == block, INSIDE, BETWEEN), model, "run")
    metrics = Artefact.read(out / "train").metrics
    # All that can be known of a pair is whether both nodes are in one block: the best possible ranking has one step.
    within = INSIDE / BLOCKS / (INSIDE / BLOCKS + (1 - 1 / BLOCKS) * BETWEEN)
    others = (1 - INSIDE) / BLOCKS / ((1 - INSIDE) / BLOCKS + (1 - 1 / BLOCKS) * (1 - BETWEEN))
    assert metrics["test_auc"] == pytest.approx(0.5 + (within - others) / 2, abs=0.05)
    assert metrics["sparsity"] == pytest.approx(0.8, abs=0.01)
    (record, *_) = [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
    assert 0 <= record["validation_auc"] <= 1
    validated = json.loads((out / "validate/validation.json").read_text())
    assert validated["passed"]
    for row in validated["candidates"]:
        assert row["auc"] == pytest.approx(metrics["test_auc"], abs=1e-4), row["file"]
        assert row["accuracy"]["value"] == pytest.approx(metrics["test_accuracy"], abs=2e-3)


def test_nothing_is_learnt_from_a_graph_without_structure(tmp_path: Path) -> None:
    out = trained(tmp_path, 0.05, "link-mlp", "train")
    assert Artefact.read(out / "train").metrics["test_auc"] == pytest.approx(0.5, abs=0.1)
