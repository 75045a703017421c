"""A task of seconds whose outcomes are known: scikit-learn's 8x8 digits and a multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.sparsifier import Sparsifier


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1437 samples to train on and 360 to test on, in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return x[train], y[train], x[test], y[test]


def perceptron(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module) -> float:
    """On the test samples, in per cent."""
    _, _, x, y = digits()
    with torch.no_grad():
        return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def fit(
    method: Method,
    *,
    epochs: int,
    sizes: tuple[int, ...] = (64, 256, 128, 10),
    batch: int = 64,
    lr: float = 0.1,
    seed: int = 0,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    cosine: bool = True,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    after_step: Callable[[nn.Module, Sparsifier], None] = lambda model, sparsifier: None,
    modifiers: Sequence[Modifier] = (),
    samples: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[nn.Module, Sparsifier]:
    """Train to the end; the sparsifier is not frozen."""
    model = perceptron(*sizes, seed=seed)
    x, y, _, _ = digits()
    used = (
        optimizer(model.parameters())
        if optimizer
        else torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    )
    steps = len(y) // batch
    sparsifier = Sparsifier(
        model, used, method, total_steps=steps * epochs, seed=seed, modifiers=modifiers, samples=samples
    )
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=generator)
        for index in range(steps):
            if cosine:
                for group in used.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * (epoch * steps + index) / (epochs * steps))) / 2
            part = order[index * batch : (index + 1) * batch]
            used.zero_grad()
            inputs, labels = sparsifier.transform_batch(x[part], y[part])
            loss = cross_entropy(model.train()(inputs), labels)
            (loss + sparsifier.batch_loss(inputs)).backward()
            used.step()
            after_step(model, sparsifier)
    return model, sparsifier
