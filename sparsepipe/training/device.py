"""The machine under a training: which device, which precision, how many threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric

from sparsepipe.errors import RecipeError

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def fabric(device: str, precision: str) -> Fabric:
    """Fabric for one process on one device.

    Args:
        device: auto (CUDA where there is one), cpu or cuda.
        precision: fp32, or bf16 (weights and optimizer stay in fp32).

    Raises:
        RecipeError: CUDA is asked for, and there is none.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise RecipeError(
            "There is no CUDA device here, or this PyTorch was built without CUDA.",
            where="train.device",
            advice="Use device = 'auto' or 'cpu'.",
        )
    accelerator = "cuda" if found and device != "cpu" else "cpu"
    return Fabric(accelerator=accelerator, devices=1, precision=PRECISIONS[precision])  # type: ignore[arg-type]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads, or all usable cores if it is 0, while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
