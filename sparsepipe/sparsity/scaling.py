"""What happened to gradients between `Sparsifier.prepare_gradients` and the optimizer step."""

from __future__ import annotations

import logging
import math

from torch import Tensor

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.network import Network

log = logging.getLogger("sparsepipe")

HARD_CLIPPING = 2.0**13
"""Clipping hardly divides gradients by as much; a `GradScaler` starts at 2^16."""


def refuse_scaled(network: Network, scale: Tensor | None) -> None:
    """Refuse dense gradients that were taken before a `GradScaler` unscaled them: their scores are far too large.

    A scaler divides all gradients by one power of two, after `prepare_gradients` if `unscale_` was not called before
    it: in place on its way to the step, or inside a fused optimizer, which is told the scale. Clipping divides by a
    number that is none, but for a chance of about one in 2^23; where both happen, only the size of the number is
    suspicious, and a warning is all that can be given.

    Args:
        network: with the dense gradients that `prepare_gradients` took, if the method needs those of this step.
        scale: what a fused optimizer divides the gradients by.

    Raises:
        ModelError: they were scaled.
    """
    divisors = (_divisor(network, name, scale) for name in network.gradients)
    divisor = next((found for found in divisors if found is not None), 1.0)
    if divisor > 1 and math.frexp(divisor)[0] == 0.5:
        raise ModelError(
            f"The gradients were divided by {divisor:g} after prepare_gradients() had taken them.",
            where="sparsifier",
            advice="With a GradScaler, call scaler.unscale_(optimizer) first, then prepare_gradients(), then clip. "
            "Divide accumulated gradients before it, too.",
        )
    if divisor >= HARD_CLIPPING:
        log.warning(
            "The gradients were divided by %g after prepare_gradients() had taken them. Clipping is seldom that hard: "
            "with a GradScaler, call scaler.unscale_(optimizer) before prepare_gradients().",
            divisor,
        )


def _divisor(network: Network, name: str, scale: Tensor | None) -> float | None:
    """What the gradients of active weights were divided by; 1 if not by one number, None if that cannot be told."""
    if scale is not None:
        return float(scale)
    gradient, mask = network.weights[name].parameter.grad, network.masks[name]
    if gradient is None:
        return None
    before, after = network.gradients[name][mask].double(), gradient[mask].double()
    ratios = (before / after)[(after != 0) & after.isfinite() & before.isfinite()]
    if ratios.numel() < 2:
        return None
    lowest, highest = float(ratios.min()), float(ratios.max())
    if lowest == highest or (lowest >= HARD_CLIPPING and highest < 1.001 * lowest):  # clipping rounds
        return lowest
    return 1.0
