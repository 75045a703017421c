"""Search for the largest number of samples that a training fits, by doubling and bisection.

Effective model complexity (Nakkiran et al., arXiv 1912.02292; Shwartz-Ziv et al., arXiv 2406.11463) is the largest
number of samples that training brings to no training error. The samples are nested: each number stands for the first
so many of one fixed order. A network that classifies n samples classifies the first m < n of them, so what fits, fits
at every smaller number, too; this, and bisection in the place of increments, is what keeps the trainings few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

FIRST = 16
DOUBLINGS = 2
"""How often the steps of a training that has not converged are doubled at most."""
IMPROVED = 0.01
"""A loss that twice the steps lower by less than this share has stopped falling."""


@dataclass(frozen=True)
class Trial:
    """One training: samples, steps allowed, whether all samples were fit, and if not, whether it had converged.

    `nonzero` is the number of parameters that were not masked at its end; `saddle` says whether it failed at a saddle
    of the loss, which longer training can leave.
    """

    samples: int
    steps: int
    fits: bool
    converged: bool
    loss: float
    nonzero: int
    saddle: bool


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        emc: largest number of samples known to be fit; 0 if not even one is.
        upper: smallest larger number that was not fit; None where all samples there are were fit.
        settled: whether the training at `upper` had converged, so that its failure is one of the network and not of
            too few steps; False where there is no `upper`. Otherwise `emc` is a lower bound.
        trials: all trainings in their order.
    """

    emc: int
    upper: int | None
    settled: bool
    trials: tuple[Trial, ...]

    @property
    def contradictions(self) -> list[int]:
        """Numbers of samples that a training failed on, although a larger one was fit: chance in training."""
        fit = {trial.samples for trial in self.trials if trial.fits}
        return sorted({trial.samples for trial in self.trials if trial.samples < self.emc} - fit)


def search(
    attempt: Callable[[int, int], Trial],
    *,
    largest: int,
    steps: int,
    tolerance: float = 0.05,
    known: Iterable[Trial] = (),
    first: int = FIRST,
    doublings: int = DOUBLINGS,
) -> Found:
    """Find the largest number of samples that is fit.

    Args:
        attempt: trains on so many samples for so many steps.
        largest: samples there are, at least one.
        steps: of a training at first. One that fails and has not converged is repeated with twice the steps, as long
            as that lowers its loss or it is at a saddle. Larger samples start with the steps that smaller ones needed.
        tolerance: the search ends once the number that fails is larger than the one that fits by this share at most,
            or by one.
        known: trials of an earlier search with the same `attempt`; they are not repeated.
        first: where to begin.
        doublings: of the steps, at most.
    """
    trials = {(trial.samples, trial.steps): trial for trial in known}
    most = steps * 2**doublings

    def try_with(samples: int, allowed: int) -> Trial:
        if (samples, allowed) not in trials:
            trials[samples, allowed] = attempt(samples, allowed)
        return trials[samples, allowed]

    def judge(samples: int) -> tuple[bool, bool]:
        """Whether it fits, and if not, whether that is settled."""
        fitting = [trial for trial in trials.values() if trial.fits and trial.steps <= most]
        if any(trial.samples >= samples for trial in fitting):
            return True, True
        allowed = max([steps, *(trial.steps for trial in fitting)])
        trial = try_with(samples, allowed)
        while not trial.fits and not trial.converged and 2 * allowed <= most:
            allowed *= 2
            before, trial = trial, try_with(samples, allowed)
            if not trial.fits and not trial.saddle and trial.loss > (1 - IMPROVED) * before.loss:
                return False, True
        return trial.fits, trial.converged

    low, high, settled = 0, largest + 1, False
    number = min(first, largest)
    while True:
        fits, converged = judge(number)
        if fits:
            fitting = [trial.samples for trial in trials.values() if trial.fits and trial.steps <= most]
            low = min(max(number, *fitting, 0), largest)
        else:
            high, settled = number, converged
        if high - low <= max(1, tolerance * low) or low == largest:
            break
        failed = [trial.samples for trial in trials.values() if not trial.fits and low < trial.samples < high]
        if high > largest:
            number = min([*failed, largest]) if failed else min(2 * low, largest)
        elif low == 0:
            number = high // 2
        else:
            number = (low + high) // 2
    return Found(low, None if high > largest else high, settled, tuple(trials.values()))
