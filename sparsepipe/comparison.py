"""Compare: one recipe over a grid of methods, sparsities, other settings and seeds; a table with paired differences.

Every cell of the grid is an ordinary training in a folder of its own, which `train` resumes and `freeze` reads. A
training that is finished is not repeated, so a comparison can be interrupted, repeated and widened; with a folder of
rows (`sparsepipe.rows`) not even where the folders of the trainings are gone.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepipe import jobs, pipeline, rows
from sparsepipe import recipe as recipes
from sparsepipe.artefact import digest_bytes, read_json, write_json
from sparsepipe.benchmark.statistics import as_dict, mean
from sparsepipe.environment import describe_machine, package_versions, usable_cores
from sparsepipe.errors import RecipeError
from sparsepipe.folders import partial_of
from sparsepipe.progress import bar
from sparsepipe.sparsity import registry

SCHEMA_VERSION = 1
RESULT = "comparison.json"
AVERAGED = (
    "test_accuracy",
    "validation_accuracy",
    "test_auc",
    "validation_auc",
    "sparsity",
    "exploration_rate",
    "training_flops_multiple",
    "inference_flops_multiple",
    "seconds",
    "cpu_seconds",
)
"""Metrics of a training whose mean over seeds a table holds; ROC-AUC is of two classes only."""


@dataclass(frozen=True)
class Setting:
    """What a row of the table is about: all but the seed.

    Attributes:
        method: name in the registry.
        sparsity: None for a method that takes none, and where the recipe's is meant.
        others: further keys of the recipe with their values, as `--set` takes them.
    """

    method: str
    sparsity: float | None
    others: tuple[tuple[str, str], ...] = ()

    def overrides(self) -> list[str]:
        sparsity = [] if self.sparsity is None else [f"method.sparsity={self.sparsity!r}"]
        return [f"method.name={self.method}", *sparsity, *(f"{key}={value}" for key, value in self.others)]

    def folder(self, seed: int) -> str:
        parts = [self.method, *([] if self.sparsity is None else [f"{self.sparsity:g}"])]
        parts += [f"{key.rpartition('.')[2]}={value}" for key, value in self.others]
        return "_".join(re.sub(r"[^\w.=+-]", "-", part) for part in [*parts, f"s{seed}"])


@dataclass(frozen=True)
class Grid:
    """What is compared with what.

    Attributes:
        methods: names in the registry; the first is what the others are compared with.
        sparsities: empty for the recipe's own.
        seeds: each method is trained once with each.
        vary: further keys of the recipe, each with its values.
    """

    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    vary: Mapping[str, tuple[str, ...]]

    def settings(self) -> list[Setting]:
        """The rows in order; methods that take no sparsity or no other option of methods have one row for all."""
        rows = []
        others = [[(key, value) for value in values] for key, values in self.vary.items()]
        for method in self.methods:
            options = {f"method.{name}" for name in registry.options_of(method)}
            takes = "method.sparsity" in options
            for sparsity in (self.sparsities if takes else ()) or (None,):
                for chosen in itertools.product(*others):
                    fitting = tuple(pair for pair in chosen if not pair[0].startswith("method.") or pair[0] in options)
                    rows.append(Setting(method, sparsity, fitting))
        return list(dict.fromkeys(rows))

    def refuse_decided(self, overrides: Sequence[str]) -> None:
        """Refuse settings that would have no effect, as the grid has its own for each training.

        Raises:
            RecipeError: naming the option that has them.
        """
        decided = {"method": "--methods", "method.name": "--methods", "seed": "--seeds"}
        if self.sparsities:
            decided["method.sparsity"] = "--sparsities"
        given = [(f"--set {override}", *override.partition("=")[::2]) for override in overrides]
        for place, key, value in [*given, *((f"--vary {key}", key, "") for key in self.vary)]:
            option = decided.get(key.strip())
            if option is not None and not value.lstrip().startswith("{"):  # a table of options is no name
                raise RecipeError(
                    f"What trainings are compared in is said by {option}; this would have no effect.",
                    where=place,
                    advice=f"Leave it out, and use {option}.",
                )


@dataclass(frozen=True)
class Training:
    """One cell: a row and a seed."""

    setting: Setting
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    stage: pipeline.Stage

    def command(self, recipe: Path, *, again: bool = False) -> list[str]:
        """Arguments of `sparsepipe` that make this training, or finish it; `again` also where it is finished."""
        sets = itertools.chain.from_iterable(("--set", override) for override in self.overrides)
        resume = not again or partial_of(self.folder / self.stage.name).exists()
        return ["train", str(recipe), *sets, "--out", str(self.folder), *(["--resume"] if resume else [])]

    def finished(self, recipe: Path, kept: Path | None = None) -> dict[str, Any] | None:
        """Its row, if it is done: that in the folder `kept`, or else that of its own folder, which is kept there then.

        Raises:
            RecipeError: the row that is kept is of another recipe.
        """
        path = None if kept is None else kept / f"{self.folder.name}.json"
        if path is not None and (found := rows.of_training(path, self.stage.config)) is not None:
            return found
        artefact = pipeline.unchanged(self.stage, {}, self.folder / self.stage.name)
        if artefact is None:
            return None
        found = rows.row(artefact, self.stage.config, self.command(recipe))
        if path is not None:
            rows.write(path, found)
        return found


def plan(recipe: Path, grid: Grid, overrides: Sequence[str], out: Path) -> list[Training]:
    """All trainings of a grid, seed by seed, so that an interrupted comparison has whole pairs.

    Raises:
        RecipeError: the recipe, an override, a method or one of its options is not valid, an override is one that the
            grid decides, or no method takes an option that shall vary.
    """
    grid.refuse_decided(overrides)
    taken = {f"method.{option}" for method in grid.methods for option in registry.options_of(method)}
    for key in grid.vary:
        if key.startswith("method.") and key not in taken:
            raise RecipeError(
                f"None of the methods {', '.join(grid.methods)} takes the option '{key}'.",
                where="--vary",
                advice="`sparsepipe methods` lists the methods.",
            )
    trainings = []
    for seed, setting in itertools.product(grid.seeds, grid.settings()):
        every = (*overrides, *setting.overrides(), f"seed={seed}", "train.dense_twin=false")
        loaded = recipes.load(recipe, every)
        registry.create(loaded.method.name, loaded.method.options)
        stage = pipeline.stages(loaded)[0]
        trainings.append(Training(setting, seed, every, out / setting.folder(seed), stage))
    return trainings


def compare(
    recipe: Path,
    grid: Grid,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    workers: int = 0,
    backend: str = "local",
    kept: Path | None = None,
    write_up: Callable[[Mapping[str, Any], Path], None] = lambda result, out: None,
) -> dict[str, Any]:
    """Train what is not trained yet, and write `comparison.json` after each training.

    Args:
        recipe: what all trainings share.
        grid: what they differ in.
        out: folder with one folder for each training.
        overrides: further `KEY=VALUE` for all.
        workers: trainings at once; 0 for as many as there are cores, with one thread each.
        backend: a name of `jobs.BACKENDS`.
        kept: folder of rows: what has a row there is not trained again, and each training that ends leaves its row.
        write_up: called with the result and `out` whenever the result has changed.

    Returns:
        `runs`: one dict for each training, with its `metrics`, or the `error` of one that failed. `table`: one for
        each setting, with means over seeds, 95% intervals by Student's t, and differences paired by seed in `minus`
        (the first method) and `minus_dense`.

    Raises:
        RecipeError: as `plan`, or there is nothing to compare, or a row is of another recipe.
        MissingExtraError: a package of the backend is not installed.
    """
    if not grid.methods or not grid.seeds:
        raise RecipeError("There is nothing to compare.", where="compare", advice="Name methods and seeds.")
    at_once = workers or usable_cores()
    if at_once > 1 and not any(override.startswith("train.threads=") for override in overrides):
        overrides = (*overrides, "train.threads=1")
    trainings = plan(recipe, grid, overrides, out)
    done = {index: found for index, each in enumerate(trainings) if (found := each.finished(recipe, kept))}
    waiting = [index for index in range(len(trainings)) if index not in done]
    failed: dict[int, str] = {}

    def collect() -> dict[str, Any]:
        metrics = {index: found["metrics"] for index, found in done.items()}
        result = _result(recipe, grid, overrides, trainings, metrics, failed)
        write_json(out / RESULT, result)
        write_up(result, out)
        return result

    out.mkdir(parents=True, exist_ok=True)
    result = collect()
    with bar("Trainings", len(waiting)) as running:
        for at, found, error in train(recipe, [trainings[index] for index in waiting], at_once, backend, kept):
            index = waiting[at]
            if found is None:
                failed[index] = error
            else:
                done[index] = found
            result = collect()
            running.advance(note=trainings[index].folder.name)
    return result


def train(
    recipe: Path,
    trainings: Sequence[Training],
    at_once: int,
    backend: str = "local",
    kept: Path | None = None,
    *,
    again: bool = False,
) -> Iterator[tuple[int, dict[str, Any] | None, str]]:
    """Make trainings, so many at once, and yield of each as it ends its index, its row or None, and what went wrong.

    With `again` those that are finished are made anew; the old result stands until the new one replaces it.
    """
    commands = [training.command(recipe, again=again) for training in trainings]
    for ended in jobs.BACKENDS[backend](commands, at_once) if commands else ():
        found = trainings[ended.index].finished(recipe, kept) if ended.code == 0 else None
        error = "" if found else ended.error or f"It ended with code {ended.code} and said nothing."
        yield ended.index, found, error


def read(path: Path) -> dict[str, Any]:
    """The result in a file, or in the folder of a comparison.

    Raises:
        ArtefactError: there is none, or it is not JSON.
        RecipeError: the file is of another kind or version.
    """
    path = path / RESULT if path.is_dir() else path
    result = read_json(path)
    if not isinstance(result, dict) or result.get("comparison_schema") != SCHEMA_VERSION:
        raise RecipeError("This is not the result of a comparison of this version of sparsepipe.", where=str(path))
    return result


def _result(
    recipe: Path,
    grid: Grid,
    overrides: Sequence[str],
    trainings: Sequence[Training],
    done: Mapping[int, Mapping[str, Any]],
    failed: Mapping[int, str],
) -> dict[str, Any]:
    runs = [
        {
            "method": training.setting.method,
            "sparsity": training.setting.sparsity,
            "others": dict(training.setting.others),
            "seed": training.seed,
            "metrics": done.get(index),
            "error": failed.get(index),
            "command": shlex.join(["sparsepipe", *training.command(recipe)]),
        }
        for index, training in enumerate(trainings)
    ]
    configs = [training.stage.config.model_dump(mode="json") for training in trainings]
    return {
        "comparison_schema": SCHEMA_VERSION,
        "recipe": str(recipe),
        "recipe_digest": digest_bytes(recipe.read_bytes()),
        "data": _common([config["data"] for config in configs]),
        "epochs": _common([config["train"]["epochs"] for config in configs]),
        "overrides": list(overrides),
        "reference": grid.methods[0],
        "table": table(grid, {(trainings[i].setting, trainings[i].seed): found for i, found in done.items()}),
        "runs": runs,
        "machine": describe_machine(),
        "versions": package_versions(),
    }


def _common(values: Sequence[Any]) -> Any:
    """The value that all are; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def table(grid: Grid, done: Mapping[tuple[Setting, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means, intervals and paired differences of each setting of a grid.

    Args:
        grid: what is compared.
        done: the metrics of finished trainings, by setting and seed.
    """
    by_setting: dict[Setting, dict[int, Mapping[str, Any]]] = {setting: {} for setting in grid.settings()}
    for (setting, seed), metrics in done.items():
        by_setting[setting][seed] = metrics
    lines = []
    for setting, runs in by_setting.items():
        line: dict[str, Any] = {
            "method": setting.method,
            "sparsity": setting.sparsity,
            "others": dict(setting.others),
            "seeds": sorted(runs),
        }
        line["means"] = {
            key: over_seeds([run[key] for run in runs.values() if run.get(key) is not None]) for key in AVERAGED
        }
        reference = _partner(by_setting, grid.methods[0], setting)
        dense = _partner(by_setting, "dense", setting)
        line["minus"] = None if setting.method == grid.methods[0] else difference(runs, reference)
        line["minus_dense"] = None if setting.method == "dense" else difference(runs, dense)
        lines.append(line)
    return lines


def _partner(
    by_setting: Mapping[Setting, dict[int, Mapping[str, Any]]], method: str, setting: Setting
) -> dict[int, Mapping[str, Any]]:
    """Trainings of `method` in the same setting, as far as that method has it, by seed."""
    own = dict(setting.others)
    fitting = [
        runs
        for other, runs in by_setting.items()
        if other.method == method
        and (other.sparsity is None or setting.sparsity is None or other.sparsity == setting.sparsity)
        and all(own.get(key, value) == value for key, value in other.others)
    ]
    # A row without a sparsity, as of `dense`, has no single partner among several.
    return fitting[0] if len(fitting) == 1 else {}


def difference(runs: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Test accuracy minus that of the partners with the same seed, as fractions."""
    pairs: Iterable[int] = sorted({*runs} & {*others})
    differences = [runs[seed]["test_accuracy"] - others[seed]["test_accuracy"] for seed in pairs]
    found = over_seeds(differences)
    return None if found is None else {**found, "pairs": len(differences)}


def over_seeds(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean and 95% interval of one value for each seed; no interval for a single one, None for none."""
    if not values:
        return None
    return as_dict(mean(values)) or {"value": values[0], "low": None, "high": None}
