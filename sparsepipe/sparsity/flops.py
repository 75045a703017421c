"""Multiply-accumulates of a network, and what sparsity makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparsepipe.errors import ModelError


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates of one sample for each weight that convolutions and matrix products read.

    The model runs once, in evaluation mode, on one sample of zeros. Biases, normalisation, activations and products
    of two activations (attention) are not counted.

    Args:
        model: takes one tensor [1, *input_shape].
        input_shape: of one sample, without the batch dimension.

    Returns:
        parameter name -> MACs; a weight used twice counts twice.

    Raises:
        ModelError: no parameter has two or more dimensions.
    """
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    if not weights:
        raise ModelError("The network has no weight of two or more dimensions, so there is nothing to make sparse.")
    device = next(iter(weights.values())).device
    counter = _MacCounter(weights)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # With gradients enabled, attention and transformer layers do not hide their products in fused kernels.
        with torch.enable_grad(), counter:
            model(torch.zeros(1, *input_shape, device=device))
    finally:
        for module, mode in training.items():
            module.training = mode
    return {name: macs for name, macs in counter.macs.items() if macs}


def inference_multiple(macs: Mapping[str, int], densities: Mapping[str, float]) -> float:
    """FLOPs of one sparse forward pass, relative to the dense one.

    Args:
        macs: from `count_macs`.
        densities: fraction of active weights; layers that are not named count as dense.
    """
    return sum(count * densities.get(name, 1.0) for name, count in macs.items()) / sum(macs.values())


def training_multiple(inference: float | Sequence[float], dense_gradient_every: int | None = None) -> float:
    """FLOPs of training relative to dense training, a backward pass being two forward passes.

    With f the multiple of the forward pass, averaged over the training: f for methods that only compute sparse
    gradients (static, SET, pruning: 3 f_S / 3 f_D) and (3 f dT + 2 f + 1) / (3 (dT + 1)) for methods that need the
    dense gradient after every dT steps (RigL, arXiv 1911.11134, appendix; DST-EE has the same needs), which for those
    that need it at every step, dT = 0, is (2 f + 1) / 3 (SNFS). It is what hardware that skips zeros would spend: masks
    on dense tensors spend all of it.

    Args:
        inference: `inference_multiple`, or one for each epoch so far, in the mean over its steps.
        dense_gradient_every: dT in steps, `method.dense_gradient_every`.
    """
    forward = inference if isinstance(inference, int | float) else fmean(inference)
    if dense_gradient_every is None:
        return forward
    return (3 * forward * dense_gradient_every + 2 * forward + 1) / (3 * (dense_gradient_every + 1))


def inference_flops(macs: Mapping[str, int], multiple: float) -> float:
    """FLOPs of the forward pass of one sample, a multiply-accumulate being two (the count of arXiv 1911.11134).

    Args:
        macs: from `count_macs`.
        multiple: `inference_multiple`; 1 for the dense network.
    """
    return 2 * sum(macs.values()) * multiple


def training_flops(macs: Mapping[str, int], multiple: float, samples: int) -> float:
    """FLOPs of training on `samples` samples, each epoch's counted: three forward passes of the dense network for
    each, times `training_multiple`.
    """
    return 3 * inference_flops(macs, 1.0) * samples * multiple


class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs that torch states for each operation, by the weight that the operation reads."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = dict.fromkeys(weights, 0)
        self._names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            for tensor in args:
                name = self._names.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
                if name is not None:
                    self.macs[name] += formula(*args, **kwargs, out_val=result) // 2
        return result
