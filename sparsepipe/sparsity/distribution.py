"""How many weights each layer keeps: target densities, and exact whole numbers that add up to the target.

Functions of shapes and numbers alone. `dense` names layers that keep everything whatever the rule says (a mapping also
says why); the others make up for it, so that the target holds over all the shapes given, except with `uniform`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.selection import kth_largest

Shape = tuple[int, ...]


def uniform(shapes: Mapping[str, Shape], sparsity: float, dense: Collection[str] = ()) -> dict[str, float]:
    """The same density 1 - sparsity in every layer; layers in `dense` are not made up for.

    Raises:
        RecipeError: every layer is in `dense`, and the sparsity is not 0.
    """
    if sparsity and shapes and set(shapes) <= set(dense):
        raise _too_dense(sparsity, dense)
    return {name: 1.0 if name in dense else 1 - sparsity for name in shapes}


def er(shapes: Mapping[str, Shape], sparsity: float, dense: Collection[str] = ()) -> dict[str, float]:
    """Erdos-Renyi: density proportional to (O + I) / (O I), clamped at 1 (SET, doi 10.1038/s41467-018-04316-3).

    Raises:
        RecipeError: the layers in `dense` alone exceed the target.
    """
    raw = {name: sum(shape[:2]) / math.prod(shape[:2]) for name, shape in shapes.items()}
    return proportional(shapes, sparsity, dense, raw)


def erk(shapes: Mapping[str, Shape], sparsity: float, dense: Collection[str] = ()) -> dict[str, float]:
    """Erdos-Renyi-Kernel: density proportional to sum(shape) / prod(shape), clamped at 1 (RigL, arXiv 1911.11134).

    Raises:
        RecipeError: the layers in `dense` alone exceed the target.
    """
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    return proportional(shapes, sparsity, dense, raw)


DISTRIBUTIONS: dict[str, Callable[[Mapping[str, Shape], float, Collection[str]], dict[str, float]]] = {
    "uniform": uniform,
    "er": er,
    "erk": erk,
}
"""Distributions that depend on shapes alone. `global` also needs the weights: see `global_magnitude`."""
NAMES = (*DISTRIBUTIONS, "global")
"""What `distribution` may be called; instead of a name it may also be a table of relative densities."""


def proportional(
    shapes: Mapping[str, Shape], sparsity: float, dense: Collection[str], raw: Mapping[str, float]
) -> dict[str, float]:
    """Densities eps * raw with eps such that the target holds.

    Layers that would exceed density 1 become dense, all those with the largest raw value together, and eps is
    computed again for the rest until none does; clamping alone would fall short of the target.

    Args:
        shapes: of the weights.
        sparsity: over all of them.
        dense: layers that keep everything.
        raw: positive relative density of each layer.

    Raises:
        RecipeError: the layers in `dense` alone exceed the target.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    full = set(dense) & set(shapes)
    budget = (1 - sparsity) * sum(sizes.values())
    if sum(sizes[name] for name in full) > round(budget):
        raise _too_dense(sparsity, dense)
    while free := {name: raw[name] for name in shapes if name not in full}:
        left = max(budget - sum(sizes[name] for name in full), 0)  # below 0 by less than half a weight
        eps = left / sum(value * sizes[name] for name, value in free.items())
        highest = max(free.values())
        if eps * highest <= 1:
            return {name: eps * free[name] if name in free else 1.0 for name in shapes}
        full |= {name for name, value in free.items() if value == highest}
    return dict.fromkeys(shapes, 1.0)


def global_magnitude(scores: Mapping[str, Tensor], sparsity: float, dense: Collection[str] = ()) -> dict[str, float]:
    """The share of each layer in the weights of highest score over the whole network.

    Args:
        scores: for each layer its elementwise scores; the densities are counted in elements.
        sparsity: over all the layers given.
        dense: layers that keep everything.

    Raises:
        RecipeError: the layers in `dense` alone exceed the target.
    """
    free = {name: score.reshape(-1) for name, score in scores.items() if name not in dense}
    total = sum(score.numel() for score in scores.values())
    kept = round((1 - sparsity) * total) - sum(scores[name].numel() for name in dense)
    if kept < 0:
        raise _too_dense(sparsity, dense)
    if not free:
        return dict.fromkeys(scores, 1.0)
    if kept == 0:
        return {name: float(name not in free) for name in scores}
    merged = torch.cat(list(free.values()))
    threshold = kth_largest(merged, kept)
    above = {name: int((score > threshold).sum()) for name, score in free.items()}
    left = kept - sum(above.values())
    densities = dict.fromkeys(scores, 1.0)
    for name, score in free.items():  # ties at the threshold go to the first layers
        ties = min(int((score == threshold).sum()), left)
        left -= ties
        densities[name] = (above[name] + ties) / score.numel()
    return densities


def apportion(shares: Mapping[str, float], limits: Mapping[str, int], units: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers near `shares` whose weighted sum is the target: the method of the largest remainder.

    Args:
        shares: real-valued number of units for each layer.
        limits: the most units that a layer has. Each layer gets at least one: none would cut the network in two.
        units: weights in one unit. The target is the rounded sum of shares x units; it is met exactly where all
            units are equal, else to within one unit.
    """
    counts = {name: min(max(math.floor(share), 1), limits[name]) for name, share in shares.items()}
    missing = round(sum(share * units[name] for name, share in shares.items()))
    missing -= sum(count * units[name] for name, count in counts.items())
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    while missing > 0:
        taking = [name for name in by_remainder if counts[name] < limits[name] and units[name] <= missing]
        if not taking:
            break
        for name in taking:
            if units[name] <= missing:
                counts[name] += 1
                missing -= units[name]
    while missing < 0:  # where the minimum of one unit exceeded the shares
        giving = [name for name in reversed(by_remainder) if counts[name] > 1 and units[name] <= -missing]
        if not giving:
            break
        for name in giving:
            if units[name] <= -missing:
                counts[name] -= 1
                missing += units[name]
    return counts


def allocate(total: int, shares: Sequence[float], low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total` exactly and are as near to proportional to `shares` as their limits allow.

    What a layer cannot take goes to the others in proportion to their shares; where only layers without a share have
    room left, in proportion to the room. The largest remainder decides where fractions go, then the order.

    Args:
        total: at least sum(low), at most sum(high).
        shares: what is not finite or below 0 counts as 0.
        low: the least of each.
        high: the most of each.
    """
    assert sum(low) <= total <= sum(high), (total, low, high)
    wishes = [share if math.isfinite(share) and share > 0 else 0.0 for share in shares]
    largest = max(wishes, default=0.0)
    wishes = [wish / largest if wish > largest * 1e-12 else 0.0 for wish in wishes]
    bounds = list(zip(wishes, low, high, strict=True))
    clipped = [float(most if wish else least) for wish, least, most in bounds]
    if sum(clipped) <= total:
        room = [most - least for least, most in zip(clipped, high, strict=True)]
        left = total - sum(clipped)
        clipped = [value + left * free / (sum(room) or 1.0) for value, free in zip(clipped, room, strict=True)]
    else:
        # The sum of clip(scale * wish, low, high) grows with the scale: halve the interval that holds the total.
        below, above = 0.0, max(most / wish for wish, _, most in bounds if wish)
        for _ in range(100):
            scale = (below + above) / 2
            clipped = [min(max(scale * wish, least), most) for wish, least, most in bounds]
            below, above = (below, scale) if sum(clipped) > total else (scale, above)
    counts = [math.floor(value) for value in clipped]
    missing = total - sum(counts)
    by_remainder = sorted(range(len(counts)), key=lambda place: counts[place] - clipped[place])
    while missing:
        sign = 1 if missing > 0 else -1
        for place in by_remainder if sign > 0 else reversed(by_remainder):
            if missing and low[place] <= counts[place] + sign <= high[place]:
                counts[place] += sign
                missing -= sign
    return counts


def _too_dense(sparsity: float, dense: Collection[str]) -> RecipeError:
    named: dict[str, list[str]] = {}
    for name in sorted(dense):
        named.setdefault(f" ({dense[name]})" if isinstance(dense, Mapping) else "", []).append(name)
    listed = "; ".join(", ".join(names) + reason for reason, names in named.items())
    return RecipeError(
        f"A sparsity of {sparsity:g} cannot be reached: the layers that stay dense hold more weights than that leaves: "
        f"{listed}.",
        where="sparsity",
        advice="Lower the sparsity, choose another pattern, or exclude these layers with an override.",
    )
