"""Whether weights fit a network, by names and shapes, and whether a dataset fits its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparsepipe.data.dataset import Dataset
from sparsepipe.errors import DataError, ModelError
from sparsepipe.formats.layout import Array
from sparsepipe.runtime.inputs import Input


def check_weights(
    expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Array], *, where: str, advice: str
) -> None:
    """Compare the names and shapes of weights with those of a network.

    Args:
        expected: name -> shape of everything in the network's state dict.
        weights: name -> values.
        where: what to call the weights in the error.
        advice: of the error.

    Raises:
        ModelError: weights are missing, unexpected or of another shape; the first ones of each kind are named.
    """
    misshaped = [
        f"{name} {weights[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of the wrong shape": misshaped,
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        raise ModelError(f"The weights do not fit the network: {found}.", where=where, advice=advice)


def input_for(dataset: Dataset, taken: Sequence[Input], where: str) -> Input:
    """The only input of a network, with the shape of the samples of a dataset.

    Raises:
        DataError: the network takes several inputs, or samples of another shape.
    """
    if len(taken) != 1:
        names = ", ".join(entry.name for entry in taken)
        raise DataError(f"A dataset gives one input, the network takes {len(taken)} ({names}).", where=where)
    (entry,) = taken
    shape = (entry.shape[0] if entry.shape else None, *dataset.input_shape)
    fits = len(entry.shape) == len(shape) and all(
        size == given or not isinstance(size, int) for size, given in zip(entry.shape[1:], shape[1:], strict=True)
    )
    if not fits:
        raise DataError(
            f"Its samples have the shape {list(dataset.input_shape)}, the network takes {list(entry.shape[1:])}.",
            where=where,
        )
    return replace(entry, shape=shape)


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
