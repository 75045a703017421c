"""Options are finite numbers in their range."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.options import count, number


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, True, "1", -0.5])
def test_what_is_no_finite_number_in_the_range_is_refused(value: object) -> None:
    with pytest.raises(RecipeError, match=r"'c' must be a number in \[0, inf\)"):
        number("c", value)


def test_numbers_in_the_range_pass() -> None:
    assert number("c", 3) == 3.0
    assert number("c", 1.0, high=1) == 1.0


def test_numbers_of_numpy_are_numbers() -> None:
    for value in (np.float32(0.5), np.float64(0.5)):
        assert type(number("c", value)) is float
    assert type(count("steps", np.int64(3))) is int
    for wrong in (np.bool_(True), np.float64(3), np.int64(0), np.array(3)):
        with pytest.raises(RecipeError, match="'steps' must be an integer of at least 1"):
            count("steps", wrong)
