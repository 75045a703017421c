"""The network that the folder of a stage holds, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsepipe.artefact import Artefact
from sparsepipe.errors import ModelError
from sparsepipe.models.registry import create
from sparsepipe.plugins import is_plugin
from sparsepipe.spec import SPEC_FILE, ModelSpec
from sparsepipe.stages.convert import load_weights
from sparsepipe.stages.fit import check_weights

if TYPE_CHECKING:
    from torch import nn


def load_network(source: Artefact, trusted_model: str | None = None) -> nn.Module:
    """The network of a `convert` or `freeze` artefact with its weights, in evaluation mode.

    Args:
        source: the artefact.
        trusted_model: `module:function` that may be imported. A name that only the artefact gives is not: it may come
            from anyone, and importing runs code.

    Raises:
        ModelError: the network's code is not trusted or not found, or its weights do not fit it.
        ArtefactError: a file is missing or damaged.
    """
    import torch

    spec = ModelSpec.read(source.file(SPEC_FILE))
    if is_plugin(spec.model.name) and spec.model.name != trusted_model:
        raise ModelError(
            f"The network is built by code that this folder names, '{spec.model.name}'.",
            where=str(source.folder),
            advice=f"If you trust that code, repeat the command with --model {spec.model.name}",
        )
    network: nn.Module = create(
        spec.model.name, input_shape=spec.input_shape, classes=len(spec.classes), options=spec.model.options
    )
    weights = load_weights(source)
    check_weights(
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()},
        weights,
        where=str(source.folder),
        advice="The network's code or options have changed since it was trained; use the ones it was trained with.",
    )
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    network.eval()
    return network
