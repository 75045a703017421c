"""The training loop: steps and epochs, evaluation, the best epoch so far, and a state that resumes bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim import Optimizer

from sparsepipe.errors import SparsepipeError
from sparsepipe.ranking import roc_auc
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.training.average import Average
from sparsepipe.training.batches import Batch, TrainingBatches
from sparsepipe.training.fake_quantisation import FakeQuantisation
from sparsepipe.training.rates import Rate

FINITE_CHECK_EVERY = 20
"""Steps between two checks of the loss on a device where reading it waits for the device."""

AGREE_EVERY = 10
"""Steps between two times at which several processes agree on stopping or saving, where that waits for the device."""

LEAST_SCALE = 2.0**-30
"""The scaler of the loss halves its scale for each step that overflows; below this no scale will help."""

Own = TypeVar("Own")

DIVERGED_ADVICE = "Try a lower optimizer.lr, a longer schedule.warmup, or train.precision = 'fp32'."


class DivergedError(SparsepipeError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy and accuracy over `samples` samples; of two classes also the area under the ROC curve."""

    loss: float
    correct: int
    samples: int
    auc: float | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


@dataclass(frozen=True)
class Epoch:
    """What is known at the end of an epoch; epochs count from 1, `step` is the number of steps done."""

    number: int
    step: int
    lr: float
    train: Score
    validation: Score
    seconds: float


def evaluate(fabric: Fabric, network: nn.Module, batches: Iterable[Batch]) -> Score:
    """Cross-entropy, accuracy and ROC-AUC of `network` in evaluation mode, over the batches of all processes.

    Args:
        fabric: its precision is used.
        network: the bare network: DDP would wait for the other processes in every pass, whose number may differ.
        batches: this process's share.
    """
    network.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=fabric.device)
    ranked: list[Tensor] = []
    with torch.no_grad():
        for inputs, labels in batches:
            with fabric.autocast():
                logits = network(inputs)
            logits = logits.float()
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, (logits.argmax(1) == labels).sum(), loss.new_tensor(len(labels))])
            if logits.shape[1] == 2:
                ranked.append(torch.stack([logits[:, 1] - logits[:, 0], labels]).cpu())
    loss_sum, correct, samples = _sum_over_processes(fabric, totals).tolist()
    return Score(loss_sum / samples, int(correct), int(samples), _auc(fabric, ranked))


class Loop:
    """One training, from any step to its end.

    Args:
        fabric: device and precision; it is launched already.
        model: the network, on its device and in its memory format.
        optimizer: over the parameters of `model`.
        sparsifier: over `model` and `optimizer`.
        training: the batches of each epoch.
        validation: the batches to select on.
        lr: base learning rate.
        rate: multiple of `lr` at each step.
        epochs: passes over the training samples.
        label_smoothing: share of the target that is spread over all classes.
        ema: decay of a moving average of the network, which is then what is validated and kept; 0 for none.
        quantisation: rounds in the last passes; only epochs that end with it are kept. Not together with `ema`.

    Raises:
        ModelError: there is to be an average, but the network cannot be copied.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: Optimizer,
        sparsifier: Sparsifier,
        *,
        training: TrainingBatches,
        validation: Iterable[Batch],
        lr: float,
        rate: Rate,
        epochs: int,
        label_smoothing: float = 0.0,
        ema: float = 0.0,
        quantisation: FakeQuantisation | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.sparsifier = sparsifier
        self.step = 0
        """Optimizer steps done."""
        self.seconds = 0.0
        """Spent on training so far, interrupted runs included."""
        self.cpu_seconds = 0.0
        """The same in time of the processor, of this process alone: what else the machine does hardly shows in it."""
        self.best: dict[str, Any] | None = None
        """The epoch of highest validation accuracy among those with final masks: number, accuracy, loss, weights, and
        the ranges of activations where passes round."""
        self.average = Average(model, sparsifier, ema) if ema else None
        self.quantisation = quantisation
        self._fabric = fabric
        self._training = training
        self._validation = validation
        self._lr = lr
        self._rate = rate
        self.epochs = epochs
        self._label_smoothing = label_smoothing
        self._agree_every = AGREE_EVERY if fabric.world_size > 1 and fabric.device.type != "cpu" else 1
        self._network, self._optimizer = fabric.setup(model, optimizer, move_to_device=False)
        self._losses = torch.zeros(training.steps, device=fabric.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=fabric.device)
        self._started = time.monotonic()
        self._cpu_started = time.process_time()

    @property
    def candidate(self) -> nn.Module:
        """The network that is validated and kept: the average if there is one."""
        return self.average.network if self.average else self.model

    @property
    def total_steps(self) -> int:
        return self.epochs * self._training.steps

    def run(
        self,
        *,
        on_step: Callable[[], None],
        on_epoch: Callable[[Epoch], None],
        stop: Callable[[], bool] = lambda: False,
        save_due: Callable[[], bool] = lambda: False,
        save: Callable[[], object] = lambda: None,
    ) -> None:
        """Train to the end, or until `stop`.

        What any process answers to `stop` or `save_due` holds for all.

        Args:
            on_step: called after every step.
            on_epoch: called after every epoch.
            stop: asked before every step; once it returns True, training ends there, and the state can be saved.
            save_due: asked before every step whether to save the state now.
            save: called then.

        Raises:
            DivergedError: the loss is not finite any more.
        """
        self._started = time.monotonic() - self.seconds
        self._cpu_started = time.process_time() - self.cpu_seconds
        while self.step < self.total_steps:
            before = time.monotonic()
            epoch, first = divmod(self.step, self._training.steps)
            self._network.train()
            for inputs, labels in self._training.epoch(epoch, first):
                if self.step % self._agree_every == 0:
                    stopping, saving = self.agree(stop, save_due)
                    if stopping:
                        return
                    if saving:
                        save()
                self._train(inputs, labels)
                self._take_time()
                on_step()
            self._check_finite(epoch)
            on_epoch(self._finish(epoch, before))

    def evaluate(self, batches: Iterable[Batch]) -> Score:
        """Score of the network as it is now; every process has to call this."""
        return self._evaluate(self.model, batches)

    def agree(self, *questions: Callable[[], bool]) -> list[bool]:
        """Whether any process says yes, for each question; every process has to call this."""
        if self._fabric.world_size == 1:
            return [ask() for ask in questions]
        votes = torch.tensor([float(ask()) for ask in questions], device=self._fabric.device)
        return [total > 0 for total in _sum_over_processes(self._fabric, votes).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on: nested dicts of tensors and plain values.

        Every process has to call this, and all get the same.
        """
        own = {
            "losses": self._losses.cpu(),
            "correct": self._correct.cpu(),
            "sparsifier": self.sparsifier.local_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self._fabric.device) if self._on_cuda else None,
        }
        self._share_buffers(self.model)
        self._share_buffers(self.candidate)
        return {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "average": self.average and self.average.state_dict(),
            "ranges": self.quantisation and self.quantisation.observed.clone(),
            "precision": self._fabric.strategy.precision.state_dict(),
            "processes": _from_all_processes(self._fabric, own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]
        self.best = state["best"]
        own = state["processes"][self._fabric.global_rank]
        self._losses.copy_(own["losses"])
        self._correct.copy_(own["correct"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._lay_out_optimizer_state()
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.sparsifier.load_local_state(own["sparsifier"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if self.quantisation:
            self.quantisation.observed = state["ranges"]
        self._fabric.strategy.precision.load_state_dict(state["precision"])
        torch.set_rng_state(own["random"])
        if self._on_cuda and own["random_cuda"] is not None:
            torch.cuda.set_rng_state(own["random_cuda"], self._fabric.device)

    @property
    def _on_cuda(self) -> bool:
        return self._fabric.device.type == "cuda"

    def _evaluate(self, network: nn.Module, batches: Iterable[Batch]) -> Score:
        self._share_buffers(network)
        return evaluate(self._fabric, network, batches)

    def _share_buffers(self, network: nn.Module) -> None:
        """Give all processes the buffers of the first, as DDP does before a forward pass in training.

        Each process feeds its own batches to its batch norms, but the network that is kept is that of process 0.
        """
        if self._fabric.world_size > 1:
            for buffer in network.buffers():
                values = buffer.contiguous()  # the backends take dense memory in C order only
                distributed.broadcast(values, src=0)
                buffer.copy_(values)

    def _train(self, inputs: Tensor, labels: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * self._rate(self.step)
        if self.quantisation:
            self.quantisation.active = self.step >= self.quantisation.start
        self._optimizer.zero_grad()
        inputs, labels = self.sparsifier.transform_batch(inputs, labels)
        logits = self._network(inputs)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        position = self.step % self._training.steps
        self._losses[position] = loss.detach()
        if loss.device.type == "cpu" or position % FINITE_CHECK_EVERY == 0:
            self._check_finite(self.step // self._training.steps)
        self._fabric.backward(loss + self.sparsifier.batch_loss(inputs))
        taken = self.sparsifier.step
        self._optimizer.step()
        if self.average and self.sparsifier.step > taken:  # not one that the scaler of the loss skipped
            self.average.update()
        self._correct += (logits.detach().argmax(1) == labels).sum()
        self.step += 1

    def _finish(self, epoch: int, before: float) -> Epoch:
        self.sparsifier.on_epoch_end(epoch)
        steps = self._training.steps
        totals = torch.stack([self._losses.double().sum(), self._correct.double()])
        loss_sum, correct = _sum_over_processes(self._fabric, totals).tolist()
        samples = steps * self._training.global_size
        train = Score(loss_sum / (steps * self._fabric.world_size), int(correct), samples)
        validation = self._evaluate(self.candidate, self._validation)
        if not isfinite(validation.loss):
            raise DivergedError(
                f"The validation loss became {validation.loss}.", where=f"epoch {epoch + 1}", advice=DIVERGED_ADVICE
            )
        scale = self._fabric.strategy.precision.state_dict().get("scale", 1.0)
        if scale < LEAST_SCALE:
            raise DivergedError(
                f"The gradients overflow fp16 at any scale of the loss (now {scale}), so that all steps are skipped.",
                where=f"epoch {epoch + 1}",
                advice=DIVERGED_ADVICE,
            )
        if self.sparsifier.masks_final and (self.quantisation is None or self.quantisation.active):
            self._keep_if_best(epoch + 1, validation)
        self._losses.zero_()
        self._correct.zero_()
        self._take_time()
        scale = self.sparsifier.lr_scale(self.step)
        lr = self._lr * (self._rate(self.step - 1) if scale is None else scale)
        return Epoch(epoch + 1, self.step, lr, train, validation, time.monotonic() - before)

    def _take_time(self) -> None:
        self.seconds = time.monotonic() - self._started
        self.cpu_seconds = time.process_time() - self._cpu_started

    def _keep_if_best(self, number: int, score: Score) -> None:
        """Keep the weights if the accuracy is higher than ever, or as high with a lower loss."""
        if self.best is None or (score.accuracy, -score.loss) > (self.best["accuracy"], -self.best["loss"]):
            weights = {name: value.detach().clone() for name, value in self.candidate.state_dict().items()}
            self.best = {"epoch": number, "accuracy": score.accuracy, "loss": score.loss, "weights": weights}
            if self.quantisation:
                self.best["ranges"] = self.quantisation.observed.clone()

    def _check_finite(self, epoch: int) -> None:
        finite = self._losses.isfinite()
        if not bool(finite.all()):
            position = int((~finite).nonzero()[0])
            raise DivergedError(
                f"The training loss became {self._losses[position].item()} in step {position + 1} of the epoch.",
                where=f"step {epoch * self._training.steps + position + 1}, epoch {epoch + 1}",
                advice=DIVERGED_ADVICE,
            )

    def _lay_out_optimizer_state(self) -> None:
        """Give loaded state the memory format of its parameter, so that sums come out in the same order as before."""
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _auc(fabric: Fabric, ranked: Sequence[Tensor]) -> float | None:
    """ROC-AUC of this process's scores and labels, batches [2, n], and those of the others; None where there are none.

    Every process has to call this.
    """
    everyone = [batch for batches in _from_all_processes(fabric, ranked) for batch in batches]
    if not everyone:
        return None
    scores, labels = torch.cat(everyone, dim=1).numpy()
    return roc_auc(scores, labels)


def _from_all_processes(fabric: Fabric, own: Own) -> list[Own]:
    """What each process has, in the order of their numbers."""
    if fabric.world_size == 1:
        return [own]
    everyone = [own] * fabric.world_size
    distributed.all_gather_object(everyone, own)
    return everyone


def _sum_over_processes(fabric: Fabric, totals: Tensor) -> Tensor:
    summed = fabric.all_reduce(totals, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed
