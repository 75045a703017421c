"""Folders and files that a dataset's name points to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from sparsepipe.errors import DataError


def existing(kind: Literal["file", "folder"], argument: str) -> Path:
    """Raises DataError if there is no such file or folder."""
    path = Path(argument).expanduser()
    found = "file" if path.is_file() else "folder" if path.is_dir() else None
    if found != kind:
        what = f"This is a {found}, not a {kind}." if found else f"There is no such {kind}."
        raise DataError(what, where=argument, advice=f"Paths are relative to {Path.cwd()}.")
    return path


def listing(root: Path, files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Relative path, size in bytes and time of last change in ns of each file: changes when a file does."""
    found = []
    for file in files:
        status = file.stat()
        found.append((file.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns))
    return sorted(found)
