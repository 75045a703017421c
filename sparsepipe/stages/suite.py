"""Suites: tables of speed that one command reproduces."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sparsepipe.artefact import Artefact, draft, write_json
from sparsepipe.benchmark import networks
from sparsepipe.benchmark.int8 import METHOD as INT8_METHOD
from sparsepipe.benchmark.int8 import quantise
from sparsepipe.benchmark.interleaved import Timing, interleave
from sparsepipe.benchmark.results import MILLISECONDS_PER_NANOSECOND
from sparsepipe.benchmark.statistics import as_dict
from sparsepipe.errors import RecipeError
from sparsepipe.graph.prune import block_shape
from sparsepipe.progress import Bar, bar
from sparsepipe.recipe import Bench, Fraction
from sparsepipe.runtime.compare import Tally, finite
from sparsepipe.runtime.inputs import inputs_of, random_inputs
from sparsepipe.runtime.sessions import run, session
from sparsepipe.stages import bench
from sparsepipe.stages.variants import export_dense, export_sparse

RESULT_FILE = "suite.json"
SCHEMA_VERSION = 1
SEED = 0
CALIBRATION_CALLS = 4
STEPS = 20  # of the progress bar, for the calls that take turns in one process
DENSE, INT8 = "dense", "int8"
METHOD = (
    "cpu: all files of a network in one process with one thread, blocks of calls in random order, CPU time of the "
    "thread; ratios of best deciles, and of medians of rounds with 95% bootstrap intervals. processes: each file in a "
    "process of its own, one running at a time, wall time; memory is resident memory above that before loading."
)


class Kernels(Bench):
    """Settings of the suite `kernels`: which settings of which networks, and as of `bench` for the processes."""

    sparsity: tuple[Fraction, ...] = (0.8, 0.9, 0.95, 0.98)
    pattern: tuple[str, ...] = ("unstructured", "4x1")
    networks: tuple[str, ...] = tuple(networks.NETWORKS)


def kernels(config: Kernels) -> dict[str, Any]:
    """The speed of the kernels on whole networks with random weights, beside dense and int8 onnxruntime.

    Returns:
        `networks`, each with the files `dense`, `int8` and one for each sparsity and pattern, the `method`, and the
        `environment`.

    Raises:
        RecipeError: no such network.
        GraphError: no such pattern, or a sparse file computes something else than the dense one.
    """
    for pattern in config.pattern:
        block_shape(pattern)
    unknown = [name for name in config.networks if name not in networks.NETWORKS]
    if unknown:
        raise RecipeError(
            f"The suite has no network '{unknown[0]}'.",
            where="networks",
            advice=f"It has: {', '.join(networks.NETWORKS)}.",
        )
    steps = len(config.sparsity) * len(config.pattern) + 1 + STEPS + bench.rounds(_with_batch(config, 1))
    measured: list[dict[str, Any]] = []
    runtimes: dict[str, dict[str, Any]] = {}
    with bar("Suite", steps * len(config.networks)) as running:
        for name in config.networks:
            with tempfile.TemporaryDirectory(prefix="sparsepipe-") as folder:
                row, found = _network(name, config, Path(folder), running)
            measured.append(row)
            runtimes |= {str(one): one for one in found}
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": "kernels",
        "method": METHOD,
        "int8": INT8_METHOD,
        "networks": measured,
        "environment": {**bench.environment(config), "runtimes": list(runtimes.values())},
    }


SUITES: Mapping[str, Callable[[Kernels], dict[str, Any]]] = {"kernels": kernels}


def record(name: str, config: Kernels, out: Path) -> Artefact:
    """Run the suite `name`, and keep the result in the folder `out`."""
    with draft(out, "suite", config, {}) as building:
        result = SUITES[name](config)
        write_json(building.folder / RESULT_FILE, result)
        building.metrics.update(result)
    return Artefact.read(out)


def _with_batch(config: Kernels, batch: int) -> Kernels:
    return config.model_copy(update={"batch": (batch,)})


def _network(name: str, config: Kernels, folder: Path, running: Bar) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All files of one network."""
    network = networks.NETWORKS[name]
    model = networks.build(name, seed=SEED)
    batch = network.input_shape[0]
    dense = export_dense(model, folder / DENSE)
    inputs = inputs_of(session(dense))
    feeds = random_inputs(inputs, batch, SEED)
    int8 = folder / f"{INT8}.onnx"
    quantise(dense, int8, [random_inputs(inputs, batch, SEED + call) for call in range(CALIBRATION_CALLS)])
    running.advance(note=f"{name}: exporting")
    variants = []
    for pattern in config.pattern:
        for sparsity in config.sparsity:
            place = folder / f"{pattern}-{sparsity}"
            variants.append(export_sparse(model, pattern, sparsity, place, feeds))
            running.advance(note=f"{name}: exporting")
    paths = [dense, int8, *(variant.path for variant in variants)]
    timings = _interleaved(paths, feeds, config.seconds, name, running)
    race = bench.take_turns(
        paths,
        [DENSE, INT8, *(variant.label for variant in variants)],
        0,
        _with_batch(config, batch),
        lambda note: running.advance(note=f"{name}: {note}"),
    )
    facts: list[dict[str, Any]] = [
        {"kind": DENSE},
        {"kind": INT8, "max_relative_error": _error(dense, int8, feeds)},
        *({"kind": "sparse", **variant.facts()} for variant in variants),
    ]
    files = []
    for index, (fact, timing) in enumerate(zip(facts, timings, strict=True)):
        own, base = (race.results[start :: len(paths)] for start in (index, 0))
        processes = [
            {**row, "relative": _relative(row, dense_row, own[0])} for row, dense_row in zip(own, base, strict=True)
        ]
        files.append({**fact, "cpu": _cpu(timing, timings[0]), "processes": processes})
    described = {"network": name, "title": network.title, "input": list(network.input_shape), "files": files}
    return described, race.runtimes


def _interleaved(
    paths: Sequence[Path], feeds: Mapping[str, Any], seconds: float, name: str, running: Bar
) -> list[Timing]:
    done = 0

    def show(share: float) -> None:
        nonlocal done
        reached = int(share * STEPS)
        running.advance(reached - done, note=f"{name}: one thread, in turn")
        done = reached

    sessions = [session(path) for path in paths]
    calls = [partial(one.run, None, dict(feeds)) for one in sessions]
    timings = interleave(calls, seconds * len(calls), seed=SEED, progress=show)
    running.advance(STEPS - done)
    return timings


def _cpu(timing: Timing, dense: Timing) -> dict[str, Any]:
    return {
        "best_decile_ms": timing.best_decile * MILLISECONDS_PER_NANOSECOND,
        "median_ms": timing.median * MILLISECONDS_PER_NANOSECOND,
        "calls": sum(len(taken) for taken in timing.rounds),
        "speedup_best_decile": dense.best_decile / timing.best_decile,
        "speedup": as_dict(timing.speedup_over(dense, SEED)),
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


def _error(dense: Path, other: Path, feeds: Mapping[str, Any]) -> float | None:
    """Largest difference of the outputs relative to the largest of the dense file; None where it is not finite."""
    tally = Tally()
    tally.add(run(session(dense), feeds), run(session(other), feeds))
    return finite(tally.max_relative)
