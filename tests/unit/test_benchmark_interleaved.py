"""The interleaved timer: what it counts and in which order, never how long anything takes."""

from __future__ import annotations

import gc
import time
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from sparsepipe.benchmark import interleaved
from sparsepipe.benchmark.interleaved import Timing, interleave


def burn(milliseconds: float) -> None:
    """Take CPU time of this thread."""
    end = time.thread_time_ns() + milliseconds * 1e6
    while time.thread_time_ns() < end:
        pass


def test_every_round_holds_a_block_of_every_call_after_one_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interleaved, "MOST_CALLS", 4)
    log: list[str] = []
    timings = interleave([lambda: log.append("a"), lambda: log.append("b")], seconds=0, rounds=5)
    assert [len(timing.rounds) for timing in timings] == [5, 5]
    assert all(len(taken) == 4 for timing in timings for taken in timing.rounds)
    # 4 calls of each to warm up, then 5 rounds of 1 + 4 calls of each
    assert Counter(log) == {"a": 4 + 25, "b": 4 + 25}
    blocks = [len(list(group)) for _, group in groupby(log[8:])]
    assert sum(blocks) == 50
    assert set(blocks) <= {5, 10}  # two blocks of one call meet where the order of the rounds differs
    assert len({tuple(log[8 + 10 * i : 18 + 10 * i]) for i in range(5)}) == 2  # both orders occur


def test_time_asleep_does_not_count_and_work_does() -> None:
    idle, busy = interleave([lambda: time.sleep(0.005), lambda: burn(5)], seconds=0, rounds=2)
    assert busy.best_decile >= 5e6
    assert idle.best_decile < 5e6 / 2
    # 20 ms of 5 ms each
    assert {len(taken) for taken in busy.rounds} <= {2, 3, 4}


def test_it_goes_on_for_as_long_as_it_is_told_and_reports_its_progress() -> None:
    shares: list[float] = []
    started = time.perf_counter()
    interleave([lambda: burn(0.1)], seconds=0.3, rounds=1, progress=shares.append)
    assert time.perf_counter() - started >= 0.3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_figures_of_a_timing() -> None:
    slow = Timing(tuple(np.arange(1.0, 12.0) * 100 for _ in range(6)))
    fast = Timing(tuple(np.arange(1.0, 12.0) * 25 for _ in range(6)))
    assert (slow.best_decile, slow.median) == (200.0, 600.0)
    ratio = fast.speedup_over(slow)
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (4.0, 4.0, 4.0)
    assert Timing(slow.rounds[:5]).speedup_over(Timing(fast.rounds[:5])) is None


def test_garbage_is_collected_again_after_a_call_that_fails() -> None:
    with pytest.raises(ZeroDivisionError):
        interleave([lambda: 1 / 0], seconds=0)
    assert gc.isenabled()
