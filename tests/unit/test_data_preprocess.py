"""Preprocessing against numpy in float64 on everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparsepipe.data import ArraySplit, prepare
from sparsepipe.data import preprocess as module
from sparsepipe.data.preprocess import statistics
from sparsepipe.errors import DataError
from sparsepipe.spec import Preprocessing


def test_prepare_images() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    preprocessing = Preprocessing(scale=1 / 255, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 1.5))
    expected = ((raw / 255 - [0.1, 0.5, 0.9]) / [0.2, 0.3, 1.5]).transpose(0, 3, 1, 2)
    prepared = prepare(raw, preprocessing)
    assert prepared.dtype == np.float32
    assert prepared.flags.c_contiguous
    np.testing.assert_allclose(prepared, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prepare_features(dtype: type) -> None:
    raw: Any = np.random.default_rng(1).normal(3, 2, (7, 5)).astype(dtype)
    mean, std = np.arange(5.0), np.arange(1.0, 6.0)
    prepared = prepare(raw, Preprocessing(mean=tuple(mean.tolist()), std=tuple(std.tolist())))
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, (raw - mean) / std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (2, 4), (2, 3, 4, 4), (4, 4, 3)])
def test_prepare_refuses_samples_of_another_form(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\[n, H, W, 3\]"):
        prepare(np.zeros(shape, np.uint8), Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3))


def test_statistics_of_images_are_exact() -> None:
    raw = np.random.default_rng(2).integers(0, 200, (1100, 3, 5, 3), np.uint8)
    raw[..., 2] = 17  # a constant channel
    found = statistics(ArraySplit(raw, np.zeros(len(raw), np.int64)), 1 / 255)
    scaled = raw.astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std[:2], scaled.std((0, 1, 2))[:2], rtol=1e-12)
    assert found.std[2] == 1.0
    assert found.scale == 1 / 255


def test_statistics_of_features_hold_at_large_offsets() -> None:
    raw = (np.random.default_rng(3).normal(0, 1, (1500, 4)) * [1, 10, 0.1, 0] + [1000, -5, 0, 3]).astype(np.float32)
    found = statistics(ArraySplit(raw, np.zeros(len(raw), np.int64)), 1.0)
    np.testing.assert_allclose(found.mean, raw.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.std[:3], raw.astype(np.float64).std(0)[:3], rtol=1e-9)
    assert found.std[3] == 1.0


def test_prepared_training_data_has_mean_0_and_std_1() -> None:
    raw = np.random.default_rng(4).integers(0, 256, (300, 6, 6, 3), np.uint8)
    prepared = prepare(raw, statistics(ArraySplit(raw, np.zeros(300, np.int64)), 1 / 255))
    np.testing.assert_allclose(prepared.mean((0, 2, 3), dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(prepared.std((0, 2, 3), dtype=np.float64), 1, rtol=1e-5)


def test_statistics_of_a_long_split_are_taken_from_evenly_spaced_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STATISTICS_SAMPLES", 5)
    raw = np.arange(17, dtype=np.float32)[:, None]
    found = statistics(ArraySplit(raw, np.zeros(17, np.int64)), 1.0)
    assert found.mean == (8.0,)
    np.testing.assert_allclose(found.std, np.std([0, 4, 8, 12, 16]))
