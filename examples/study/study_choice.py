"""What a user chooses from at the end of the chain: the study's files, their accuracy, size, memory and speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from study_rows import Results, half, minus, percent_over

from sparsepipe.comparison import over_seeds
from sparsepipe.reporting.markdown import Table
from sparsepipe.reporting.units import MISSING, milliseconds, percent, points, ratio, size

FILES = (
    ("dense", 0.0, "unstructured", "dense"),
    ("dense", 0.0, "unstructured", "dense.int8"),
    ("dst-ee", 0.8, "unstructured", "universal"),
    ("dst-ee", 0.9, "unstructured", "universal"),
    ("dst-ee", 0.95, "unstructured", "universal"),
    ("gmp", 0.9, "unstructured", "universal"),
    ("gmp", 0.95, "unstructured", "universal"),
    ("dst-ee", 0.9, "4x1", "universal"),
    ("dst-ee", 0.95, "4x1", "universal"),
    ("dst-ee", 0.8, "4x4", "universal"),
    ("dst-ee", 0.8, "4x4", "universal.int8"),
)
"""What a user chooses from: method, sparsity, pattern, and the key of the exported file."""


@dataclass(frozen=True)
class File:
    """One kind of file in the mean over seeds, and how fast that of the first seed was.

    Attributes:
        label: what to call it.
        accuracy: test accuracy in onnxruntime.
        lost: accuracy of the trained network in PyTorch minus that of the file, paired by seed.
        bytes: of the file, in the mean.
        timed: row of the benchmark, or None.
    """

    label: str
    seeds: int
    accuracy: dict[str, Any]
    lost: dict[str, Any]
    bytes: float
    timed: Mapping[str, Any] | None


def files(results: Results) -> list[File]:
    """Those of `FILES` of which at least one seed was exported."""
    found = []
    for method, sparsity, pattern, key in FILES:
        runs = results.by_seed(method, sparsity, pattern=pattern)
        tested = [results.files[run.name][key] for run in runs.values() if key in results.files.get(run.name, {})]
        if not tested:
            continue
        label = file_label(method, sparsity, pattern, key)
        accuracy = over_seeds([each["accuracy"]["value"] for each in tested])
        lost = over_seeds([each["reference_accuracy"]["value"] - each["accuracy"]["value"] for each in tested])
        assert accuracy is not None
        assert lost is not None
        stored = sum(each["bytes"] for each in tested) / len(tested)
        timed = next((row for row in (results.speed or {}).get("results", ()) if row["file"] == label), None)
        found.append(File(label, len(tested), accuracy, lost, stored, timed))
    return found


def file_label(method: str, sparsity: float, pattern: str, key: str) -> str:
    precision = "int8" if key.endswith("int8") else "fp32"
    return f"dense {precision}" if method == "dense" else f"{method} {100 * sparsity:g}% {pattern} {precision}"


def files_table(results: Results) -> str:
    found = files(results)
    if not found:
        return "No network of the study has been exported yet."
    headers = ["file", "seeds", "test accuracy in onnxruntime", "points lost by the file", "size"]
    headers += ["median latency", "times faster than dense fp32", "resident memory of the session"]
    lines = [
        [
            each.label,
            str(each.seeds),
            percent_over(each.accuracy),
            f"{100 * each.lost['value']:.2f}{half(each.lost)}",
            size(each.bytes),
            *_speed(each.timed),
        ]
        for each in found
    ]
    title = "Networks as files; accuracies over seeds, speed of one seed's file, 1 thread, batch 1"
    return Table(title, headers, lines).markdown()


def _speed(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or not row["latency_ms"]["p50"]:
        return [MISSING] * 3
    gain = row["speedup"]
    memory = None if row["rss_bytes"] is None else row["rss_bytes"] - (row["idle_rss_bytes"] or 0)
    return [
        milliseconds(row["latency_ms"]["p50"]["value"]),
        f"{ratio(gain['value'])} ({gain['low']:.2f}–{gain['high']:.2f})" if gain else MISSING,
        size(memory),
    ]


def speed_conditions(results: Results) -> str:
    """On what the files were timed, and whether the machine was quiet."""
    if results.speed is None:
        return "No file has been timed yet."
    machine, (verdict,) = results.speed["environment"], results.speed["verdicts"]
    state = "**noisy**" if verdict["noisy"] else "quiet"
    apart = MISSING if verdict["difference"] is None else percent(verdict["difference"], 1)
    return (
        f"Timed on {machine['cpu']} ({', '.join(machine['isa'])}), onnxruntime {machine['versions']['onnxruntime']}, "
        f"{machine['measured'][:10]}, files in turns. The machine was {state}: other processes disturbed "
        f"{verdict['blocks_disturbed']} of {verdict['blocks']} blocks of calls, and the same file in two processes "
        f"differed by {apart}."
    )


def blocks_cost(results: Results) -> str:
    """What blocks cost, and int8 on the largest, each paired by seed."""
    said = []
    for method, sparsity, pattern, key in FILES:
        if pattern == "unstructured":
            continue
        blocks, free = (results.by_seed(method, sparsity, pattern=each) for each in (pattern, "unstructured"))
        what = f"- {100 * sparsity:g}% in blocks of {pattern}"
        if not key.endswith("int8"):
            gain = minus(blocks, free)
            seeds = sorted(blocks.keys() & free.keys())
            each = [blocks[seed].metrics["test_accuracy"] - free[seed].metrics["test_accuracy"] for seed in seeds]
            what += " minus unstructured"
        else:
            tested = [files for run in blocks.values() if (files := results.files.get(run.name))]
            each = [files[key]["accuracy"]["value"] - files["universal"]["accuracy"]["value"] for files in tested]
            gain = over_seeds(each)
            what += ", int8 minus fp32"
        if gain:
            by_seed = ", ".join(f"{100 * value:+.2f}".replace("-", "−") for value in each)
            said.append(f"{what}: {points(gain['value'])}{half(gain)} ({by_seed} by seed).")
    return "\n".join(said) or "There are too few rows yet."
