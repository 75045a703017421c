"""Intervals for what is measured and counted. Every interval is at the 95% level; every random draw is seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2
RESAMPLES = 2000
BINS = 2048
"""Larger samples are counted in so many bins of equal size to be drawn from: a p99 is good to 0.05 of a percent."""
NOISE_LIMIT = 0.03

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, all in one unit."""

    value: float
    low: float
    high: float


def minimum_samples(quantile: float) -> int:
    """The smallest sample whose order statistics bound a quantile on both sides.

    The smallest value lies above the q-quantile with probability (1-q)^n and the largest below it with q^n; both must
    be at most 2.5%. So a p99 needs 368 samples, a p90 36 and a median 6.
    """
    return math.ceil(math.log(TAIL) / math.log(max(quantile, 1 - quantile)))


def order_statistics(count: int, quantile: float) -> tuple[int, int] | None:
    """Which two of `count` sorted samples enclose a quantile with at least 95% probability, whatever the distribution.

    The number of samples below the q-quantile is binomial(n, q). The lower index is the largest, and the upper one the
    smallest, that leaves at most 2.5% on its side (David and Nagaraja, Order Statistics, 3rd ed., section 7.1).

    Returns:
        Zero-based indices into the sorted samples; None where `count` is too small for an interval.
    """
    if count < minimum_samples(quantile):
        return None
    # ppf(p) is the smallest k with P(below <= k) >= p, so P(below <= low - 1) < 2.5% and P(below > high) <= 2.5%.
    low, high = (int(stats.binom.ppf(level, count, quantile)) for level in (TAIL, 1 - TAIL))
    return low - 1, high


def percentile(samples: Samples, quantile: float) -> Estimate | None:
    """A quantile of the samples with its distribution-free interval; None where the sample does not support one.

    The interval takes the samples to be independent. Latencies of one process are so only roughly, which is why
    medians, tails and speed-ups are bootstrapped over blocks.
    """
    indices = order_statistics(len(samples), quantile)
    if indices is None:
        return None
    ordered = np.sort(samples)
    return Estimate(float(np.quantile(ordered, quantile)), float(ordered[indices[0]]), float(ordered[indices[1]]))


def median(blocks: Sequence[Samples], seed: int) -> Estimate | None:
    """The median of all calls; its interval is a percentile bootstrap that draws whole blocks.

    Calls of one block share the state of the machine, so an interval over single calls would be too narrow.

    Args:
        blocks: samples of each block.
        seed: of the bootstrap.

    Returns:
        None where there are too few blocks for the interval of a median.
    """
    if len(blocks) < minimum_samples(0.5):
        return None
    low, high = np.quantile(_resampled(blocks, 0.5, seed), [TAIL, 1 - TAIL])
    return Estimate(float(np.median(np.concatenate(blocks))), float(low), float(high))


def tail(blocks: Sequence[Samples], quantile: float, seed: int) -> Estimate | None:
    """A high quantile of all calls, with the wider one of two intervals.

    One is that of `percentile`, which takes the calls to be independent; the other a percentile bootstrap that draws
    whole blocks, whose calls share the state of the machine. The bootstrap alone is too narrow where few calls lie
    beyond the quantile, since it draws nothing larger than what was seen.

    Args:
        blocks: samples of each block.
        quantile: between 0 and 1.
        seed: of the bootstrap.

    Returns:
        None where the sample is too small for an interval.
    """
    found = percentile(np.concatenate(blocks), quantile) if blocks else None
    if found is None or len(blocks) < minimum_samples(0.5):
        return found
    low, high = np.quantile(_resampled(blocks, quantile, seed), [TAIL, 1 - TAIL])
    return Estimate(found.value, min(found.low, float(low)), max(found.high, float(high)))


def _resampled(blocks: Sequence[Samples], quantile: float, seed: int) -> Samples:
    """The quantile of each of `RESAMPLES` draws of blocks with replacement.

    Where so much of the sample is not more than one value, and no more is below the next one, it is their mean, as of
    a median (definition 2 of Hyndman and Fan 1996, "Sample quantiles in statistical packages").
    """
    ordered = np.sort(np.concatenate(blocks))
    places = np.linspace(0, len(ordered) - 1, min(len(ordered), BINS)).round().astype(np.int64)
    edges = np.unique(ordered[places])
    counts = np.array([np.bincount(np.searchsorted(edges, block), minlength=len(edges)) for block in blocks], float)
    drawn = np.random.default_rng(seed).multinomial(len(blocks), [1 / len(blocks)] * len(blocks), RESAMPLES)
    found = []
    for weights in np.array_split(drawn.astype(float), 8):  # in parts, to save memory
        below = (weights @ counts).cumsum(axis=1)
        wanted = quantile * below[:, -1:]
        found.append((edges[(below >= wanted).argmax(axis=1)] + edges[(below > wanted).argmax(axis=1)]) / 2)
    return np.concatenate(found)


def speedup(baseline: Sequence[Samples], candidate: Sequence[Samples], seed: int) -> Estimate | None:
    """How many times faster the candidate is: the median, over paired blocks, of the ratio of the blocks' medians.

    Both blocks of a pair ran one after the other, so what slows the machine down for a while cancels out. The
    interval is a percentile bootstrap that draws whole pairs, since the calls of one block are not independent.

    Args:
        baseline: samples of each block.
        candidate: samples of the blocks that ran beside them, in the same order.
        seed: of the bootstrap.

    Returns:
        None where there are too few pairs for the interval of a median.
    """
    if len(baseline) < minimum_samples(0.5):
        return None
    pairs = zip(baseline, candidate, strict=True)
    ratios = np.array([np.median(first) / np.median(second) for first, second in pairs])
    draws = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [TAIL, 1 - TAIL])
    return Estimate(float(np.median(ratios)), float(low), float(high))


def self_difference(blocks: Sequence[Samples]) -> float | None:
    """The A/A test: how far the median of the even blocks is from that of the odd ones, as a fraction.

    Both halves ran the same file under the same conditions, so any difference is noise. None for less than two blocks.
    """
    if len(blocks) < 2:
        return None
    even, odd = (np.median([np.median(block) for block in blocks[start::2]]) for start in (0, 1))
    return float(abs(even - odd) / min(even, odd))


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean of independent values, as of runs with different seeds, with Student's interval.

    Args:
        values: all in one unit.

    Returns:
        None for less than two values, whose spread is not known.
    """
    if len(values) < 2:
        return None
    centre = float(np.mean(values))
    half = float(stats.t.ppf(1 - TAIL, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Estimate(centre, centre - half, centre + half)


def wilson(correct: int, samples: int) -> Estimate:
    """A share with its interval by Wilson (1927), "Probable inference, the law of succession", JASA 22.

    Args:
        correct: number of successes.
        samples: number of trials, at least one.
    """
    share = correct / samples
    z = float(stats.norm.ppf(1 - TAIL))
    weight = 1 + z * z / samples
    centre = (share + z * z / (2 * samples)) / weight
    half = z / weight * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    return Estimate(share, max(centre - half, 0.0), min(centre + half, 1.0))


def paired_difference(lost: int, gained: int, samples: int) -> Estimate:
    """By how much the share of successes fell between two tests of the same samples, as a fraction.

    The value is (lost - gained) / samples; its interval is that of Agresti and Min (2005), "Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24: Wald's, after half a sample was added to
    each of the four cells.

    Args:
        lost: samples that only the first test passed.
        gained: samples that only the second test passed.
        samples: number of samples, at least one.
    """
    more_lost, more_gained, more = lost + 0.5, gained + 0.5, samples + 2
    centre = (more_lost - more_gained) / more
    variance = (more_lost + more_gained) / more - centre * centre
    half = float(stats.norm.ppf(1 - TAIL)) * math.sqrt(variance / more)
    value = (lost - gained) / samples
    return Estimate(value, min(max(centre - half, -1.0), value), max(min(centre + half, 1.0), value))


def as_dict(estimate: Estimate | None, scale: float = 1.0) -> dict[str, Any] | None:
    """The estimate times `scale` as JSON-able keys `value`, `low` and `high`."""
    if estimate is None:
        return None
    return {"value": estimate.value * scale, "low": estimate.low * scale, "high": estimate.high * scale}
