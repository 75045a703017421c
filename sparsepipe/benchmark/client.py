"""The harness's end of a benchmark worker: start it, ask it, stop and continue it, and survive its death."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

PYTHON = (sys.executable, "-P")
"""Without -P, a file of the current folder would take the place of a package of its name."""
WORKER_COMMAND = (*PYTHON, "-m", "sparsepipe.benchmark.worker")

QUIT_TIMEOUT_SECONDS = 5.0
STDERR_KEPT = 300


class WorkerError(Exception):
    """A worker died, hung, or could not do what it was asked; the message is a reason to show in its row.

    `alive` tells a refusal from a death.
    """

    def __init__(self, message: str, *, alive: bool) -> None:
        super().__init__(message)
        self.alive = alive


class WorkerProcess:
    """A worker in a process of its own; use it as a context manager.

    Args:
        command: how to start it: any program that speaks the protocol of `sparsepipe.benchmark.worker`.
        environment: variables to set for it, beside those of this process.
    """

    def __init__(self, command: Sequence[str] = WORKER_COMMAND, environment: Mapping[str, str] | None = None) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        try:
            # A session of its own keeps Ctrl-C, which the harness handles, away from the worker.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            self._stderr.close()
            raise WorkerError(f"the worker cannot be started: {error}", alive=False) from error
        # A thread, because not every system can wait for a pipe with a time limit.
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Args:
            command: name of the request.
            timeout: seconds after which the worker counts as hanging, and is killed.
            arguments: further keys of the request.

        Raises:
            WorkerError: no answer, or one that is an error.
        """
        line = json.dumps({"command": command, **arguments}) + "\n"
        try:
            self._send(line.encode())
        except OSError as error:
            raise self._death(command) from error
        answer = self._read_line(command, timeout)
        if "error" in answer:
            raise WorkerError(str(answer["error"]), alive=True)
        return answer

    def stop(self) -> None:
        """Keep the process from running, its spinning threads too, where the system can."""
        self._signal("SIGSTOP")

    def resume(self) -> None:
        self._signal("SIGCONT")

    def close(self) -> None:
        """End the process: at its next request if it is well, by force if not."""
        self.resume()
        try:
            self._send(b'{"command": "quit"}\n')
            self._process.wait(QUIT_TIMEOUT_SECONDS)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._stderr):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)
        if number is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._lines.put(line)
        self._lines.put(b"")

    def _read_line(self, command: str, timeout: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty as error:
            self._process.kill()
            self._process.wait()
            raise WorkerError(
                f"no answer to '{command}' within {timeout:g} s; it was killed (a longer timeout can be set)",
                alive=False,
            ) from error
        if not line:
            raise self._death(command)
        try:
            return dict(json.loads(line))
        except ValueError as error:
            raise WorkerError(f"the answer to '{command}' is not JSON: {line[:80]!r}", alive=True) from error

    def _death(self, command: str) -> WorkerError:
        try:
            code = self._process.wait(QUIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
        self._stderr.seek(0)
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        detail = f": {last[0][:STDERR_KEPT]}" if last else ""
        return WorkerError(f"the process ended {how} during '{command}'{detail}", alive=False)
