"""Train a network until it has learnt a sample by heart, or until more steps would not help."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsepipe.sparsity.curvature import hessian_times, joined, lanczos, separated
from sparsepipe.sparsity.method import SparseFromStart
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.training.batches import Batch, TrainingBatches
from sparsepipe.training.loop import DIVERGED_ADVICE, DivergedError
from sparsepipe.training.rates import Rate

CHECK_EVERY = 25
"""Least number of steps between two passes over the whole sample."""
STATIONARY = 1e-3
"""A gradient whose norm is this share of the first one's counts as zero."""
PLATEAU = 0.01
"""A loss that falls by less than this share in the second half of the steps has stopped falling."""
SADDLE = 0.1
"""A Hessian whose least eigenvalue is below minus this share of its largest one is that of a saddle, not a minimum."""
PRODUCTS = 20
"""With the Hessian, to find its extreme eigenvalues."""


@dataclass(frozen=True)
class Fit:
    """How a training on one sample ended.

    Attributes:
        correct: samples whose class the network, in evaluation mode, tells.
        samples: of the whole sample.
        loss: mean cross-entropy over the sample.
        gradient_norm: of that loss by the weights that are not masked, relative to its norm before training.
        plateau: whether the loss did not fall any more in the second half of the steps.
        negative_curvature: minus the least eigenvalue of the Hessian of that loss, by the weights that are not masked,
            relative to the largest one; looked at only where training failed, 0 elsewhere.
        steps: optimizer steps taken.
        nonzero: parameters that are not masked, biases and normalisation included.
    """

    correct: int
    samples: int
    loss: float
    gradient_norm: float
    plateau: bool
    negative_curvature: float
    steps: int
    nonzero: int

    @property
    def complete(self) -> bool:
        """Whether every sample is classified as labelled."""
        return self.correct == self.samples

    @property
    def saddle(self) -> bool:
        """Whether it failed where the loss curves down in some direction as much as `SADDLE` says."""
        return self.negative_curvature >= SADDLE

    @property
    def converged(self) -> bool:
        """Whether longer training promises nothing: the gradient is gone or the loss stopped falling, at no saddle."""
        return (self.gradient_norm < STATIONARY or self.plateau) and not self.saddle


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    training: TrainingBatches,
    sample: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    rate: Rate,
    label_smoothing: float = 0.0,
) -> Fit:
    """Train for `steps`, or until all of `sample` is classified as labelled, or the gradient has vanished in a minimum.

    A fit before the last step counts where the network has its target sparsity by then: a network that is still denser
    has more parameters than it will be left with.

    Args:
        model: the network, fresh.
        optimizer: over the parameters of `model`.
        sparsifier: over `model` and `optimizer`, made for `steps`.
        training: the batches of each epoch.
        sample: the same samples, each once.
        steps: optimizer steps at most.
        lr: base learning rate.
        rate: multiple of `lr` at each step.
        label_smoothing: share of the target that is spread over all classes, in training.

    Raises:
        DivergedError: the loss is not finite any more.
    """
    every = max(CHECK_EVERY, training.steps)
    masked_from_start = isinstance(sparsifier.method, SparseFromStart)
    first = _look(model, sparsifier, sample, gradient=True)
    losses: list[tuple[int, float]] = []
    step = epoch = 0
    while step < steps:
        model.train()
        for inputs, labels in training.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step)
            optimizer.zero_grad()
            changed, targets = sparsifier.transform_batch(inputs, labels)
            loss = functional.cross_entropy(model(changed), targets, label_smoothing=label_smoothing)
            (loss + sparsifier.batch_loss(changed)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if step % every == 0 and step < steps:
                settled = sparsifier.masks_final
                seen = _look(model, sparsifier, sample, gradient=settled)
                losses.append((step, seen.loss))
                sparse = settled or (masked_from_start and _on_target(sparsifier))
                vanished = settled and seen.norm < STATIONARY * first.norm
                if sparse and (seen.correct == seen.samples or vanished):
                    ended = _fit(model, sparsifier, sample, seen, first.norm, losses, step, steps)
                    if ended.complete or ended.converged:
                        return ended
                model.train()
            if step == steps:
                break
        sparsifier.on_epoch_end(epoch)
        epoch += 1
    sparsifier.freeze()
    seen = _look(model, sparsifier, sample, gradient=True)
    losses.append((step, seen.loss))
    return _fit(model, sparsifier, sample, seen, first.norm, losses, step, steps)


@dataclass(frozen=True)
class _Look:
    correct: int
    samples: int
    loss: float
    norm: float


def _look(model: nn.Module, sparsifier: Sparsifier, sample: Iterable[Batch], *, gradient: bool) -> _Look:
    """Accuracy and loss over the whole sample, and the norm of the gradient if it is asked for."""
    model.eval()
    model.zero_grad()
    correct = samples = 0
    total = 0.0
    with torch.set_grad_enabled(gradient):
        for inputs, labels in sample:
            logits = model(inputs)
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            if gradient:
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            correct += int((logits.argmax(1) == labels).sum())
            samples += len(labels)
    if not math.isfinite(total):
        raise DivergedError(
            f"The loss became {total} on {samples} samples.",
            where=f"step {sparsifier.step}",
            advice=DIVERGED_ADVICE,
        )
    norm = _norm(model, sparsifier) / samples if gradient else math.inf
    model.zero_grad()
    return _Look(correct, samples, total / samples, norm)


def _norm(model: nn.Module, sparsifier: Sparsifier) -> float:
    squares = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kept: Tensor = parameter.grad * sparsifier.masks[name] if name in sparsifier.masks else parameter.grad
            squares += float(kept.square().sum())
    return math.sqrt(squares)


def _negative_curvature(model: nn.Module, sparsifier: Sparsifier, sample: Iterable[Batch]) -> float:
    """Minus the least eigenvalue of the Hessian over the whole sample, relative to the largest; 0 if there is none."""
    model.eval()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    free = joined(
        sparsifier.masks[name].double() if name in sparsifier.masks else torch.ones_like(parameter)
        for name, parameter in named
    )

    def product(vector: Tensor) -> Tensor:
        losses = (functional.cross_entropy(model(inputs), labels, reduction="sum") for inputs, labels in sample)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return free * joined(hessian_times(losses, parameters, separated(free * vector, parameters)))

    start = torch.rand(len(free), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    values, _ = lanczos(product, free * start.to(free.device), PRODUCTS)
    largest = float(values.abs().max())
    return max(0.0, -float(values[0]) / largest) if largest else 0.0


def _on_target(sparsifier: Sparsifier) -> bool:
    assert isinstance(sparsifier.method, SparseFromStart)
    # Exact counts round to whole weights or groups, layer by layer.
    return sparsifier.mask_set.sparsity >= sparsifier.method.target.sparsity - 1e-2


def _fit(
    model: nn.Module,
    sparsifier: Sparsifier,
    sample: Iterable[Batch],
    seen: _Look,
    first_norm: float,
    losses: list[tuple[int, float]],
    step: int,
    steps: int,
) -> Fit:
    masks = sparsifier.mask_set
    parameters = sum(parameter.numel() for parameter in model.parameters())
    early = [loss for at, loss in losses if at <= steps / 2]
    late = [loss for at, loss in losses if at > steps / 2]
    gradient_norm = seen.norm / first_norm if first_norm else 0.0
    plateau = bool(early and late) and min(late) > (1 - PLATEAU) * min(early)
    failed = seen.correct < seen.samples
    return Fit(
        correct=seen.correct,
        samples=seen.samples,
        loss=seen.loss,
        gradient_norm=gradient_norm,
        plateau=plateau,
        negative_curvature=_negative_curvature(model, sparsifier, sample) if failed else 0.0,
        steps=step,
        nonzero=parameters - (masks.size - masks.nnz),
    )
