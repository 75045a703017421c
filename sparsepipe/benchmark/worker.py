"""One benchmark process: one model file in one runtime. Run as `python -m sparsepipe.benchmark.worker`.

It reads one JSON object a line from stdin and answers each with one on stdout:

| request | answer |
|---|---|
| `{"command": "prepare", "runtime", "model", "folder", "samples", "inputs", "outputs"}` | `model`: the file that the runtime loads, made from an ONNX file |
| `{"command": "load", "runtime", "model", "threads", "batch", "seed", "shapes": {name: [...]}, "feeds", "cpus": [0] or null}` | `load_ms`, `first_call_ms`, `idle_rss_bytes`, `cpus`, `inputs`: {name: [type, shape]}, `warnings`: [...], `settings` |
| `{"command": "outputs", "calls", "out"}` | nothing in it; the outputs of these calls are in the file `out` |
| `{"command": "run", "count", "warmup"}` | `latency_ns`: [...], and for the whole block `wall_ns`, `cpu_ns`, `switches`, `waited_ns`, `stolen_ns`, `foreign_ns` |
| `{"command": "stats"}` | `rss_bytes`, `peak_rss_bytes` |
| `{"command": "quit"}` | nothing; the process ends |

`feeds` names a file of `sparsepipe.benchmark.calls`, whose first call is timed; where it is null, the runtime makes up
inputs by `batch`, `seed` and `shapes`. A request that fails is answered with `{"error": "..."}`. This module needs only
the standard library, and numpy for files of calls.
"""  # noqa: E501

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsepipe.benchmark.runtimes import Runtime

Answer = dict[str, Any]

PR_SET_PDEATHSIG = 1
NANOSECONDS = 1_000_000_000


class Worker:
    """The model under test and what is asked of it."""

    def __init__(self) -> None:
        self._runtime: Runtime | None = None
        self._cpus: list[int] = []
        self._feeds: str | None = None

    def prepare(self, request: Mapping[str, Any]) -> Answer:
        """Make the file that a runtime loads, converted or quantised, from an ONNX file."""
        from sparsepipe.benchmark.runtimes import Preparation, find

        samples = request["samples"]
        work = Preparation(
            Path(request["model"]),
            Path(request["folder"]),
            Path(samples) if samples else None,
            request["inputs"],
            request["outputs"],
        )
        return {"model": str(find(request["runtime"]).prepare(work))}

    def load(self, request: Mapping[str, Any]) -> Answer:
        """Pin the process, import the runtime, load the model and call it once."""
        self._cpus = pin(request.get("cpus"))
        from sparsepipe.benchmark.runtimes import find

        runtime = find(request["runtime"])
        before = memory()["rss_bytes"]
        said = Said()
        started = time.perf_counter_ns()
        with said:
            runtime.load(request["model"], request["threads"])
        loaded = time.perf_counter_ns()
        self._feeds = request.get("feeds")
        inputs = self._feed(runtime, request)
        fed = time.perf_counter_ns()
        runtime.run()
        called = time.perf_counter_ns()
        self._runtime = runtime
        return {
            "load_ms": (loaded - started) / 1e6,
            "first_call_ms": (called - fed) / 1e6,
            "idle_rss_bytes": before,
            "cpus": self._cpus,
            "inputs": inputs,
            "warnings": said.messages,
            "settings": runtime.describe(),
        }

    def _feed(self, runtime: Runtime, request: Mapping[str, Any]) -> dict[str, list[Any]]:
        if self._feeds is None:
            return runtime.feed(request["batch"], request["seed"], request.get("shapes") or {})
        from sparsepipe.benchmark import calls

        first = calls.read(self._feeds)[0]
        runtime.give(first)
        return {name: [value.dtype.name, list(value.shape)] for name, value in first.items()}

    def outputs(self, request: Mapping[str, Any]) -> Answer:
        """What the network computes for given inputs; those that are timed are put back."""
        if self._runtime is None or self._feeds is None:
            raise RuntimeError("no model is loaded with inputs of a file")
        from sparsepipe.benchmark import calls

        found = []
        for feeds in calls.read(request["calls"]):
            self._runtime.give(feeds)
            # Some runtimes use the memory of their outputs again.
            found.append([output.copy() for output in self._runtime.run()])
        calls.write_outputs(Path(request["out"]), found)
        self._runtime.give(calls.read(self._feeds)[0])
        return {}

    def run(self, request: Mapping[str, Any]) -> Answer:
        """One block: untimed calls, then `count` timed ones."""
        if self._runtime is None:
            raise RuntimeError("no model is loaded")
        call, clock = self._runtime.run, time.perf_counter_ns
        for _ in range(request["warmup"]):
            call()
        latencies = [0] * int(request["count"])
        gc.disable()
        before = Snapshot(self._cpus)
        for index in range(len(latencies)):
            started = clock()
            call()
            latencies[index] = clock() - started
        after = Snapshot(self._cpus)
        gc.enable()
        return {"latency_ns": latencies, **before.until(after)}

    def stats(self, request: Mapping[str, Any]) -> Answer:
        return memory()


class Said(logging.Handler):
    """Keeps what is logged as a warning while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def __enter__(self) -> Said:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Snapshot:
    """Clocks and counters at one moment, to tell this process from others that use the same processors."""

    def __init__(self, cpus: Iterable[int]) -> None:
        self.wall_ns = time.perf_counter_ns()
        self.cpu_ns = time.process_time_ns()
        self.switches = involuntary_switches()
        self.waited_ns = waited_ns()
        self.busy_ns, self.stolen_ns = processor_time(set(cpus))

    def until(self, later: Snapshot) -> Answer:
        """What passed between two moments. `foreign_ns` is processor time that others had, where we may run."""
        cpu = later.cpu_ns - self.cpu_ns
        waits = self.waited_ns, later.waited_ns
        return {
            "wall_ns": later.wall_ns - self.wall_ns,
            "cpu_ns": cpu,
            "switches": later.switches - self.switches,
            "waited_ns": None if waits[0] is None or waits[1] is None else waits[1] - waits[0],
            "stolen_ns": later.stolen_ns - self.stolen_ns,
            "foreign_ns": max(later.busy_ns - self.busy_ns - cpu, 0),
        }


def pin(cpus: list[int] | None) -> list[int]:
    """Keep this process and its later threads on `cpus`; the processors that it may use then."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    if cpus:
        os.sched_setaffinity(0, cpus)
    return sorted(os.sched_getaffinity(0))


def memory() -> Answer:
    """Resident memory now and at its peak, in bytes; None where the system does not tell."""
    try:
        status = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
        return {"rss_bytes": int(status["VmRSS"]) * 1024, "peak_rss_bytes": int(status["VmHWM"]) * 1024}
    except (OSError, KeyError):
        pass
    try:
        import psutil
    except ImportError:
        return {"rss_bytes": None, "peak_rss_bytes": None}
    info = psutil.Process().memory_info()
    return {"rss_bytes": info.rss, "peak_rss_bytes": getattr(info, "peak_wset", None)}


def involuntary_switches() -> int:
    """How often a thread of this process was taken off its processor."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def waited_ns() -> int | None:
    """How long the threads of this process were ready to run but another had the processor; None where not told."""
    total = None
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # the thread has just ended, or there are no statistics
            total = (total or 0) + int(path.read_text().split()[1])
    return total


def processor_time(cpus: set[int]) -> tuple[int, int]:
    """Time, since the start of the system, that `cpus` were busy and that a hypervisor gave them to others.

    In nanoseconds, but counted in ticks (10 ms on most systems); zeros where /proc/stat does not exist.
    """
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0, 0
    tick = NANOSECONDS // os.sysconf("SC_CLK_TCK")
    busy = stolen = 0
    for line in lines:
        name, *fields = line.split()
        if re.fullmatch(r"cpu\d+", name) and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            busy += (user + nice + system + irq + softirq) * tick
            stolen += steal * tick
    return busy, stolen


def die_with_parent() -> None:
    """Have the system kill this process with the one that started it: a stopped process would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve() -> None:
    """Answer requests until `quit` or the end of stdin."""
    die_with_parent()
    # Runtimes print banners: the protocol keeps the real stdout, and everything else goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    commands: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
        "prepare": worker.prepare,
        "load": worker.load,
        "outputs": worker.outputs,
        "run": worker.run,
        "stats": worker.stats,
    }
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "quit":
            return
        try:
            answer = commands[request["command"]](request)
        except Exception as error:  # whatever a runtime raises becomes the reason in a row of the result
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve()
