"""Sparse training under the Trainer of Hugging Face: `Trainer(..., callbacks=[SparseCallback(method)])`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparsepipe.errors import ArtefactError, MissingExtraError, ModelError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.sparsifier import Sparsifier

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingExtraError("transformers", "transformers", "The callback for Hugging Face's Trainer") from error

STATE_FILE = "sparsifier.pt"
"""In each checkpoint folder, beside `optimizer.pt`."""


class SparseCallback(TrainerCallback):
    """Keeps the model sparse while `Trainer.train` trains it.

    Masks and counters are saved in the Trainer's checkpoint folders and restored by
    `train(resume_from_checkpoint=...)`, also with the weights that `load_best_model_at_end` loads. When training ends
    the masks are fixed. Another `train` of the same model goes on from them.

    The Trainer clips gradients (`max_grad_norm`, 1.0 by default) before a callback sees them: DST-EE's `c` is then
    compared with clipped gradients.

    Args:
        method: for example `DSTEE(sparsity=0.95)`.
        checkpoint: the folder that training resumes from, where it is not `checkpoint-STEP` in `output_dir`.
        **settings: of the `Sparsifier`: seed, process_group, check_every.
    """

    def __init__(self, method: Method, *, checkpoint: str | Path | None = None, **settings: Any) -> None:
        self.method = method
        self._checkpoint = checkpoint
        self._settings = settings
        self._sparsifier: Sparsifier | None = None
        self._model: nn.Module | None = None

    @property
    def sparsifier(self) -> Sparsifier:
        """The Sparsifier of the training: masks, metrics and counters.

        Raises:
            ModelError: no training has begun.
        """
        if self._sparsifier is None:
            raise ModelError("There is no Sparsifier before the training begins.", where="SparseCallback")
        return self._sparsifier

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        # Here the weights and the optimizer of a checkpoint are loaded already.
        saved = None
        if state.global_step:
            saved = _read(Path(self._checkpoint or _folder(args, state)))
        elif self._sparsifier is not None and model is self._model:
            # Another training of the same model, with schedules of its own.
            saved = {**self._sparsifier.state_dict(), "total_steps": state.max_steps}
        self._model = model
        self._sparsifier = Sparsifier(
            model, optimizer, self.method, total_steps=state.max_steps, state=saved, **self._settings
        )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self.sparsifier.on_epoch_end(round(state.epoch) - 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        # A search of hyperparameters keeps its checkpoints elsewhere, and never resumes.
        if state.is_world_process_zero and _folder(args, state).is_dir():
            partial = _folder(args, state) / f"{STATE_FILE}.partial"
            torch.save(self.sparsifier.state_dict(), partial)
            os.replace(partial, _folder(args, state) / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.sparsifier.load_state_dict(_read(Path(state.best_model_checkpoint)))
        self.sparsifier.freeze()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtefactError(
            "There is no state of the masks that belongs to the checkpoint.",
            where=str(path),
            advice="If training resumes from another folder, name it: SparseCallback(method, checkpoint=FOLDER). A "
            "checkpoint that was made without the callback has none.",
        ) from None
    except Exception as error:  # a damaged file fails in many ways
        raise ArtefactError(
            "The file is damaged.", where=str(path), advice="Resume from another checkpoint."
        ) from error
    return saved
