"""The rows of the study, and what follows from one of them or a few: which training it is of, rates, bounds, means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import study_files

from sparsepipe import rows
from sparsepipe.artefact import read_json
from sparsepipe.comparison import Training, difference, over_seeds
from sparsepipe.errors import RecipeError
from sparsepipe.reporting.units import MISSING, percent
from sparsepipe.sparsity.schedule import UpdateSchedule, cosine

REFERENCE = "dst-ee"
SWEEP_SPARSITY = 0.95
VALIDATION = 5000
"""Images that a training holds out to select the epoch on."""
INPUT_SHAPE, CLASSES = (3, 32, 32), 10
"""Of the data, which need not be here when a report is made."""

Estimate = Mapping[str, Any]
"""`value`, and `low` and `high` of the 95% interval, or None for a single seed."""

Identity = tuple[str, float, Mapping[str, str]]
"""Of a network: method, sparsity (0 for dense training), and the options of the method that the study sets."""


def network(method: str, sparsity: float, c: str, **others: str) -> Identity:
    """The network that a method gives with these options; only DST-EE has a c, and a pattern is of blocks."""
    options = {"c": c, **others} if method == REFERENCE else others
    return method, sparsity, {key: value for key, value in options.items() if value != "unstructured"}


def identity(training: Training) -> Identity:
    setting = training.setting
    options = {key.removeprefix("method."): value for key, value in setting.others}
    return setting.method, setting.sparsity or 0.0, options


@dataclass(frozen=True)
class Run:
    """A training with its row, read."""

    training: Training
    row: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.training.folder.name

    @property
    def c(self) -> str | None:
        return identity(self.training)[2].get("c")

    @property
    def metrics(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.row["metrics"]
        return found

    @property
    def epochs(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.row["epochs"]
        return found

    @property
    def method(self) -> Mapping[str, Any]:
        """The options of its method, as its recipe has them."""
        found: Mapping[str, Any] = self.row["config"]["method"]
        return found


class Results:
    """All rows, what became of the networks as files, and the c that DST-EE has wherever c is not what is studied.

    Args:
        trainings: of the study.
        folder: of their rows.
        files: folder of what `study_files` writes; it may not be there.
        c: of DST-EE.

    Raises:
        RecipeError: a row is of no training of the study, or of another recipe, or a file is not of its row's network.
    """

    def __init__(self, trainings: Sequence[Training], folder: Path, files: Path, c: str) -> None:
        listed = {training.folder.name: training for training in trainings}
        self.runs = []
        for path in sorted(folder.glob("*.json")):
            if path.stem not in listed:
                raise RecipeError("The study has no such training.", where=str(path), advice="Move this row away.")
            if row := rows.of_training(path, listed[path.stem].stage.config):
                self.runs.append(Run(listed[path.stem], row))
        accuracies = {run.name: run.metrics["test_accuracy"] for run in self.runs}
        self.files = {}
        for each in study_files.read(files):
            own = {file["reference_accuracy"]["value"] for file in each["files"].values()}
            if own != {accuracies.get(each["training"])}:
                raise RecipeError(
                    "The files are not of the network that the row is of: its accuracy is another.",
                    where=f"{files / each['training']}.json",
                    advice="Remove it, `study.py again` the training, then `study.py files`.",
                )
            self.files[each["training"]] = each["files"]
        timed = files / study_files.SPEED_FILE
        self.speed: dict[str, Any] | None = read_json(timed) if timed.is_file() else None
        self.c = c
        self.planned = len(listed)

    def by_seed(self, method: str, sparsity: float = 0.0, **others: str) -> dict[int, Run]:
        """The trainings of one network; of DST-EE those with the study's c, unless `others` has another."""
        wanted = network(method, sparsity, **{"c": self.c, **others})
        return {run.training.seed: run for run in self.runs if identity(run.training) == wanted}


def minus(own: Mapping[int, Run], other: Mapping[int, Run]) -> dict[str, Any] | None:
    """Test accuracy of trainings minus that of others, paired by seed."""
    return difference(*({seed: run.metrics for seed, run in runs.items()} for runs in (own, other)))


def mean(runs: Mapping[int, Run], key: str) -> dict[str, Any] | None:
    """Over seeds, with the 95% interval."""
    return over_seeds([run.metrics[key] for run in runs.values()])


def percent_over(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else percent(estimate["value"]) + half(estimate)


def half(estimate: Estimate) -> str:
    """Half of the interval, as it stands behind a mean, in points; nothing for a single seed."""
    return "" if estimate["high"] is None else f" ± {100 * (estimate['high'] - estimate['value']):.2f}"


def sweep(results: Results) -> list[Run]:
    """DST-EE at one sparsity with each c that has a row, of the first seed; by c."""
    found = [
        run
        for run in results.runs
        if run.c and identity(run.training) == network(REFERENCE, SWEEP_SPARSITY, run.c) and run.training.seed == 0
    ]
    return sorted(found, key=lambda run: float(run.c or 0))


def layer_gradients(run: Run) -> dict[str, float]:
    """Of each layer, the mean absolute gradient of its inactive weights in one batch: that of the last update of an
    epoch, in the median over the epochs.
    """
    found: dict[str, list[float]] = {}
    for epoch in run.epochs:
        for name, value in (epoch["inactive_gradient_mean"] or {}).items():
            if value:
                found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def bonus(run: Run, rounds: int) -> float:
    """c ln(t) / (N + eps) half-way to the last update, for a weight that was active after N updates."""
    return float(run.c or 0) * math.log(stop_step(run) / 2) / (rounds + run.method.get("eps", 1.0))


def stop_step(run: Run) -> int:
    """The optimizer step from which on masks stay as they are."""
    return int(run.method["stop_at"] * run.epochs[-1]["step"])


def new_share(run: Run) -> float:
    """Of the weights that grew, the share that had never been active: the part of growth that explores.

    As many grow as are dropped, a share `churn` of the active ones in the mean over the updates of an epoch; what is
    dropped and grown again at once is neither.
    """
    updates = UpdateSchedule(run.method["update_every"], 1, stop_step(run))
    ends = [0, *(epoch["step"] for epoch in run.epochs)]
    counts = [sum(map(updates.due, range(first + 1, last + 1))) for first, last in pairwise(ends)]
    churn = (epoch["churn"] or 0.0 for epoch in run.epochs)
    active, weights = run.metrics["nnz"], run.metrics["weights"]
    grown = active * sum(share * count for share, count in zip(churn, counts, strict=True))
    return float((run.metrics["exploration_rate"] * weights - active) / grown)


def coverage_bound(run: Run) -> float:
    """The exploration rate that no method can exceed: of each layer min(1, d (1 + sum p)), d its density."""
    method = run.method
    updates = UpdateSchedule(method["update_every"], 1, stop_step(run))
    fraction = cosine(method["drop_fraction"], updates.stop)
    spread = 1 + sum(fraction(step) for step in range(1, updates.stop) if updates.due(step))
    sizes, densities = layer_sizes(run), run.epochs[0]["density"]
    reached = sum(min(1.0, densities[name] * spread) * size for name, size in sizes.items())
    return reached / sum(sizes.values())


def layer_sizes(run: Run) -> dict[str, int]:
    """Weights of each layer that has a mask."""
    import torch

    from sparsepipe.models.registry import create

    model = run.row["config"]["model"]
    options = {key: value for key, value in model.items() if key != "name"}
    with torch.device("meta"):
        created = create(model["name"], input_shape=INPUT_SHAPE, classes=CLASSES, options=options)
    return {name: created.get_parameter(name).numel() for name in run.epochs[0]["density"]}
