"""What is logged at the end of each epoch: a line of `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sparsepipe.artefact import write_text
from sparsepipe.errors import ArtefactError, MissingExtraError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
EVENTS = "tensorboard"

log = logging.getLogger("sparsepipe")


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; none if there is no such file.

    Raises:
        ArtefactError: a line is JSON, but no record with a `step`; or the file is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise ArtefactError("The log of the training is no text.", where=str(path)) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:  # the run was killed while it wrote this line
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ArtefactError(
                "The line is no record of an epoch: it must be a JSON object with an integer 'step'.",
                where=f"{path}, line {number}",
                advice="Delete this line and what follows, or train from the start.",
            )
        records.append(record)
    return records


class MetricsLog:
    """Appends one record an epoch.

    A full disk does not end the training: there is a warning, and what could not be written is when there is room.

    Args:
        folder: where `metrics.jsonl` and the folder `tensorboard` lie.
        step: the step that training starts from; what an interrupted run logged after it is forgotten.

    Raises:
        ArtefactError: `metrics.jsonl` is malformed.
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / FILE
        self.records = [record for record in read(self._path) if record["step"] <= step]
        """All epochs so far, in order."""
        self._rewrite()
        self._events = _Events(folder / EVENTS, step)
        self._failing = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one epoch. `record` holds `step`, numbers, None for what is unknown, and dicts of numbers."""
        self.records.append(dict(record))
        self._events.pending.append(record)
        try:
            self._append(record)
            self._events.write()
        except OSError as error:
            if not self._failing:
                log.warning("The log of step %d could not be written (%s).", record["step"], error.strerror or error)
            self._failing = True
        else:
            self._failing = False

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._failing:  # the file may end in half a line
            self._rewrite()
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def _rewrite(self) -> None:
        write_text(self._path, "".join(map(_line, self.records)))

    def sync(self) -> None:
        """Wait until the records are on the disk: a checkpoint that comes after them counts on them."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._failing:
            with suppress(OSError):  # what has room now; writing the result will tell if nothing has
                self._rewrite()
        self._events.close()


class _Events:
    """Records as TensorBoard events; what a full disk kept out is written once there is room.

    TensorBoard's writer cannot be used any more once it has failed, so another one takes its place.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self.pending: list[Mapping[str, Any]] = []
        """Records that `write` has to write."""
        self._writer: SummaryWriter | None = _summary_writer(folder, step)

    def write(self) -> None:
        """Write what is pending.

        Raises:
            OSError: some of it could not be written; all of it stays pending.
        """
        try:
            if self._writer is None:
                self._writer = _summary_writer(self._folder, self.pending[0]["step"] - 1)
            for record in self.pending:
                _add_scalars(self._writer, record)
            self._writer.flush()
        except OSError:
            self.close()
            raise
        self.pending.clear()

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._writer = None


def _add_scalars(writer: SummaryWriter, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        for tag, number in value.items() if isinstance(value, Mapping) else ((None, value),):
            if number is not None and name != "step":
                writer.add_scalar(f"{name}/{tag}" if tag else name, number, record["step"])


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "Logging a training") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
