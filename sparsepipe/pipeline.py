"""The chain of stages: what each reads, and which can be skipped because nothing that it depends on has changed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from sparsepipe.artefact import MANIFEST, Artefact, check_free
from sparsepipe.environment import package_versions
from sparsepipe.errors import ArtefactError
from sparsepipe.folders import partial_of
from sparsepipe.recipe import Recipe
from sparsepipe.settings import Choice
from sparsepipe.stages.train import network_source, same_config

log = logging.getLogger("sparsepipe")


class Run(Protocol):
    """What each module of `sparsepipe.stages` offers as `run`."""

    def __call__(self, config: BaseModel, inputs: Mapping[str, Artefact], out: Path) -> Artefact: ...


@dataclass(frozen=True)
class Stage:
    """One step of the chain.

    Attributes:
        name: name of the step and of its output folder.
        config: the part of the recipe that it depends on.
        needs: the earlier steps whose artefacts it reads.
        run: does the work; imported only when the step is not skipped.
    """

    name: str
    config: BaseModel
    needs: tuple[str, ...]
    run: Run


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    artefact: Artefact
    skipped: bool
    seconds: float


def stages(recipe: Recipe, *, force: bool = False) -> list[Stage]:
    """The chain for one recipe, in order; `force` starts an interrupted training over instead of resuming it."""
    from sparsepipe.stages.freeze import FreezeConfig
    from sparsepipe.stages.report import ReportConfig
    from sparsepipe.stages.train import TrainConfig
    from sparsepipe.stages.validate import ValidateConfig

    # The recipe is the user's own, so the network that it names may be imported from an artefact, too.
    trusted = recipe.model.name
    training = TrainConfig.from_recipe(recipe)
    chain = [Stage("train", training, (), _training(force))]
    if recipe.train.dense_twin:
        twin = training.model_copy(update={"method": Choice(name="dense")})
        chain.append(Stage("train-dense", twin, (), _training(force)))
    chain += [
        Stage("freeze", FreezeConfig(), ("train",), _late("freeze")),
        Stage("convert", recipe.convert, ("freeze",), _late("convert")),
        Stage("export", recipe.export, ("convert",), _late("export", trusted_model=trusted)),
        Stage(
            "validate",
            ValidateConfig.from_recipe(recipe),
            ("freeze", "export"),
            _late("validate", trusted_model=trusted),
        ),
        Stage("bench", recipe.bench, ("export",), _late("bench")),
    ]
    chain.append(
        Stage("report", ReportConfig(title=recipe.name), tuple(stage.name for stage in chain), _late("report"))
    )
    return chain


def run(
    recipe: Recipe, out: Path, *, force: bool = False, announce: Callable[[Stage, bool], None] | None = None
) -> dict[str, Outcome]:
    """Run every stage of `recipe` into `out`, skipping those whose inputs, configuration and outputs are unchanged.

    Args:
        recipe: the resolved recipe.
        out: the run folder; each stage writes the folder of its name in it.
        force: run every stage again, and start an interrupted training over instead of resuming it.
        announce: called before each stage with the stage and whether it is skipped.

    Raises:
        RecipeError: the recipe asks for an export in int8 with nothing to calibrate on; it is known before training.
        ArtefactError: the folder of a stage that would run holds what sparsepipe did not write; nothing has run then.
        SparsepipeError: of a stage.
    """
    recipe.refuse_uncalibrated()
    chain = stages(recipe, force=force)
    outcomes: dict[str, Outcome] = {}
    for position, stage in enumerate(chain):
        inputs = {name: outcomes[name].artefact for name in stage.needs}
        folder = out / stage.name
        done = None if force else unchanged(stage, inputs, folder)
        if done is None and all(earlier.skipped for earlier in outcomes.values()):
            for later in chain[position:]:  # a folder that is refused must not cost a training first
                check_free(out / later.name, later.name.removesuffix("-dense"))
        if announce is not None:
            announce(stage, done is not None)
        started = time.monotonic()
        artefact = done or stage.run(stage.config, inputs, folder)
        outcomes[stage.name] = Outcome(artefact, done is not None, time.monotonic() - started)
    return outcomes


def unchanged(stage: Stage, inputs: Mapping[str, Artefact], folder: Path) -> Artefact | None:
    """The artefact in `folder`, if running `stage` again would make the same one; None otherwise.

    Compared are the digests of the inputs (the data and the user's network code, too), the version of sparsepipe, the
    configuration, but for what is `FREE_TO_CHANGE` in a training, and the files themselves against their digests.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        artefact = Artefact.read(folder)
        artefact.verify()
    except ArtefactError as error:
        log.warning("%s is made again: %s", stage.name, error)
        return None
    manifest = artefact.manifest
    expected = {name: inputs[name].digest for name in stage.needs}
    if "data" in manifest.inputs:
        expected["data"] = _data_fingerprint(stage.config)
    if isinstance(network := getattr(stage.config, "model", None), Choice):
        expected |= network_source(network.name)
    same = (
        manifest.inputs == expected
        and manifest.versions.get("sparsepipe") == package_versions().get("sparsepipe")
        and same_config(manifest.config, stage.config.model_dump(mode="json"))
    )
    return artefact if same else None


def _data_fingerprint(config: BaseModel) -> str:
    from sparsepipe.data import fingerprint

    choice = getattr(config, "data", None)
    return fingerprint(choice.name, choice.options) if isinstance(choice, Choice) else ""


def _training(force: bool) -> Run:
    def run_stage(config: BaseModel, inputs: Mapping[str, Artefact], out: Path) -> Artefact:
        resume = partial_of(out).exists() and not force
        return _late("train", resume=resume, restart=force)(config, inputs, out)

    return run_stage


def _late(module: str, **options: object) -> Run:
    def run_stage(config: BaseModel, inputs: Mapping[str, Artefact], out: Path) -> Artefact:
        function = partial(import_module(f"sparsepipe.stages.{module}").run, **options)
        artefact: Artefact = function(config, inputs, out)
        return artefact

    return run_stage
