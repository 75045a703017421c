"""The data of these examples: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, no download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

SHAPE = (1, 8, 8)
CLASSES = 10


def load() -> tuple[TensorDataset, TensorDataset]:
    """1,400 samples to train on and 397 to test on: images [N, 1, 8, 8] in [0, 1] and labels [N]."""
    images, labels = load_digits(return_X_y=True)
    samples = torch.from_numpy((images / 16).astype(np.float32)).reshape(-1, *SHAPE)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(labels)
    train, test = order[:1400], order[1400:]
    return TensorDataset(samples[train], targets[train]), TensorDataset(samples[test], targets[test])


def accuracy(logits: Tensor, test: TensorDataset) -> float:
    """The share of test samples that `logits` [397, 10] get right."""
    return float((logits.argmax(1) == test.tensors[1]).float().mean())
