"""Datasets by name, as raw samples in numpy, and the preprocessing that turns them into what a network takes."""

from __future__ import annotations

from sparsepipe.data.dataset import Dataset
from sparsepipe.data.preprocess import prepare
from sparsepipe.data.registry import DatasetInfo, available, fingerprint, load
from sparsepipe.data.split import ArraySplit, Split, hold_out

__all__ = [
    "ArraySplit",
    "Dataset",
    "DatasetInfo",
    "Split",
    "available",
    "fingerprint",
    "hold_out",
    "load",
    "prepare",
]
