"""When checkpoints are written, and what a full disk does to a training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from sparsepipe.training import checkpoint, saver  # noqa: E402
from sparsepipe.training.saver import Saver  # noqa: E402


class Clock:
    """A clock that stands still unless it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(saver.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def state() -> dict[str, Any]:
    return {"weight": torch.ones(3)}


def test_a_number_of_steps_counts_from_where_training_started_and_from_each_checkpoint(tmp_path: Path) -> None:
    running = Saver(tmp_path, 10, 4)
    assert [running.due(step) for step in (10, 13, 14, 20)] == [False, False, True, True]
    assert running.save(15, state)
    assert [running.due(step) for step in (15, 18, 19)] == [False, False, True]


def test_without_a_number_it_is_every_half_minute(tmp_path: Path, clock: Clock) -> None:
    running = Saver(tmp_path, 0, 0)
    clock.now += 29
    assert not running.due(10_000)
    clock.now += 1
    assert running.due(1)
    running.save(1, state)
    assert not running.due(2)
    clock.now += 30
    assert running.due(2)


def test_slow_writing_takes_a_twentieth_of_the_time_at_most(tmp_path: Path, clock: Clock) -> None:
    def slow() -> dict[str, Any]:
        clock.now += 10
        return state()

    running = Saver(tmp_path, 0, 0)
    running.save(5, slow)
    clock.now += 189
    assert not running.due(6)
    clock.now += 11
    assert running.due(6)


def test_a_process_that_writes_nothing_is_never_due_but_takes_part(clock: Clock) -> None:
    asked = []
    running = Saver(None, 0, 1)
    assert not running.due(5)
    assert not running.save(5, lambda: asked.append(1) or state())
    assert asked == [1]


def test_a_full_disk_is_told_once_and_so_is_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: Path, state: Any) -> None:
        raise OSError(28, "No space left on device")

    running = Saver(tmp_path, 0, 1)
    assert running.save(3, state)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "sparsepipe"):
        patch.setattr(checkpoint, "save", full)
        assert not running.save(4, state)
        assert not running.save(5, state)
    assert running.save(6, state)
    assert running.save(7, state)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "The checkpoint of step 4 could not be written (No space left on device); training goes on, "
        "and that of step 3 is kept.",
        "Checkpoints can be written again: that of step 6 is.",
    ]
