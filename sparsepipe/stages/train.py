"""Train: from a recipe to the selected weights of a sparse network and their masks.

The validation split is held out from the training split, by seed, and decides which epoch is selected. The test split
is read once, at the very end, with the selected weights. An interrupted training leaves its checkpoint in
`<out>.partial` and can be resumed; on a CPU the result is the same bit for bit.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field

from sparsepipe import data, folders, launch
from sparsepipe.artefact import MANIFEST, Artefact, digest_file, draft
from sparsepipe.errors import ArtefactError, MissingExtraError, ModelError
from sparsepipe.plugins import is_plugin, load_plugin
from sparsepipe.recipe import Augment, Modifiers, Optimizer, Recipe, Schedule, Training
from sparsepipe.settings import NamedChoice, Section
from sparsepipe.training.interrupt import stop_request

if TYPE_CHECKING:
    from types import ModuleType

    from lightning_fabric import Fabric

log = logging.getLogger("sparsepipe")

FREE_TO_CHANGE = {"train.threads", "train.device", "train.checkpoint_every"}
"""Settings that a resumed training may change, and for which a finished one is not repeated: they decide the order in
which sums are rounded, and so the last bits, but not what is learnt. `sparsepipe run --force` trains anew."""


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says where a file does not fit on the disk, into the user's quota, or under a limit."""


class TrainConfig(Section):
    """The parts of a recipe that the trained network depends on."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: NamedChoice
    data: NamedChoice
    method: NamedChoice
    modifiers: Modifiers = ()
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


def run(
    config: BaseModel, inputs: Mapping[str, Artefact], out: Path, *, resume: bool = False, restart: bool = False
) -> Artefact:
    """Train a network; under torchrun as process 0, while the others `follow`.

    Args:
        config: a `TrainConfig`.
        inputs: none.
        out: folder to write.
        resume: go on from the checkpoint that an interrupted run left in `<out>.partial`, if there is one.
        restart: delete such a checkpoint when the first step of this training is due. With neither it is refused.

    Raises:
        SparsepipeError: data, network, method or settings do not fit together; the checkpoint is of another
            configuration or damaged, or is there and neither `resume` nor `restart` is set; the loss is not finite any
            more.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the checkpoint of the last finished step is written.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    assert isinstance(config, TrainConfig)
    trainer = _trainer()
    sources = _sources(config)
    partial = folders.partial_of(out)
    with trainer.device.connected(config.train.device, config.train.precision) as fabric:
        if resume and not partial.exists() and (done := _finished(out, config, sources)) is not None:
            log.info("This training is finished already.")
            fabric.broadcast(None)  # the others wait for an order
            return done
        with _only_one(partial):
            if not resume and not restart:
                refuse_interrupted(out)
            return _train(trainer, fabric, config, sources, out, partial, resume)


def refuse_interrupted(out: Path) -> None:
    """Keep what an interrupted run left for `out`.

    Raises:
        ArtefactError: there is a checkpoint.
        MissingExtraError: a package of the extra `train` is not installed.
    """
    partial = folders.partial_of(out)
    if _trainer().checkpoint.exists(partial):
        raise ArtefactError(
            "An interrupted training is here, which would be lost.",
            where=str(partial),
            advice="Go on with it: `sparsepipe train` with --resume; or start over: with --restart.",
        )


def follow(config: TrainConfig) -> None:
    """Take part in the training that process 0 leads: train on another share of the data, and write nothing.

    Raises:
        SparsepipeError: as `run`, or this process has other settings, data or network code than process 0.
    """
    trainer = _trainer()
    with trainer.device.connected(config.train.device, config.train.precision) as fabric:
        order = fabric.broadcast(None)
        if order is None:
            return
        _refuse_differing(
            order["identity"],
            _identity(config, _sources(config)),
            what="Process 0 was started with other settings",
            where=f"process {launch.rank()}",
            advice="Start all processes with the same recipe, data and code.",
        )
        trainer.train(config, fabric, None, order["identity"], order["state"])


def _train(
    trainer: ModuleType,
    fabric: Fabric,
    config: TrainConfig,
    sources: Mapping[str, str],
    out: Path,
    partial: Path,
    resume: bool,
) -> Artefact:
    identity = _identity(config, sources)
    state = _interrupted(trainer, partial, identity) if resume else None
    try:
        with draft(out, "train", config, sources, resumable=True) as building:
            fabric.broadcast({"identity": identity, "state": state})
            trainer.train(config, fabric, building, identity, state)
    except BaseException as error:
        resumable = trainer.checkpoint.exists(partial)
        if not resumable and folders.is_ours(partial):
            # torchrun sends SIGTERM as soon as another process has failed, which is when this one cleans up.
            with stop_request():
                folders.discard(partial)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise ArtefactError(
                f"The result of the training could not be written ({error.strerror}).",
                where=error.filename or str(partial),
                advice="Make room and train again with `--resume`: it goes on from the last checkpoint written."
                if resumable
                else "Make room and train again.",
            ) from error
        raise
    return Artefact.read(out, "train")


def _sources(config: TrainConfig) -> dict[str, str]:
    """Digests of what the training is made from."""
    return {"data": data.fingerprint(config.data.name, config.data.options), **network_source(config.model.name)}


def _identity(config: TrainConfig, sources: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what is computed, under the names that a refusal uses."""
    return {
        **_flat(config.model_dump(mode="json")),
        **{f"the {name}": digest for name, digest in sources.items()},
        "the number of processes": launch.world_size(),
    }


def network_source(name: str) -> dict[str, str]:
    """The digest of the module that makes the user's own network, which is imported; nothing for the zoo's networks."""
    if not is_plugin(name):
        return {}
    load_plugin(name, ModelError)
    source = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return {"network": digest_file(Path(source))} if source else {}


def _finished(out: Path, config: TrainConfig, sources: Mapping[str, str]) -> Artefact | None:
    """The complete result of the same training, if it stands in `out`."""
    if not (out / MANIFEST).is_file():
        return None
    done = Artefact.read(out, "train")
    same = done.manifest.inputs == sources and same_config(done.manifest.config, config.model_dump(mode="json"))
    return done if same else None


def same_config(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two configurations of a stage, as manifests hold them, differ in nothing but what is free to change."""
    one, other = _flat(before), _flat(now)
    keys = {key for key in {*one, *other} if one.get(key) != other.get(key)}
    if keys and keys <= FREE_TO_CHANGE:
        changes = ", ".join(f"{key} = {other.get(key)!r} (was {one.get(key)!r})" for key in sorted(keys))
        log.info(
            "What was trained before is kept, though %s; `run --force`, or `train` without --resume, trains it again.",
            changes,
        )
    return keys <= FREE_TO_CHANGE


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Dotted keys in which two configurations differ, but for what is free to change."""
    one, other = _flat(before), _flat(now)
    return {key for key in {*one, *other} if one.get(key) != other.get(key)} - FREE_TO_CHANGE


@contextmanager
def _only_one(partial: Path) -> Iterator[None]:
    """Keep a second training out of the folder while one is at work in it.

    Raises:
        ArtefactError: another process trains there.
    """
    path = partial.with_name(f".{partial.name}.lock")
    with folders.made(partial.parent), path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtefactError(
                "Another process is training into this folder.",
                where=str(partial),
                advice="Wait for it, or name another folder with --out.",
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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
    before = saved.get("identity")
    if not isinstance(before, Mapping):
        raise ArtefactError(
            "The checkpoint does not say what it is of.",
            where=str(partial),
            advice="Start over: `sparsepipe train` with --restart, or `sparsepipe run --force`.",
        )
    _refuse_differing(
        before,
        identity,
        what="The interrupted training was made with other settings",
        where=str(partial),
        advice="Resume it with the same recipe and data, or start over: `sparsepipe train` with --restart, or "
        "`sparsepipe run --force`.",
    )
    return saved


def _refuse_differing(before: Mapping[str, Any], now: Mapping[str, Any], *, what: str, where: str, advice: str) -> None:
    differing = [
        f"{key} = {before.get(key)!r} (now {now.get(key)!r})"
        for key in sorted({*before, *now} - FREE_TO_CHANGE)
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise ArtefactError(f"{what}: {', '.join(differing)}.", where=where, advice=advice)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
