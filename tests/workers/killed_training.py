"""Trains small networks in forked processes that can be killed at any moment.

Importing torch takes seconds and a fork a few milliseconds, so one server forks for each order. Orders are lines of
JSON on stdin, as `Order` says; the answer to each is a line of JSON: `{"code": exit code or -signal, "seconds": ...}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import nn

from sparsepipe import artefact
from sparsepipe.cli.main import main
from sparsepipe.stages import trainer  # noqa: F401 (takes seconds to import)
from sparsepipe.training import checkpoint

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.chmod", "os.truncate"}
"""Audit events of what changes files, each raised before the change."""


class Order(TypedDict):
    arguments: list[str]
    """Of `sparsepipe train`, beside --out and --resume."""
    out: str
    log: str
    """The file to append all output to."""
    seconds: NotRequired[float]
    """Kill after this time."""
    change: NotRequired[int]
    """Kill right before this change to a file below the parent of `out`, counted from 1."""
    signal: NotRequired[int]
    """Send this signal instead of killing before the change."""
    write: NotRequired[int]
    """Kill in the middle of writing this checkpoint, counted from 1."""


def network(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """All that has state: convolutions, batch norm, and dropout, which draws from torch's generator."""
    return nn.Sequential(
        *(nn.Conv2d(input_shape[0], 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, classes)),
    )


def images() -> dict[str, Any]:
    """Images [N, 6, 6, 2] of three classes that differ in brightness."""
    generator = np.random.default_rng(0)
    labels = np.arange(150) % 3
    pixels = (generator.integers(0, 80, (150, 6, 6, 2)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    return {"x_train": pixels[:120], "y_train": labels[:120], "x_test": pixels[120:], "y_test": labels[120:]}


def end_at_change(number: int, by: int, folder: str) -> None:
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or not args or not str(args[0]).startswith(folder):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), by)

    sys.addaudithook(watch)


def kill_in_write(number: int) -> None:
    """Leave half a checkpoint under its temporary name."""
    seen = 0

    class Half:
        def __init__(self, file: IO[bytes]) -> None:
            self._file = file

        def write(self, content: bytes) -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def counting(path: Path) -> Iterator[Any]:
        nonlocal seen
        seen += 1
        with artefact.atomic_write(path) as file:
            yield Half(file) if seen == number else file

    checkpoint.atomic_write = counting


def work(order: Order) -> int:
    """Run the command line in this process; returns its exit code."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if "change" in order:
        end_at_change(order["change"], order.get("signal", signal.SIGKILL), str(Path(order["out"]).parent))
    if "write" in order:
        kill_in_write(order["write"])
    sys.argv = ["sparsepipe", "train", *order["arguments"], "--out", order["out"], "--resume"]
    try:
        main()
    except SystemExit as end:
        sys.stderr.flush()
        return int(end.code or 0)
    return 0


def serve(order: Order) -> dict[str, Any]:
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        os._exit(work(order))
    deadline = started + order.get("seconds", 300)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
        if time.monotonic() >= deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.001)


def run() -> None:
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
