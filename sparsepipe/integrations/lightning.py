"""Sparse training under Lightning's Trainer: `Trainer(callbacks=[SparseCallback(method)])`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from sparsepipe.errors import MissingExtraError, ModelError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.sparsifier import Sparsifier

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError("lightning", "lightning", "The callback for Lightning's Trainer") from error


class SparseCallback(Callback):
    """Keeps the module sparse while `Trainer.fit` trains it.

    Masks and counters are saved in the Trainer's checkpoints and restored by `fit(ckpt_path=...)`. When training ends
    the masks are fixed. Another `fit` of the same module goes on from them.

    Args:
        method: for example `DSTEE(sparsity=0.95)`. Names of layers are those in the LightningModule.
        total_steps: optimizer steps of the whole training, where the Trainer cannot know them.
        **settings: of the `Sparsifier`: seed, process_group, check_every.
    """

    def __init__(self, method: Method, *, total_steps: int | None = None, **settings: Any) -> None:
        self.method = method
        self._total_steps = total_steps
        self._settings = settings
        self._sparsifier: Sparsifier | None = None
        self._module: LightningModule | None = None
        self._state: Mapping[str, Any] | None = None

    @property
    def sparsifier(self) -> Sparsifier:
        """The Sparsifier of the training: masks, metrics and counters.

        Raises:
            ModelError: no training has begun.
        """
        if self._sparsifier is None:
            raise ModelError("There is no Sparsifier before the training begins.", where="SparseCallback")
        return self._sparsifier

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here the weights of a checkpoint are loaded already; the optimizer's state follows.
        if len(trainer.optimizers) != 1:
            raise ModelError(
                f"The module has {len(trainer.optimizers)} optimizers, but a Sparsifier belongs to one.",
                where="SparseCallback",
                advice="Make a Sparsifier for each in the module's on_fit_start, and save their state_dict() in its "
                "on_save_checkpoint.",
            )
        if self._state is None and self._sparsifier is not None and pl_module is self._module:
            # Another training of the same module, with schedules of its own.
            self._state = {**self._sparsifier.state_dict(), "total_steps": self._steps(trainer)}
        self._sparsifier = Sparsifier(
            pl_module,
            trainer.optimizers[0],
            self.method,
            total_steps=self._steps(trainer),
            state=self._state,
            **self._settings,
        )
        self._module, self._state = pl_module, None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # The gradients are unscaled here, but for fused optimizers, with which the Trainer refuses to clip.
        if trainer.gradient_clip_val:
            self.sparsifier.prepare_gradients()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparsifier.on_epoch_end(trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparsifier.freeze()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state or {}) if self._sparsifier is None else self._sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # After the training, as for `test(ckpt_path="best")`, the masks follow the weights that were loaded.
        self._state = state_dict
        if self._sparsifier is not None:
            self._sparsifier.load_state_dict(state_dict)

    def _steps(self, trainer: Trainer) -> int:
        steps = self._total_steps or trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise ModelError(
                "The Trainer does not know how many steps the training will have.",
                where="SparseCallback",
                advice="Set max_steps in the Trainer, or total_steps in the callback.",
            )
        return int(steps)
