"""What the artefacts of a run say, read into typed records: the only place that knows the keys of their metrics.

A key that is absent or null becomes None, keys that are not shown are ignored, and a value of the wrong type is an
error that names it. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sparsepipe.artefact import Artefact
from sparsepipe.errors import ArtefactError

STAGES = ("train", "train-dense", "freeze", "convert", "export", "validate", "bench")
"""Keys of the mapping of artefacts, in the order of the chain."""

METRICS_FILE = "metrics.jsonl"


def _only_finite(value: Any) -> Any:
    """NaN and infinities, which JSON cannot hold portably, mean the same as a missing value."""
    is_odd = isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
    return None if is_odd else value


Number = Annotated[float | None, BeforeValidator(_only_finite)]
Count = Annotated[int | None, Field(ge=0)]


class Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Estimate(Record):
    """A measured value and its interval; unit and level are those of the field that holds it."""

    value: float
    low: Number = None
    high: Number = None


class Accuracy(Estimate):
    correct: Count = None
    samples: Count = None


class Epoch(Record):
    """One line of `metrics.jsonl`."""

    epoch: int
    step: int | None = None
    lr: Number = None
    train_loss: Number = None
    train_accuracy: Number = None
    validation_loss: Number = None
    validation_accuracy: Number = None
    sparsity: Number = None
    exploration_rate: Number = None
    drop_fraction: Number = None
    density: dict[str, Number] = {}
    mask_updates: Count = None
    churn: Number = None
    age: dict[str, Number] = {}
    dropped: dict[str, Number] = {}
    grown: dict[str, Number] = {}
    exploration: dict[str, Number] = {}
    age_median: dict[str, Number] = {}
    age_p90: dict[str, Number] = {}
    inactive_gradient_norm: dict[str, Number] = {}
    inactive_gradient_mean: dict[str, Number] = {}


class Training(Record):
    """Metrics of the stage `train`; accuracies are fractions, `seconds` is the wall time of training."""

    test_accuracy: Number = None
    test_correct: Count = None
    test_samples: Count = None
    validation_accuracy: Number = None
    epoch_selected: int | None = None
    sparsity: Number = None
    nnz: Count = None
    weights: Count = None
    parameters: Count = None
    exploration_rate: Number = None
    mask_updates: Count = None
    inference_flops: Number = None
    inference_flops_multiple: Number = None
    training_flops: Number = None
    training_flops_multiple: Number = None
    dense_gradient_every: Count = None
    dense_macs: Number = None
    seconds: Number = None
    data: dict[str, Any] = {}


class Layer(Record):
    """One weight: `size` elements of which `nnz` are not zero; sizes in bytes."""

    name: str
    shape: tuple[int, ...] = ()
    nnz: Count = None
    size: Count = None
    op: str | None = None
    format: str | None = None
    block: Any = None
    dense_bytes: Count = None
    bytes: Count = None
    sparse: bool | None = None
    reason: str | None = None

    @property
    def density(self) -> float | None:
        """Fraction of weights that are not zero."""
        return min(self.nnz / self.size, 1.0) if self.nnz is not None and self.size else None


class Frozen(Record):
    sparsity: Number = None
    nnz: Count = None
    weights: Count = None
    digest: str | None = None
    layers: list[Layer] = []


class Converted(Record):
    bytes_before: Count = None
    bytes_after: Count = None
    layers: list[Layer] = []


class ExportedFile(Record):
    name: str
    bytes: Count = None
    target: str | None = None
    precision: str | None = None


class Exported(Record):
    """`files` is keyed by target, with `.int8` behind it for an int8 file beside one in fp32."""

    files: dict[str, ExportedFile] = {}
    sparsity: Number = None
    opset: int | None = None
    layers: list[Layer] = []


class Divergence(Record):
    layer: str
    max_abs: Number = None
    max_relative: Number = None


class NoisyLayer(Record):
    layer: str
    sqnr_db: Number = None


class Candidate(Record):
    """One file compared with its reference; `agreement` is the share of samples with the same top class.

    Of int8 files, `rms_of_range` is the error in units of the output's range, `drop_points` the accuracy that is lost.
    """

    file: str
    reference: str | None = None
    samples: Count = None
    max_abs: Number = None
    max_relative: Number = None
    agreement: Number = None
    passed: bool | None = None
    accuracy: Accuracy | None = None
    reference_accuracy: Accuracy | None = None
    first_divergence: Divergence | None = None
    precision: str | None = None
    rms_of_range: Number = None
    drop_points: Estimate | None = None
    noisiest_layers: list[NoisyLayer] = []
    note: str | None = None


class Validated(Record):
    passed: bool | None = None
    candidates: list[Candidate] = []
    data: str | None = None
    note: str | None = None


class Timing(Record):
    """One file at one setting: latencies in milliseconds, memory and sizes in bytes."""

    file: str
    target: str | None = None
    precision: str | None = None
    threads: int | None = None
    batch: int | None = None
    samples: Count = None
    latency_ms: dict[str, Estimate | None] = {}
    speedup: Estimate | None = None
    speedup_over_int8: Estimate | None = None
    cpu_ms: Number = None
    load_ms: Number = None
    first_call_ms: Number = None
    rss_bytes: Number = None
    peak_rss_bytes: Number = None
    file_bytes: Count = None
    self_difference: Number = None
    """Between the medians of the even and the odd blocks of calls, as a fraction: the noise of the measurement."""
    noisy: bool | None = None
    note: str | None = None

    @property
    def setting(self) -> tuple[int | None, int | None]:
        return self.threads, self.batch

    def percentile(self, name: str) -> Estimate | None:
        return self.latency_ms.get(name)


class Conditions(Record):
    note: str


class Verdict(Record):
    """How far two processes of the baseline were apart at one setting, as a fraction."""

    threads: int
    batch: int
    difference: Number
    limit: float
    noisy: bool
    blocks: int
    blocks_disturbed: int
    conditions: Conditions


class Benchmark(Record):
    baseline: str | None = None
    results: list[Timing] = []
    verdicts: list[Verdict] = []
    environment: dict[str, Any] = {}

    @property
    def noisy(self) -> bool:
        """Whether a measurement varied, or two processes of one file differed too much."""
        return any(result.noisy for result in self.results) or any(verdict.noisy for verdict in self.verdicts)

    def is_baseline(self, timing: Timing) -> bool:
        return self.baseline is not None and self.baseline in (timing.file, timing.target)


@dataclass(frozen=True)
class Contents:
    """Everything that is known of a run; None (or an empty tuple) where the artefact is absent."""

    artefacts: Mapping[str, Artefact]
    train: Training | None
    dense: Training | None
    freeze: Frozen | None
    convert: Converted | None
    export: Exported | None
    validate: Validated | None
    bench: Benchmark | None


RecordT = TypeVar("RecordT", bound=Record)


def read(artefacts: Mapping[str, Artefact]) -> Contents:
    """Read the metrics of the artefacts, keyed by stage as in `STAGES`; any of them may be absent.

    Raises:
        ArtefactError: a metric has the wrong type; the message names the folder and the key.
    """

    def metrics(stage: str, record: type[RecordT]) -> RecordT | None:
        artefact = artefacts.get(stage)
        if artefact is None:
            return None
        return _check(record, artefact.metrics, where=str(artefact.folder))

    return Contents(
        artefacts={stage: artefacts[stage] for stage in STAGES if stage in artefacts},
        train=metrics("train", Training),
        dense=metrics("train-dense", Training),
        freeze=metrics("freeze", Frozen),
        convert=metrics("convert", Converted),
        export=metrics("export", Exported),
        validate=metrics("validate", Validated),
        bench=metrics("bench", Benchmark),
    )


def read_epochs(artefact: Artefact | None) -> tuple[Epoch, ...]:
    """The lines of `metrics.jsonl` of a training artefact; none where the artefact or the file is absent.

    Raises:
        ArtefactError: a line is not JSON or lacks its epoch; the message names the line.
    """
    if artefact is None or METRICS_FILE not in artefact.manifest.outputs:
        return ()
    path = artefact.file(METRICS_FILE)
    lines = enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
    return tuple(_epoch(line, path, number) for number, line in lines if line.strip())


def _epoch(line: str, path: Path, number: int) -> Epoch:
    where = f"{path}, line {number}"
    try:
        table = json.loads(line)
    except ValueError as error:
        raise ArtefactError("The line is not valid JSON.", where=where, advice="Run the stage again.") from error
    return _check(Epoch, table, where=where)


def _check(record: type[RecordT], table: Any, *, where: str) -> RecordT:
    try:
        return record.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the value"
        raise ArtefactError(
            f"The metric '{key}' cannot be shown: {problem['msg'].lower()}.", where=where, advice="Run the stage again."
        ) from error
