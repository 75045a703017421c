"""Sparse training in a PyTorch loop that somebody already has: the lines marked `new` are all that sparsepipe needs.

python examples/loops/plain_pytorch.py FOLDER

The loop accumulates gradients over two batches and computes in bfloat16. It writes a checkpoint after each epoch; the
same command goes on from it after an interruption. At the end it writes ONNX files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import digits
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import sparsepipe

ACCUMULATED = 2


def main(folder: Path, epochs: int = 20) -> dict[str, Any]:
    """Train a small network 90% sparse; returns its masks, its test accuracy and the network itself."""
    train, test = digits.load()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, digits.CLASSES),
    )
    loader = DataLoader(train, batch_size=35, shuffle=True)
    steps = len(loader) // ACCUMULATED
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    method = sparsepipe.DSTEE(sparsity=0.9, distribution="erk", c=1e-3, update_every=10)  # new
    sparsifier = sparsepipe.Sparsifier(model, optimizer, method, total_steps=epochs * steps)  # new

    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sparsifier.load_state_dict(saved["sparsifier"])  # new
        torch.set_rng_state(saved["random"])
        first = saved["epoch"]

    for epoch in range(first, epochs):
        for number, (images, labels) in enumerate(loader, start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(images), labels) / ACCUMULATED
            loss.backward()
            if number % ACCUMULATED == 0:
                optimizer.step()
                optimizer.zero_grad()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparsifier": sparsifier.state_dict(),  # new
            "random": torch.get_rng_state(),
            "epoch": epoch + 1,
        }
        torch.save(state, folder / "checkpoint.partial")
        (folder / "checkpoint.partial").replace(checkpoint)

    masks = sparsifier.freeze()  # new: from here on the masks are fixed and the hooks are gone
    model.eval()
    with torch.no_grad():
        accuracy = digits.accuracy(model(test.tensors[0]), test)
    sparsepipe.export_onnx(model, digits.SHAPE, folder / "onnx")  # new: dense, portable and universal files
    return {"masks": masks, "accuracy": accuracy, "model": model}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    print(f"sparsity {result['masks'].sparsity:.2%}, test accuracy {result['accuracy']:.2%}")
