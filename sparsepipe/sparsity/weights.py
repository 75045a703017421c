"""Which weights of a network can be masked."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from sparsepipe.errors import ModelError

log = logging.getLogger("sparsepipe")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of weights that can be masked."""


@dataclass(frozen=True)
class Weight:
    """One maskable weight, under its first name in `model.named_parameters()`."""

    name: str
    parameter: nn.Parameter
    convolution: bool
    linear: bool
    transposed: bool
    """Its first two dimensions are (input, output), not (output, input)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def output_axis(self) -> int:
        """The dimension of output channels; of a transposed convolution with groups, of those of each group."""
        return 1 if self.transposed else 0


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside those that `torch.compile`, DDP and Lightning Fabric wrap around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model.get_submodule("_orig_mod")
        elif "_forward_module" in model._modules:  # Fabric
            model = model.get_submodule("_forward_module")
        else:
            return model


def same_weights(copy: nn.Module, weights: Mapping[str, Weight]) -> dict[str, nn.Parameter]:
    """The parameters of a copy of the model that correspond to `weights`, whatever wrappers are around the copy.

    Raises:
        ModelError: one is missing or has another shape, or is the very same parameter.
    """
    copy = unwrapped(copy)
    while "module" in copy._modules and not all(name in dict(copy.named_parameters()) for name in weights):
        copy = unwrapped(copy.get_submodule("module"))  # AveragedModel and others keep their copy there
    found = dict(copy.named_parameters())
    for name, weight in weights.items():
        same = found.get(name)
        if same is None or same.shape != weight.parameter.shape or same is weight.parameter:
            raise ModelError(
                f"The copy has no weight '{name}' of its own of shape {weight.shape}.",
                where="follow",
                advice="Give a copy of the model that the Sparsifier was made for: AveragedModel(model).",
            )
    return {name: found[name] for name in weights}


def maskable(model: nn.Module, optimizer: Optimizer) -> dict[str, Weight]:
    """The weights of convolutions, linear and recurrent layers and attention projections that `optimizer` trains.

    Embeddings, normalisation, biases and depthwise kernels are left out, as is a weight that any embedding shares, one
    without elements, one that is frozen, and what modules of unknown kinds hold. A weight that modules share appears
    once.

    Raises:
        ModelError: there is no such weight, a weight is not initialised yet or no ordinary tensor of floats, or two
            different parameters share memory, so that no mask could hold for both.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    embedded = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    found: dict[int, tuple[nn.Parameter, bool, bool, bool]] = {}
    for path, module in model.named_modules():
        for parameter in _weights_of(path, module):
            if isinstance(parameter, nn.UninitializedParameter):
                raise ModelError(
                    f"A weight of {type(module).__name__} has no shape yet.",
                    where="model",
                    advice="Pass one batch through the model before making the Sparsifier.",
                )
            empty = parameter.ndim >= 2 and parameter.numel() == 0
            if id(parameter) in trained and id(parameter) not in embedded and parameter.requires_grad and not empty:
                convolution, linear = isinstance(module, _ConvNd), isinstance(module, nn.Linear)
                turned = isinstance(module, _ConvTransposeNd) or _is_turned_linear(module)
                found.setdefault(id(parameter), (parameter, convolution, linear or _is_turned_linear(module), turned))
    named = dict(model.named_parameters())
    weights = {name: Weight(name, *found[id(value)]) for name, value in named.items() if id(value) in found}
    if not weights:
        raise ModelError(
            "There is no weight to mask: no convolution or linear or recurrent layer has a weight that this optimizer "
            "trains.",
            where="model",
            advice="Give the Sparsifier the model and the optimizer that trains its parameters.",
        )
    for weight in weights.values():
        _refuse_unusual(weight)
    _refuse_shared_memory(weights)
    others = [
        name
        for name in named.keys() - weights
        if id(named[name]) in trained and named[name].requires_grad and named[name].ndim >= 2
    ]
    if others:
        log.info(
            "%d trained tensors of two or more dimensions stay dense: embeddings, normalisation, depthwise kernels, "
            "and what layers of unknown kinds hold (%s).",
            len(others),
            ", ".join(sorted(others)[:5]) + (", ..." if len(others) > 5 else ""),
        )
    return weights


def _weights_of(path: str, module: nn.Module) -> Iterator[nn.Parameter]:
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif isinstance(module, nn.RNNBase):
        names = [name for layer in module._all_weights for name in layer if name.startswith("weight_")]
    elif isinstance(module, nn.RNNCellBase):
        names = ["weight_ih", "weight_hh"]
    elif isinstance(module, nn.Linear | nn.Bilinear | _ConvNd) or _is_turned_linear(module):
        names = [] if _is_depthwise(module) else ["weight"]
    else:
        return
    for name in names:
        # Not getattr: a parametrized weight is computed anew at each use and cannot be masked in place.
        parameter = module._parameters.get(name)
        if parameter is not None:
            yield parameter
        elif name not in module._parameters and isinstance(getattr(module, name, None), Tensor):
            log.warning(
                "'%s' is computed anew at each use (a parametrization, weight or spectral norm, pruning); it is left "
                "dense and not counted.",
                f"{path}.{name}".lstrip("."),
            )


def _is_turned_linear(module: nn.Module) -> bool:
    """Whether this is the `Conv1D` of GPT-2 in transformers: a linear layer with a weight of [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels


def _refuse_unusual(weight: Weight) -> None:
    """Masks are written into the memory of a weight, which must therefore be one of ordinary numbers."""
    parameter = weight.parameter
    advice = "Train sparse in ordinary tensors of float32, float16, bfloat16 or float64; quantise what is trained."
    if parameter.is_meta:
        what = "has no memory yet (its device is 'meta')"
        advice = (
            "Give the model memory and weights before making the Sparsifier: model.to_empty(device=...), then load."
        )
    elif not issubclass(type(parameter), nn.Parameter):  # isinstance holds for any tensor that once was wrapped in one
        what = f"is a {type(parameter).__name__}, not an ordinary tensor"
    elif parameter.dtype not in DTYPES:
        what = f"consists of {str(parameter.dtype).removeprefix('torch.')}"
    elif parameter.layout != torch.strided:
        what = f"has the memory layout {str(parameter.layout).removeprefix('torch.')}"
    elif parameter.ndim < 2:
        what = f"has the shape {weight.shape}, which is not that of a layer: something has flattened or partitioned it"
        advice = "Train with DistributedDataParallel, which keeps the whole network on each process."
    else:
        return
    raise ModelError(f"'{weight.name}' {what}.", where="model", advice=advice)


def _refuse_shared_memory(weights: dict[str, Weight]) -> None:
    """Several weights may lie in one buffer, as those of recurrent layers on GPUs do, but not over each other."""
    spans = []
    for name, weight in weights.items():
        parameter, start = weight.parameter, weight.parameter.data_ptr()
        places = sum((size - 1) * stride for size, stride in zip(weight.shape, parameter.stride(), strict=True)) + 1
        spans.append((start, start + places * parameter.element_size(), name))
    for (_, end, owner), (start, _, name) in pairwise(sorted(spans)):
        if start < end:
            raise ModelError(
                f"'{owner}' and '{name}' are different parameters in the same memory.",
                where="model",
                advice="Share the Parameter object itself: module_b.weight = module_a.weight.",
            )
