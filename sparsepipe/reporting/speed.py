"""The tables of a suite of benchmarks, as text: for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsepipe.benchmark.records import FP32, INT8, SPARSE, SparseForm
from sparsepipe.reporting import units, verdicts
from sparsepipe.reporting.markdown import Table

Row = Mapping[str, Any]
SHOWN = 0.95
"""The sparsity at which a document shows memory, load time and threads."""


def tables(result: Row) -> list[Table]:
    """Speed in times of dense fp32 and of dense int8 onnxruntime: a row for each network, precision and pattern."""
    rows: Sequence[Row] = result["rows"]
    sparsities = sorted({file["sparsity"] for row in rows for file in _sparse(row)})
    heads = [_percent(sparsity) for sparsity in sparsities]

    def cells(row: Row, key: str) -> list[str]:
        found = {file["sparsity"]: _gain(file["cpu"], key) for file in _sparse(row)}
        return [found.get(sparsity, units.MISSING) for sparsity in sparsities]

    return [
        Table(
            "Times faster than dense fp32 onnxruntime, one thread",
            ["network", "dense", "dense int8", "pattern", *heads],
            [
                [
                    row["title"],
                    units.milliseconds(row["files"][0]["cpu"]["best_decile_ms"]),
                    *(_gain(file["cpu"], "speedup") for file in row["files"] if file["kind"] == INT8),
                    str(SparseForm.of(row)),
                    *cells(row, "speedup"),
                ]
                for row in rows
            ],
        ),
        Table(
            "Sparse, times faster than dense int8 onnxruntime in the same turns",
            ["network", "pattern", *heads],
            [[row["title"], str(SparseForm.of(row)), *cells(row, "speedup_over_int8")] for row in rows],
        ),
    ]


def needs(result: Row, sparsity: float | None = None) -> Table:
    """What each file needs in a process of its own, in times of the dense one; perhaps of one sparsity only."""
    lines = [
        [
            row["title"],
            str(SparseForm.of(row)) if file["kind"] == SPARSE else "",
            _percent(file["sparsity"]) if file["kind"] == SPARSE else file["kind"],
            str(process["threads"]),
            _latency(process),
            *(units.ratio(process["relative"][key]) for key in ("threads_speedup", "load", "session_memory", "file")),
        ]
        for row in result["rows"]
        for file in row["files"]
        if sparsity is None or file.get("sparsity") == sparsity
        for process in file["processes"]
    ]
    return Table(
        "In processes of their own, wall time; load time, memory of the session and file size in times of dense",
        ["network", "pattern", "file", "threads", "p50", "threads gain", "load", "memory", "size"],
        lines,
    )


def remarks(result: Row) -> list[str]:
    """How and on what it was measured, and what must be said about the figures."""
    environment, settings = result["environment"], result["settings"]
    processes = [process for row in result["rows"] for file in row["files"] for process in file["processes"]]
    noisy = sum(process["noisy"] for process in processes)
    dates = sorted({row["measured"][:10] for row in result["rows"]})
    found = [
        "Speed: best decile of the CPU time of calls that took turns in one process (median of rounds). "
        f"int8: {result['int8']}.",
        *_errors(result["rows"]),
        f"{environment['cpu']} ({', '.join(environment['isa'])}), onnxruntime "
        f"{environment['versions']['onnxruntime']}, {settings['seconds']:g} s for each file and setting, "
        f"{', '.join(dates) or 'nothing measured yet'}.",
    ]
    if noisy:
        found.append(f"The machine was noisy in {noisy} of {len(processes)} measurements of wall time.")
    if races := [verdict for row in result["rows"] for verdict in row.get("verdicts", [])]:
        found.append(verdicts.summary(races))
    found += [
        f"{row['title']}, {process['file']}, {process['threads']} threads: {process['note']}"
        for row in result["rows"]
        for file in row["files"]
        for process in file["processes"]
        if not process["samples"]
    ]
    return found


def markdown(result: Row) -> str:
    """All tables for a document."""
    parts = [table.markdown() for table in tables(result)]
    threads = needs(result, SHOWN)
    if threads.rows:
        parts.append(threads.markdown())
    return "\n\n".join([*parts, "\n".join(f"- {remark}" for remark in remarks(result))])


def _errors(rows: Sequence[Row]) -> Iterator[str]:
    fp32 = [row for row in rows if SparseForm.of(row).precision == FP32]
    int8 = [row for row in rows if SparseForm.of(row).precision == INT8]
    if fp32 or not int8:
        yield f"Largest difference of sparse outputs from dense onnxruntime: {_largest_error(fp32, SPARSE)}."
    if int8:
        yield (
            "Sparse int8 has weights of 8 bits, and is calibrated as dense int8 is. Largest difference of its outputs "
            f"from dense fp32 onnxruntime on the same weights: {_largest_error(int8, SPARSE)}; of those of dense int8: "
            f"{_largest_error(int8, INT8)}."
        )


def _largest_error(rows: Sequence[Row], kind: str) -> str:
    errors = [file["max_relative_error"] for row in rows for file in row["files"] if file["kind"] == kind]
    return "not finite" if None in errors else f"{max(errors, default=0.0):.1e} of the largest output"


def _sparse(row: Row) -> Iterator[Row]:
    return (file for file in row["files"] if file["kind"] == SPARSE)


def _gain(cpu: Row, key: str) -> str:
    """Best decile, and the median of the rounds in brackets."""
    median = f" ({cpu[key]['value']:.2f})" if cpu[key] else ""
    return f"{cpu[f'{key}_best_decile']:.2f}{median}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def _latency(process: Row) -> str:
    estimate = process["latency_ms"]["p50"]
    return units.milliseconds(estimate["value"] if estimate else None)
