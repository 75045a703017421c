"""Train: from a recipe to the selected weights of a sparse network and their masks.

The validation split is held out from the training split, by seed, and decides which epoch is selected. The test split
is read once, at the very end, with the selected weights. An interrupted training leaves its checkpoint in
`<out>.partial` and can be resumed; on a CPU the result is the same bit for bit.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from sparsepipe import data
from sparsepipe.artefact import Artefact, draft
from sparsepipe.errors import ArtefactError, MissingExtraError
from sparsepipe.recipe import Augment, NamedChoice, Optimizer, Recipe, Schedule, Section, Training

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger("sparsepipe")

FREE_TO_CHANGE = {"train.threads", "train.device", "train.checkpoint_every"}
"""Settings that a resumed training may change: they do not decide what is computed."""


class TrainConfig(Section):
    """The parts of a recipe that the trained network depends on."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: NamedChoice
    data: NamedChoice
    method: NamedChoice
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Training = Training()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> TrainConfig:
        # The twin is another run of this stage, so whether there is one must not make this run a different one.
        training = recipe.train.model_copy(update={"dense_twin": False})
        sections = {name: getattr(recipe, name) for name in cls.model_fields}
        return cls(**{**sections, "train": training})


def run(config: BaseModel, inputs: Mapping[str, Artefact], out: Path, *, resume: bool = False) -> Artefact:
    """Train a network.

    Args:
        config: a `TrainConfig`.
        inputs: none.
        out: folder to write.
        resume: go on from the checkpoint that an interrupted run left in `<out>.partial`, if there is one. Without it
            what such a run left is deleted.

    Raises:
        SparsepipeError: data, network, method or settings do not fit together; the checkpoint is of another
            configuration or damaged; the loss is not finite any more.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the checkpoint of the last finished step is written.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    assert isinstance(config, TrainConfig)
    trainer = _trainer()
    fingerprint = data.fingerprint(config.data.name, config.data.options)
    identity = {**_flat(config.model_dump(mode="json")), "the data": fingerprint}
    partial = out.absolute().with_name(out.name + ".partial")
    state = _interrupted(trainer, partial, identity) if resume else None
    if state is None and partial.exists():
        if not resume:
            log.info("The interrupted training in %s is discarded (--resume would go on with it).", partial)
        shutil.rmtree(partial)
    try:
        with draft(out, "train", config, {"data": fingerprint}, resumable=True) as building:
            trainer.train(config, building, identity, state)
    except BaseException:
        if not trainer.checkpoint.exists(partial):  # nothing that could be resumed
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return Artefact.read(out, "train")


def _trainer() -> ModuleType:
    # GNU OpenMP reads this when torch is loaded. By default its threads wait for each other at full speed for so long
    # that one busy core of another program makes training many times slower; this waits for about 0.1 ms, then sleeps.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        from sparsepipe.stages import trainer
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("sparsepipe"):
            raise
        raise MissingExtraError(error.name, "train", "Training") from error
    return trainer


def _interrupted(trainer: ModuleType, partial: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that an interrupted run left, if it was of the same configuration."""
    saved: dict[str, Any] | None = trainer.checkpoint.load(partial)
    if saved is None:
        log.info("There is no interrupted training to resume; starting from the beginning.")
        return None
    before = saved["identity"]
    differing = [
        f"{key} = {before.get(key)!r} (now {identity.get(key)!r})"
        for key in sorted({*before, *identity} - FREE_TO_CHANGE)
        if before.get(key) != identity.get(key)
    ]
    if differing:
        raise ArtefactError(
            f"The interrupted training was made with other settings: {', '.join(differing)}.",
            where=str(partial),
            advice="Resume it with the same recipe and data, or start over: `sparsepipe train` without --resume, or "
            "`sparsepipe run --force`.",
        )
    return saved


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
