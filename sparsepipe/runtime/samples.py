"""Batches to compare two networks on: made up, or from a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsepipe.runtime.inputs import Input, random_inputs, resolve

Array = NDArray[Any]

BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Batch:
    """Inputs for one call.

    Attributes:
        inputs: by name.
        count: number of samples that count.
        size: number of samples that the call takes; what is beyond `count` fills up a fixed batch size.
        labels: true classes of those that count, where they are known.
        batched: the inputs whose rows are samples; none where the batch size is fixed.
    """

    inputs: dict[str, Array]
    count: int
    size: int
    labels: Array | None = None
    batched: frozenset[str] = frozenset()

    def outputs(self, outputs: Sequence[Array]) -> list[Array]:
        """A network's outputs without those of the filling."""
        return [output[: self.count] if output.ndim and len(output) == self.size else output for output in outputs]

    def only(self, sample: int) -> dict[str, Array]:
        """The inputs of one sample, as a batch of one; all of them where the batch size is fixed."""
        return self._rows(slice(sample, sample + 1))

    def head(self, count: int) -> dict[str, Array]:
        """The inputs of the first samples, at most `count`; all of them where the batch size is fixed."""
        return self._rows(slice(count))

    def _rows(self, chosen: slice) -> dict[str, Array]:
        return {name: value[chosen] if name in self.batched else value for name, value in self.inputs.items()}


@dataclass(frozen=True)
class Samples:
    """A number of samples for given inputs, in batches; iterating again gives the same ones.

    Attributes:
        inputs: what the networks take.
        count: number of samples.
        size: samples of a batch.
        make: (first sample, number of samples) -> the batch.
    """

    inputs: Sequence[Input]
    count: int
    size: int
    make: Callable[[int, int], Batch]

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, self.size):
            yield self.make(start, min(self.size, self.count - start))


def random_samples(inputs: Sequence[Input], count: int, batch: int, seed: int, bounds: Mapping[str, int]) -> Samples:
    """Seeded random samples (`random_inputs`), about `count` of them.

    Args:
        inputs: what the networks take.
        count: number of samples; a fixed batch size rounds it up.
        batch: samples of a batch, unless the networks fix it or samples are large.
        seed: of the random generator.
        bounds: number of allowed values of integer inputs.
    """
    size, fixed = _batch_size(inputs, batch)
    count = -(-count // size) * size if fixed else count
    batched = frozenset() if fixed else _batched(inputs)

    def make(start: int, number: int) -> Batch:
        return Batch(random_inputs(inputs, number, seed + start, bounds), number, number, batched=batched)

    return Samples(inputs, count, size, make)


def labelled_samples(
    entry: Input, labels: Array, batch: int, load: Callable[[NDArray[np.int64]], NDArray[np.float32]]
) -> Samples:
    """All samples of a split, in order, for networks with one input.

    Args:
        entry: the input.
        labels: true classes, int64 [N].
        batch: samples of a batch, unless the networks fix it or samples are large.
        load: indices -> prepared samples.
    """
    size, fixed = _batch_size([entry], batch)
    batched = frozenset() if fixed else frozenset({entry.name})

    def make(start: int, number: int) -> Batch:
        chosen = np.arange(start, start + number)
        values = load(chosen)
        if fixed:
            values = np.concatenate([values, np.repeat(values[-1:], size - number, axis=0)])
        return Batch({entry.name: values}, number, len(values), labels[chosen], batched)

    return Samples([entry], len(labels), size, make)


def _batch_size(inputs: Sequence[Input], wanted: int) -> tuple[int, bool]:
    """The batch size, and whether the networks fix it; large samples come in smaller batches, to save memory."""
    fixed = next((entry.batch for entry in inputs if entry.batch is not None and len(entry.shape) > 1), None)
    if fixed is not None:
        return fixed, True
    values = sum(int(np.prod(shape)) for shape in resolve(inputs, 1).values())
    return max(1, min(wanted, BATCH_BYTES // (4 * max(values, 1)))), False


def _batched(inputs: Sequence[Input]) -> frozenset[str]:
    """The inputs whose first dimension is the batch, where networks leave that free."""
    one, two = resolve(inputs, 1), resolve(inputs, 2)
    return frozenset(name for name in one if one[name][:1] != two[name][:1])
