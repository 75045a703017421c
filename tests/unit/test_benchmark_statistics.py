"""Intervals against scipy's, and against their own promise on simulated data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparsepipe.benchmark import statistics
from sparsepipe.benchmark.statistics import Estimate


def scipy_interval(count: int, quantile: float) -> tuple[float, float]:
    """Which of the sorted samples 0, 1, 2, ... scipy takes as the ends of the interval; NaN where there is none."""
    found: Any = stats.quantile_test(np.arange(float(count)), p=quantile).confidence_interval(0.95)
    return found.low, found.high


@pytest.mark.parametrize(("quantile", "expected"), [(0.5, 6), (0.9, 36), (0.1, 36), (0.99, 368)])
def test_minimum_samples_is_the_first_size_with_an_interval_on_both_sides(quantile: float, expected: int) -> None:
    assert statistics.minimum_samples(quantile) == expected
    for count, exists in ((expected - 1, False), (expected, True)):
        assert bool(np.isfinite(scipy_interval(count, quantile)).all()) is exists
        assert (statistics.order_statistics(count, quantile) is not None) is exists


@given(st.integers(1, 2000), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_the_order_statistics_are_those_of_scipy(count: int, quantile: float) -> None:
    ours = statistics.order_statistics(count, quantile)
    theirs = scipy_interval(count, quantile)
    if ours is None:
        assert np.isnan(theirs).any()
    else:
        assert ours == theirs


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_the_interval_covers_the_true_percentile_of_a_skewed_distribution(quantile: float) -> None:
    random, covered, trials = np.random.default_rng(1), 0, 400
    truth = stats.expon.ppf(quantile)
    for _ in range(trials):
        estimate = statistics.percentile(random.exponential(size=400), quantile)
        assert estimate is not None
        assert estimate.low <= estimate.value <= estimate.high
        covered += estimate.low <= truth <= estimate.high
    # A fair coin of 95% falls below 92% of 400 throws less than once in a hundred times.
    assert covered >= 0.92 * trials


def test_a_percentile_that_the_sample_does_not_support_is_none() -> None:
    samples = np.arange(367.0)
    assert statistics.percentile(samples, 0.99) is None
    assert statistics.percentile(samples[:20], 0.9) is None
    assert statistics.percentile(samples[:5], 0.5) is None
    assert statistics.percentile(samples[:0], 0.5) is None


def blocks(random: np.random.Generator, centre: float, drift: np.ndarray, size: int = 30) -> list[np.ndarray]:
    return [centre * slow * random.lognormal(0, 0.05, size) for slow in drift]


def test_the_speedup_of_paired_blocks_survives_a_drift_of_the_machine() -> None:
    random = np.random.default_rng(2)
    drift = np.linspace(1, 3, 20)
    estimate = statistics.speedup(blocks(random, 8.0, drift), blocks(random, 2.0, drift), seed=0)
    assert estimate is not None
    assert estimate.value == pytest.approx(4.0, rel=0.02)
    assert 3.8 < estimate.low <= estimate.value <= estimate.high < 4.2


def test_the_speedup_interval_covers_the_truth() -> None:
    random, covered, trials = np.random.default_rng(3), 0, 120
    for trial in range(trials):
        noise = random.lognormal(0, 0.1, (2, 20))
        estimate = statistics.speedup(blocks(random, 3.0, noise[0]), blocks(random, 2.0, noise[1]), seed=trial)
        assert estimate is not None
        covered += estimate.low <= 1.5 <= estimate.high
    # The percentile bootstrap of a median of 20 is a little short of 95%.
    assert covered >= 0.86 * trials


def test_the_speedup_is_the_same_for_the_same_seed_and_needs_six_pairs() -> None:
    random = np.random.default_rng(4)
    first, second = blocks(random, 3.0, np.ones(6)), blocks(random, 2.0, np.ones(6))
    assert statistics.speedup(first, second, seed=7) == statistics.speedup(first, second, seed=7)
    assert statistics.speedup(first, first, seed=7) == Estimate(1.0, 1.0, 1.0)
    assert statistics.speedup(first[:5], second[:5], seed=7) is None


def test_the_self_difference_compares_even_with_odd_blocks() -> None:
    flat = [np.full(9, 2.0)] * 8
    assert statistics.self_difference(flat) == 0.0
    assert statistics.self_difference([np.full(9, 2.0), np.full(9, 2.2)] * 4) == pytest.approx(0.1)
    assert statistics.self_difference(flat[:1]) is None


@given(st.integers(1, 3000), st.data())
def test_wilson_is_that_of_scipy(samples: int, draw: st.DataObject) -> None:
    correct = draw.draw(st.integers(0, samples))
    ours = statistics.wilson(correct, samples)
    theirs = stats.binomtest(correct, samples).proportion_ci(0.95, method="wilson")
    assert ours.value == correct / samples
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_as_dict_changes_the_unit() -> None:
    assert statistics.as_dict(Estimate(2.0, 1.0, 4.0), 0.5) == {"value": 1.0, "low": 0.5, "high": 2.0}
    assert statistics.as_dict(None) is None


def test_the_median_interval_covers_the_truth_where_the_calls_of_a_block_go_together() -> None:
    random, covered, narrow, trials = np.random.default_rng(2), 0, 0, 60
    for _ in range(trials):
        # Each block has a shift of its own, far larger than the spread inside it.
        blocks = [100 + random.normal() + 0.1 * random.normal(size=50) for _ in range(20)]
        estimate = statistics.median(blocks, seed=0)
        assert estimate is not None
        assert estimate.value == np.median(np.concatenate(blocks))
        covered += estimate.low <= 100 <= estimate.high
        naive = statistics.percentile(np.concatenate(blocks), 0.5)
        assert naive is not None
        narrow += naive.low <= 100 <= naive.high
    # 95% of 60 is 57; below 50 has a probability under 1 in 500. The interval over single calls is far too narrow.
    assert covered >= 50
    assert narrow < covered


@pytest.mark.parametrize("calls", [1, 2, 500])
def test_the_median_interval_is_that_of_drawing_whole_blocks(calls: int) -> None:
    """Few calls are drawn from as they are, many through bins."""
    random = np.random.default_rng(3)
    blocks = [random.normal() + 0.3 * random.lognormal(size=calls) for _ in range(20)]
    theirs = stats.bootstrap(
        (np.arange(len(blocks)),),
        lambda drawn: np.median(np.concatenate([blocks[number] for number in drawn])),
        n_resamples=4000,
        vectorized=False,
        method="percentile",
        rng=random,
    ).confidence_interval
    ours = statistics.median(blocks, seed=0)
    assert ours is not None
    spread = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.06 * spread)


def test_the_median_needs_six_blocks_for_an_interval() -> None:
    blocks = [np.arange(10.0)] * 6
    assert statistics.median(blocks[:5], seed=0) is None
    assert statistics.median(blocks, seed=0) == statistics.median(blocks, seed=0)


def test_the_interval_of_a_paired_difference_covers_the_true_one() -> None:
    """By simulation: 95% of intervals hold the difference that the samples were drawn with."""
    random = np.random.default_rng(0)
    lost, gained, samples = 0.05, 0.02, 400
    cells = random.multinomial(samples, [lost, gained, 1 - lost - gained], size=2000)
    found = [statistics.paired_difference(int(one), int(two), samples) for one, two, _ in cells]
    assert all(one.low <= one.value <= one.high for one in found)
    covered = np.mean([one.low <= lost - gained <= one.high for one in found])
    assert 0.93 < covered < 0.975


def test_a_paired_difference_of_nothing_is_zero_with_an_interval() -> None:
    none = statistics.paired_difference(0, 0, 1000)
    assert none.value == 0
    assert -0.003 < none.low < 0 < none.high < 0.003
