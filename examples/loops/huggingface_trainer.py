"""Sparse training under the Trainer of Hugging Face: one callback is all that sparsepipe needs.

python examples/loops/huggingface_trainer.py FOLDER

The model is a tiny ConvNeXt made from a configuration; nothing is downloaded. The Trainer accumulates gradients,
computes in bfloat16, clips and writes checkpoints; the same command goes on from the last of them after an
interruption. At the end it writes ONNX files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import digits
import torch
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import sparsepipe
from sparsepipe.integrations.transformers import SparseCallback


class Logits(nn.Module):
    """The model with one tensor in and one tensor out, as an exported file has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values).logits
        return logits


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def main(folder: Path, epochs: int = 10) -> dict[str, Any]:
    """Train a tiny network 80% sparse; returns its masks, its test accuracy and what was exported."""
    train, test = digits.load()
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_channels=1, patch_size=2, hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, num_labels=digits.CLASSES
    )
    sparse = SparseCallback(sparsepipe.DSTEE(sparsity=0.8, distribution="erk", c=1e-3, update_every=10))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=35,
        gradient_accumulation_steps=2,
        bf16=True,
        learning_rate=3e-3,
        save_strategy="epoch",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(ConvNextForImageClassification(config), arguments, collate, train, callbacks=[sparse])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))

    # The Trainer leaves its autocast around the model, which an exported file must not have.
    model = Logits(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)).eval()
    with torch.no_grad():
        accuracy = digits.accuracy(model(test.tensors[0]), test)
    sparsepipe.export_onnx(model, digits.SHAPE, folder / "onnx")
    return {"masks": sparse.sparsifier.mask_set, "accuracy": accuracy, "model": model}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]))
    print(f"sparsity {result['masks'].sparsity:.2%}, test accuracy {result['accuracy']:.2%}")
