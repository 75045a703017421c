"""Sparse training under Lightning's Trainer: one callback is all that sparsepipe needs.

python examples/loops/lightning_trainer.py FOLDER

The Trainer accumulates gradients, computes in bfloat16, clips and writes checkpoints; the same command goes on from the
last of them after an interruption. At the end it writes ONNX files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import digits
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import sparsepipe
from sparsepipe.integrations.lightning import SparseCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, digits.CLASSES)
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: Path, epochs: int = 20) -> dict[str, Any]:
    """Train a small network 90% sparse; returns its masks, its test accuracy and the network itself."""
    train, test = digits.load()
    torch.manual_seed(0)
    module = Digits()
    sparse = SparseCallback(sparsepipe.DSTEE(sparsity=0.9, distribution="erk", c=1e-3, update_every=10))
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[sparse, ModelCheckpoint(folder, save_last=True)],
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, DataLoader(train, batch_size=35, shuffle=True), ckpt_path=last if last.exists() else None)

    module.eval()
    with torch.no_grad():
        accuracy = digits.accuracy(module.network(test.tensors[0]), test)
    sparsepipe.export_onnx(module.network, digits.SHAPE, folder / "onnx")
    return {"masks": sparse.sparsifier.mask_set, "accuracy": accuracy, "model": module}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    print(f"sparsity {result['masks'].sparsity:.2%}, test accuracy {result['accuracy']:.2%}")
