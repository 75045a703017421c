"""One row of a suite: a network at several sparsities of one pattern, beside its dense and its dense int8 file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from sparsepipe.benchmark import networks
from sparsepipe.benchmark.int8 import quantise
from sparsepipe.benchmark.interleaved import Timing, interleave
from sparsepipe.benchmark.records import DENSE, INT8, SPARSE, SparseForm
from sparsepipe.benchmark.results import MILLISECONDS_PER_NANOSECOND
from sparsepipe.benchmark.statistics import as_dict
from sparsepipe.graph.finish import serialise
from sparsepipe.graph.prune import prune
from sparsepipe.recipe import Bench
from sparsepipe.runtime.compare import Tally, finite
from sparsepipe.runtime.inputs import inputs_of, random_inputs
from sparsepipe.runtime.sessions import run, session
from sparsepipe.stages import bench
from sparsepipe.stages.variants import Variant, export_dense, export_sparse, export_sparse_int8

SEED = 0
CALIBRATION_CALLS = 4
STEPS = 20  # of the progress bar, for the calls that take turns in one process
Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Baselines:
    """A network, and the files that its sparse ones are compared with."""

    name: str
    model: ModelProto
    dense: Path
    int8: Path

    @property
    def batch(self) -> int:
        return networks.NETWORKS[self.name].input_shape[0]

    def calls(self) -> list[dict[str, Any]]:
        """The inputs that int8 files are calibrated on; the first are those that are timed."""
        inputs = inputs_of(session(self.dense))
        return [random_inputs(inputs, self.batch, SEED + call) for call in range(CALIBRATION_CALLS)]


def prepare(name: str, folder: Path) -> Baselines:
    """Build the network `name` and write its dense and its int8 file into `folder`."""
    model = networks.build(name, seed=SEED)
    made = Baselines(name, model, export_dense(model, folder / DENSE), folder / f"{INT8}.onnx")
    quantise(made.dense, made.int8, made.calls())
    return made


def steps(sparsities: int, config: Bench) -> int:
    """How many steps of progress `measure` has."""
    return sparsities + STEPS + bench.rounds(config)


def measure(
    base: Baselines, form: SparseForm, sparsities: Sequence[float], config: Bench, folder: Path, advance: Advance
) -> dict[str, Any]:
    """Measure the network at each sparsity, and its dense and dense int8 files in the same turns.

    Args:
        base: the network and its files.
        form: precision and pattern of the sparse files.
        sparsities: of the layers that are pruned.
        config: threads, time and pinning; the batch size is the network's own.
        folder: where the sparse files are written.
        advance: called with a number of steps, `steps` in all, and a note.

    Returns:
        A JSON-able row. Each of its `files` has `cpu` (all in one process, one thread, CPU time) and `processes` (a
        process each, wall time, a row for each number of threads), and but for the dense one `max_relative_error`,
        from dense fp32 onnxruntime on the same weights. `verdicts` are those of `bench` on the processes.

    Raises:
        GraphError: a sparse file computes something else than the dense one, or an int8 one than the plain int8 file.
    """
    network, name = networks.NETWORKS[base.name], base.name
    config = config.model_copy(update={"batch": (base.batch,)})
    calls = base.calls()
    feeds = calls[0]
    paths, labels = [base.dense, base.int8], [DENSE, INT8]
    facts: list[dict[str, Any]] = [
        {"kind": DENSE},
        {"kind": INT8, "max_relative_error": _error(base.dense, base.int8, feeds, exact_int8=False)},
    ]
    for sparsity in sparsities:
        label = f"{form} {sparsity:.4g}"
        advance(0, f"{name}: exporting {label}")
        variant = _export(base, form, sparsity, folder / f"{form}-{sparsity}", calls)
        paths.append(variant.path)
        labels.append(label)
        facts.append({"kind": SPARSE, **variant.facts()})
        if form.precision == INT8:  # the variant tells its error from plain int8
            dense = serialise(prune(base.model, sparsity, form.pattern)[0], where=name)
            facts[-1]["max_relative_error"] = _error(dense, variant.path, feeds)
        advance(1, "")
    timings = _interleaved(
        paths, 1, feeds, config.seconds, lambda count: advance(count, f"{name}: in turn, one thread")
    )
    race = bench.take_turns(
        paths, labels, 0, config, lambda note: advance(1, f"{name}: {note}"), int8=1, fast_int8=True
    )
    files = []
    for index, (fact, timing) in enumerate(zip(facts, timings, strict=True)):
        own, reference = (race.results[start :: len(paths)] for start in (index, 0))
        processes = [
            {**row, "relative": _relative(row, dense_row, own[0])}
            for row, dense_row in zip(own, reference, strict=True)
        ]
        files.append({**fact, "cpu": _cpu(timing, timings[0], timings[1]), "processes": processes})
    return {
        "network": name,
        "title": network.title,
        "input": list(network.input_shape),
        "precision": form.precision,
        "pattern": form.pattern,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        # The library's place on this machine is of no use elsewhere; its digest stands beside the rows.
        "runtimes": [{key: value for key, value in one.items() if key != "kernel_library"} for one in race.runtimes],
        "files": files,
        "verdicts": race.verdicts,
    }


def _export(
    base: Baselines, form: SparseForm, sparsity: float, folder: Path, calls: Sequence[Mapping[str, Any]]
) -> Variant:
    if form.precision == INT8:
        return export_sparse_int8(base.model, form.pattern, sparsity, folder, calls)
    return export_sparse(base.model, form.pattern, sparsity, folder, calls[0])


def _interleaved(
    paths: Sequence[Path], int8: int, feeds: Mapping[str, Any], seconds: float, advance: Callable[[int], None]
) -> list[Timing]:
    done = 0

    def show(share: float) -> None:
        nonlocal done
        reached = int(share * STEPS)
        advance(reached - done)
        done = reached

    sessions = [session(path, exact_int8=index != int8) for index, path in enumerate(paths)]
    calls = [partial(one.run, None, dict(feeds)) for one in sessions]
    timings = interleave(calls, seconds * len(calls), seed=SEED, progress=show)
    advance(STEPS - done)
    return timings


def _cpu(timing: Timing, dense: Timing, int8: Timing) -> dict[str, Any]:
    return {
        "best_decile_ms": timing.best_decile * MILLISECONDS_PER_NANOSECOND,
        "median_ms": timing.median * MILLISECONDS_PER_NANOSECOND,
        "calls": sum(len(taken) for taken in timing.rounds),
        "speedup_best_decile": dense.best_decile / timing.best_decile,
        "speedup": as_dict(timing.speedup_over(dense, SEED)),
        "speedup_over_int8_best_decile": int8.best_decile / timing.best_decile,
        "speedup_over_int8": as_dict(timing.speedup_over(int8, SEED)),
    }


def _relative(row: Mapping[str, Any], dense: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float | None]:
    """What a file needs in times of the dense one with as many threads, and its speed in times of `first`.

    Args:
        row: of the file.
        dense: of the dense file, measured beside it.
        first: of the file at the first number of threads.
    """
    return {
        "load": _ratio(row["load_ms"], dense["load_ms"]),
        "session_memory": _ratio(_session_bytes(row), _session_bytes(dense)),
        "file": _ratio(row["file_bytes"], dense["file_bytes"]),
        "threads_speedup": _ratio(_p50(first), _p50(row)),
    }


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None


def _session_bytes(row: Mapping[str, Any]) -> int | None:
    """Resident memory that loading and running the file added to the process."""
    return (
        None if row["rss_bytes"] is None or row["idle_rss_bytes"] is None else row["rss_bytes"] - row["idle_rss_bytes"]
    )


def _p50(row: Mapping[str, Any]) -> float | None:
    estimate = row["latency_ms"]["p50"]
    return estimate["value"] if estimate else None


def _error(dense: Path | bytes, other: Path, feeds: Mapping[str, Any], *, exact_int8: bool = True) -> float | None:
    """Largest difference of the outputs relative to the largest of the dense file; None where it is not finite."""
    tally = Tally()
    tally.add(run(session(dense), feeds), run(session(other, exact_int8=exact_int8), feeds))
    return finite(tally.max_relative)
