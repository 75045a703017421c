"""What is logged at the end of each epoch: a line of `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from sparsepipe.artefact import write_text
from sparsepipe.errors import ArtefactError, MissingExtraError
from sparsepipe.sparsity.history import MaskHistory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
MAX_BUCKETS = 64
"""Buckets of one histogram in TensorBoard."""
MAX_PICTURE = (256, 1024)
"""Rows and columns of one picture in TensorBoard."""

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
        self._shown: int | None = None
        self._failing = False

    def write(self, record: Mapping[str, Any], history: MaskHistory | None = None) -> None:
        """Log one epoch.

        Args:
            record: `step`, numbers, None for what is unknown, and dicts of numbers.
            history: TensorBoard also gets how old the active weights of each sparse layer are (in mask updates) and,
                where the film has a new frame, the mask of its layer.
        """
        self.records.append(dict(record))
        self._events.pending.append(self._entry(record, history))
        try:
            self._append(record)
            self._events.write()
        except OSError as error:
            self._warn(error)
        else:
            self._failing = False

    def _warn(self, error: OSError) -> None:
        if not self._failing:
            step = self.records[-1]["step"] if self.records else 0
            log.warning("The log of step %d could not be written (%s).", step, error.strerror or error)
        self._failing = True

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
        try:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:  # some file systems find out only now that there is no room
            self._warn(error)

    def _entry(self, record: Mapping[str, Any], history: MaskHistory | None) -> _Entry:
        entry = _Entry(record)
        if history is not None:
            entry.histograms = {f"age/{layer}": _histogram(history.ages(layer)) for layer in history.masks.counters}
            film = history.film
            if film is not None and film.rounds[-1] != self._shown:
                self._shown = film.rounds[-1]
                entry.pictures = {f"mask/{film.layer}": _picture(history.masks[film.layer])}
        return entry

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._failing:
            with suppress(OSError):  # what has room now; writing the result will tell if nothing has
                self._rewrite()
        self._events.close()


@dataclass
class _Entry:
    """What TensorBoard gets at the end of an epoch; histograms and pictures by their tags."""

    record: Mapping[str, Any]
    histograms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


class _Events:
    """Entries as TensorBoard events; what a full disk kept out is written once there is room.

    TensorBoard's writer cannot be used any more once it has failed, so another one takes its place.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self.pending: list[_Entry] = []
        """Entries that `write` has to write."""
        self._writer: SummaryWriter | None = _summary_writer(folder, step)

    def write(self) -> None:
        """Write what is pending.

        Raises:
            OSError: some of it could not be written; all of it stays pending.
        """
        try:
            if self._writer is None:
                self._writer = _summary_writer(self._folder, self.pending[0].record["step"] - 1)
            for entry in self.pending:
                _add(self._writer, entry)
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


def _add(writer: SummaryWriter, entry: _Entry) -> None:
    step = entry.record["step"]
    for name, value in entry.record.items():
        for tag, number in value.items() if isinstance(value, Mapping) else ((None, value),):
            if number is not None and name != "step":
                writer.add_scalar(f"{name}/{tag}" if tag else name, number, step)
    for tag, histogram in entry.histograms.items():
        writer.add_histogram_raw(tag, global_step=step, **histogram)
    for tag, picture in entry.pictures.items():
        writer.add_image(tag, picture, step, dataformats="HW")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _histogram(counts: Sequence[int]) -> dict[str, Any]:
    """What TensorBoard stores of a histogram, from the number of weights of each age."""
    number, values = np.array(counts), np.arange(len(counts))
    found = np.flatnonzero(number) if number.any() else values[:1]
    edges = np.linspace(0, len(counts), min(len(counts), MAX_BUCKETS) + 1).astype(int)
    return {
        "min": int(found[0]),
        "max": int(found[-1]),
        "num": int(number.sum()),
        "sum": int(number @ values),
        "sum_squares": int(number @ values**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": np.add.reduceat(number, edges[:-1]).tolist(),
    }


def _picture(mask: Tensor) -> Tensor:
    """A mask [O, I, *k] as a grey image [O, I*k*k], dark where it is active, shrunk by density if it is large."""
    density = mask.float().reshape(1, mask.shape[0], -1)
    rows, columns = (min(side, most) for side, most in zip(density.shape[1:], MAX_PICTURE, strict=True))
    return (255 * (1 - adaptive_avg_pool2d(density, (rows, columns))[0])).to(torch.uint8).cpu()


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "Logging a training") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
