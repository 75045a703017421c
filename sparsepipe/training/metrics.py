"""What is logged at the end of each epoch: a line of `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sparsepipe.artefact import write_text
from sparsepipe.errors import ArtefactError, MissingExtraError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE = "metrics.jsonl"
EVENTS = "tensorboard"


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
        write_text(self._path, "".join(map(_line, self.records)))
        self._events = _summary_writer(folder / EVENTS, step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one epoch. `record` holds `step`, numbers, None for what is unknown, and dicts of numbers."""
        self.records.append(dict(record))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        for name, value in record.items():
            for tag, number in value.items() if isinstance(value, Mapping) else ((None, value),):
                if number is not None and name != "step":
                    self._events.add_scalar(f"{name}/{tag}" if tag else name, number, record["step"])
        self._events.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "Logging a training") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
