"""Trainings of a comparison in the process of the test, instead of one process each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from click.testing import CliRunner

from sparsepipe import jobs
from sparsepipe.cli.main import sparsepipe
from sparsepipe.jobs import Done


def run_here(monkeypatch: pytest.MonkeyPatch, *, failing: str | None = None) -> list[list[str]]:
    """Have trainings run here, one after another; those with the argument `failing` fail.

    Returns:
        The arguments of each, once it has begun.
    """
    made: list[list[str]] = []

    def in_this_process(commands: Sequence[Sequence[str]], at_once: int) -> Iterator[Done]:
        for index, arguments in enumerate(commands):
            made.append(list(arguments))
            if failing in arguments:
                yield Done(index, 2, "Error: unlucky")
                continue
            done = CliRunner().invoke(sparsepipe, list(arguments))
            assert done.exit_code == 0, done.output
            yield Done(index, 0, "")

    monkeypatch.setitem(jobs.BACKENDS, "local", in_this_process)
    return made
