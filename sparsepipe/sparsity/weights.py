"""Which weights of a network can be masked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from sparsepipe.errors import ModelError


@dataclass(frozen=True)
class Weight:
    """One maskable weight, under its first name in `model.named_parameters()`."""

    name: str
    parameter: nn.Parameter
    convolution: bool
    transposed: bool
    """Its first two dimensions are (input, output) channels, not (output, input)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)


def maskable(model: nn.Module, optimizer: Optimizer) -> dict[str, Weight]:
    """The weights of convolutions, linear layers and attention projections that `optimizer` trains.

    Embeddings, normalisation, biases and depthwise kernels are left out, as is a weight that any embedding shares.
    A weight shared between modules appears once.

    Raises:
        ModelError: there is no such weight, a weight is not initialised yet, or two different parameters share
            memory, so that no mask could hold for both.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    found: dict[int, tuple[nn.Parameter, bool, bool]] = {}
    for module in model.modules():
        for parameter in _weights_of(module):
            if isinstance(parameter, nn.UninitializedParameter):
                raise ModelError(
                    f"A weight of {type(module).__name__} has no shape yet.",
                    where="model",
                    advice="Pass one batch through the model before making the Sparsifier.",
                )
            if id(parameter) in trained and id(parameter) not in embedded and parameter.requires_grad:
                transposed = isinstance(module, _ConvTransposeNd)
                found.setdefault(id(parameter), (parameter, isinstance(module, _ConvNd), transposed))
    named = model.named_parameters()
    weights = {name: Weight(name, *found[id(parameter)]) for name, parameter in named if id(parameter) in found}
    if not weights:
        raise ModelError(
            "There is no weight to mask: no convolution or linear layer has a weight that this optimizer trains.",
            where="model",
            advice="Give the Sparsifier the model and the optimizer that trains its parameters.",
        )
    _refuse_shared_memory(weights)
    return weights


def _weights_of(module: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(module, nn.MultiheadAttention):
        names: tuple[str, ...] = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not _is_depthwise(module)):
        names = ("weight",)
    else:
        return
    for name in names:
        # Not getattr: a parametrized weight is computed anew at each use and cannot be masked in place.
        parameter = module._parameters.get(name)
        if parameter is not None:
            yield parameter


def _is_depthwise(module: _ConvNd) -> bool:
    return module.groups > 1 and module.groups == module.in_channels


def _refuse_shared_memory(weights: dict[str, Weight]) -> None:
    owners: dict[int, str] = {}
    for name, weight in weights.items():
        address = weight.parameter.untyped_storage().data_ptr()
        if address and owners.setdefault(address, name) != name:
            raise ModelError(
                f"'{owners[address]}' and '{name}' are different parameters in the same memory.",
                where="model",
                advice="Share the Parameter object itself: module_b.weight = module_a.weight.",
            )
