"""The search for the effective model complexity, against oracles of known capacity."""

from __future__ import annotations

import pytest

from sparsepipe.emc.search import Trial, search


class Oracle:
    """Fits up to `capacity` samples, given at least `needs(samples)` steps; the loss falls until then."""

    def __init__(self, capacity: int, *, needs: int = 0, notices: bool = True) -> None:
        self.capacity, self.needs, self.notices = capacity, needs, notices
        self.asked: list[tuple[int, int]] = []

    def __call__(self, samples: int, steps: int) -> Trial:
        self.asked.append((samples, steps))
        enough = steps >= self.needs
        fits = samples <= self.capacity and enough
        return Trial(samples, steps, fits, enough and self.notices, 0.0 if fits else 1 / steps, 7, False)


@pytest.mark.parametrize("capacity", [0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 100, 999, 1000])
def test_without_tolerance_the_capacity_is_found_exactly(capacity: int) -> None:
    oracle = Oracle(capacity)
    found = search(oracle, largest=1000, steps=10, tolerance=0)
    assert found.emc == capacity
    assert found.upper == (None if capacity == 1000 else capacity + 1)
    assert found.settled is (capacity < 1000)
    assert len(oracle.asked) == len(set(oracle.asked)) <= 18  # doublings and halvings: 2 log2(1000)
    assert found.contradictions == []


@pytest.mark.parametrize("capacity", [3, 40, 77, 640, 900])
@pytest.mark.parametrize("tolerance", [0.05, 0.2])
def test_the_result_is_within_the_tolerance_and_never_above_the_capacity(capacity: int, tolerance: float) -> None:
    found = search(Oracle(capacity), largest=1000, steps=10, tolerance=tolerance)
    assert found.upper is not None
    assert found.emc <= capacity < found.upper
    assert found.upper - found.emc <= max(1, tolerance * found.emc)
    wider = search(Oracle(capacity), largest=1000, steps=10, tolerance=0)
    assert len(found.trials) <= len(wider.trials)


def test_too_few_steps_are_doubled_and_larger_samples_start_with_what_was_needed() -> None:
    oracle = Oracle(40, needs=35)
    found = search(oracle, largest=1000, steps=10, tolerance=0)
    assert (found.emc, found.upper, found.settled) == (40, 41, True)
    assert oracle.asked[:3] == [(16, 10), (16, 20), (16, 40)]
    assert {steps for _, steps in oracle.asked[3:]} == {40}


def test_what_stays_undertrained_is_a_lower_bound() -> None:
    oracle = Oracle(40, needs=41)  # 10, 20 and 40 steps are allowed
    found = search(oracle, largest=1000, steps=10, tolerance=0)
    assert found.emc == 0
    assert found.settled is False
    assert max(steps for _, steps in oracle.asked) == 40


def test_a_loss_that_more_steps_do_not_lower_is_a_failure_of_the_network() -> None:
    def flat(samples: int, steps: int) -> Trial:
        return Trial(samples, steps, samples <= 20, False, 0.5, 7, False)

    found = search(flat, largest=1000, steps=10, tolerance=0)
    assert (found.emc, found.upper, found.settled) == (20, 21, True)
    assert max(trial.steps for trial in found.trials) == 20  # the second of three allowed showed it


def test_a_saddle_that_twice_the_steps_do_not_leave_settles_nothing() -> None:
    def stuck(samples: int, steps: int) -> Trial:
        return Trial(samples, steps, samples <= 20, False, 0.5, 7, samples > 20)

    found = search(stuck, largest=1000, steps=10, tolerance=0)
    assert (found.emc, found.upper, found.settled) == (20, 21, False)
    assert {trial.steps for trial in found.trials if trial.samples == 21} == {10, 20, 40}  # all that are allowed


def test_a_fit_proves_all_smaller_samples_and_known_trials_are_not_repeated() -> None:
    first = search(Oracle(300), largest=1000, steps=10, tolerance=0.2)
    again = Oracle(300)
    assert search(again, largest=1000, steps=10, tolerance=0.2, known=first.trials).emc == first.emc
    assert again.asked == []
    finer = search(again, largest=1000, steps=10, tolerance=0, known=first.trials)
    assert finer.emc == 300
    assert not {each.samples for each in first.trials} & {samples for samples, _ in again.asked}
    assert min(samples for samples, _ in again.asked) > first.emc


def test_a_failure_below_a_fit_is_chance_and_does_not_lower_the_result() -> None:
    unlucky = Trial(64, 10, False, True, 1.0, 7, False)
    larger = Trial(200, 10, True, True, 0.0, 7, False)
    found = search(Oracle(300), largest=1000, steps=10, tolerance=0, known=[unlucky, larger])
    assert found.emc == 300
    assert found.contradictions == [64]


def test_a_fit_that_took_more_steps_than_allowed_now_is_not_used() -> None:
    longer = Trial(200, 1000, True, True, 0.0, 7, False)
    assert search(Oracle(50), largest=1000, steps=10, tolerance=0, known=[longer]).emc == 50
