"""Run under torchrun: a Trainer of Lightning or Hugging Face with its callback trains, is cut off and resumes.

Each process sees other samples. Arguments: lightning or transformers, and a folder for checkpoints and results.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sparsepipe
from sparsepipe import launch

EPOCHS, SAMPLES, BATCH = 4, 128, 8


def network() -> nn.Sequential:
    torch.manual_seed(int(os.environ["RANK"]))  # the wrappers give every process the weights of the first
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 12, generator=generator), torch.randint(0, 4, (SAMPLES,), generator=generator)


def method() -> Any:
    return sparsepipe.DSTEE(sparsity=0.8, c=1e-2, update_every=2)


def under_lightning(folder: Path, epochs: int) -> tuple[nn.Module, Any]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from sparsepipe.integrations.lightning import SparseCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    total = EPOCHS * SAMPLES // BATCH // int(os.environ["WORLD_SIZE"])
    callback = SparseCallback(method(), total_steps=total, check_every=1)
    module = Module()
    trainer = Trainer(
        max_epochs=epochs, callbacks=[callback, ModelCheckpoint(folder, save_last=True)], accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]), strategy="ddp", logger=False, enable_progress_bar=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(module, DataLoader(TensorDataset(*data()), BATCH), ckpt_path=last if last.exists() else None)
    return module.network, callback.sparsifier


def under_transformers(folder: Path, epochs: int) -> tuple[nn.Module, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from sparsepipe.integrations.transformers import SparseCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_training_stop = state.epoch >= epochs

    callback = SparseCallback(method(), check_every=1)
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=1e-2,
        save_strategy="epoch", report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model, samples = Model(), [{"x": x, "labels": y} for x, y in zip(*data(), strict=True)]
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[callback, Stop()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    return model.network, callback.sparsifier


def main(which: str, folder: Path) -> None:
    train = {"lightning": under_lightning, "transformers": under_transformers}[which]
    found: dict[str, Any] = {}
    for name, stops in {"whole": [EPOCHS], "resumed": [2, EPOCHS]}.items():
        for epochs in stops:
            trained, sparsifier = train(folder / name, epochs)
        weights = {key: value.double().sum().item() for key, value in trained.state_dict().items()}
        counters = {key: int(counter.sum()) for key, counter in sparsifier.mask_set.counters.items()}
        nonzeros = {key: sparsifier.mask_set.nnz_of(key) for key in counters}
        digest = sparsifier.mask_set.digest()
        found[name] = {
            "digest": digest, "counters": counters, "nonzeros": nonzeros, "weights": weights, "step": sparsifier.step
        }  # fmt: skip
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    launch.leave(0)
