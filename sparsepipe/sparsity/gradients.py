"""Gradients that a method brings to a step: the chain rule through transformed weights, and an extra loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.network import Network


def complete(method: Method, network: Network, transformed: Collection[str], step: int, scale: Tensor | None) -> None:
    """Bring `.grad` of weights and variables, which backward left, to what they are for the method.

    Args:
        method: whose `transform_weight` and `extra_loss` are asked.
        network: its weights have the gradients with respect to the transformed weights.
        transformed: names of the weights that forward passes transform.
        step: the step to come.
        scale: what the gradients are multiplied with, if anything.
    """
    variables = list(network.variables.values())
    for variable in variables:
        variable.grad = None
    for name in transformed:
        parameter = network.weights[name].parameter
        if parameter.grad is not None:
            with torch.enable_grad():
                weight = parameter.detach().requires_grad_()
                value = method.transform_weight(network, name, weight, step, True)
                own, *others = _gradients(value, [weight, *variables], parameter.grad)
            parameter.grad.zero_() if own is None else parameter.grad.copy_(own)
            _add(variables, others, None if scale is None else 1 / scale)
    with torch.enable_grad():
        loss = method.extra_loss(network, step)
        if loss is None or not loss.requires_grad:
            return
        weights: list[Tensor] = list(network.tensors.values())
        found = _gradients(loss, [*weights, *variables], None)
    _add(weights, found[: len(weights)], scale)
    _add(variables, found[len(weights) :], None)


def _gradients(value: Tensor, inputs: Sequence[Tensor], outer: Tensor | None) -> tuple[Tensor | None, ...]:
    if not value.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(value, inputs, outer, allow_unused=True)


def _add(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: Tensor | None) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            gradient = gradient if factor is None else gradient * factor
            tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad.add_(gradient)
