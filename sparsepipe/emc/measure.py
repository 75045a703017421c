"""Effective model complexity of one recipe over methods, sparsities and seeds; trials are kept as they end."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsepipe import data
from sparsepipe import recipe as recipes
from sparsepipe.artefact import digest_bytes, read_json, write_json
from sparsepipe.comparison import Grid, Setting, over_seeds
from sparsepipe.data import Dataset
from sparsepipe.emc.samples import Inputs, Labels, NestedSamples
from sparsepipe.emc.search import DOUBLINGS, Found, Trial, search
from sparsepipe.environment import describe_machine, package_versions
from sparsepipe.errors import ArtefactError, RecipeError, SparsepipeError
from sparsepipe.models import registry as models
from sparsepipe.progress import bar
from sparsepipe.settings import Choice
from sparsepipe.sparsity import registry as methods
from sparsepipe.sparsity.modifiers import registry as modifiers
from sparsepipe.stages.assembly import EVALUATION_BATCH, check_data, modifiers_of, rate_of, sparsifier_of, steps_of
from sparsepipe.stages.input_space import input_space
from sparsepipe.stages.train import TrainConfig, network_source
from sparsepipe.training import device, optimizers
from sparsepipe.training.augment import Augmentation
from sparsepipe.training.batches import EvaluationBatches, InMemory, Normalise, TrainingBatches
from sparsepipe.training.fitting import fit

log = logging.getLogger("sparsepipe")

SCHEMA_VERSION = 1
RESULT = "emc.json"
TRIALS = "trials"


@dataclass(frozen=True)
class Task:
    """What is searched, beside methods, sparsities and seeds.

    Attributes:
        labels: semantic or random.
        inputs: data or random.
        tolerance: of each search, relative.
        steps: of a training at first; None for as many as the recipe takes on the whole training split.
    """

    labels: Labels = "semantic"
    inputs: Inputs = "data"
    tolerance: float = 0.05
    steps: int | None = None


@dataclass(frozen=True)
class Cell:
    """One search: a setting and a seed."""

    setting: Setting
    seed: int
    config: TrainConfig
    samples: NestedSamples
    steps: int

    @property
    def file(self) -> str:
        return f"{self.setting.folder(self.seed)}.json"


def measure(
    recipe: Path,
    grid: Grid,
    task: Task,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    write_up: Callable[[Mapping[str, Any], Path], None] = lambda result, out: None,
) -> dict[str, Any]:
    """Search for the effective model complexity in every cell of the grid, one after another.

    Each training is that of the recipe: its network, method, optimizer, schedule and batch size; without augmentation,
    as the samples are to be learnt as they are, and in fp32. Its trials are written as they end, and not repeated.

    Args:
        recipe: what all trainings share.
        grid: methods, sparsities and seeds; `vary` as in a comparison.
        task: what is to be fit, and how well it is searched.
        out: folder of `emc.json`, and of the trials.
        overrides: further `KEY=VALUE` for all.
        write_up: called with the result and `out` after each search.

    Returns:
        `runs`: one dict for each search that has ended. `failed`: one for each in which a training failed, with its
        `error`; the others go on. `table`: one for each setting, with means over seeds and 95% intervals by Student's
        t.

    Raises:
        RecipeError: there is nothing to search, or a part of the recipe is not valid.
        SparsepipeError: parts of the recipe do not fit together.
    """
    if not grid.methods or not grid.seeds:
        raise RecipeError("There is nothing to search.", where="emc", advice="Name methods and seeds.")
    cells = _plan(recipe, grid, task, overrides)
    runs: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with bar("Searches", len(cells)) as running:
        for cell in cells:
            try:
                runs.append(_run(cell, _search(cell, task, out, lambda note: running.advance(0, note=note))))
            except SparsepipeError as error:  # as where the loss is not finite any more
                failed.append({**_of(cell), "error": str(error)})
            result = _result(recipe, grid, task, cells[0], overrides, runs, failed)
            write_json(out / RESULT, result)
            write_up(result, out)
            running.advance()
    return result


def _plan(recipe: Path, grid: Grid, task: Task, overrides: Sequence[str]) -> list[Cell]:
    grid.refuse_decided(overrides)
    cells = []
    datasets: dict[str, Dataset] = {}
    for seed, setting in itertools.product(grid.seeds, grid.settings()):
        config = TrainConfig.from_recipe(recipes.load(recipe, [*overrides, *setting.overrides(), f"seed={seed}"]))
        key = recipes.digest(config.data)
        dataset = datasets.setdefault(key, datasets.get(key) or data.load(config.data.name, config.data.options))
        methods.create(config.method.name, config.method.options)
        for modifier in config.modifiers:
            modifiers.create(modifier.name, modifier.options)
        taken = methods.options_of(config.method.name)
        options = {key: value for key, value in config.method.options.items() if key in taken}
        chosen = Choice(**{**options, "name": config.method.name})
        # Samples are learnt as they are, so there is no augmentation.
        config = config.model_copy(update={"method": chosen, "augment": recipes.Augment()})
        check_data(config, _network(config, dataset), dataset, 2)
        whole = max(1, len(dataset.train) // config.train.batch_size) * config.train.epochs
        samples = NestedSamples(dataset, seed, labels=task.labels, inputs=task.inputs)
        cells.append(Cell(setting, seed, config, samples, task.steps or whole))
    return cells


def _search(cell: Cell, task: Task, out: Path, note: Callable[[str], None]) -> Found:
    path, identity = out / TRIALS / cell.file, _identity(cell, task)
    trials = _known(path, identity)
    name = path.stem

    def attempt(count: int, steps: int) -> Trial:
        note(f"{name}: {count} samples, {steps} steps")
        trial = train(cell.config, cell.samples, count, steps)
        trials.append(trial)
        write_json(path, {"identity": identity, "trials": [asdict(each) for each in trials]})
        ended = "fits" if trial.fits else "fails" if trial.converged else "has not converged"
        log.info("%s: %d samples, %d steps: %s (loss %.3g).", name, count, steps, ended, trial.loss)
        return trial

    found = search(attempt, largest=cell.samples.total, steps=cell.steps, tolerance=task.tolerance, known=tuple(trials))
    if found.contradictions:
        log.warning(
            "%s: failed on %s samples, but then fit %d: trainings differ by chance.",
            name,
            ", ".join(map(str, found.contradictions)),
            found.emc,
        )
    return found


def train(config: TrainConfig, samples: NestedSamples, count: int, steps: int) -> Trial:
    """Train a fresh network on the first `count` samples; the seed decides the rest.

    Raises:
        SparsepipeError: parts of the recipe do not fit together, or the loss is not finite any more.
    """
    where = device.fabric(config.train.device, "fp32").device
    split = samples.first(count)
    cuda = [where] if where.type == "cuda" else []
    with device.threads(config.train.threads), torch.random.fork_rng(cuda):
        model = _network(config, samples.dataset).to(where)
        torch.manual_seed(config.seed)
        optimizer = optimizers.create(model=model, **config.optimizer.model_dump())
        normalise = Normalise(samples.preprocessing, where)
        source = InMemory(split, where)
        training = TrainingBatches(
            source, normalise, Augmentation(), batch_size=config.train.batch_size, seed=config.seed
        )
        method = methods.create(config.method.name, config.method.options)
        modified = modifiers_of(config, input_space(samples.preprocessing, samples.dataset.input_shape))
        total = steps_of(method, modified, steps)
        warmup = min(total - 1, round(config.schedule.warmup / config.train.epochs * total))
        scored = list(itertools.islice(training.epoch(0), method.samples_needed))
        ended = fit(
            model,
            optimizer,
            sparsifier_of(config, model, optimizer, method, total, scored, modified),
            training,
            EvaluationBatches(source, normalise, batch_size=EVALUATION_BATCH),
            steps=total,
            lr=config.optimizer.lr,
            rate=rate_of(config, total, warmup),
            label_smoothing=config.train.label_smoothing,
        )
    return Trial(count, steps, ended.complete, ended.converged, ended.loss, ended.nonzero, ended.saddle)


def _network(config: TrainConfig, dataset: Dataset) -> torch.nn.Module:
    torch.manual_seed(config.seed)
    return models.create(
        config.model.name,
        input_shape=dataset.input_shape,
        classes=len(dataset.classes),
        options=config.model.options,
    )


def _identity(cell: Cell, task: Task) -> dict[str, Any]:
    """All that decides how a trial with so many samples and steps ends."""
    config = cell.config
    settings = config.model_dump(mode="json", include={"seed", "model", "method", "modifiers", "optimizer", "schedule"})
    return {
        **settings,
        "batch_size": config.train.batch_size,
        "label_smoothing": config.train.label_smoothing,
        "warmup": config.schedule.warmup / config.train.epochs,
        "labels": task.labels,
        "inputs": task.inputs,
        "data": data.fingerprint(config.data.name, config.data.options),
        "sources": network_source(config.model.name),
        "sparsepipe": package_versions().get("sparsepipe"),
    }


def _known(path: Path, identity: Mapping[str, Any]) -> list[Trial]:
    """Trials of an earlier call with the same identity."""
    if not path.is_file():
        return []
    try:
        written = read_json(path)
        if written["identity"] == identity:
            return [Trial(**each) for each in written["trials"]]
    except (ArtefactError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); its trials are made again.", path, error)
        return []
    log.info("%s holds trials of other settings; they are made again.", path)
    return []


def _run(cell: Cell, found: Found) -> dict[str, Any]:
    largest = [trial for trial in found.trials if trial.fits and trial.samples == found.emc]
    nonzero = min((trial.nonzero for trial in largest or found.trials), default=0)
    return {
        **_of(cell),
        "emc": found.emc,
        "upper": found.upper,
        "settled": found.settled,
        "nonzero": nonzero,
        "emc_per_nonzero": found.emc / nonzero,
        "trials": [asdict(trial) for trial in found.trials],
    }


def _of(cell: Cell) -> dict[str, Any]:
    return {"method": cell.setting.method, "sparsity": cell.setting.sparsity, "seed": cell.seed}


def _result(
    recipe: Path,
    grid: Grid,
    task: Task,
    any_cell: Cell,
    overrides: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    rows = []
    for setting in grid.settings():
        own = [run for run in runs if (run["method"], run["sparsity"]) == (setting.method, setting.sparsity)]
        means = {key: over_seeds([float(run[key]) for run in own]) for key in ("emc", "emc_per_nonzero", "nonzero")}
        rows.append(
            {
                "method": setting.method,
                "sparsity": setting.sparsity,
                "seeds": sorted(run["seed"] for run in own),
                "lower_bounds": sum(not run["settled"] for run in own),
                "means": means,
            }
        )
    return {
        "emc_schema": SCHEMA_VERSION,
        "recipe": str(recipe),
        "recipe_digest": digest_bytes(recipe.read_bytes()),
        "data": any_cell.config.data.model_dump(mode="json"),
        "overrides": list(overrides),
        **asdict(task),
        "steps": any_cell.steps,
        "doublings": DOUBLINGS,
        "table": rows,
        "runs": list(runs),
        "failed": list(failed),
        "machine": describe_machine(),
        "versions": package_versions(),
    }
