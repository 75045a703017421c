"""Folders and files that a dataset's name points to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sparsepipe.errors import DataError


def existing_folder(argument: str) -> Path:
    """Raises DataError if there is no such folder."""
    path = Path(argument).expanduser()
    if not path.is_dir():
        what = "This is a file, not a folder." if path.exists() else "There is no such folder."
        raise DataError(what, where=argument, advice=f"Paths are relative to {Path.cwd()}.")
    return path


def existing_file(argument: str) -> Path:
    """Raises DataError if there is no such file."""
    path = Path(argument).expanduser()
    if not path.is_file():
        what = "This is a folder, not a file." if path.is_dir() else "There is no such file."
        raise DataError(what, where=argument, advice=f"Paths are relative to {Path.cwd()}.")
    return path


def listing(root: Path, files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Relative path, size in bytes and time of last change in ns of each file: changes when a file does."""
    found = []
    for file in files:
        status = file.stat()
        found.append((file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    return sorted(found)
