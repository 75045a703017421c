"""Find the strength of a method that has no target sparsity: train again and again, and bisect its knob."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsepipe.artefact import Artefact, check_free, copy, write_json
from sparsepipe.errors import RecipeError
from sparsepipe.settings import Choice
from sparsepipe.sparsity import registry
from sparsepipe.stages import train

log = logging.getLogger("sparsepipe")

FIRST = 1e-3
"""Where a knob is 0 by default."""
FACTOR = 4.0
"""Between two trials while the target is not bracketed yet."""
TRIALS_FILE = "trials.json"

Trial = tuple[float, float]
"""Knob and sparsity."""


def next_value(trials: list[Trial], target: float) -> float:
    """The knob to try next, of which sparsity rises: by the factor, then the geometric mean of the bracket."""
    below = [knob for knob, sparsity in trials if sparsity < target]
    above = [knob for knob, sparsity in trials if sparsity >= target]
    if below and above and max(below) < min(above):
        return math.sqrt(max(below) * min(above))
    return max(below) * FACTOR if below else min(above) / FACTOR


def bisect(measure: Callable[[float], float], first: float, target: float, tolerance: float, most: int) -> list[Trial]:
    """Trials in their order; the last one is within `tolerance` of `target`, or there are `most`."""
    trials = [(first, measure(first))]
    while abs(trials[-1][1] - target) > tolerance and len(trials) < most:
        knob = next_value(trials, target)
        trials.append((knob, measure(knob)))
    return trials


def run(
    config: train.TrainConfig, out: Path, *, sparsity: float, tolerance: float = 0.01, most: int = 10
) -> tuple[Artefact, train.TrainConfig, list[dict[str, Any]]]:
    """Train until the sparsity is reached; `out` becomes the trial that came closest, `trials.json` beside it says all.

    Trials that are finished are not trained again, so an interrupted search goes on when it is repeated.

    Args:
        config: of the training; its knob is where the search begins.
        out: folder of the result. The trials are in `trials` beside it.
        sparsity: wanted, in (0, 1).
        tolerance: largest difference that is good enough.
        most: trials at most.

    Raises:
        RecipeError: the method has no knob, or the sparsity is not between 0 and 1.
        ArtefactError: `out` holds something else than a training.
        SparsepipeError: as the stage `train`.
    """
    name = config.method.name
    knob = registry.METHODS[name].knob if name in registry.METHODS else ""
    if not knob:
        # The median gates that it ends with by default are fewer than the target says.
        exact = ', and method.finish = "top-k"' if name == "l0-constrained" else ""
        raise RecipeError(
            f"The method '{name}' has no knob to search.",
            where="--target-sparsity",
            advice=f"Set method.sparsity{exact}. Methods with a knob: "
            + ", ".join(info.name for info in registry.METHODS.values() if info.knob)
            + ".",
        )
    if not 0 < sparsity < 1:
        raise RecipeError(f"The sparsity must be between 0 and 1, not {sparsity:g}.", where="--target-sparsity")
    first = float(getattr(registry.create(name, config.method.options), knob)) or FIRST
    check_free(out, "train")
    done: dict[float, tuple[Artefact, train.TrainConfig]] = {}

    def measure(value: float) -> float:
        method = Choice(**{**config.method.options, "name": name, knob: value})
        tried = config.model_copy(update={"method": method})
        artefact = train.run(tried, {}, out.parent / "trials" / f"{knob}-{value:.6g}", resume=True)
        done[value] = artefact, tried
        log.info("%s = %.6g: sparsity %.2f%%.", knob, value, 100 * artefact.metric("sparsity"))
        return float(artefact.metric("sparsity"))

    trials = bisect(measure, first, sparsity, tolerance, most)
    best, found = min(trials, key=lambda trial: abs(trial[1] - sparsity))
    if abs(found - sparsity) > tolerance:
        log.warning("After %d trials the closest sparsity is %.2f%%.", len(trials), 100 * found)
    table = [
        {knob: value, "sparsity": reached, "validation_accuracy": done[value][0].metric("validation_accuracy")}
        for value, reached in trials
    ]
    chosen = copy(done[best][0], out)
    write_json(out.parent / TRIALS_FILE, {"method": name, "knob": knob, "target": sparsity, "trials": table})
    return chosen, done[best][1], table
