"""What all results of `sparsepipe bench` have in common: one file at one setting, read from any of them.

The kinds are: a benchmark of files (`results`, `baseline`), what-if (`results` of pairs `dense` and `sparse`) and
suites (`rows`). A profile (`sparsepipe profile`) has layers instead, and no records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any, NamedTuple

from sparsepipe.errors import ArtefactError

Table = Mapping[str, Any]
DENSE, INT8, SPARSE = "dense", "int8", "sparse"
FP32 = "fp32"
WALL, CPU = "wall", "cpu"
OURS = "sparsepipe"
"""What the names of runtimes with sparsepipe's kernels begin with."""
SKIPPING = ("mnn", "deepsparse")
"""Other runtimes that leave out the products with zeros."""


class SparseForm(NamedTuple):
    """What the sparse files of a row of the suite `kernels` are; written `4x1` where they are fp32, or `int8-4x4`."""

    precision: str
    pattern: str

    @classmethod
    def parse(cls, name: str) -> SparseForm:
        pattern = name.removeprefix(f"{INT8}-")
        return cls(FP32 if pattern == name else INT8, pattern)

    @classmethod
    def of(cls, row: Table) -> SparseForm:
        """That of a row; rows from before there was int8 do not tell their precision."""
        return cls(row.get("precision", FP32), row["pattern"])

    def __str__(self) -> str:
        return self.pattern if self.precision == FP32 else f"{self.precision}-{self.pattern}"


@dataclass(frozen=True)
class Record:
    """One file of one network at one setting.

    Attributes:
        network: its name; empty where a result has only one.
        label: of the file in its result.
        kind: "dense", "int8" (dense int8) or "sparse".
        pattern: of the zeros, of a row of a suite as `SparseForm` writes it; empty where it is not known.
        sparsity: share of zeros; None where it is not known.
        threads: of one operator.
        batch: size of the first dimension.
        clock: "wall" in a process of its own, or "cpu" time of calls in turn in one process.
        latency_ms: `value`, `low` and `high` (None where there is no interval) of a call: the median for "wall", the
            best decile for "cpu".
        tail_ms: the same of p99.
        speedup: the same, over the dense file measured beside it.
        speedup_over_int8: the same, over the dense int8 file measured beside it.
        cpu_ms: of one call in all threads.
        memory_bytes: resident, at rest after the calls.
        file_bytes: of the file.
        load_ms: to open it in a fresh process.
        first_call_ms: of the first call there.
        noisy: whether the machine was found noisy.
        note: what must be said of it; the reason where nothing could be measured.
        runtime: what ran it where several runtimes stand beside each other, else empty.
        source: the result that it stands in, where there are several.
        baseline: label of the file that `speedup` is over, where that is chosen among files.
    """

    network: str
    label: str
    kind: str
    pattern: str
    sparsity: float | None
    threads: int
    batch: int
    clock: str
    latency_ms: Table | None
    tail_ms: Table | None = None
    speedup: Table | None = None
    speedup_over_int8: Table | None = None
    cpu_ms: float | None = None
    memory_bytes: float | None = None
    file_bytes: int | None = None
    load_ms: float | None = None
    first_call_ms: float | None = None
    noisy: bool = False
    note: str | None = None
    runtime: str = ""
    source: str = ""
    baseline: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What names the same measurement in two results."""
        return self.network, self.label, self.pattern, self.sparsity, self.threads, self.batch, self.clock

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def read(result: Any, *, where: str) -> list[Record]:
    """The records of a result, in its order.

    Args:
        result: the JSON that `sparsepipe bench` wrote, of any form.
        where: what to call it in an error.

    Raises:
        ArtefactError: it is no result of a benchmark.
    """
    kind = kind_of(result)
    try:
        if kind in READERS:
            return list(READERS[kind](result))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtefactError(f"The result is damaged: {error!r}.", where=where, advice="Measure again.") from error
    raise ArtefactError(
        "This is no result of a benchmark.", where=where, advice="Name a file that `sparsepipe bench --out` wrote."
    )


def kind_of(result: Any) -> str:
    """A key of `READERS`, "profile", or "" for something else."""
    if not isinstance(result, Mapping):
        return ""
    if result.get("kind") == "profile":
        return "profile"
    if isinstance(result.get("rows"), list):
        return "suite"
    rows = result.get("results")
    if not isinstance(rows, list):
        return ""
    return "whatif" if all(isinstance(row, Mapping) and "sparse" in row for row in rows) and rows else "files"


def _files(result: Table) -> Iterator[Record]:
    baseline = result.get("baseline")
    for row in result["results"]:
        record = _process("", row["file"], _kind_of_file(row, baseline), "", None, row)
        yield replace(record, baseline=baseline or "")


def _kind_of_runtime(name: str) -> str:
    if name.startswith(OURS):
        return SPARSE
    return INT8 if "int8" in name else SPARSE if name in SKIPPING else DENSE


def _kind_of_file(row: Table, baseline: str | None) -> str:
    """By what runs it, or by what the export says of itself; a file from elsewhere says nothing, so by its name."""
    if row.get("runtime"):
        return _kind_of_runtime(row["runtime"])
    target, precision = row.get("target"), row.get("precision")
    if target == DENSE and precision == INT8:
        return INT8
    if row["file"] == baseline or target == DENSE:
        return DENSE
    return INT8 if target is None and "int8" in row["file"] else SPARSE


def _what_if(result: Table) -> Iterator[Record]:
    seen, network = set(), PurePath(result["model"]).name
    for row in result["results"]:
        setting = row["sparsity"], row["threads"], row["batch"]
        baselines = [kind for kind in (DENSE, INT8) if kind in row]
        if setting not in seen:  # the same dense files stand beside all patterns of a sparsity
            seen.add(setting)
            for kind in baselines:
                yield _process(network, f"{kind} beside {row['sparsity']:.4g}", kind, "", None, row[kind])
        name = f"{row['sparse']['file']}{' int8' if INT8 in baselines else ''}"
        yield _process(network, name, SPARSE, row["pattern"], row["sparsity"], row["sparse"])


def _suite(result: Table) -> Iterator[Record]:
    for row in result["rows"]:
        if "results" in row:
            yield from _runtimes(row)
            continue
        form = str(SparseForm.of(row))
        for file in row["files"]:
            sparse = file["kind"] == SPARSE
            pattern, sparsity = (form, file["sparsity"]) if sparse else ("", None)
            name = f"{form} {sparsity:.4g}" if sparse else f"{file['kind']} beside {form}"
            cpu = file.get("cpu")
            if cpu:
                best = {"value": cpu["best_decile_ms"], "low": None, "high": None}
                batch = (row.get("input") or [1])[0]
                yield Record(
                    row["title"], name, file["kind"], pattern, sparsity, 1, batch, CPU, best,
                    speedup=cpu["speedup"], speedup_over_int8=cpu["speedup_over_int8"],
                )  # fmt: skip
            for process in file.get("processes", ()):
                yield _process(row["title"], name, file["kind"], pattern, sparsity, process)


def _runtimes(row: Table) -> Iterator[Record]:
    """A network at one sparsity in several runtimes, the first of which is dense onnxruntime; each is a pattern."""
    first = row["results"][0]["file"]
    for measured in row["results"]:
        label = measured.get("runtime") or measured["file"]
        is_dense = measured["file"] == first
        kind = DENSE if is_dense else _kind_of_runtime(label)
        name = f"dense beside {row['sparsity']:.4g}" if is_dense else f"{label} {row['sparsity']:.4g}"
        yield _process(row["title"], name, kind, "" if is_dense else label, row["sparsity"], measured)


def _process(network: str, label: str, kind: str, pattern: str, sparsity: float | None, row: Table) -> Record:
    return Record(
        network=network,
        label=label,
        kind=kind,
        pattern=pattern,
        sparsity=sparsity,
        threads=row["threads"],
        batch=row["batch"],
        clock=WALL,
        latency_ms=row["latency_ms"].get("p50"),
        tail_ms=row["latency_ms"].get("p99"),
        speedup=row["speedup"],
        speedup_over_int8=row.get("speedup_over_int8"),
        cpu_ms=row["cpu_ms"],
        memory_bytes=row["rss_bytes"],
        file_bytes=row["file_bytes"],
        load_ms=row["load_ms"],
        first_call_ms=row["first_call_ms"],
        noisy=bool(row["noisy"]),
        note=row["note"],
        runtime=str(row.get("runtime") or ""),
    )


READERS: Mapping[str, Callable[[Table], Iterator[Record]]] = {"files": _files, "whatif": _what_if, "suite": _suite}
"""Kind of a result -> its records."""


class Group(NamedTuple):
    """What records must share to be compared: two results may be of different machines, or of different times."""

    source: str
    network: str
    clock: str
    threads: int
    batch: int


def groups(records: Sequence[Record]) -> dict[Group, list[Record]]:
    """The records that may be compared, in their order."""
    found: dict[Group, list[Record]] = {}
    for record in records:
        key = Group(record.source, record.network, record.clock, record.threads, record.batch)
        found.setdefault(key, []).append(record)
    return found
