"""Stopping between two steps, so that the state is whole and can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparsepipe.errors import InterruptedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether someone asked to stop (Ctrl-C, or the system with SIGTERM)."""

    def __init__(self) -> None:
        self.number = signal.SIGINT
        """The signal that made the request."""
        self.made = False

    def _make(self, number: int, frame: FrameType | None) -> None:
        if self.made:  # asked twice: do not wait for the step to end
            raise InterruptedBySignal(number)
        self.made, self.number = True, signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs; a second one raises InterruptedBySignal at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # signals can be handled in the main thread only
        yield request
        return
    before = {number: signal.signal(number, request._make) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
