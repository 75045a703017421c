"""Rows: what is kept of a finished training, one JSON file each, small enough to be committed.

A row holds the whole recipe that its training had, so that a comparison takes the row in place of the training: what a
row stands for is not trained again, whether or not its run folder is still there.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sparsepipe.artefact import Artefact, read_json, write_json
from sparsepipe.environment import describe_machine
from sparsepipe.errors import RecipeError
from sparsepipe.recipe import digest
from sparsepipe.settings import check
from sparsepipe.stages.train import differing

SCHEMA_VERSION = 1
KEPT = (
    "test_accuracy",
    "validation_accuracy",
    "test_auc",
    "validation_auc",
    "epoch_selected",
    "sparsity",
    "nnz",
    "weights",
    "exploration_rate",
    "mask_updates",
    "training_flops_multiple",
    "inference_flops_multiple",
    "seconds",
    "cpu_seconds",
)
"""Metrics of a training that its row holds."""

OF_EPOCHS = (
    "epoch",
    "step",
    "train_loss",
    "validation_accuracy",
    "exploration_rate",
    "churn",
    "density",
    "inactive_gradient_mean",
)
"""What a row holds of each epoch."""

SOURCES = ("sparsepipe", "models", "cli", "examples/*.toml", "examples/*.py")
"""Of a checkout, what a training may run."""

DIGITS = 5
"""Of the figures of epochs."""


def row(artefact: Artefact, config: BaseModel, command: Sequence[str]) -> dict[str, Any]:
    """What is kept of a training.

    Args:
        artefact: of the stage `train`.
        config: what it was trained by.
        command: arguments of `sparsepipe` that make it again.
    """
    lines = artefact.file("metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "row_schema": SCHEMA_VERSION,
        "command": shlex.join(["sparsepipe", *command]),
        "recipe_digest": digest(config),
        "config": config.model_dump(mode="json"),
        "metrics": {key: artefact.metrics[key] for key in KEPT if key in artefact.metrics},
        "epochs": [_short({key: record.get(key) for key in OF_EPOCHS}) for record in map(json.loads, lines)],
        "commit": source_commit(),
        "created": artefact.manifest.created,
        "versions": artefact.manifest.versions,
        "machine": describe_machine(),
    }


def write(path: Path, found: Mapping[str, Any]) -> None:
    write_json(path, found)


def read(path: Path) -> dict[str, Any]:
    """The row in a file.

    Raises:
        ArtefactError: the file is missing or is not JSON.
        RecipeError: it is no row, or one of another version.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("row_schema") != SCHEMA_VERSION:
        raise RecipeError("This is not the row of a training, or one of another version.", where=str(path))
    return found


def of_training(path: Path, config: BaseModel) -> dict[str, Any] | None:
    """The row in a file, which must be that of a training by `config`; None where there is no file.

    Raises:
        RecipeError: the row is of another recipe, or has settings that recipes have no more.
    """
    if not path.is_file():
        return None
    found = read(path)
    # Through the model, so that a setting that recipes did not have yet counts as its default.
    before = check(type(config), found["config"], where=str(path)).model_dump(mode="json")
    if keys := differing(before, config.model_dump(mode="json")):
        raise RecipeError(
            f"The row is of another recipe; they differ in {', '.join(sorted(keys))}.",
            where=str(path),
            advice="Name another folder for the rows, or move this one away.",
        )
    return found


def source_commit() -> str | None:
    """The commit of the sources that run, with `+` where they were changed since; None where they are no checkout."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    changed = commit and git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return f"{commit}+" if changed else commit


def _short(value: Any) -> Any:
    """Numbers with `DIGITS` significant digits."""
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
