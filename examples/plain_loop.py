"""Sparse training in a PyTorch loop that somebody already has: the three lines marked below are all that is new.

python examples/plain_loop.py
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

import sparsepipe


def main(epochs: int = 20) -> tuple[float, float]:
    """Train an MLP 95% sparse on the 8x8 digits; returns (sparsity, test accuracy)."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    inputs = torch.from_numpy((x / 16).astype(np.float32))
    labels = torch.from_numpy(y)
    shuffled = torch.randperm(len(labels))
    train, test = shuffled[:1400], shuffled[1400:]

    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = -(-len(train) // 64)
    method = sparsepipe.DSTEE(sparsity=0.95, distribution="erk", c=1e-3, update_every=10)  # new
    sparsifier = sparsepipe.Sparsifier(model, optimizer, method, total_steps=epochs * batches)  # new

    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()

    masks = sparsifier.freeze()  # new: from here on the masks are fixed and the hooks are gone
    with torch.no_grad():
        accuracy = float((model(inputs[test]).argmax(1) == labels[test]).float().mean())
    return masks.sparsity, accuracy


if __name__ == "__main__":
    sparsity, accuracy = main()
    print(f"sparsity {sparsity:.2%}, test accuracy {accuracy:.2%}")
