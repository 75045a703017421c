"""From measurements to the rows of a benchmark's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sparsepipe.benchmark.harness import EXTENSION, MINIMUM_BLOCKS, QUANTILES, Measurement, Setting
from sparsepipe.benchmark.statistics import (
    NOISE_LIMIT,
    Estimate,
    Samples,
    as_dict,
    median,
    minimum_samples,
    self_difference,
    speedup,
    tail,
)
from sparsepipe.spec import PRECISION_KEY, TARGET_KEY

MEDIAN = 0.5
MILLISECONDS_PER_NANOSECOND = 1e-6


def rows(
    labels: Sequence[str], measurements: Sequence[Measurement], setting: Setting, baseline: int
) -> list[dict[str, Any]]:
    """One JSON-able row for each measurement.

    Args:
        labels: what each file is called.
        measurements: of one setting, in the order of `labels`.
        setting: threads, batch and time.
        baseline: index of the file that speed-ups are relative to.
    """
    reference = measurements[baseline]
    found = []
    for label, measurement in zip(labels, measurements, strict=True):
        same_work, difference = compare_inputs(reference.inputs, measurement.inputs)
        gain = _speedup(reference, measurement, setting.seed) if same_work else None
        row = _row(label, measurement, setting, gain)
        notes = [note for note in (row["note"], difference and f"{difference} '{labels[baseline]}'") if note]
        found.append(row | {"note": "; ".join(notes) or None})
    return found


def same_file(first: Measurement, second: Measurement, setting: Setting) -> dict[str, Any]:
    """The A/A test: how far two processes are apart that ran one file in the same turns.

    Args:
        first: the file.
        second: the same file once more.
        setting: what both ran with.

    Returns:
        `threads`, `batch`, `difference` (a fraction; None where one failed, or there are too few blocks), `interval` of
        the ratio of their speeds, the `limit`, and whether the machine was `noisy`: the difference is beyond the
        limit, or other processes disturbed more than half of the blocks. What cannot be told is noisy, too.
    """
    ratio = _speedup(first, second, setting.seed)
    blocks = [*first.blocks, *second.blocks]
    disturbed = sum(block.disturbed for block in blocks)
    difference = None if ratio is None else max(ratio.value, 1 / ratio.value) - 1
    return {
        "threads": setting.threads,
        "batch": setting.batch,
        "difference": difference,
        "interval": as_dict(ratio),
        "limit": NOISE_LIMIT,
        "blocks": len(blocks),
        "blocks_disturbed": disturbed,
        "noisy": difference is None or difference > NOISE_LIMIT or disturbed > len(blocks) / 2,
    }


def compare_inputs(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether two files were given as much to do, and in what their inputs differ, as the beginning of a sentence.

    Args:
        baseline: name -> type and shape of each input; empty where they are not known.
        other: those of the other file.
    """
    if not baseline or not other or baseline == other:
        return True, None
    if sorted(map(str, baseline.values())) == sorted(map(str, other.values())):
        return True, f"its inputs are called {', '.join(other)}, not {', '.join(baseline)} as those of"
    described = [
        ", ".join(f"{name} {kind} {'x'.join(map(str, shape))}" for name, (kind, shape) in inputs.items())
        for inputs in (other, baseline)
    ]
    return False, f"no speed-up is given: it takes {described[0]}, not {described[1]} as"


@dataclass(frozen=True)
class FileFacts:
    """What a file says of itself: the target and the precision of its export, and its size with its external data."""

    target: str | None
    precision: str | None
    bytes: int


def file_facts(path: Path) -> FileFacts:
    """Target and precision that an ONNX file names in its metadata, None where it names none, and its size in bytes.

    A file that is not valid ONNX has no target; the worker will say what is wrong with it.
    """
    size = sum(file.stat().st_size for file in files_of(path))
    model = _read(path)
    named = {} if model is None else {entry.key: entry.value for entry in model.metadata_props}
    return FileFacts(named.get(TARGET_KEY), named.get(PRECISION_KEY), size)


def files_of(path: Path) -> list[Path]:
    """A model file and those beside it that hold its weights: external data of ONNX, the .bin of OpenVINO's .xml."""
    if path.suffix == ".xml":
        return [file for file in (path, path.with_suffix(".bin")) if file.is_file()]
    model = _read(path)
    beside = {
        entry.value
        for tensor in (model.graph.initializer if model else ())
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *(file for name in sorted(beside) if (file := path.parent / name).is_file())]


def _read(path: Path) -> onnx.ModelProto | None:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception:  # protobuf and onnx each raise their own
        return None


def _row(label: str, measurement: Measurement, setting: Setting, gain: Estimate | None) -> dict[str, Any]:
    facts = file_facts(measurement.contestant.model)
    row: dict[str, Any] = {
        "file": label,
        "target": facts.target,
        "precision": facts.precision,
        "threads": setting.threads,
        "batch": setting.batch,
        "samples": 0,
        "latency_ms": dict.fromkeys(QUANTILES),
        "speedup": None,
        "cpu_ms": None,
        "load_ms": _median(measurement.load_ms),
        "first_call_ms": _median(measurement.first_call_ms),
        "rss_bytes": measurement.rss_bytes,
        "peak_rss_bytes": measurement.peak_rss_bytes,
        "idle_rss_bytes": measurement.idle_rss_bytes,
        "inputs": measurement.inputs,
        "file_bytes": facts.bytes,
        "blocks": len(measurement.blocks),
        "blocks_dropped": 0,
        "self_difference": None,
        "noisy": False,
        "note": measurement.failure,
    }
    if measurement.failure is not None or not measurement.blocks:
        return row
    blocks = measurement.usable
    samples: Samples = np.concatenate([block.latency_ns for block in blocks])
    difference = self_difference([block.latency_ns for block in blocks])
    disturbed = len(measurement.blocks) - len(measurement.clean)
    return row | {
        "samples": len(samples),
        "latency_ms": {
            name: as_dict(
                median([block.latency_ns for block in blocks], setting.seed)
                if quantile == MEDIAN
                else tail([block.latency_ns for block in blocks], quantile, setting.seed),
                MILLISECONDS_PER_NANOSECOND,
            )
            for name, quantile in QUANTILES.items()
        },
        "speedup": as_dict(gain),
        "cpu_ms": float(np.median([block.cpu_ns_per_call for block in blocks])) * MILLISECONDS_PER_NANOSECOND,
        "blocks_dropped": len(measurement.blocks) - len(blocks),
        "self_difference": difference,
        "noisy": (difference is not None and difference > NOISE_LIMIT) or disturbed > len(measurement.blocks) / 2,
        "note": _note(measurement, len(samples), setting),
    }


def _speedup(reference: Measurement, measurement: Measurement, seed: int) -> Estimate | None:
    """Over the rounds in which neither was disturbed; over all where there are too few of those."""
    if reference.failure is not None or measurement.failure is not None:
        return None
    pairs = list(zip(reference.blocks, measurement.blocks, strict=True))
    clean = [pair for pair in pairs if not (pair[0].disturbed or pair[1].disturbed)]
    used = clean if len(clean) >= MINIMUM_BLOCKS else pairs
    return speedup([first.latency_ns for first, _ in used], [second.latency_ns for _, second in used], seed)


def _note(measurement: Measurement, samples: int, setting: Setting) -> str | None:
    notes = [warning.rstrip(".") for warning in measurement.warnings]
    disturbed = len(measurement.blocks) - len(measurement.clean)
    if measurement.usable is measurement.blocks and disturbed:
        notes.append(f"other processes disturbed {disturbed} of {len(measurement.blocks)} blocks; all were kept")
    missing = [name for name, quantile in QUANTILES.items() if samples < minimum_samples(quantile)]
    if missing:
        needed = minimum_samples(QUANTILES[missing[-1]])
        notes.append(
            f"{' and '.join(missing)} not shown: {samples} calls in at most {EXTENSION * setting.seconds:g} s, "
            f"where {missing[-1]} needs {needed}"
        )
    if setting.cpus is not None and len(setting.cpus) < setting.threads:
        notes.append(f"{setting.threads} threads shared {len(setting.cpus)} processors")
    return "; ".join(notes) or None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
