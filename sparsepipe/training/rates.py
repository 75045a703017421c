"""Learning rates: plain callables of the step, counted from 0, that give a multiple of the base rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparsepipe.errors import RecipeError

Rate = Callable[[int], float]


def constant() -> Rate:
    """1 at every step."""
    return lambda step: 1.0


def cosine(total: int, start: int = 0) -> Rate:
    """(1 + cos(pi x)) / 2, where x goes from 0 at `start` to 1 at `total` (Loshchilov and Hutter, arXiv 1608.03983)."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * (step - start) / (total - start)))


def multistep(milestones: Sequence[int], gamma: float) -> Rate:
    """gamma to the power of the number of milestones that the step has reached."""
    return lambda step: gamma ** sum(step >= milestone for milestone in milestones)


def warmed_up(rate: Rate, warmup: int) -> Rate:
    """`rate`, but rising linearly over the first `warmup` steps: (step + 1) / (warmup + 1) of its value at `warmup`."""
    return lambda step: rate(step) if step >= warmup else rate(warmup) * (step + 1) / (warmup + 1)


def create(name: str, *, total: int, warmup: int, milestones: Sequence[float], gamma: float) -> Rate:
    """The learning rate of one training.

    Args:
        name: cosine, multistep or constant.
        total: steps of the whole training.
        warmup: steps of linear warm-up; the cosine runs over the rest.
        milestones: multistep: fractions of `total`.
        gamma: multistep: the factor at each milestone.

    Raises:
        RecipeError: the warm-up leaves no steps, or the name is unknown.
    """
    if warmup >= total:
        raise RecipeError(
            f"The warm-up takes {warmup} steps, but the whole training has {total}.",
            where="schedule.warmup",
            advice="Shorten the warm-up or train for more epochs.",
        )
    shapes: dict[str, Rate] = {
        "cosine": cosine(total, warmup),
        "multistep": multistep([round(milestone * total) for milestone in milestones], gamma),
        "constant": constant(),
    }
    if name not in shapes:
        raise RecipeError(
            f"There is no learning-rate schedule '{name}'.", where="schedule", advice=f"Known: {', '.join(shapes)}."
        )
    return warmed_up(shapes[name], warmup)
