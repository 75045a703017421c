"""When masks change, and how much: plain callables of the optimizer step, which counts from 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


def cosine(value: float, stop: int) -> Schedule:
    """From `value` at step 0 to 0 at `stop`: value/2 (1 + cos(pi t/stop)) (RigL, arXiv 1911.11134, section 3)."""
    return lambda step: value / 2 * (1 + math.cos(math.pi * _progress(step, 0, stop)))


def cosine_floor(value: float, stop: int, floor: float = 0.005) -> Schedule:
    """The same, but to `floor` at `stop`, or constant if `value` is lower (ITOP, arXiv 2102.02887, the code)."""
    falling = cosine(max(value - floor, 0.0), stop)
    return lambda step: min(value, floor) + falling(step)


def halved(value: float, stop: int) -> Schedule:
    """`value`, from three quarters of the way to `stop` on half of it, then 0 (MEST, arXiv 2110.14032, the code)."""
    return lambda step: value * (1.0 if 4 * step < 3 * stop else 0.5 if step < stop else 0.0)


def stepped(value: float, every: int, factor: float) -> Schedule:
    """`value` times `factor` after each `every` steps: value factor^floor(step/every)."""
    return lambda step: float(value * factor ** (step // every))


def linear(value: float, stop: int) -> Schedule:
    """From `value` at step 0 to 0 at `stop`, in a straight line."""
    return lambda step: value * (1 - _progress(step, 0, stop))


def cubic(value: float, start: int, stop: int) -> Schedule:
    """From 0 at `start` to `value` at `stop`: value (1 - (1 - x)^3), x the progress (Zhu & Gupta, arXiv 1710.01878)."""
    return lambda step: value * (1 - (1 - _progress(step, start, stop)) ** 3)


DROP_SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": lambda value, stop: constant(value),
    "cosine-floor": cosine_floor,
    "halved": halved,
}
"""Ways in which the drop fraction may go from its first value, by name: (value, stop) -> Schedule."""


@dataclass(frozen=True)
class UpdateSchedule:
    """Mask updates at every multiple of `every` in the steps start <= t < stop."""

    every: int
    start: int
    stop: int

    def due(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step` (from 1)."""
        return self.start <= step < self.stop and step % self.every == 0

    @property
    def last(self) -> int:
        """The step of the last update; 0 if there is none."""
        last = (self.stop - 1) // self.every * self.every
        return last if last >= max(self.start, 1) else 0


def _progress(step: int, start: int, stop: int) -> float:
    """Share of the way from `start` to `stop`, in [0, 1]."""
    if step >= stop:
        return 1.0
    return max(step - start, 0) / (stop - start)
