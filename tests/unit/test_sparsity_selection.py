"""Exact top-k against sorting in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepipe.sparsity.selection import top_k

SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -3.0, math.inf, -math.inf, math.nan])


def best(scores: list[float], candidates: list[bool], count: int) -> set[int]:
    """Indices of the `count` best candidates: highest score, then lowest index; NaN and -infinity last."""
    places = [index for index, candidate in enumerate(candidates) if candidate]

    def key(index: int) -> tuple[float, int]:
        score = scores[index]
        return (math.inf if math.isnan(score) else -score, index)

    return set(sorted(places, key=key)[:count])


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_top_k_is_exact_with_ties_by_lowest_index_and_nan_last(data: st.DataObject, rows: int, groups: int) -> None:
    matrix = st.lists(st.lists(SCORES, min_size=groups, max_size=groups), min_size=rows, max_size=rows)
    flags = st.lists(st.lists(st.booleans(), min_size=groups, max_size=groups), min_size=rows, max_size=rows)
    scores, candidates = data.draw(matrix), data.draw(flags)
    counts = [data.draw(st.integers(0, sum(row))) for row in candidates]
    chosen = top_k(torch.tensor(scores), torch.tensor(counts), torch.tensor(candidates))
    for row in range(rows):
        found = set(chosen[row].nonzero().flatten().tolist())
        assert found == best(scores[row], candidates[row], counts[row])


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_one_long_row_agrees_with_a_stable_sort(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 500, (1, 100_000), generator=generator).float()
    candidates = torch.rand(scores.shape, generator=generator) < share
    order = scores[0].sort(descending=True, stable=True).indices
    order = order[candidates[0][order]]
    for count in (1, 777, len(order) // 2, len(order)):
        expected = torch.zeros(100_000, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(top_k(scores, torch.tensor([count]), candidates)[0], expected)
