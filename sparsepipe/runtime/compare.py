"""How far the outputs of two networks are apart, batch by batch, and where they begin to be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NO_CLASS = -1
NO_REFERENCE_CLASS = -2


@dataclass(frozen=True)
class Divergence:
    """The first layer beyond the tolerance. An error that has no finite value is None."""

    layer: str
    max_abs: float | None
    max_relative: float | None


@dataclass
class Tally:
    """Running comparison of a candidate with its reference, over any number of batches.

    Differences are taken in float64. The relative one is relative to the largest |value| of the same output of the
    reference over all batches; of several outputs the worst counts. Values that are NaN, or the same infinity, in both
    are no difference of a layer, but they are counted as not finite: with any of those on either side the largest
    differences are infinite, and nothing passes.
    """

    samples: int = 0
    agreeing: int | None = None
    correct: int | None = None
    reference_correct: int | None = None
    lost: int = 0
    """Samples that the reference alone gets right."""
    gained: int = 0
    """Samples that the candidate alone gets right."""
    ranked: list[Array] = field(default_factory=list)
    """Of two classes: scores of the second by candidate and reference, and labels, [3, n] for each batch."""
    problem: str | None = None
    not_finite: int = 0
    reference_not_finite: int = 0
    _max_abs: list[float] = field(default_factory=list)
    _scale: list[float] = field(default_factory=list)
    _error: list[_Error] = field(default_factory=list)
    _worst: float = -1.0

    def add(self, reference: Sequence[Array], candidate: Sequence[Array], labels: Array | None = None) -> int | None:
        """Count one batch.

        Args:
            reference: outputs of the reference; the first of shape [N, classes] is what the top-1 class is taken from.
            candidate: outputs of the candidate, in the same order.
            labels: the true classes, [N].

        Returns:
            The index of the sample with the largest difference so far, if it is in this batch.
        """
        self.samples += len(reference[0]) if reference and reference[0].ndim else 1
        self.problem = self.problem or mismatch(reference, candidate)
        if self.problem:
            return None
        self._max_abs = self._max_abs or [0.0] * len(reference)
        self._scale = self._scale or [0.0] * len(reference)
        self._error = self._error or [_Error() for _ in reference]
        worst = None
        for index, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
            self.not_finite += _count_not_finite(found)
            self.reference_not_finite += _count_not_finite(expected)
            difference = absolute_difference(expected, found)
            self._max_abs[index] = max(self._max_abs[index], float(difference.max(initial=0.0)))
            self._scale[index] = max(self._scale[index], largest(expected))
            self._error[index].add(expected, difference)
            if index == 0:
                worst = self._new_worst(difference)
        self._count_classes(reference[0], candidate[0], labels)
        return worst

    @property
    def max_abs(self) -> float:
        """Largest absolute difference; infinite where one of the two is not finite, or nothing could be compared."""
        return max(self._max_abs, default=0.0) if self._comparable else math.inf

    @property
    def max_relative(self) -> float:
        """Largest difference relative to the largest |value| of the reference's output; infinite as `max_abs` is."""
        if not self._comparable:
            return math.inf
        return max((relative(*pair) for pair in zip(self._max_abs, self._scale, strict=True)), default=0.0)

    @property
    def rms_of_range(self) -> float:
        """Root mean square of the differences, in units of the range (largest less smallest) of the reference's output.

        Of several outputs the worst counts; infinite as `max_abs` is.
        """
        return max((error.of_range for error in self._error), default=0.0) if self._comparable else math.inf

    @property
    def complete(self) -> bool:
        """Whether there was something to compare, and all of it finite."""
        return self._comparable and self.samples > 0

    @property
    def _comparable(self) -> bool:
        return self.problem is None and not self.not_finite and not self.reference_not_finite

    @property
    def agreement(self) -> float | None:
        """Share of samples with the same top-1 class; None where the output holds no classes."""
        return self.agreeing / self.samples if self.agreeing is not None and self.samples else None

    def passed(self, max_relative: float, min_agreement: float) -> bool:
        """Whether all outputs were finite and compared, and the two networks are as close as this."""
        agrees = self.agreement is None or self.agreement >= min_agreement
        return self.complete and self.max_relative <= max_relative and agrees

    @property
    def note(self) -> str | None:
        """What must be said about the comparison: why there was none, or how many output values are not finite."""
        if self.problem or not (self.not_finite or self.reference_not_finite):
            return self.problem
        return (
            f"Output values that are not finite (NaN or infinite): {self.not_finite} of the file, "
            f"{self.reference_not_finite} of the reference."
        )

    def _new_worst(self, difference: Array) -> int | None:
        if not difference.size:
            return None
        of_samples = difference.reshape(len(difference), -1).max(axis=1) if difference.ndim else difference.reshape(1)
        index = int(of_samples.argmax())
        if of_samples[index] <= self._worst:
            return None
        self._worst = float(of_samples[index])
        return index

    def _count_classes(self, reference: Array, candidate: Array, labels: Array | None) -> None:
        if not has_classes(reference):
            return
        expected, found = _classes(reference, NO_REFERENCE_CLASS), _classes(candidate, NO_CLASS)
        self.agreeing = (self.agreeing or 0) + int((expected == found).sum())
        if labels is not None:
            self.correct = (self.correct or 0) + int((found == labels).sum())
            self.reference_correct = (self.reference_correct or 0) + int((expected == labels).sum())
            self.lost += int(((expected == labels) & (found != labels)).sum())
            self.gained += int(((expected != labels) & (found == labels)).sum())
            if reference.shape[1] == 2:
                scores = [output[:, 1] - output[:, 0] for output in (candidate, reference)]
                self.ranked.append(np.stack([*scores, labels]))


@dataclass
class _Error:
    """Squared differences of one output, and the range of the reference's values."""

    squares: float = 0.0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, expected: Array, difference: Array) -> None:
        with np.errstate(over="ignore"):
            self.squares += float(np.square(difference).sum())
        self.count += difference.size
        finite_values = expected.astype(np.float64)[np.isfinite(expected.astype(np.float64))]
        self.low = min(self.low, float(finite_values.min(initial=math.inf)))
        self.high = max(self.high, float(finite_values.max(initial=-math.inf)))

    @property
    def of_range(self) -> float:
        return relative(math.sqrt(self.squares / self.count), self.high - self.low) if self.count else 0.0


def has_classes(output: Array) -> bool:
    """Whether an output can be read as scores of classes: floats of shape [N, classes]."""
    return output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind == "f"


def mismatch(reference: Sequence[Array], candidate: Sequence[Array]) -> str | None:
    """Why two lists of outputs cannot be subtracted, as a sentence; None where they can."""
    if len(reference) != len(candidate):
        return f"It has {len(candidate)} outputs, the reference {len(reference)}."
    for index, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        if expected.shape != found.shape:
            return f"Output {index} has the shape {list(found.shape)}, that of the reference {list(expected.shape)}."
        if expected.dtype.kind not in "fiub" or found.dtype.kind not in "fiub":
            return f"Output {index} is not a tensor of numbers."
    return None


def absolute_difference(reference: Array, candidate: Array) -> Array:
    """|candidate - reference| in float64; 0 where both are NaN or the same infinity, infinite where only one is."""
    expected, found = reference.astype(np.float64), candidate.astype(np.float64)
    same = (expected == found) | (np.isnan(expected) & np.isnan(found))
    with np.errstate(invalid="ignore"):
        difference = np.abs(found - expected)
    return np.where(same, 0.0, np.where(np.isfinite(difference), difference, np.inf))


def largest(values: Array) -> float:
    """The largest finite |value|; 0 where there is none."""
    magnitudes = np.abs(values.astype(np.float64))
    return float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0))


def relative(difference: float, scale: float) -> float:
    """`difference / scale`; a difference from nothing but zeros is infinite."""
    if difference == 0.0:
        return 0.0
    return difference / scale if scale > 0.0 else math.inf


def first_divergence(
    order: Iterable[str], reference: Mapping[str, Array], candidate: Mapping[str, Array], tolerance: float
) -> Divergence | None:
    """The first tensor, in `order`, that both have and whose relative difference is beyond `tolerance`.

    A tensor that has another number of elements in the candidate diverges, too. Tensors that are not floats are
    passed over.
    """
    for name in order:
        if name not in reference or name not in candidate:
            continue
        expected, found = reference[name], candidate[name]
        if expected.dtype.kind != "f" or found.dtype.kind != "f":
            continue
        if expected.size != found.size:
            return Divergence(name, None, None)
        difference = float(absolute_difference(expected.ravel(), found.ravel()).max(initial=0.0))
        error = relative(difference, largest(expected))
        if error > tolerance:
            return Divergence(name, finite(difference), finite(error))
    return None


def finite(value: float) -> float | None:
    """None in place of what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _count_not_finite(values: Array) -> int:
    # bfloat16 and the like have no isfinite of their own
    return int(values.size - np.count_nonzero(np.isfinite(values.astype(np.float64))))


def _classes(scores: Array, none: int) -> Array:
    """Top-1 class of each row, [N]; a row with a NaN has no class, and so agrees with nothing."""
    return np.where(np.isnan(scores).any(axis=1), none, scores.argmax(axis=1))
