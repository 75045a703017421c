"""What the stage `train` does once torch is there: run a training, select, test, and write the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from sparsepipe import data
from sparsepipe.artefact import Draft
from sparsepipe.errors import ArtefactError, InterruptedBySignal
from sparsepipe.formats.film import save_film
from sparsepipe.formats.masks import save_masks
from sparsepipe.formats.tensors import write_tensors
from sparsepipe.progress import bar
from sparsepipe.recipe import digest
from sparsepipe.sparsity import flops
from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.sparsity.method import TargetMethod
from sparsepipe.spec import FILM_FILE, MASKS_FILE, WEIGHTS_FILE, ModelSpec
from sparsepipe.stages.assembly import Assembly, assemble
from sparsepipe.training import checkpoint, device
from sparsepipe.training.interrupt import stop_request
from sparsepipe.training.loop import Epoch, Score
from sparsepipe.training.metrics import FILE, MetricsLog
from sparsepipe.training.saver import Saver
from sparsepipe.training.seeds import generator

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from sparsepipe.stages.train import TrainConfig

log = logging.getLogger("sparsepipe")


def train(
    config: TrainConfig,
    fabric: Fabric,
    building: Draft | None,
    identity: Mapping[str, Any],
    state: Mapping[str, Any] | None,
) -> None:
    """Train as `config` says, from `state` if there is one, and write files and metrics of the artefact.

    Every process of a distributed training has to call this, with the same state; process 0 alone has a `building`,
    and writes.

    Raises:
        As `sparsepipe.stages.train.run`.
    """
    dataset = data.load(config.data.name, config.data.options)
    # Network and dropout draw from torch's global generators; the caller gets these back as they were.
    cuda = [fabric.device] if fabric.device.type == "cuda" else []
    with device.threads(config.train.threads), torch.random.fork_rng(cuda):
        torch.manual_seed(config.seed)
        training = assemble(config, dataset, fabric)
        if fabric.global_rank > 0:  # dropout of its own, after a network that is the same
            torch.manual_seed(generator(config.seed, "process", fabric.global_rank).initial_seed())
        if state is not None:
            _restore(training, state, str(building.folder) if building else f"process {fabric.global_rank}")
            log.info("Resuming after step %d of %d.", training.loop.step, training.loop.total_steps)
        _tell_what_stays_dense(training)
        if state is None and building is not None:  # only now: what could not be assembled must cost nothing
            if checkpoint.exists(building.folder):
                log.info("The interrupted training in %s is discarded.", building.folder)
            building.clear()
        multiples = _run(training, building, identity)
        masks = training.sparsifier.freeze()
        selected = _select(training, masks)
        if training.loop.quantisation is not None:  # scores are those of the network that is written, in fp32
            training.loop.quantisation.active = False
        # The one place where test samples are looked at; every process has a share of them.
        scores = {
            "validation": training.loop.evaluate(training.validation),
            "test": training.loop.evaluate(training.evaluation(dataset.test)),
        }
        if (quantisation := training.loop.quantisation) is not None:
            quantisation.active = True
            scores["int8_test"] = training.loop.evaluate(training.evaluation(dataset.test))
            quantisation.active = False
        snapshots = {kind: _snapshot(training, state) for kind, state in training.sparsifier.snapshots.items()}
        if building is not None:
            _write(training, building, masks, selected, multiples, scores)
            if snapshots:
                building.metrics["snapshots"] = snapshots
            checkpoint.remove_older(building.folder)


def _restore(training: Assembly, state: Mapping[str, Any], where: str) -> None:
    """Go on from `state`.

    Raises:
        ArtefactError: it is not the state of a step of this training.
    """
    loop = training.loop
    try:
        loop.load_state_dict(state["loop"])
        if not isinstance(loop.step, int) or not 0 <= loop.step <= loop.total_steps:
            raise ValueError(f"step {loop.step} is outside 0..{loop.total_steps}")
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(
            f"The checkpoint does not hold the state of this training ({type(error).__name__}: {reason}).",
            where=where,
            advice="Train from the start: `sparsepipe train` with --restart, or `sparsepipe run --force`.",
        ) from error


def _tell_what_stays_dense(training: Assembly) -> None:
    """Log why layers stay dense; warn where the pattern does not fit them, and of weights that no method masks."""
    if not isinstance(training.sparsifier.method, TargetMethod):
        return
    masks = training.sparsifier.mask_set
    misfits = {layer.dense_because for layer in training.sparsifier.layers.values() if layer.misfit}
    for reason in dict.fromkeys(masks.reasons.values()):
        names = ", ".join(name for name, given in masks.reasons.items() if given == reason)
        level = logging.WARNING if reason in misfits else logging.INFO
        log.log(level, "These layers stay dense (%s): %s.", reason, names)
    parameters = dict(training.loop.model.named_parameters())
    known = {*masks, *training.sparsifier.left_out}
    unmasked = [name for name, value in parameters.items() if value.ndim >= 2 and name not in known]
    if unmasked:
        share = sum(parameters[name].numel() for name in unmasked) / sum(map(torch.numel, parameters.values()))
        log.warning(
            "Not made sparse, as only weights of convolutions (but for depthwise ones), linear layers and attention "
            "are: %s; %.1f%% of all parameters.",
            ", ".join(unmasked),
            100 * share,
        )


def _run(training: Assembly, building: Draft | None, identity: Mapping[str, Any]) -> list[float]:
    """Train to the end; with a `building`, write logs and checkpoints.

    Returns:
        The inference FLOPs multiple of each epoch that is logged, in the mean over its steps.

    Raises:
        InterruptedBySignal: it was asked to stop; the state is saved.
    """
    loop, settings = training.loop, training.config.train
    saver = Saver(building.folder if building else None, loop.step, settings.checkpoint_every)
    note = "first epoch"

    def save() -> bool:
        if metrics is not None:
            metrics.sync()
        return saver.save(loop.step, lambda: {"identity": dict(identity), "loop": loop.state_dict()})

    def on_epoch(epoch: Epoch) -> None:
        nonlocal note
        if metrics is None:
            return
        record = _record(training, epoch, _multiples(metrics))
        metrics.write(record, training.history)
        note = f"epoch {epoch.number}/{loop.epochs}, loss {epoch.train.loss:.3f}, "
        note += f"validation {epoch.validation.accuracy:.2%}"
        log.info("%s, sparsity %.2f%%, %.1f s", note, 100 * record["sparsity"], epoch.seconds)

    remaining = loop.total_steps - loop.step
    with (
        nullcontext() if building is None else MetricsLog(building.folder, loop.step) as metrics,
        bar(f"training {training.config.model.name} ({training.config.method.name})", remaining) as progress,
        stop_request() as request,
    ):
        loop.run(
            on_step=lambda: progress.advance(1, note),
            on_epoch=on_epoch,
            stop=lambda: request.made,
            save_due=lambda: saver.due(loop.step),
            save=save,
        )
        saved = save()
        (stopped,) = loop.agree(lambda: request.made)
    if stopped:
        what = "all is saved" if saved else "this was not saved"
        log.warning("Stopped after step %d of %d; %s.", loop.step, loop.total_steps, what)
        raise InterruptedBySignal(request.number)
    return [] if metrics is None else _multiples(metrics)


def _multiples(metrics: MetricsLog) -> list[float]:
    try:
        return [float(record["mean_inference_flops_multiple"]) for record in metrics.records]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            "An epoch has no number 'mean_inference_flops_multiple'.",
            where=FILE,
            advice="Train from the start: `sparsepipe train` with --restart.",
        ) from error


def _record(training: Assembly, epoch: Epoch, earlier: list[float]) -> dict[str, Any]:
    """What is logged of one epoch; `earlier` are the mean inference multiples of the epochs before."""
    state, changes = training.sparsifier.metrics(), training.history.take()
    multiple = flops.inference_multiple(training.macs, state["density"])
    mean = flops.inference_multiple(training.macs, changes["mean_density"])
    spent = flops.training_multiple([*earlier, mean], training.sparsifier.method.dense_gradient_every)
    return {
        "epoch": epoch.number,
        "step": epoch.step,
        "lr": epoch.lr,
        "train_loss": epoch.train.loss,
        "train_accuracy": epoch.train.accuracy,
        "validation_loss": epoch.validation.loss,
        "validation_accuracy": epoch.validation.accuracy,
        **_auc("validation", epoch.validation),
        "sparsity": state["sparsity"],
        "exploration_rate": state["exploration_rate"],
        "drop_fraction": state["drop_fraction"],
        "density": state["density"],
        **changes,
        "inference_flops": flops.inference_flops(training.macs, multiple),
        "inference_flops_multiple": multiple,
        "mean_inference_flops_multiple": mean,
        "training_flops": flops.training_flops(training.macs, spent, epoch.step * training.samples_per_step),
        "training_flops_multiple": spent,
        "seconds": epoch.seconds,
    }


def _select(training: Assembly, masks: MaskSet) -> int:
    """Put the selected weights into the network, exact zeros where masks are off; returns their epoch."""
    loop, settings = training.loop, training.config.train
    epoch, weights = loop.epochs, loop.candidate.state_dict()
    if settings.select == "best" and loop.best is not None:
        epoch, weights = loop.best["epoch"], loop.best["weights"]
        if loop.quantisation is not None:
            loop.quantisation.observed = loop.best["ranges"]
    elif settings.select == "best":
        log.warning("The masks became final only after the last epoch, so its weights are selected.")
    loop.model.load_state_dict(weights)
    with torch.no_grad():
        for name, mask in masks.items():
            loop.model.get_parameter(name).masked_fill_(~mask, 0)
    return epoch


def _snapshot(training: Assembly, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Scores of an earlier state of the network, which is a result of the training, too."""
    model = training.loop.model
    selected = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    validation = training.loop.evaluate(training.validation)
    test = training.loop.evaluate(training.evaluation(training.dataset.test))
    model.load_state_dict(selected)
    masked = training.sparsifier.mask_set
    return {
        "test_accuracy": test.accuracy,
        "test_correct": test.correct,
        "validation_accuracy": validation.accuracy,
        **_auc("test", test),
        **_auc("validation", validation),
        "sparsity": 1 - sum(int(weights[name].count_nonzero()) for name in masked) / masked.size,
    }


def _auc(split: str, score: Score) -> dict[str, float]:
    """Of two classes, the metric of a split."""
    return {} if score.auc is None else {f"{split}_auc": score.auc}


def _write(
    training: Assembly,
    building: Draft,
    masks: MaskSet,
    epoch: int,
    multiples: list[float],
    scores: Mapping[str, Score],
) -> None:
    """Write the network, and all that is known of it."""
    config, dataset, loop = training.config, training.dataset, training.loop
    validation, test = scores["validation"], scores["test"]
    ModelSpec(
        model=config.model,
        input_shape=dataset.input_shape,
        classes=dataset.classes,
        preprocessing=dataset.preprocessing,
        method=config.method.name,
        pattern=str(training.sparsifier.method.describe().get("pattern", "unstructured")),
        data=config.data,
        recipe_digest=digest(config),
        activation_ranges=loop.quantisation.ranges() if loop.quantisation is not None else None,
    ).write(building.folder)
    weights = loop.model.state_dict()
    write_tensors(building.folder / WEIGHTS_FILE, {name: value.cpu().numpy() for name, value in weights.items()})
    for kind, state in training.sparsifier.snapshots.items():
        arrays = {name: value.cpu().numpy() for name, value in state.items()}
        write_tensors(building.folder / f"{kind}.safetensors", arrays)
    save_masks(building.folder / MASKS_FILE, {name: mask.cpu().numpy() for name, mask in masks.items()})
    if (film := training.history.finish()) is not None:
        bits = [frame.numpy() for frame in film.bits]
        save_film(building.folder / FILM_FILE, film.layer, film.shape, film.rounds, film.steps, bits)
    inference = flops.inference_multiple(training.macs, masks.densities())
    every = training.sparsifier.method.dense_gradient_every
    spent = flops.training_multiple(multiples or inference, every)
    building.metrics |= {
        "test_accuracy": test.accuracy,
        "test_correct": test.correct,
        "test_samples": test.samples,
        "validation_accuracy": validation.accuracy,
        **_auc("test", test),
        **_auc("validation", validation),
        "epoch_selected": epoch,
        "sparsity": masks.sparsity,
        "nnz": masks.nnz,
        "weights": masks.size,
        "parameters": sum(parameter.numel() for parameter in loop.model.parameters()),
        "exploration_rate": masks.exploration_rate(),
        "mask_updates": training.history.updates,
        "inference_flops": flops.inference_flops(training.macs, inference),
        "inference_flops_multiple": inference,
        "training_flops": flops.training_flops(training.macs, spent, loop.step * training.samples_per_step),
        "training_flops_multiple": spent,
        "dense_gradient_every": every,
        "dense_macs": sum(training.macs.values()),
        "seconds": loop.seconds,
        "cpu_seconds": loop.cpu_seconds,
        "processes": training.fabric.world_size,
        "data": {"name": dataset.name, **training.samples},
    }
    if (rounded := scores.get("int8_test")) is not None:
        building.metrics["int8_test_accuracy"] = rounded.accuracy
        log.info("With weights and activations rounded to int8: test %.2f%%.", 100 * rounded.accuracy)
    log.info(
        "Selected epoch %d: validation %.2f%%, test %.2f%%, sparsity %.2f%%.",
        epoch,
        100 * validation.accuracy,
        100 * test.accuracy,
        100 * masks.sparsity,
    )
