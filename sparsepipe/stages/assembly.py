"""From a recipe's sections to a training that is ready to run, with every misfit found before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from sparsepipe import data
from sparsepipe.data import Dataset, Split
from sparsepipe.errors import DataError, ModelError, RecipeError, SparsepipeError
from sparsepipe.models import registry as models
from sparsepipe.plugins import failure
from sparsepipe.sparsity import flops
from sparsepipe.sparsity import registry as methods
from sparsepipe.sparsity.attacks import InputSpace
from sparsepipe.sparsity.history import MaskHistory
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.modifiers import registry as modifiers
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.stages import qat
from sparsepipe.stages.input_space import input_space
from sparsepipe.training import optimizers, rates
from sparsepipe.training.augment import Augmentation
from sparsepipe.training.batches import EvaluationBatches, Normalise, TrainingBatches, source
from sparsepipe.training.loop import Loop

if TYPE_CHECKING:
    from sparsepipe.stages.train import TrainConfig

EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Assembly:
    """One training, ready to run."""

    config: TrainConfig
    dataset: Dataset
    samples: dict[str, int]
    samples_per_step: int
    """Of all processes together."""
    macs: dict[str, int]
    loop: Loop
    validation: EvaluationBatches
    normalise: Normalise
    fabric: Fabric

    @property
    def sparsifier(self) -> Sparsifier:
        return self.loop.sparsifier

    @property
    def history(self) -> MaskHistory:
        return self.sparsifier.history or self.sparsifier.watch()

    def evaluation(self, split: Split) -> EvaluationBatches:
        return evaluation(split, self.normalise, self.fabric)


def evaluation(split: Split, normalise: Normalise, fabric: Fabric) -> EvaluationBatches:
    """This process's share of `split`."""
    return EvaluationBatches(
        source(split, fabric.device),
        normalise,
        batch_size=EVALUATION_BATCH,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )


def rate_of(config: TrainConfig, total: int, warmup: int) -> rates.Rate:
    """The learning rate of each of `total` steps, as a multiple of the optimizer's; `warmup` steps come first."""
    schedule = config.schedule
    return rates.create(schedule.name, total=total, warmup=warmup, milestones=schedule.milestones, gamma=schedule.gamma)


def modifiers_of(config: TrainConfig, space: InputSpace) -> list[Modifier]:
    """The modifiers of a recipe; `space` is that of the inputs that they change."""
    return [modifiers.create(each.name, each.options, inputs=space) for each in config.modifiers]


def steps_of(method: Method, modified: Sequence[Modifier], asked: int) -> int:
    """Steps or epochs of the whole training, where the recipe asks for so many."""
    return max(1, round(asked * method.epochs_multiplier)) * math.prod(each.stages for each in modified)


def sparsifier_of(
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    total: int,
    scored: Sequence[tuple[torch.Tensor, torch.Tensor]],
    modified: Sequence[Modifier],
) -> Sparsifier:
    """The method and modifiers of a recipe at work on a network.

    Args:
        config: the parts of the recipe.
        model: the network.
        optimizer: of its parameters.
        method: as the recipe names it.
        total: optimizer steps.
        scored: the training batches that the method chooses masks by before training.
        modified: from `modifiers_of`.
    """
    return Sparsifier(
        model,
        optimizer,
        method,
        total_steps=total,
        seed=config.seed,
        samples=scored,
        modifiers=modified,
    )


def assemble(config: TrainConfig, dataset: Dataset, fabric: Fabric) -> Assembly:
    """Build the network, the batches and the loop.

    Raises:
        SparsepipeError: parts of the recipe do not fit together, or do not fit the data.
    """
    settings, classes = config.train, len(dataset.classes)
    rest, held_out = data.hold_out(dataset.train, settings.validation, config.seed)
    if len(rest) < fabric.world_size:
        raise DataError(
            f"There are {len(rest)} training samples, but {fabric.world_size} processes.", where=dataset.name
        )
    model = models.create(
        config.model.name, input_shape=dataset.input_shape, classes=classes, options=config.model.options
    )
    check_data(config, model, dataset, min(2, settings.batch_size, len(rest)))
    # Channels last is the layout that convolutions are fastest in, on CPUs by a quarter and more.
    model.to(fabric.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _keep_from_crashing(model)
    optimizer = optimizers.create(model=model, **config.optimizer.model_dump())
    normalise = Normalise(dataset.preprocessing, fabric.device)
    batches = TrainingBatches(
        source(rest, fabric.device),
        normalise,
        Augmentation(**config.augment.model_dump()),
        batch_size=settings.batch_size,
        seed=config.seed,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    method = methods.create(config.method.name, config.method.options)
    modified = modifiers_of(config, input_space(dataset.preprocessing, dataset.input_shape))
    epochs = steps_of(method, modified, settings.epochs)
    total = batches.steps * epochs
    rate = rate_of(config, total, round(config.schedule.warmup * batches.steps))
    macs = flops.count_macs(model, dataset.input_shape)
    validation = evaluation(held_out, normalise, fabric)
    scored = list(islice(batches.epoch(0, 0), method.samples_needed)) if method.samples_needed else []
    sparsifier = sparsifier_of(config, model, optimizer, method, total, scored, modified)
    loop = Loop(
        fabric,
        model,
        optimizer,
        sparsifier,
        training=batches,
        validation=validation,
        lr=config.optimizer.lr,
        rate=rate,
        epochs=epochs,
        label_smoothing=settings.label_smoothing,
        ema=settings.ema,
        quantisation=qat.prepare(model, dataset.input_shape, sparsifier, settings, total),
    )
    sizes = {"train": len(rest), "validation": len(held_out), "test": len(dataset.test)}
    sparsifier.watch()
    return Assembly(config, dataset, sizes, batches.global_size, macs, loop, validation, normalise, fabric)


def check_data(config: TrainConfig, model: nn.Module, dataset: Dataset, batch: int) -> None:
    """Refuse a network that does not take the dataset's samples, or does not tell its classes apart.

    It runs in evaluation mode, and in training mode on `batch` samples: some networks then return something else.
    """
    shape, classes = dataset.input_shape, len(dataset.classes)
    if len(shape) != 3 and Augmentation(**config.augment.model_dump()).active:
        raise RecipeError(
            f"Augmentation works on images, but the samples of '{dataset.name}' are {shape[0]} features.",
            where="augment",
            advice="Remove the section, or choose a dataset of images.",
        )
    if int(dataset.train.labels.max()) >= classes:
        raise DataError(f"There are labels above {classes - 1}, but only {classes} classes.", where=dataset.name)
    _check_output(model.eval(), 2, config, dataset)
    try:
        # A copy, as batch statistics change with every pass in training mode.
        trained = deepcopy(model).train()
    except Exception:  # tensors that are computed from others cannot be copied: training itself will tell
        return
    with torch.random.fork_rng([]):  # dropout draws, but training must start from the same random state
        _check_output(trained, batch, config, dataset)


def _check_output(model: nn.Module, batch: int, config: TrainConfig, dataset: Dataset) -> None:
    """Refuse a network that, in the mode that it is in, does not turn `batch` samples into logits.

    Raises:
        ModelError: its code fails, or what it returns is not a tensor [batch, classes].
    """
    name, shape, classes = config.model.name, dataset.input_shape, len(dataset.classes)
    mode = "training" if model.training else "evaluation"
    try:
        with torch.no_grad():
            logits = model(torch.zeros(batch, *shape))
    except SparsepipeError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(
            f"In {mode} mode the network does not take samples of the shape {shape} of "
            f"'{dataset.name}' in batches of {batch}: {failure(error)}.",
            where=name,
        ) from error
    wanted = f"'{dataset.name}' has {classes} classes, so it must be ({batch}, {classes})"
    if not isinstance(logits, torch.Tensor):
        raise ModelError(
            f"In {mode} mode the network returns a {type(logits).__name__}, not one tensor; {wanted}.", where=name
        )
    if tuple(logits.shape) != (batch, classes):
        raise ModelError(
            f"For {batch} samples in {mode} mode the network gives an output of shape {tuple(logits.shape)}; {wanted}.",
            where=name,
            advice="Build it for as many classes as the argument `classes` says.",
        )


def _keep_from_crashing(model: nn.Module) -> None:
    """Have strided 1x1 convolutions of fewer than eight channels take images with the channels first.

    With the channels last their gradient is written beyond its memory on CPUs with AVX2 alone (oneDNN in torch 2.13),
    which ends the process or, worse, does not.
    """
    for part in model.modules():
        if (
            isinstance(part, nn.Conv2d)
            and part.in_channels // part.groups < 8
            and max(part.kernel_size) == 1
            and max(part.stride) > 1
        ):
            part.weight.data = part.weight.data.clone(memory_format=torch.contiguous_format)
            part.register_forward_pre_hook(_channels_first)


def _channels_first(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in inputs)
