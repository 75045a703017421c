"""Sparse training of a timm model with timm's optimizer, schedule and moving average of the weights.

python examples/loops/timm_model.py FOLDER [MODEL]

The lines marked `new` are all that sparsepipe needs. Depthwise kernels and squeeze-and-excite biases stay dense by
themselves; the average is kept as sparse as the model. The loop accumulates gradients over two batches and computes in
bfloat16. It writes a checkpoint after each epoch; the same command goes on from it. At the end it writes ONNX files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import digits
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader

import sparsepipe

ACCUMULATED = 2
SHAPE = (1, 32, 32)


def enlarged(images: Tensor) -> Tensor:
    """Images [N, 1, 32, 32]: most networks of timm halve their input five times."""
    return interpolate(images, scale_factor=4)


def main(folder: Path, model_name: str = "mobilenetv3_small_050", epochs: int = 10) -> dict[str, Any]:
    """Train a network 80% sparse; returns its masks, the test accuracy of its average, and the average itself."""
    train, test = digits.load()
    torch.manual_seed(0)
    model = timm.create_model(model_name, in_chans=1, num_classes=digits.CLASSES)
    average = ModelEmaV3(model, decay=0.9)
    loader = DataLoader(train, batch_size=35, shuffle=True)
    steps = len(loader) // ACCUMULATED
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs)
    method = sparsepipe.DSTEE(sparsity=0.8, distribution="erk", c=1e-3, update_every=10)  # new
    sparsifier = sparsepipe.Sparsifier(model, optimizer, method, total_steps=epochs * steps)  # new
    sparsifier.follow(average.module)  # new

    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        sparsifier.load_state_dict(saved["sparsifier"])  # new
        torch.set_rng_state(saved["random"])
        first = saved["epoch"]

    for epoch in range(first, epochs):
        schedule.step(epoch)
        for number, (images, labels) in enumerate(loader, start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(enlarged(images)), labels) / ACCUMULATED
            loss.backward()
            if number % ACCUMULATED == 0:
                optimizer.step()
                optimizer.zero_grad()
                average.update(model)
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparsifier": sparsifier.state_dict(),  # new
            "random": torch.get_rng_state(),
            "epoch": epoch + 1,
        }
        torch.save(state, folder / "checkpoint.partial")
        (folder / "checkpoint.partial").replace(checkpoint)

    masks = sparsifier.freeze()  # new
    network = average.module.eval()
    with torch.no_grad():
        accuracy = digits.accuracy(network(enlarged(test.tensors[0])), test)
    sparsepipe.export_onnx(network, SHAPE, folder / "onnx")  # new
    return {"masks": masks, "accuracy": accuracy, "model": network}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), *sys.argv[2:])
    print(f"sparsity {result['masks'].sparsity:.2%}, test accuracy {result['accuracy']:.2%}")
