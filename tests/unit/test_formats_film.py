"""The file of a film: what was saved comes back, and a file that does not add up is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsepipe.errors import SparsepipeError
from sparsepipe.formats.film import load_film, save_film

SHAPE = (3, 2, 2, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two frames of 12 weights: 0 and 2 are active, then 0 and 11."""
    bits = [np.array([0b101, 0], np.uint8), np.array([0b1, 0b1000], np.uint8)]
    save_film(tmp_path / "film.safetensors", "conv.weight", SHAPE, [0, 4], [0, 80], bits)
    return tmp_path / "film.safetensors"


def test_a_film_comes_back(path: Path) -> None:
    film = load_film(path)
    assert (film.layer, film.updates, film.steps) == ("conv.weight", (0, 4), (0, 80))
    assert [mask.shape for mask in film.masks] == [SHAPE, SHAPE]
    assert [np.flatnonzero(mask).tolist() for mask in film.masks] == [[0, 2], [0, 11]]


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({"bits": np.zeros((2, 1), np.uint8)}, {}, "no frames 'bits' of 12 bits"),
        ({"bits": np.zeros((0, 2), np.uint8)}, {}, "no frames 'bits'"),
        ({"bits": np.zeros(4, np.uint8)}, {}, "no frames 'bits'"),
        ({"bits": np.zeros((2, 2), np.int64)}, {}, "no frames 'bits'"),
        ({"bits": None}, {}, "no frames 'bits'"),
        ({"updates": np.array([0])}, {}, "one 'updates' and one 'steps'"),
        ({"steps": np.array([0.0, 1.0])}, {}, "one 'updates' and one 'steps'"),
        ({"steps": None}, {}, "one 'updates' and one 'steps'"),
        ({}, {"shape": [12]}, "is not a shape"),
        ({}, {"shape": [-3, 4]}, "is not a shape"),
        ({}, {"shape": [True, 12]}, "is not a shape"),
        ({}, {"shape": "3x4"}, "is not a shape"),
        ({}, {"shape": [2**40, 2**40]}, "is not a shape|no frames"),
        ({}, None, "do not say which weight"),
    ],
)
def test_a_malformed_film_is_refused(
    path: Path, tensors: dict[str, Any], about: dict[str, Any] | None, message: str
) -> None:
    entries = {name: array for name, array in {**load_file(path), **tensors}.items() if array is not None}
    film = json.dumps(None if about is None else {"layer": "conv.weight", "shape": SHAPE, **about})
    save_file(entries, path, {"film": film})
    with pytest.raises(SparsepipeError, match=message):
        load_film(path)
