"""Randomness that depends on where one is in the training, and not on how one got there."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator of its own for one purpose at one position, such as (epoch, step).

    The same arguments give the same stream, on every device and in every process.
    """
    key = hashlib.sha256(repr((seed, purpose, *position)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
