"""Progress of anything that takes longer than a moment: bars with an ETA on a terminal, sparse log lines elsewhere.

Everything goes to stderr, so that stdout stays free for results.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsepipe import launch

log = logging.getLogger("sparsepipe")
console = Console(stderr=True)

LOG_EVERY_SECONDS = 15.0
T = TypeVar("T")

_running: ContextVar[bool] = ContextVar("running", default=False)


class Bar:
    """One running task: call `advance` as it goes on; `note` shows beside the bar."""

    def __init__(self, description: str, total: int, progress: Progress | None, *, silent: bool = False) -> None:
        self._silent = silent
        self._description = description
        self._total = total
        self._done = 0
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="") if progress else None
        self._started = self._logged = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self._done += count
        if self._silent:
            return
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)
            if note is not None:
                self._progress.update(self._task, note=note)
        elif (now := time.monotonic()) - self._logged >= LOG_EVERY_SECONDS and self._done:
            self._logged = now
            remaining = (now - self._started) / self._done * max(self._total - self._done, 0)
            log.info(
                "%s: %d/%d, about %.0f s left%s",
                self._description,
                self._done,
                self._total,
                remaining,
                f", {note}" if note else "",
            )


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """Show one progress bar while the block runs. A bar inside of another one is silent: the outer one has the ETA.

    Args:
        description: what is going on, in a few words.
        total: how many units `advance` will count.
    """
    if _running.get():
        yield Bar(description, total, None, silent=True)
        return
    token = _running.set(True)
    try:
        with _shown(description, total) as outermost:
            yield outermost
    finally:
        _running.reset(token)


@contextmanager
def _shown(description: str, total: int) -> Iterator[Bar]:
    if not console.is_terminal or launch.rank() > 0:
        yield Bar(description, total, None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(description, total, progress)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Iterate over `items` under a progress bar."""
    with bar(description, total) as running:
        for item in items:
            yield item
            running.advance()
