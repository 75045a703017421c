"""Several calls timed in one process and one thread, in turn, by the CPU time of the thread or another clock.

CPU time leaves out what the machine gave to other processes, and calls in turn share what is left of a disturbance: the
clock's frequency, caches and memory that neighbours use. So ratios hold on a shared machine, where wall time does not.
It counts the calling thread alone: sessions must have one thread (several of them are for `harness`, in processes of
their own).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsepipe.benchmark.statistics import Estimate, Samples, minimum_samples, speedup

BLOCK_NS = 20_000_000
"""CPU time of the timed calls of one block, about, unless the caller says otherwise."""
FEWEST_CALLS, MOST_CALLS = 2, 1000  # in a block
FEWEST_ROUNDS = minimum_samples(0.5)
"""Fewer rounds give no interval of a ratio."""
WARM_UP_CALLS = 3
BEST = 0.1
"""The quantile that a busy machine distorts least."""


@dataclass(frozen=True)
class Timing:
    """Nanoseconds of the calls of each round. Rounds with the same index stood beside each other."""

    rounds: tuple[Samples, ...]

    @property
    def best_decile(self) -> float:
        """Nanoseconds that the fastest tenth of the calls stays under."""
        return float(np.quantile(np.concatenate(self.rounds), BEST))

    @property
    def median(self) -> float:
        """Nanoseconds."""
        return float(np.median(np.concatenate(self.rounds)))

    def speedup_over(self, baseline: Timing, seed: int = 0) -> Estimate | None:
        """How many times faster than `baseline` by the medians of the rounds, with a 95% interval.

        None where there are too few rounds for it.
        """
        return speedup(baseline.rounds, self.rounds, seed)


def interleave(
    calls: Sequence[Callable[[], Any]],
    seconds: float,
    *,
    rounds: int = FEWEST_ROUNDS,
    block_ns: int = BLOCK_NS,
    seed: int = 0,
    clock: Callable[[], int] = time.thread_time_ns,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Timing]:
    """Time all calls side by side.

    Each round runs a block of every call, in random order: one call that is not timed, which finds the caches full of
    another one's data, then as many as take about `block_ns`.

    Args:
        calls: what to time, in the calling thread.
        seconds: wall time for all of them together; the round that is on is finished.
        rounds: at least so many rounds are run, even if they take longer.
        block_ns: CPU time of a block in nanoseconds, about.
        seed: of the order.
        clock: nanoseconds; `time.perf_counter_ns` for calls that wait for a device.
        progress: called after each round with the share of the work that is done, at most 1.

    Returns:
        One timing for each call, in their order.
    """
    random = np.random.default_rng(seed)
    started = time.perf_counter()
    counts = [_calls_of_a_block(call, block_ns, clock) for call in calls]
    samples: list[list[Samples]] = [[] for _ in calls]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while calls and (len(samples[0]) < rounds or time.perf_counter() - started < seconds):
            for index in random.permutation(len(calls)):
                samples[index].append(_block(calls[index], counts[index], clock))
            spent = (time.perf_counter() - started) / seconds if seconds > 0 else 1.0
            progress(min(spent, len(samples[0]) / rounds if rounds else 1.0, 1.0))
    finally:
        if was_enabled:
            gc.enable()
    return [Timing(tuple(taken)) for taken in samples]


def _calls_of_a_block(call: Callable[[], Any], block_ns: int, clock: Callable[[], int]) -> int:
    """Warm up, and find how many calls fill a block."""
    fastest = max(float(_block(call, WARM_UP_CALLS, clock).min()), 1.0)
    return int(np.clip(round(block_ns / fastest), FEWEST_CALLS, MOST_CALLS))


def _block(call: Callable[[], Any], count: int, clock: Callable[[], int]) -> Samples:
    """Nanoseconds of `count` calls after one that does not count."""
    taken = np.empty(count)
    call()
    for index in range(count):
        before = clock()
        call()
        taken[index] = clock() - before
    return taken
