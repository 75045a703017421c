"""The processes that `torchrun` started, as it describes them to each; without it there is one process.

Nothing here needs torch but telling which of several failing processes reports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

PATIENCE = timedelta(seconds=10)
"""How long a process waits for another one to report its error before it ends silently."""


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default)) if "TORCHELASTIC_RUN_ID" in os.environ else default


def rank() -> int:
    """Number of this process, from 0; process 0 writes all files."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes on all hosts."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes on this host."""
    return _number("LOCAL_WORLD_SIZE", 1)


@contextmanager
def one_report() -> Iterator[bool]:
    """Whether this process reports its error: True in the first that asks, and in the only one of a single process.

    torchrun ends all processes as soon as one has ended, so the others wait until the report is out.
    """
    if world_size() == 1:
        yield True
        return
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=PATIENCE)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        claimed = store.compare_set(f"sparsepipe/failed/{attempt}", "", str(rank()))
    except (DistError, RuntimeError, ValueError):  # no one is left to agree with
        yield True
        return
    reported = f"sparsepipe/reported/{attempt}"
    if claimed.decode() == str(rank()):
        yield True
        store.set(reported, "yes")
        return
    with suppress(DistError, RuntimeError):
        store.wait([reported], PATIENCE)
    yield False


def leave(code: int) -> NoReturn:
    """End this process with the exit code `code`; one of several ends without Python's own shutdown.

    A thread of gloo drops its references to a tensor after the collective, for which it takes Python's lock, and the
    process group's end does not wait for it. If Python is shutting down by then, the process aborts, and torchrun
    kills the others.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
