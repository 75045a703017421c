"""Folders that come into being whole: made as `NAME.partial`, then put in the place of an older one by rename.

Nothing is deleted but what sparsepipe made: a folder under construction bears a mark, and a complete one a manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from sparsepipe.errors import ArtefactError

MANIFEST = "manifest.json"
RECIPE_FILE = "recipe.toml"
"""In a run folder, beside the folders of its stages."""
MARK = ".sparsepipe"
"""An empty file that says of a folder under construction whose it is."""
CHECKPOINTS = "checkpoint*.safetensors"
"""Say the same: the trainings of earlier versions left no mark."""
LITTER = (".DS_Store", "._*", "Thumbs.db", "desktop.ini")
"""What file managers leave in the folders that they show; nobody misses it."""


def named(folder: Path) -> Path:
    """`folder` as an absolute path with a name of its own, so that another can stand beside it: not `.` or `..`."""
    return folder.resolve() if folder.name in ("", "..") else folder.absolute()


def partial_of(folder: Path) -> Path:
    """Where `folder` is made, and where a run that was interrupted leaves what it has."""
    folder = named(folder)
    return folder.parent / f"{folder.name}.partial"


def aside_of(folder: Path) -> Path:
    """Where an old folder waits while a new one takes its place; a run that is killed just then leaves it there."""
    folder = named(folder)
    return folder.parent / f".{folder.name}.old"


def is_litter(path: Path) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in LITTER)


def is_empty(folder: Path) -> bool:
    """Whether `folder` is one that holds nothing but litter."""
    return folder.is_dir() and all(is_litter(path) for path in folder.iterdir())


def is_ours(folder: Path) -> bool:
    """Whether `folder` may be deleted: sparsepipe made it, or it is empty."""
    known = (folder / MARK).is_file() or (folder / MANIFEST).is_file() or any(folder.glob(CHECKPOINTS))
    return known or is_empty(folder)


def refuse_foreign(folder: Path) -> None:
    """Keep `folder`, which has to make way, unless it is ours.

    Raises:
        ArtefactError: it exists, and sparsepipe did not make it.
    """
    if folder.exists() and not is_ours(folder):
        raise ArtefactError(
            "This is in the way, and sparsepipe did not make it.",
            where=str(folder),
            advice="Move it elsewhere, or name another folder with --out.",
        )


def empty(folder: Path, *, but: frozenset[str] = frozenset({MARK})) -> None:
    """Delete what `folder` holds, except for the names `but`."""
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def discard(folder: Path) -> None:
    """Delete `folder`, if it exists.

    Raises:
        ArtefactError: it is not ours.
    """
    refuse_foreign(folder)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        # What says whose it is goes last: after a kill it must be known still.
        (folder / MARK).touch()
        empty(folder, but=frozenset({MARK, MANIFEST}))
        shutil.rmtree(folder)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make `folder` and those above it; what was made here and is empty in the end goes again."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def under_construction(folder: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yields the folder to write into, which becomes `folder` when the block ends without an error.

    Args:
        folder: the final folder, as `named` gives it; what stands there is replaced at the end.
        resumable: keep what an interrupted run left, and keep it again if the block fails.

    Raises:
        ArtefactError: what has to make way is not ours.
    """
    partial, aside = partial_of(folder), aside_of(folder)
    refuse_foreign(partial)
    refuse_foreign(aside)
    with made(folder.parent):
        if not resumable:
            discard(partial)
        partial.mkdir(exist_ok=True)
        (partial / MARK).touch()
        remove_temporary(partial)
        if folder.exists():
            discard(aside)
        try:
            yield partial
            _put_in_place(partial, folder, aside)
        except BaseException:
            if not resumable:
                with suppress(OSError):
                    discard(partial)
            raise


def _put_in_place(partial: Path, folder: Path, aside: Path) -> None:
    (partial / MARK).unlink()
    # The old folder steps aside by rename, so there is no moment in which its files are half gone.
    if folder.exists():
        discard(aside)
        os.replace(folder, aside)
    os.replace(partial, folder)
    with suppress(OSError):
        discard(aside)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    for leftover in folder.rglob(".*"):
        if leftover.is_file() and leftover.name != MARK:
            leftover.unlink()
