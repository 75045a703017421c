"""From raw samples to what a network takes, and the statistics that this needs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sparsepipe.data.split import IntArray, Raw, Split
from sparsepipe.errors import DataError
from sparsepipe.spec import Preprocessing

STATISTICS_SAMPLES = 20_000
CHUNK = 512
# A channel that varies by less than this, relative to its mean, is constant up to rounding of float32.
CONSTANT_BELOW = 1e-6


def prepare(raw: Raw, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """`(raw * scale - mean) / std` in float32, images as channels first.

    Args:
        raw: [n, H, W, C] images (uint8) or [n, F] features (float32).
        preprocessing: with C or F values of mean and std.

    Returns:
        Contiguous float32 [n, C, H, W] or [n, F].

    Raises:
        DataError: `raw` has other dimensions, or another number of channels or features.
    """
    channels = len(preprocessing.mean)
    if raw.ndim not in (2, 4) or raw.shape[-1] != channels:
        raise DataError(
            f"The samples have the shape {list(raw.shape)}; the preprocessing is for [n, H, W, {channels}] or "
            f"[n, {channels}].",
            advice="Use the dataset that the network was trained on, or one of the same form.",
        )
    std = np.asarray(preprocessing.std)
    gain = (preprocessing.scale / std).astype(np.float32)
    offset = (np.asarray(preprocessing.mean) / std).astype(np.float32)
    if raw.ndim == 4:
        raw = raw.transpose(0, 3, 1, 2)
        gain, offset = gain[:, None, None], offset[:, None, None]
    prepared = np.empty(raw.shape, np.float32)
    np.multiply(raw, gain, out=prepared, casting="same_kind")
    prepared -= offset
    return prepared


def statistics(split: Split, scale: float) -> Preprocessing:
    """Mean and standard deviation of each channel or feature, in units of `raw * scale`.

    They are taken over the whole split, or over 20,000 evenly spaced samples of a longer one, in integer or float64
    arithmetic. Where a channel is constant, its std is given as 1.
    """
    count = min(len(split), STATISTICS_SAMPLES)
    indices = np.linspace(0, len(split) - 1, count).round().astype(np.int64)
    images = split.load(indices[:1]).ndim == 4
    mean, std = _of_images(split, indices) if images else _of_features(split, indices)
    std = np.where(std > CONSTANT_BELOW * np.abs(mean), std * scale, 1.0)
    return Preprocessing(scale=scale, mean=tuple((mean * scale).tolist()), std=tuple(std.tolist()))


def _of_images(split: Split, indices: IntArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and std from each channel's histogram, so that sums are exact."""
    counts = np.zeros((split.load(indices[:1]).shape[-1], 256), np.int64)
    for raw in _chunks(split, indices):
        for channel in range(len(counts)):
            counts[channel] += np.bincount(raw[..., channel].ravel(), minlength=256)
    values, total = np.arange(256, dtype=np.float64), counts.sum(1)
    mean = counts @ values / total
    return mean, np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / total)


def _of_features(split: Split, indices: IntArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = sum(raw.sum(0, dtype=np.float64) for raw in _chunks(split, indices)) / len(indices)
    variance = sum(((raw - mean) ** 2).sum(0) for raw in _chunks(split, indices)) / len(indices)
    return mean, np.sqrt(variance)


def _chunks(split: Split, indices: IntArray) -> Iterator[Raw]:
    return (split.load(indices[start : start + CHUNK]) for start in range(0, len(indices), CHUNK))
