"""Scores of single weights, higher is better; all in float32 at least, so that half precision makes no extra ties."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return wide(weight).abs()


def gradient(dense_gradient: Tensor) -> Tensor:
    """|dL/dw|, RigL's growth score (arXiv 1911.11134)."""
    return wide(dense_gradient).abs()


def acquisition(
    dense_gradient: Tensor, counters: Tensor, step: int, c: float, eps: float, *, signed: bool = False
) -> Tensor:
    """|dL/dw| + c ln(t) / (N + eps), DST-EE's growth score (arXiv 2211.16667).

    Args:
        dense_gradient: of the same mini-batch for all weights, inactive ones too.
        counters: N, in how many rounds each weight was active.
        step: t, the global optimizer step; the bonus is 0 below t = 2.
        c: the weight of exploration. With 0 the score equals `gradient` bit for bit.
        eps: positive remainder that keeps the bonus of a never-active weight finite.
        signed: |dL/dw + c ln(t) / (N + eps)| instead, as in the code of the paper's first author: for a negative
            gradient the bonus then lowers the score, as long as it is the smaller of the two.
    """
    exploitation = wide(dense_gradient) if signed else gradient(dense_gradient)
    scale = c * math.log(step) if step >= 2 else 0.0
    bonus = counters.to(exploitation.dtype).add_(eps)
    score = torch.div(torch.as_tensor(scale, dtype=bonus.dtype), bonus, out=bonus).add_(exploitation)
    return score.abs_() if signed else score


def random(like: Tensor, seed: int, name: str, step: int) -> Tensor:
    """Uniform scores in [0, 1) that depend on nothing but the seed, the layer's name and the step.

    They are drawn on the CPU, so that every rank and every device sees the same.
    """
    key = hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.device)


def wide(tensor: Tensor) -> Tensor:
    """The values in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
