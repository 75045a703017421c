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
    """Inputs by name, of which the first `count` samples count; the rest fills up a fixed batch size."""

    inputs: dict[str, Array]
    count: int
    labels: Array | None = None

    def outputs(self, outputs: Sequence[Array]) -> list[Array]:
        """A network's outputs without those of the filling."""
        size = len(next(iter(self.inputs.values())))
        return [output[: self.count] if output.ndim and len(output) == size else output for output in outputs]

    def only(self, sample: int) -> dict[str, Array]:
        """The inputs of one sample, as a batch of one."""
        return self._rows(slice(sample, sample + 1))

    def head(self, count: int) -> dict[str, Array]:
        """The inputs of the first samples, at most `count`."""
        return self._rows(slice(count))

    def _rows(self, chosen: slice) -> dict[str, Array]:
        size = len(next(iter(self.inputs.values())))
        return {name: value[chosen] if len(value) == size else value for name, value in self.inputs.items()}


@dataclass(frozen=True)
class Samples:
    """A number of samples for given inputs, in batches; iterating again gives the same ones.

    Attributes:
        inputs: what the networks take.
        count: number of samples.
        size: samples of a batch.
        fixed: whether every batch must have just this size.
        make: (first sample, number of samples) -> inputs by name, and labels where they are known.
    """

    inputs: Sequence[Input]
    count: int
    size: int
    fixed: bool
    make: Callable[[int, int], tuple[dict[str, Array], Array | None]]

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, self.size):
            count = min(self.size, self.count - start)
            inputs, labels = self.make(start, count)
            yield Batch(_fill(inputs, self.size) if self.fixed else inputs, count, labels)


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

    def make(start: int, number: int) -> tuple[dict[str, Array], None]:
        return random_inputs(inputs, number, seed + start, bounds), None

    return Samples(inputs, count, size, fixed, make)


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

    def make(start: int, number: int) -> tuple[dict[str, Array], Array]:
        chosen = np.arange(start, start + number)
        return {entry.name: load(chosen)}, labels[chosen]

    return Samples([entry], len(labels), size, fixed, make)


def _batch_size(inputs: Sequence[Input], wanted: int) -> tuple[int, bool]:
    """The batch size, and whether the networks fix it; large samples come in smaller batches, to save memory."""
    fixed = next((entry.batch for entry in inputs if entry.batch is not None and len(entry.shape) > 1), None)
    if fixed is not None:
        return fixed, True
    values = sum(int(np.prod(shape)) for shape in resolve(inputs, 1).values())
    return max(1, min(wanted, BATCH_BYTES // (4 * max(values, 1)))), False


def _fill(inputs: dict[str, Array], size: int) -> dict[str, Array]:
    """Repeat the last sample until there are `size`."""
    return {
        name: np.concatenate([value, np.repeat(value[-1:], size - len(value), axis=0)])
        for name, value in inputs.items()
    }
