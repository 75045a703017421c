"""The headline of a run: artefacts -> plain data (`summarise`) -> one table (`headline`, `rows`).

Used by the report, by the table that ends `sparsepipe run` and by its `--json`. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from sparsepipe.artefact import Artefact
from sparsepipe.reporting import units
from sparsepipe.reporting.contents import Accuracy, Benchmark, Contents, Estimate, Exported, Timing, Training, read

INT8 = "int8"
DEPLOYED_TARGETS = ("universal", "portable")
"""Targets in the order in which a file of theirs is called "the sparse file"."""


@dataclass(frozen=True)
class Cell:
    """A formatted value and, where it has one, its interval (same unit, not repeated)."""

    value: str = units.MISSING
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.interval})" if self.interval else self.value


@dataclass(frozen=True)
class Row:
    """One line of the headline table; `note` says what exactly was measured."""

    quantity: str
    dense: Cell = Cell()
    sparse: Cell = Cell()
    change: Cell = Cell("")
    note: str = ""


def summarise(artefacts: Mapping[str, Artefact]) -> dict[str, Any]:
    """The headline of a run as JSON-able data; a value is None where no artefact holds it.

    Args:
        artefacts: any subset of `contents.STAGES`, keyed by stage.

    Returns:
        `sparsity`, `nnz`, `weights`; `accuracy` {dense, sparse, exported_dense, exported_sparse: {value, low, high,
        correct, samples}, difference}; `files` {dense, sparse: {name, bytes}, ratio}; `latency` {threads, batch,
        dense, sparse: {p50, p90, p99}, in milliseconds, self_difference (a fraction)}; `speedup` {value, low, high};
        `exports` (a list, empty where no file is in int8: file, target, precision, accuracy, drop_points, bytes,
        latency, the p50, speedup, speedup_over_int8); `valid` (bool); `noisy` (bool); `notes` (sentences that a reader
        of the figures must know).

    Raises:
        ArtefactError: a metric has the wrong type.
    """
    return summarise_contents(read(artefacts))


def summarise_contents(contents: Contents) -> dict[str, Any]:
    """`summarise` for artefacts that were read already."""
    dense_file, sparse_file = _file_names(contents)
    dense_timing, sparse_timing = _timings(contents.bench, dense_file, sparse_file)
    accuracy = {
        "dense": _tested(contents.dense),
        "sparse": _tested(contents.train),
        "exported_dense": _exported_accuracy(contents, dense_file),
        "exported_sparse": _exported_accuracy(contents, sparse_file),
    }
    files = {
        "dense": _file(contents.export, dense_timing, dense_file),
        "sparse": _file(contents.export, sparse_timing, sparse_file),
    }
    summary: dict[str, Any] = {
        "sparsity": _first(contents, "sparsity"),
        "nnz": _first(contents, "nnz"),
        "weights": _first(contents, "weights"),
        "accuracy": {**accuracy, "difference": _difference(accuracy["dense"], accuracy["sparse"])},
        "files": {**files, "ratio": _ratio(files["dense"], files["sparse"])},
        "latency": _latency(dense_timing, sparse_timing, contents.bench),
        "speedup": _dump(sparse_timing.speedup) if sparse_timing else None,
        "exports": _exports(contents),
        "valid": contents.validate.passed if contents.validate else None,
        "noisy": contents.bench.noisy if contents.bench else None,
    }
    return {**summary, "notes": _notes(summary)}


def rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The headline table of `summarise` as text: headers, and a line for each quantity that is known."""
    lines = [[row.quantity, str(row.dense), str(row.sparse), str(row.change), row.note] for row in headline(summary)]
    return ["", "dense", "sparse", "change", "measured on"], lines


def files(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """The files side by side where some are in int8: headers, and a line for each; none where all are in fp32."""
    headers = ["file", "precision", "test accuracy", "points lost", "size", "latency, median", "speed-up"]
    exports = summary["exports"]
    over_int8 = any(row["speedup_over_int8"] for row in exports)
    lines = [
        [
            Cell(row["file"]),
            Cell(row["precision"] or units.MISSING),
            _accuracy(row["accuracy"]),
            _lost(row["drop_points"]),
            Cell(units.size(row["bytes"])),
            _milliseconds(_estimate(row["latency"])),
            *(_ratio_cell(row[key]) for key in ("speedup", "speedup_over_int8")[: 2 if over_int8 else 1]),
        ]
        for row in exports
    ]
    return [*headers, *(["over dense int8"] if over_int8 else [])], lines


def headline(summary: Mapping[str, Any]) -> list[Row]:
    """The headline table of `summarise`: a row for each quantity that is known in at least one column."""
    accuracy, files = summary["accuracy"], summary["files"]
    found = []
    if summary["sparsity"] is not None:
        found.append(_sparsity_row(summary))
    if accuracy["dense"] or accuracy["sparse"]:
        row = Row(
            "Test accuracy, trained",
            _accuracy(accuracy["dense"]),
            _accuracy(accuracy["sparse"]),
            Cell("" if accuracy["difference"] is None else units.points(accuracy["difference"])),
            note="PyTorch; dense is the same recipe trained without sparsity",
        )
        found.append(row)
    if accuracy["exported_dense"] or accuracy["exported_sparse"]:
        row = Row(
            "Test accuracy, exported",
            _accuracy(accuracy["exported_dense"]),
            _accuracy(accuracy["exported_sparse"]),
            note="onnxruntime; both files hold the sparse weights",
        )
        found.append(row)
    if files["dense"] or files["sparse"]:
        dense, sparse = (Cell(units.size(files[column]["bytes"])) if files[column] else Cell() for column in _COLUMNS)
        note = " against ".join(files[column]["name"] for column in _COLUMNS if files[column])
        found.append(Row("File size", dense, sparse, Cell(_smaller(files["ratio"])), note=note))
    found.extend(_latency_rows(summary["latency"], _estimate(summary["speedup"])))
    return found


_COLUMNS = ("dense", "sparse")


def base_name(file: str) -> str:
    return PurePosixPath(file.replace("\\", "/")).name


def _file_names(contents: Contents) -> tuple[str | None, str | None]:
    """Names of the dense and the sparse file that the table compares."""
    if contents.export:
        named = {target: base_name(file.name) for target, file in contents.export.files.items()}
        return named.get("dense"), next((named[target] for target in DEPLOYED_TARGETS if target in named), None)
    if contents.bench:
        bench = contents.bench
        dense = next((base_name(result.file) for result in bench.results if bench.is_baseline(result)), None)
        return dense, next((base_name(result.file) for result in bench.results if not bench.is_baseline(result)), None)
    if contents.validate and contents.validate.candidates:
        return None, base_name(contents.validate.candidates[0].file)
    return None, None


def _timings(bench: Benchmark | None, dense: str | None, sparse: str | None) -> tuple[Timing | None, Timing | None]:
    """Both files at the first setting that was measured."""
    measured = _first_setting(bench)
    return measured.get(dense or ""), measured.get(sparse or "")


def _first_setting(bench: Benchmark | None) -> dict[str, Timing]:
    """Files by name at the first setting that was measured."""
    if bench is None or not bench.results:
        return {}
    setting = bench.results[0].setting
    return {base_name(result.file): result for result in reversed(bench.results) if result.setting == setting}


def _exports(contents: Contents) -> list[dict[str, Any]]:
    exported = contents.export.files if contents.export else {}
    if all(file.precision != INT8 for file in exported.values()):
        return []
    measured = _first_setting(contents.bench)
    candidates = contents.validate.candidates if contents.validate else []
    compared = {base_name(candidate.file): candidate for candidate in reversed(candidates)}
    found = []
    for file in exported.values():
        name = base_name(file.name)
        timing, candidate = measured.get(name), compared.get(name)
        found.append(
            {
                "file": name,
                "target": file.target,
                "precision": file.precision,
                "accuracy": _exported_accuracy(contents, name),
                "drop_points": _dump(candidate.drop_points) if candidate else None,
                "bytes": file.bytes,
                "latency": _dump(timing.percentile("p50")) if timing else None,
                "speedup": _dump(timing.speedup) if timing else None,
                "speedup_over_int8": _dump(timing.speedup_over_int8) if timing else None,
            }
        )
    return found


def _first(contents: Contents, key: str) -> Any:
    """The value of the latest stage that knows it: what was frozen counts more than what was trained."""
    for record in (contents.freeze, contents.train, contents.export):
        value = getattr(record, key, None)
        if value is not None:
            return value
    return None


def _tested(training: Training | None) -> dict[str, Any] | None:
    if training is None or training.test_accuracy is None:
        return None
    correct, samples, interval = training.test_correct, training.test_samples, {}
    if correct is not None and samples:
        from sparsepipe.benchmark.statistics import wilson  # loads scipy

        estimate = wilson(min(correct, samples), samples)
        interval = {"low": estimate.low, "high": estimate.high}
    tested = Accuracy(value=training.test_accuracy, correct=correct, samples=samples, **interval)
    return tested.model_dump()


def _exported_accuracy(contents: Contents, file: str | None) -> dict[str, Any] | None:
    candidates = contents.validate.candidates if contents.validate else []
    for candidate in candidates:
        if base_name(candidate.file) == file and candidate.accuracy:
            return candidate.accuracy.model_dump()
    return None


def _file(export: Exported | None, timing: Timing | None, name: str | None) -> dict[str, Any] | None:
    if name is None:
        return None
    exported = export.files.values() if export else ()
    size = next((file.bytes for file in exported if base_name(file.name) == name), None)
    if size is None and timing is not None:
        size = timing.file_bytes
    return None if size is None else {"name": name, "bytes": size}


def _latency(dense: Timing | None, sparse: Timing | None, bench: Benchmark | None) -> dict[str, Any] | None:
    either = dense or sparse
    if either is None or bench is None:
        return None
    twins = [one.difference for one in bench.verdicts if (one.threads, one.batch) == either.setting]
    halves = [timing.self_difference for timing in (dense, sparse) if timing]
    return {
        "threads": either.threads,
        "batch": either.batch,
        "dense": _percentiles(dense),
        "sparse": _percentiles(sparse),
        "self_difference": max(difference or 0.0 for difference in (*halves, *twins)),
    }


def _percentiles(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    return {name: _dump(timing.percentile(name)) for name in ("p50", "p90", "p99")}


def _dump(estimate: Estimate | None) -> dict[str, Any] | None:
    return estimate.model_dump() if estimate else None


def _difference(dense: dict[str, Any] | None, sparse: dict[str, Any] | None) -> float | None:
    return sparse["value"] - dense["value"] if dense and sparse else None


def _ratio(dense: dict[str, Any] | None, sparse: dict[str, Any] | None) -> float | None:
    return dense["bytes"] / sparse["bytes"] if dense and sparse and sparse["bytes"] else None


def _notes(summary: Mapping[str, Any]) -> list[str]:
    found = []
    speedup, latency = _estimate(summary["speedup"]), summary["latency"]
    if summary["valid"] is False:
        found.append("Validation failed: an exported file does not compute what its reference computes.")
    if summary["noisy"]:
        found.append("The machine was noisy while it was measured: trust no difference of a few per cent.")
    if speedup and speedup.low is not None and speedup.high is not None and speedup.low <= 1 <= speedup.high:
        found.append("The interval of the speed-up includes 1: no difference in speed was shown.")
    elif speedup and latency and abs(speedup.value - 1) <= latency["self_difference"]:
        found.append("The difference in speed is no larger than the noise of the measurement itself (A/A).")
    if latency and any(latency[column] and latency[column]["p99"] is None for column in _COLUMNS):
        found.append("A percentile that the number of calls does not support is not shown.")
    if summary["accuracy"]["sparse"] and not summary["accuracy"]["dense"]:
        found.append("No dense twin was trained (train.dense_twin), so the cost in accuracy is not known.")
    return found


def _sparsity_row(summary: Mapping[str, Any]) -> Row:
    sparsity, nnz, weights = summary["sparsity"], summary["nnz"], summary["weights"]
    note = f"{units.count(nnz)} of {units.count(weights)} weights are left" if nnz is not None and weights else ""
    fewer = Cell(f"{units.ratio(1 / (1 - sparsity))} fewer weights" if sparsity < 1 else "")
    dense = Cell(units.percent(0.0, 0) if summary["accuracy"]["dense"] else "")
    return Row("Sparsity", dense, Cell(units.percent(sparsity)), fewer, note)


def _latency_rows(latency: Mapping[str, Any] | None, speedup: Estimate | None) -> list[Row]:
    if latency is None:
        return []
    setting = f"{units.plural(latency['threads'] or 1, 'thread')}, batch {latency['batch'] or 1}"
    found = []
    for name, label in (("p50", "Latency, median (p50)"), ("p99", "Latency, p99")):
        dense, sparse = (_estimate((latency[column] or {}).get(name)) for column in _COLUMNS)
        # Only the speed-up of the median is measured in pairs, so that it has an interval.
        change = _speedup(speedup) if name == "p50" and speedup else Cell("")
        found.append(Row(label, _milliseconds(dense), _milliseconds(sparse), change, setting))
    return found


def _speedup(estimate: Estimate) -> Cell:
    return Cell(f"speed-up {units.ratio(estimate.value)}", units.ratio_interval(estimate))


def _ratio_cell(value: Mapping[str, Any] | None) -> Cell:
    estimate = _estimate(value)
    return Cell(units.ratio(estimate.value), units.ratio_interval(estimate)) if estimate else Cell()


def _lost(value: Mapping[str, Any] | None) -> Cell:
    estimate = _estimate(value)
    if estimate is None:
        return Cell()
    known = estimate.low is not None and estimate.high is not None
    return Cell(f"{estimate.value:.2f}", f"{estimate.low:.2f} to {estimate.high:.2f}" if known else "")


def _smaller(factor: float | None) -> str:
    return "" if factor is None else f"{units.ratio(factor)} smaller"


def _accuracy(value: Mapping[str, Any] | None) -> Cell:
    estimate = _estimate(value)
    return Cell(units.percent(estimate.value), units.percent_interval(estimate)) if estimate else Cell()


def _milliseconds(estimate: Estimate | None) -> Cell:
    return Cell(units.milliseconds(estimate.value), units.milliseconds_interval(estimate)) if estimate else Cell()


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    return Estimate.model_validate(dict(value)) if value else None
