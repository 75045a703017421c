"""Exact, deterministic top-k: the one way in which weights are chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top_k(scores: Tensor, counts: Tensor, candidates: Tensor) -> Tensor:
    """Choose exactly `counts[r]` of the candidates of row r: highest score first, then lowest index.

    NaN ranks last, so a damaged score never changes how many are chosen. A threshold and exact resolution of the ties
    at it are several times faster than a stable sort.

    Args:
        scores: float [R, G].
        counts: int64 [R], none above the number of candidates of its row.
        candidates: bool [R, G].

    Returns:
        bool [R, G].
    """
    if not counts.any():
        return torch.zeros_like(candidates)
    if scores.shape[0] == 1:
        return _one_row(scores[0], int(counts[0]), candidates[0]).unsqueeze(0)
    scores = _ranked(scores).masked_fill_(~candidates, -torch.inf)
    largest = scores.topk(int(counts.max()), dim=1).values
    threshold = largest.gather(1, (counts - 1).clamp(min=0).unsqueeze(1))
    above, ties = scores > threshold, scores == threshold
    open_places = (counts - above.sum(dim=1)).unsqueeze(1)
    return above | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= open_places))


def _one_row(scores: Tensor, count: int, candidates: Tensor) -> Tensor:
    """The same for one long row: gathering the candidates first makes short work of a few among many."""
    if 2 * int(candidates.count_nonzero()) > candidates.numel():
        return _best(lambda: _ranked(scores).masked_fill_(~candidates, -torch.inf), count)
    places = candidates.nonzero().squeeze(1)
    chosen = torch.zeros_like(candidates)
    found = scores[places]
    chosen[places[_best(lambda: _ranked(found), count)]] = True
    return chosen


def _best(make: Callable[[], Tensor], count: int) -> Tensor:
    """Exactly `count` of a new flat tensor, bool: the largest, then of equal ones the first.

    It is made twice, and one of them at a time is there: the search for the threshold puts it into another order.
    """
    threshold = kth_largest(make(), count)
    values = make()
    chosen = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.count_nonzero())]] = True
    return chosen


def _ranked(scores: Tensor) -> Tensor:
    """The scores with NaN and -infinity as the lowest finite value, still above what is no candidate."""
    lowest = torch.finfo(scores.dtype).min
    return scores.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of a flat tensor, k from 1; on a CPU the values are in another order afterwards."""
    if values.device.type == "cpu":
        # About ten times faster than kthvalue, which also moves an index with each value.
        place, found = values.numel() - k, values.numpy()
        found.partition(place)
        return values.new_tensor(found[place])
    # On other devices kthvalue is refused under torch.use_deterministic_algorithms; the values of topk are exact.
    return values.topk(k, sorted=False).values.min()
