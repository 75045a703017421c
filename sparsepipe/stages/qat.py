"""Quantisation-aware training: where a network has to round so that it computes as its int8 export will."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from sparsepipe import launch
from sparsepipe.errors import MissingExtraError, RecipeError
from sparsepipe.graph.fold import fold
from sparsepipe.quantization.points import layer_inputs, quantised_tensors
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.training.fake_quantisation import LAYERS, FakeQuantisation, Points, calls_of

if TYPE_CHECKING:
    from sparsepipe.recipe import Training

INT8_QAT = "int8-qat"

log = logging.getLogger("sparsepipe")


def prepare(
    network: nn.Module, input_shape: tuple[int, ...], sparsifier: Sparsifier, settings: Training, total: int
) -> FakeQuantisation | None:
    """What rounds in the last steps of a training; None where the recipe does not ask for it.

    Args:
        network: as it is trained, on its device.
        input_shape: shape of one sample.
        sparsifier: of `network`.
        settings: the section `train`.
        total: optimizer steps.

    Raises:
        GraphError: the network cannot be exported, or not quantised.
        RecipeError: the masks are not final in time, or there is to be an average of the weights.
        MissingExtraError: onnxscript is not installed.
    """
    if settings.precision != INT8_QAT:
        return None
    start = int(settings.qat_start * total)
    if settings.ema:
        raise RecipeError(
            "An average of the weights is rounded to other values than the weights that were trained to be rounded.",
            where="train.precision",
            advice="Set train.ema = 0, or another train.precision.",
        )
    if not sparsifier.masks_final_after(start):
        raise RecipeError(
            f"int8-qat trains the weights of final masks, but after step {start} of {total} (train.qat_start = "
            f"{settings.qat_start:g}) those of {sparsifier.method.name} may still change.",
            where="train.precision",
            advice="Let the masks end earlier (method.stop_at or the like), set train.qat_start later, or choose a "
            "method whose masks become final during training.",
        )
    try:
        from sparsepipe.graph.build import build
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxscript", "train", "int8-qat") from error
    folded, _ = fold(build(network, input_shape))
    quantised = quantised_tensors(folded)
    modules = dict(network.named_modules())
    layers = {path: f"{path}.weight" for path, module in modules.items() if path and isinstance(module, LAYERS)}
    inputs = {path: name for path, name in layer_inputs(folded, layers).items() if name in quantised}
    outputs = calls_of(quantised, (path for path in modules if path))
    (output,) = folded.graph.output
    if output.name in quantised:
        outputs = {call: name for call, name in outputs.items() if name != output.name} | {"": output.name}
    unseen = sorted(quantised - {*inputs.values(), *outputs.values()})
    if unseen and launch.rank() == 0:
        log.warning(
            "int8-qat does not see the results of these operations, as they are no modules: %s. Their ranges are found "
            "at the export, by --calibrate.",
            ", ".join(unseen),
        )
    return FakeQuantisation(network, Points(inputs, outputs), start)
