"""Trainings side by side, each in a process of its own: on this machine, or on a Ray cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sparsepipe.errors import MissingExtraError

START = (sys.executable, "-c", "from sparsepipe.cli.main import main; main()")
ERROR_LINES = 15
PATIENCE = 60.0
"""Seconds that a training may take to write its checkpoint when all are told to stop."""


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        index: its place in the sequence of commands.
        code: exit code; negative for a signal.
        error: the end of what it wrote to stderr.
    """

    index: int
    code: int
    error: str


Backend = Callable[[Sequence[Sequence[str]], int], Iterator[Done]]
"""Runs `sparsepipe` with each of the argument lists, at most so many at once, and yields each as it ends."""


def run_one(index: int, arguments: Sequence[str], started: list[subprocess.Popen[str]] | None = None) -> Done:
    """Run one command to its end.

    Args:
        index: goes into the result.
        arguments: of `sparsepipe`.
        started: the process is entered here, for who may have to stop it.
    """
    with subprocess.Popen(
        [*START, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        if started is not None:
            started.append(process)
        _, error = process.communicate()
    return Done(index, process.returncode, "\n".join(error.splitlines()[-ERROR_LINES:]))


def local(commands: Sequence[Sequence[str]], jobs: int) -> Iterator[Done]:
    """Processes of this machine. If the caller stops early they are told to, and write their checkpoints."""
    started: list[subprocess.Popen[str]] = []
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(run_one, index, command, started) for index, command in enumerate(commands)]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        running = [process for process in started if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()


def on_ray(commands: Sequence[Sequence[str]], jobs: int) -> Iterator[Done]:
    """Tasks of the Ray cluster that RAY_ADDRESS names, or else of one on this machine.

    All nodes must have sparsepipe, and the same files under the same names: a shared folder.

    Raises:
        MissingExtraError: ray is not installed.
    """
    try:
        ray: Any = import_module("ray")  # its functions have no types
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", "ray", "The backend ray") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    try:
        task = ray.remote(num_cpus=max(1, int(ray.cluster_resources().get("CPU", 1)) // jobs))(run_one)
        waiting: list[Any] = [task.remote(index, list(command)) for index, command in enumerate(commands)]
        try:
            while waiting:
                ready, waiting = ray.wait(waiting)
                yield from ray.get(ready)
        finally:
            for reference in waiting:
                ray.cancel(reference, force=False)
    finally:
        if ours:
            ray.shutdown()


BACKENDS: dict[str, Backend] = {"local": local, "ray": on_ray}
