"""What an exported file is compared with: the network in PyTorch, or another ONNX file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparsepipe.artefact import Artefact, find
from sparsepipe.errors import ArtefactError, GraphError, ModelError, RecipeError, one_line
from sparsepipe.runtime.inputs import Input
from sparsepipe.runtime.network import OnnxNetwork
from sparsepipe.settings import check
from sparsepipe.spec import SPEC_FILE, SPEC_KEY, ModelSpec
from sparsepipe.stages.forms import INT8
from sparsepipe.stages.network import load_network

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]

DENSE_TARGET = "dense"
NETWORK_STAGES = ("freeze", "convert")
"""Stages whose artefact holds a network, in the order in which they are looked for."""

NO_TORCH = "torch is not installed, so the dense ONNX file stands for the network"


class Network(Protocol):
    """What can be run and looked into."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> list[Input]: ...

    def run(self, inputs: Mapping[str, Array]) -> list[Array]: ...

    def trace(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Reference:
    """A network to compare with, what is known about it, and what must be said about the choice."""

    network: Network
    spec: ModelSpec | None
    note: str | None = None
    source: Artefact | None = None
    """That holds the network, where it is one in PyTorch."""


class TorchNetwork:
    """A PyTorch network on the CPU, in evaluation mode.

    Args:
        module: the network, with its weights.
        input_shape: shape of one sample.
    """

    name = "PyTorch"

    def __init__(self, module: torch.nn.Module, input_shape: Sequence[int]) -> None:
        self.module = module.eval()
        self.inputs = [Input("input", "float", (None, *input_shape))]

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs for the one input.

        Raises:
            ModelError: the network cannot take it.
        """
        import torch

        (values,) = inputs.values()
        try:
            with torch.inference_mode():
                output = self.module(torch.from_numpy(np.ascontiguousarray(values)))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(f"The network fails on inputs {list(values.shape)}: {one_line(error)}") from error
        return [value.numpy() for value in (output if isinstance(output, (tuple, list)) else [output])]

    def trace(self, inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """Outputs of modules by their path, such as `layer1.0.bn1`; a module's later calls are `layer1.0.bn1@1`, `@2`.

        Args:
            inputs: the one input.
            names: which outputs to return; names that are none are passed over.
        """
        found: dict[str, Array] = {}
        wanted, calls = set(names), Counter[str]()

        def keep(path: str, output: Any) -> None:
            name = f"{path}@{calls[path]}" if calls[path] else path
            calls[path] += 1
            if name in wanted and hasattr(output, "numpy"):
                # A copy: the next module may work in place.
                found[name] = output.clone().numpy()

        paths = {name.partition("@")[0] for name in names}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, path=path: keep(path, output))
            for path, module in self.module.named_modules()
            if path in paths
        ]
        try:
            self.run(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def spec_of(network: OnnxNetwork) -> ModelSpec | None:
    """What an exported file says about itself; None for files from other tools.

    Raises:
        GraphError: the metadata is damaged.
    """
    text = network.metadata.get(SPEC_KEY)
    if text is None:
        return None
    try:
        return check(ModelSpec, json.loads(text), where=network.name)
    except (ValueError, RecipeError) as error:
        raise GraphError(f"The metadata '{SPEC_KEY}' is damaged: {error}.", where=network.name) from error


def from_artefact(artefact: Artefact, export: Artefact | None, trusted_model: str | None) -> Reference:
    """The network that an artefact holds; where torch is not installed, the dense file of `export` instead.

    Args:
        artefact: of one of `NETWORK_STAGES`.
        export: files that were exported from it.
        trusted_model: the `module:function` that the user allows to be imported as the network.

    Raises:
        ArtefactError: a file is missing or damaged, or torch is, and there is no dense file.
        ModelError: the network cannot be built, is not trusted, or its weights do not fit.
    """
    spec = ModelSpec.read(artefact.file(SPEC_FILE))
    if find_spec("torch") is None:
        return Reference(OnnxNetwork(dense_file(export, artefact.folder)), spec, NO_TORCH)
    return Reference(TorchNetwork(load_network(artefact, trusted_model), spec.input_shape), spec, source=artefact)


def from_path(path: Path, trusted_model: str | None) -> Reference:
    """The network in an ONNX file, a run folder or the folder of a stage.

    Raises:
        ArtefactError: there is no network.
        GraphError: the ONNX file cannot be loaded.
    """
    if not path.is_dir():
        network = OnnxNetwork(path)
        return Reference(network, spec_of(network))
    export = find(path, "export")
    for stage in NETWORK_STAGES:
        if artefact := find(path, stage):
            return from_artefact(artefact, export, trusted_model)
    network = OnnxNetwork(dense_file(export, path))
    return Reference(network, spec_of(network))


def dense_file(export: Artefact | None, folder: Path) -> Path:
    """The dense file in fp32 of an export, to stand for the network.

    Raises:
        ArtefactError: there is no export, or no dense file in it; the message names `folder`.
    """
    file = export.metric("files").get(DENSE_TARGET) if export else None
    if export is None or file is None or file.get("precision") == INT8:
        raise ArtefactError(
            "This folder holds no network to compare with that can be run here.",
            where=str(folder),
            advice=f"Name a run folder, or the folder of one of the stages {', '.join(NETWORK_STAGES)} (these need "
            "torch), or of an export with the dense target in fp32.",
        )
    return export.file(file["name"])
