"""Interleaved measurement of several models: blocks in random order, all but one process stopped at any moment."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.benchmark.client import WORKER_COMMAND, WorkerError, WorkerProcess
from sparsepipe.benchmark.statistics import Samples, minimum_samples

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

ROUNDS = 20
"""Blocks into which the measuring time of each model is divided."""
COLD_STARTS = 3
"""Fresh processes in which loading and the first call are timed."""
EXTENSION = 3
"""How many times its measuring time a model gets at most, where percentiles need more calls."""
MINIMUM_BLOCKS = minimum_samples(0.5)
WARMUP_SHARE = 0.1
ANSWER_SECONDS, ANSWER_SHARE, BYTES_PER_SECOND = 60.0, 10.0, 10e6
"""How long a process may take for an answer: so long, plus so many times its measuring time, and to read the file."""

# A block is disturbed if more than this share of it went to others. Ticks of 10 ms blur what /proc/stat says.
DISTURBED_SHARE = 0.02
FOREIGN_SHARE = 0.1
FOREIGN_FLOOR_NS = 30e6
SWITCHES_FLOOR = 5
SWITCHES_PER_SECOND = 20


@dataclass(frozen=True)
class Contestant:
    """A model file in a runtime.

    Attributes:
        model: the file.
        runtime: as `sparsepipe.benchmark.runtimes.find` takes it, in the worker.
        command: starts the worker; a runtime with an environment of its own names that environment's Python.
        environment: variables for the worker.
        feeds: a file of `sparsepipe.benchmark.calls` with its inputs; None for random ones.
    """

    model: Path
    runtime: str = "onnxruntime"
    command: tuple[str, ...] = WORKER_COMMAND
    environment: Mapping[str, str] = field(default_factory=dict)
    feeds: Path | None = None


@dataclass(frozen=True)
class Setting:
    """What all contestants of one comparison share.

    Attributes:
        threads: of one operator.
        batch: size of the first dimension of inputs that leave it open.
        seconds: measuring time of each contestant.
        cpus: processors to pin to; None where processes are not pinned.
        seed: of inputs and of the order.
        shapes: of inputs, by name, as `sparsepipe.runtime.inputs.sized` takes them.
        cold_starts: processes in which loading is timed; None for `COLD_STARTS`.
        timeout: seconds after which a process that does not answer counts as hanging; None goes by the measurement.
    """

    threads: int
    batch: int
    seconds: float
    cpus: tuple[int, ...] | None
    seed: int = 0
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    timeout: float | None = None
    cold_starts: int | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive calls of one model: latency of each in nanoseconds, CPU time of the whole process per call."""

    latency_ns: Samples
    wall_ns: float
    cpu_ns_per_call: float
    disturbed: bool


@dataclass
class Measurement:
    """What was measured of one contestant; `failure` says why there is nothing."""

    contestant: Contestant
    failure: str | None = None
    load_ms: list[float] = field(default_factory=list)
    first_call_ms: list[float] = field(default_factory=list)
    idle_rss_bytes: int | None = None
    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> type and shape of what the model was called with."""
    warnings: list[str] = field(default_factory=list)
    """What was said while it was loaded."""
    blocks: list[Block] = field(default_factory=list)

    @property
    def spent_ns(self) -> float:
        return sum(block.wall_ns for block in self.blocks)

    @property
    def clean(self) -> list[Block]:
        return [block for block in self.blocks if not block.disturbed]

    @property
    def usable(self) -> list[Block]:
        """The undisturbed blocks; all of them where too few are undisturbed."""
        return self.clean if len(self.clean) >= MINIMUM_BLOCKS else self.blocks


@dataclass
class _Entrant:
    measurement: Measurement
    process: WorkerProcess
    count: int = 1

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Let the process run for one request."""
        self.process.resume()
        try:
            return self.process.ask(command, timeout, **arguments)
        finally:
            self.process.stop()


Ask = Callable[..., dict[str, Any]]
"""Sends a request to a worker: its name and arguments, as `WorkerProcess.ask` takes them, without the time limit."""


def measure(
    contestants: Sequence[Contestant],
    setting: Setting,
    progress: Callable[[str], None] = lambda note: None,
    admit: Callable[[int, Ask], str | None] = lambda index, ask: None,
) -> list[Measurement]:
    """Measure all contestants side by side.

    Each round runs one block of every contestant, in random order, while the processes of the others are stopped.
    Rounds go on until every contestant has had `setting.seconds`, and for up to three times as long where a
    percentile, or the interval of a speed-up, is within reach of that. A contestant whose process dies or hangs
    leaves the race with the reason; the others go on.

    Args:
        contestants: what to measure.
        setting: threads, batch, time and processors.
        progress: called after each of the `ROUNDS` planned rounds, with a note.
        admit: called with the index of each contestant that could be loaded, before anything is timed; what it returns
            is a reason to leave the race, None to stay.

    Returns:
        One measurement for each contestant, in their order. Blocks with the same index belong to the same round.
    """
    measurements = [Measurement(contestant) for contestant in contestants]
    with ExitStack() as stack:
        for _ in range((setting.cold_starts or COLD_STARTS) - 1):
            for measurement in measurements:
                if measurement.failure is None and (probe := _start(measurement, setting)):
                    probe.process.close()
        entrants = []
        for measurement in measurements:
            if measurement.failure is None and (entrant := _start(measurement, setting)):
                stack.callback(entrant.process.close)
                entrants.append(entrant)
        entrants = [entrant for entrant in entrants if _is_admitted(entrant, measurements, setting, admit)]
        entrants = [entrant for entrant in entrants if _attempt(entrant, lambda one: _warm_up(one, setting))]
        _run_rounds(entrants, setting, progress)
        for entrant in entrants:
            if entrant.measurement.failure is None:
                _attempt(entrant, lambda one: _read_memory(one, setting))
    return measurements


def choose_cpus(threads: int) -> tuple[int, ...] | None:
    """Processors to pin to: one thread to a physical core, as far as there are enough, and the first core last.

    The first core serves most interrupts. None where the system cannot pin.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0), reverse=True)
    cores: dict[str, list[int]] = {}
    for cpu in usable:
        cores.setdefault(_siblings(cpu), []).append(cpu)
    ranked = sorted(usable, key=lambda cpu: (cores[_siblings(cpu)].index(cpu), -cpu))
    return tuple(sorted(ranked[:threads]))


def disturbed(answer: Mapping[str, Any], setting: Setting, usable_cpus: int) -> bool:
    """Whether other processes, or other guests of the same host, took a noticeable part of a block.

    Args:
        answer: the worker's answer to `run`.
        setting: how the worker ran.
        usable_cpus: number of processors that it may use.
    """
    wall = answer["wall_ns"]
    if answer["stolen_ns"] > DISTURBED_SHARE * wall * usable_cpus:
        return True
    if setting.cpus is not None and answer["foreign_ns"] > max(FOREIGN_SHARE * wall * usable_cpus, FOREIGN_FLOOR_NS):
        return True
    if setting.threads > usable_cpus:  # its own threads take turns, so waiting says nothing about others
        return False
    if answer["waited_ns"] is not None:
        return bool(answer["waited_ns"] > DISTURBED_SHARE * wall * setting.threads)
    return bool(answer["switches"] > SWITCHES_FLOOR + SWITCHES_PER_SECOND * setting.threads * wall / 1e9)


def patience(contestant: Contestant, setting: Setting) -> float:
    """Seconds that a process may take to answer a request before it counts as hanging."""
    if setting.timeout is not None:
        return setting.timeout
    size = contestant.model.stat().st_size if contestant.model.is_file() else 0
    return ANSWER_SECONDS + ANSWER_SHARE * setting.seconds + size / BYTES_PER_SECOND


def _start(measurement: Measurement, setting: Setting) -> _Entrant | None:
    """A process with the model loaded, stopped; None, with the reason noted, where that fails."""
    contestant = measurement.contestant
    try:
        process = WorkerProcess(contestant.command, contestant.environment)
    except WorkerError as error:
        measurement.failure = str(error)
        return None
    entrant = _Entrant(measurement, process)

    def load(one: _Entrant) -> None:
        answer = one.ask(
            "load",
            patience(contestant, setting),
            runtime=contestant.runtime,
            model=str(contestant.model.absolute()),
            threads=setting.threads,
            batch=setting.batch,
            seed=setting.seed,
            shapes={name: list(shape) for name, shape in setting.shapes.items()},
            feeds=str(contestant.feeds) if contestant.feeds else None,
            cpus=list(setting.cpus) if setting.cpus else None,
        )
        measurement.load_ms.append(answer["load_ms"])
        measurement.first_call_ms.append(answer["first_call_ms"])
        measurement.idle_rss_bytes = answer["idle_rss_bytes"]
        measurement.inputs, measurement.warnings = answer.get("inputs", {}), answer.get("warnings", [])
        measurement.settings = {**answer["settings"], "cpus": answer["cpus"]}

    loaded = False
    try:
        loaded = _attempt(entrant, load)
    finally:  # Ctrl-C, too: a stopped process would stay as long as this one
        if not loaded:
            process.close()
    return entrant if loaded else None


def _is_admitted(
    entrant: _Entrant,
    measurements: Sequence[Measurement],
    setting: Setting,
    admit: Callable[[int, Ask], str | None],
) -> bool:
    measurement = entrant.measurement
    index = next(place for place, one in enumerate(measurements) if one is measurement)

    def ask(command: str, **arguments: Any) -> dict[str, Any]:
        return entrant.ask(command, patience(measurement.contestant, setting), **arguments)

    def decide(one: _Entrant) -> None:
        measurement.failure = admit(index, ask)

    return _attempt(entrant, decide) and measurement.failure is None


def _attempt(entrant: _Entrant, action: Callable[[_Entrant], None]) -> bool:
    try:
        action(entrant)
    except WorkerError as error:
        entrant.measurement.failure = str(error)
        return False
    return True


def _warm_up(entrant: _Entrant, setting: Setting) -> None:
    """Call the model until its speed has settled, and choose how many calls make a block."""
    spent, count, latency = 0.0, 1, 1.0
    while spent < WARMUP_SHARE * setting.seconds * 1e9:
        limit = patience(entrant.measurement.contestant, setting)
        answer = entrant.ask("run", limit, count=count, warmup=0)
        spent += answer["wall_ns"]
        latency = max(float(np.median(answer["latency_ns"])), 1.0)
        count *= 2
    entrant.count = max(1, round(setting.seconds * 1e9 / ROUNDS / latency))


def _run_rounds(entrants: list[_Entrant], setting: Setting, progress: Callable[[str], None]) -> None:
    random = np.random.default_rng(setting.seed)
    alive, done = list(entrants), 0
    while alive and _want_more([entrant.measurement for entrant in alive], setting):
        for index in random.permutation(len(alive)):
            _attempt(alive[index], lambda one: _run_block(one, setting))
        alive = [entrant for entrant in alive if entrant.measurement.failure is None]
        done += 1
        if done <= ROUNDS:
            progress(f"threads {setting.threads}, batch {setting.batch}")
    for _ in range(done, ROUNDS):
        progress("")


def _run_block(entrant: _Entrant, setting: Setting) -> None:
    # Stopping a process cools its caches; a single long call per block does not notice.
    warmup = math.ceil(WARMUP_SHARE * entrant.count) if entrant.count > 1 else 0
    limit = patience(entrant.measurement.contestant, setting)
    answer = entrant.ask("run", limit, count=entrant.count, warmup=warmup)
    latencies = np.array(answer["latency_ns"], dtype=np.float64)
    usable_cpus = len(entrant.measurement.settings["cpus"]) or setting.threads
    entrant.measurement.blocks.append(
        Block(
            latency_ns=latencies,
            wall_ns=answer["wall_ns"],
            cpu_ns_per_call=answer["cpu_ns"] / len(latencies),
            disturbed=disturbed(answer, setting, usable_cpus),
        )
    )


def _read_memory(entrant: _Entrant, setting: Setting) -> None:
    answer = entrant.ask("stats", patience(entrant.measurement.contestant, setting))
    entrant.measurement.rss_bytes = answer["rss_bytes"]
    entrant.measurement.peak_rss_bytes = answer["peak_rss_bytes"]


def _want_more(measurements: Sequence[Measurement], setting: Setting) -> bool:
    budget = setting.seconds * 1e9
    if min(measurement.spent_ns for measurement in measurements) < budget:
        return True
    if max(measurement.spent_ns for measurement in measurements) >= EXTENSION * budget:
        return False
    return any(_lacks_what_it_can_reach(measurement, EXTENSION * budget) for measurement in measurements)


def _lacks_what_it_can_reach(measurement: Measurement, limit_ns: float) -> bool:
    """Whether, by `limit_ns`, there can be calls for one more percentile, or blocks for a speed-up."""
    growth = limit_ns / measurement.spent_ns
    calls = sum(len(block.latency_ns) for block in measurement.blocks)
    clean_calls = sum(len(block.latency_ns) for block in measurement.clean)
    wanted = [minimum_samples(quantile) for quantile in QUANTILES.values()]
    return any(clean_calls < needed <= calls * growth for needed in wanted) or (
        len(measurement.clean) < MINIMUM_BLOCKS <= len(measurement.blocks) * growth
    )


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
