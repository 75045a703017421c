"""Artefacts: a folder with its files and a `manifest.json` that says what they are and what they were made from.

A folder under construction is called `NAME.partial` and is renamed to `NAME` once its manifest is written, so a
folder without the suffix is always complete. Names inside a manifest cannot lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsepipe import folders
from sparsepipe.environment import package_versions
from sparsepipe.errors import ArtefactError, first_line

MANIFEST = folders.MANIFEST
SCHEMA_VERSION = 1


class Manifest(BaseModel):
    """What `manifest.json` holds. Digests are `sha256:<hex>`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    versions: dict[str, str]
    metrics: dict[str, Any]
    created: str


@dataclass(frozen=True)
class Artefact:
    """A complete artefact folder, read back."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path, stage: str | None = None) -> Artefact:
        """Read the manifest of `folder`.

        Raises:
            ArtefactError: no manifest, a malformed one, or one of another stage than `stage`.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ArtefactError("This folder holds no manifest.json.", where=str(folder), advice=_advice(folder))
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except (ValidationError, ValueError) as error:
            raise ArtefactError(
                f"The manifest is not valid: {_first_problem(error)}.", where=str(path), advice="Make the folder again."
            ) from error
        if manifest.schema_version != SCHEMA_VERSION:
            raise ArtefactError(
                f"The manifest has schema version {manifest.schema_version}; this sparsepipe reads {SCHEMA_VERSION}.",
                where=str(path),
                advice="Make the folder again, or use the sparsepipe version that made it.",
            )
        if stage is not None and manifest.stage != stage:
            raise ArtefactError(
                f"This folder was made by the stage '{manifest.stage}', not by '{stage}'.", where=str(folder)
            )
        for name in manifest.outputs:
            _inside(folder, name)
        return cls(folder, manifest)

    @property
    def digest(self) -> str:
        """Digest of the stage and all output files: equal for equal content, whatever the time or the place."""
        listing = json.dumps([self.manifest.stage, sorted(self.manifest.outputs.items())])
        return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics

    def metric(self, name: str) -> Any:
        """The metric `name`.

        Raises:
            ArtefactError: the manifest does not hold it.
        """
        if name not in self.metrics:
            raise ArtefactError(
                f"The manifest does not hold the metric '{name}'.",
                where=str(self.folder),
                advice=f"Run the stage '{self.manifest.stage}' again.",
            )
        return self.metrics[name]

    def file(self, name: str) -> Path:
        """Path of the output file `name`.

        Raises:
            ArtefactError: the manifest does not list `name`, or the file is gone.
        """
        path = _inside(self.folder, name)
        if name not in self.manifest.outputs or not path.is_file():
            listed = ", ".join(sorted(self.manifest.outputs)) or "nothing"
            raise ArtefactError(
                f"The file '{name}' is missing.", where=str(self.folder), advice=f"The manifest lists: {listed}."
            )
        return path

    def verify(self) -> None:
        """Compare every output file with its digest.

        Raises:
            ArtefactError: a file is missing or was changed; the message names it.
        """
        for name, expected in self.manifest.outputs.items():
            if digest_file(self.file(name)) != expected:
                raise ArtefactError(
                    f"The file '{name}' was changed after it was written.",
                    where=str(self.folder),
                    advice="Make the folder again.",
                )


@dataclass
class Draft:
    """An artefact under construction: write files into `folder`, results into `metrics`."""

    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Delete what an interrupted run left in the folder."""
        folders.empty(self.folder)


@contextmanager
def draft(
    folder: Path, stage: str, config: BaseModel, inputs: Mapping[str, str], *, resumable: bool = False
) -> Iterator[Draft]:
    """Build an artefact in `folder`.partial and rename it when the block ends without an error.

    The metric `seconds`, the time that the block took, is added unless the block sets it.

    Args:
        folder: the final folder. An artefact that stands there is replaced only at the end.
        stage: name of the stage.
        config: its resolved configuration, stored in the manifest.
        inputs: name -> digest of what it was made from.
        resumable: keep what an interrupted run left in `folder`.partial, and keep it again if this run fails.

    Raises:
        ArtefactError: as `check_free`.
    """
    check_free(folder, stage)
    with folders.under_construction(folders.named(folder), resumable=resumable) as partial:
        building = Draft(partial)
        started = time.monotonic()
        yield building
        building.metrics.setdefault("seconds", time.monotonic() - started)
        _write_manifest(building, stage, config, inputs)


def copy(source: Artefact, folder: Path) -> Artefact:
    """Put a copy of `source`, with the same manifest, in the place of what `folder` holds.

    Raises:
        ArtefactError: as `check_free`.
    """
    check_free(folder, source.manifest.stage)
    with folders.under_construction(folders.named(folder)) as partial:
        for name in source.manifest.outputs:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.file(name), partial / name)
        shutil.copyfile(source.folder / MANIFEST, partial / MANIFEST)
    return Artefact.read(folder)


def check_free(folder: Path, stage: str) -> None:
    """Refuse to let `stage` write to `folder` where anything would be lost but an older output of that stage.

    An output that cannot be read makes way where it stands under its stage's name in a run folder.

    Raises:
        ArtefactError: `folder` holds files that no stage wrote, or that another stage wrote, or it is the current
            folder; or what has the name of its folder under construction was not made by sparsepipe.
    """
    folder = folders.named(folder)
    folders.refuse_foreign(folders.partial_of(folder))
    folders.refuse_foreign(folders.aside_of(folder))
    if not folder.exists():
        return
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ArtefactError(
            "The output folder is the current folder, which cannot be replaced.",
            where=str(folder),
            advice="Name a new folder with --out.",
        )
    if not (folder / MANIFEST).is_file():
        if folders.is_empty(folder):
            return
        raise ArtefactError(
            "The output folder exists and holds other files.", where=str(folder), advice="Name a new folder with --out."
        )
    try:
        present = Artefact.read(folder).manifest
    except ArtefactError as error:
        if folder.name.removesuffix("-dense") == stage and (folder.parent / folders.RECIPE_FILE).is_file():
            return
        raise ArtefactError(
            f"The output folder cannot be replaced, as nothing says what is in it. {error.what}",
            where=str(folder),
            advice="Delete it, or name another folder with --out.",
        ) from error
    if present.stage != stage:
        raise ArtefactError(
            f"The output folder holds the output of the stage '{present.stage}'.",
            where=str(folder),
            advice="Name another folder with --out.",
        )
    if others := sorted({*_files(folder)} - {*present.outputs}):
        raise ArtefactError(
            f"The output folder holds files that the stage '{stage}' did not write: {', '.join(others)}.",
            where=str(folder),
            advice="Move them elsewhere, or name another folder with --out.",
        )


def _write_manifest(building: Draft, stage: str, config: BaseModel, inputs: Mapping[str, str]) -> None:
    folders.remove_temporary(building.folder)
    manifest = Manifest(
        stage=stage,
        config=config.model_dump(mode="json"),
        inputs=dict(inputs),
        outputs={name: digest_file(building.folder / name) for name in _files(building.folder)},
        versions=package_versions(),
        metrics=building.metrics,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_text(building.folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _files(folder: Path) -> list[str]:
    """Names of all files in `folder`, relative to it, in their order; manifests and litter are none of its outputs."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, folders.MARK) and not folders.is_litter(path)
    ]


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for binary writing; rename it to `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file did not fit
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 under a temporary name, then rename."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON under a temporary name, then rename."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtefactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtefactError("There is no such file.", where=str(path)) from error
    except ValueError as error:
        raise ArtefactError(f"The file is not valid JSON: {first_line(error)}.", where=str(path)) from error


def digest_bytes(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def find(source: Path, stage: str) -> Artefact | None:
    """The artefact of `stage` that `source` means: `source` itself, or its folder named after the stage.

    Raises:
        ArtefactError: the artefact was changed after it was made, or what it was made from was made anew since.
    """
    for folder in (source, source / stage):
        if (folder / MANIFEST).is_file():
            artefact = Artefact.read(folder)
            if artefact.manifest.stage == stage:
                artefact.verify()
                _check_fresh(artefact)
                return artefact
    return None


def _check_fresh(artefact: Artefact) -> None:
    for name, digest in artefact.manifest.inputs.items():
        source = artefact.folder.absolute().parent / name
        if (source / MANIFEST).is_file() and Artefact.read(source).digest != digest:
            raise ArtefactError(
                f"This was made from another '{name}' than the one that stands beside it now.",
                where=str(artefact.folder),
                advice=f"Run `sparsepipe {artefact.manifest.stage}` again, or `sparsepipe run`.",
            )


def _inside(folder: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise ArtefactError(f"The manifest names '{name}', which leads out of its folder.", where=str(folder))
    path = folder / pure
    if path.exists() and not path.resolve().is_relative_to(folder.resolve()):
        raise ArtefactError(f"The file '{name}' is a link that leads out of its folder.", where=str(folder))
    return path


def _advice(folder: Path) -> str:
    if folders.partial_of(folder).is_dir():
        return "The run that makes it was interrupted; continue it with --resume."
    if not folder.exists():
        return "The folder does not exist."
    return "Name a run folder, or the output folder of one stage."


def _first_problem(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    return first_line(error)
