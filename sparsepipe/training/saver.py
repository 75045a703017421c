"""When a training writes its checkpoints, and what happens where the disk has no room for one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsepipe.training import checkpoint

SECONDS = 30.0
"""Between two checkpoints, if no number of steps is given: a killed training loses at most this much work."""

SHARE = 0.05
"""Of all time that may go into checkpoints; where writing is slow, they become rarer than every `SECONDS`."""

log = logging.getLogger("sparsepipe")


class Saver:
    """Writes the checkpoints of one training.

    Args:
        folder: where they lie; None in the processes of a distributed training that do not write.
        step: the step that training starts from.
        every: optimizer steps between two; 0 leaves it to the time that has passed.
    """

    def __init__(self, folder: Path | None, step: int, every: int) -> None:
        self._folder = folder
        self._every = every
        self._step = step
        self._kept = step or None
        self._next = time.monotonic() + SECONDS
        self._failing = False

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, `step` steps being done; never in a process that does not write."""
        if self._folder is None:
            return False
        return step - self._step >= self._every if self._every else time.monotonic() >= self._next

    def save(self, step: int, state: Callable[[], Mapping[str, Any]]) -> bool:
        """Write what `state` returns, and tell whether that went well; every process has to call this.

        A full disk does not end a training that may have taken days: there is a warning, the checkpoint before this
        one is kept, and the next one will be tried when it is due.
        """
        started = time.monotonic()
        whole = state()
        written = self._folder is not None and self._write(self._folder, step, whole)
        self._step = step
        ended = time.monotonic()
        self._next = ended + max(SECONDS, (ended - started) / SHARE)
        return written

    def _write(self, folder: Path, step: int, state: Mapping[str, Any]) -> bool:
        try:
            checkpoint.save(folder, state)
        except OSError as error:
            if not self._failing:
                log.warning(
                    "The checkpoint of step %d could not be written (%s); training goes on, and %s.",
                    step,
                    error.strerror or error,
                    "there is none before it" if self._kept is None else f"that of step {self._kept} is kept",
                )
            self._failing = True
            return False
        if self._failing:
            log.warning("Checkpoints can be written again: that of step %d is.", step)
        self._failing = False
        self._kept = step
        return True
