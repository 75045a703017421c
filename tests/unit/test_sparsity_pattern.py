"""Patterns: which elements belong together, checked against plain index arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.pattern import NM, Block, Channel, ConstantFanIn, Pattern, Unstructured, parse

SHAPES = [(8, 8), (4, 8, 3, 3), (8, 4, 1, 1), (8, 4, 5)]
PATTERNS = [Unstructured(), Block(4, 1), Block(1, 4), Block(2, 4), NM(2, 4), NM(1, 4), Channel(), ConstantFanIn()]


def group_of(pattern: Pattern, index: tuple[int, ...]) -> tuple[object, object]:
    """(row, group) of an element, by definition of the pattern."""
    output, inputs, tap = index[0], index[1], index[2:]
    match pattern:
        case Block(r, c):
            return 0, (output // r, inputs // c, tap)
        case NM(_, m):
            return (output, inputs // m, tap), inputs % m
        case Channel():
            return 0, output
        case ConstantFanIn():
            return output, (inputs, tap)
    return 0, index


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fold_brings_together_exactly_the_elements_of_one_group(pattern: Pattern, shape: tuple[int, ...]) -> None:
    indices = list(itertools.product(*map(range, shape)))
    folded = pattern.fold(torch.arange(len(indices)).reshape(shape))
    assert tuple(folded.shape) == pattern.grid(shape)
    rows = set()
    for row in folded:
        groups = [{group_of(pattern, indices[element]) for element in group} for group in row.tolist()]
        assert all(len(group) == 1 for group in groups)
        found = [group.pop() for group in groups]
        assert len(set(found)) == len(found)
        assert len({row for row, _ in found}) == 1
        rows.add(found[0][0])
    assert len(rows) == len(folded)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unfold_undoes_fold(pattern: Pattern, shape: tuple[int, ...]) -> None:
    rows, groups, size = pattern.grid(shape)
    kept = torch.rand(rows, groups) < 0.4
    mask = pattern.unfold(kept, shape)
    assert mask.shape == shape
    assert torch.equal(pattern.rows(mask), kept)
    assert int(mask.sum()) == int(kept.sum()) * size


def test_score_of_a_block_is_the_sum_over_its_elements() -> None:
    score = torch.arange(32.0).reshape(4, 8)
    expected = [[score[o : o + 2, i : i + 4].sum() for i in (0, 4)] for o in (0, 2)]
    assert Block(2, 4).scores(score).tolist() == [[float(value) for row in expected for value in row]]


def test_flat_order_of_groups_is_the_order_of_ties() -> None:
    assert Unstructured().fold(torch.arange(6).reshape(2, 3)).flatten().tolist() == list(range(6))
    first_elements = Block(2, 1).fold(torch.arange(16).reshape(4, 2, 2))[0, :, 0]
    assert first_elements.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("text", ["unstructured", "4x1", "1x4", "16x16", "2:4", "1:8", "channel", "constant-fan-in"])
def test_names_of_patterns_round_trip(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(parse(text)) == parse(text)


@pytest.mark.parametrize("text", ["", "4", "4x", "0x4", "2x0", "4:2", "0:4", "2:2", "blocks", "4X1", " 4x1", "٤x1"])
def test_anything_else_is_refused_with_the_forms_allowed(text: str) -> None:
    with pytest.raises(RecipeError, match="pattern"):
        parse(text)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
def test_a_block_fits_where_both_channel_counts_divide(outputs: int, inputs: int, r: int, c: int) -> None:
    assert Block(r, c).fits((outputs, inputs, 3, 3)) == (outputs % r == 0 and inputs % c == 0)


def test_a_misfit_says_why() -> None:
    assert "10 output channels" in (Block(4, 1).misfit((10, 64)) or "")
    assert "3 input channels" in (NM(2, 4).misfit((16, 3, 3, 3)) or "")
