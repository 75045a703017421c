"""Whether weights fit a network, by names and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsepipe.errors import ModelError
from sparsepipe.formats.layout import Array


def check_fit(
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


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
