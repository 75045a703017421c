"""Freeze: masks applied for good, training state dropped.

A frozen network is `model.json`, `model.safetensors` (weights and buffers) and `masks.safetensors`. Its inactive
weights are exactly +0.0, active ones keep their bits, except that an active -0.0 becomes +0.0, too: zero has one form
from here on. What is counted as `nnz` are the weights that are not zero. bfloat16 tensors become float32 without loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe.artefact import Artefact, Draft, digest_file, draft
from sparsepipe.errors import ArtefactError
from sparsepipe.formats.finite import ADVICE, not_finite
from sparsepipe.formats.layout import Array, positive_zeros
from sparsepipe.formats.masks import Mask, load_masks, save_masks
from sparsepipe.formats.tensors import digest_tensors, read_tensors, write_tensors
from sparsepipe.models.registry import check_name, create
from sparsepipe.plugins import is_plugin
from sparsepipe.settings import Section
from sparsepipe.spec import MASKS_FILE, SPEC_FILE, WEIGHTS_FILE, ModelSpec
from sparsepipe.stages import checkpoints
from sparsepipe.stages.fit import check_weights


class FreezeConfig(Section):
    """Freezing has no settings."""


def run(config: FreezeConfig, inputs: Mapping[str, Artefact], out: Path) -> Artefact:
    """Freeze what the stage `train` made. Needs no torch.

    Args:
        config: no settings.
        inputs: the artefact of `train`.
        out: folder to write.

    Raises:
        ArtefactError: a file is missing or damaged, weights and masks do not belong together, or a value is not finite.
        FormatError: the file of masks is malformed.
    """
    trained = inputs["train"]
    spec = ModelSpec.read(trained.file(SPEC_FILE))
    state = read_tensors(trained.file(WEIGHTS_FILE)).tensors
    masks = load_masks(trained.file(MASKS_FILE))
    _check(state, masks, trained)
    with draft(out, "freeze", config, {"train": trained.digest}) as building:
        _write(building, spec, state, masks, trained.file(WEIGHTS_FILE))
    return Artefact.read(out, "freeze")


def from_checkpoint(path: Path, spec: ModelSpec, out: Path) -> Artefact:
    """Freeze a checkpoint from elsewhere: the zeros in its weights are the masks.

    Every floating-point tensor of two or more dimensions counts as a weight. Needs torch for .pt and .pth only; where
    it is installed, the network is built to see that the weights fit.

    Args:
        path: a .safetensors, .pt or .pth file; see checkpoints.read for what it may hold.
        spec: the network that the weights belong to, and its inputs and classes. A network `module:function` is
            imported, so it must be the user's own word.
        out: folder to write.

    Raises:
        ArtefactError: the file is missing or damaged, holds no state dict, its weights and masks do not fit, or a value
            is not finite.
        ModelError: there is no such network, it cannot be built, or the weights do not fit it.
        MissingExtraError: a .pt file where torch is not installed.
    """
    check_name(spec.model.name)
    state = _fitting(checkpoints.read(path), spec, path)
    masks = {name: array != 0 for name, array in state.items() if array.ndim >= 2 and array.dtype.kind == "f"}
    with draft(out, "freeze", FreezeConfig(), {"checkpoint": digest_file(path)}) as building:
        _write(building, spec, state, masks, path)
    return Artefact.read(out, "freeze")


def _fitting(state: dict[str, Array], spec: ModelSpec, path: Path) -> dict[str, Array]:
    """The weights under the names that the network has for them."""
    try:
        import torch  # noqa: F401
    except ImportError:
        # Of the networks by name none has a part called `model`; one of the user's own may have.
        return state if is_plugin(spec.model.name) else checkpoints.without_member(state)
    network = create(
        spec.model.name, input_shape=spec.input_shape, classes=len(spec.classes), options=spec.model.options
    )
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if not any(name in expected for name in state):
        state = checkpoints.without_member(state)
    check_weights(
        expected,
        state,
        where=str(path),
        advice="Name the network that the checkpoint was saved from, with its options (--set model.NAME=VALUE) and "
        "the dataset that it was trained on.",
    )
    return state


def _check(state: Mapping[str, Array], masks: Mapping[str, Mask], trained: Artefact) -> None:
    where = str(trained.folder)
    for name, mask in masks.items():
        if name not in state:
            raise ArtefactError(f"There is a mask for '{name}', but no such weight.", where=where)
        if state[name].shape != mask.shape:
            raise ArtefactError(
                f"The weight '{name}' has shape {list(state[name].shape)}, its mask {list(mask.shape)}.", where=where
            )
    masked, maskable = sum(mask.size for mask in masks.values()), trained.metrics.get("weights")
    if isinstance(maskable, int) and masked < maskable:
        raise ArtefactError(
            f"{maskable - masked} of the {maskable} weights that were trained with masks have none in {MASKS_FILE}.",
            where=where,
            advice="Finish the training again with `sparsepipe train RECIPE --resume`.",
        )


def _write(
    building: Draft, spec: ModelSpec, state: Mapping[str, Array], masks: Mapping[str, Mask], where: Path
) -> None:
    frozen = {
        name: positive_zeros(np.where(masks[name], array, array.dtype.type(0))) if name in masks else array
        for name, array in state.items()
    }
    if problem := not_finite(frozen.items()):
        raise ArtefactError(problem, where=str(where), advice=ADVICE)
    spec.write(building.folder)
    write_tensors(building.folder / WEIGHTS_FILE, frozen)
    save_masks(building.folder / MASKS_FILE, masks)
    layers = [_layer(name, frozen[name]) for name in masks]
    weights, nnz = sum(layer["size"] for layer in layers), sum(layer["nnz"] for layer in layers)
    building.metrics |= {
        "sparsity": 1 - nnz / weights if weights else 0.0,
        "nnz": nnz,
        "weights": weights,
        "digest": digest_tensors(frozen),
        "layers": layers,
    }


def _layer(name: str, weight: Array) -> dict[str, Any]:
    nnz = int(np.count_nonzero(weight))
    return {
        "name": name,
        "shape": list(weight.shape),
        "nnz": nnz,
        "size": weight.size,
        "sparsity": 1 - nnz / weight.size if weight.size else 0.0,
    }
