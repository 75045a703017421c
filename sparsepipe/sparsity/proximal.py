"""Proximal operators of l1 penalties: they move values towards zero, and make small ones exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(values: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(v) max(|v| - t, 0), elementwise; t a number or of the shape of v."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def group_soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """v_g max(0, 1 - t sqrt(|g|) / ||v_g||), g the rows v[i] of [R, ...]: a row stays whole or becomes zero."""
    rows = values.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    smallest = torch.finfo(norms.dtype).tiny
    scale: Tensor = (1 - threshold * rows.shape[1] ** 0.5 / norms.clamp(min=smallest)).clamp(min=0)
    shrunk: Tensor = rows * scale
    return shrunk.reshape(values.shape)
