"""The machines under a training: which device, which precision, how many threads and processes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from torch import distributed

from sparsepipe import launch
from sparsepipe.environment import usable_cores
from sparsepipe.errors import RecipeError, SparsepipeError, first_line

log = logging.getLogger("sparsepipe")

_LOST = re.compile("gloo|nccl|Connection (closed|reset)", re.IGNORECASE)
"""What the messages of the backends hold when a peer is gone; most come as plain RuntimeError."""


@contextmanager
def connected(device: str, precision: str) -> Iterator[Fabric]:
    """`fabric`, connected to the processes that `torchrun` started, while the block runs.

    Raises:
        RecipeError: as `fabric`.
        ConnectionLostError: another process ended before this one was done.
    """
    try:
        yield fabric(device, precision)
    except RuntimeError as error:
        if launch.world_size() > 1 and (isinstance(error, distributed.DistError) or _LOST.search(str(error))):
            raise ConnectionLostError(
                f"The connection to another process was lost ({first_line(error)}).",
                where=f"process {launch.rank()}",
                advice="See why the other process ended; `--resume` goes on from the last checkpoint.",
            ) from error
        raise
    if launch.world_size() > 1:
        distributed.destroy_process_group()


def fabric(device: str, precision: str) -> Fabric:
    """Fabric for this process on one device; with others that `torchrun` started, connected to them.

    Args:
        device: auto (CUDA where there is one), cpu or cuda.
        precision: of the passes through the network: fp32, bf16, or fp16 with a scaled loss. Weights and optimizer stay
            in fp32.

    Raises:
        RecipeError: CUDA is asked for, and there is none; there are more processes on this host than CUDA devices.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise RecipeError(
            "There is no CUDA device here, or this PyTorch was built without CUDA.",
            where="train.device",
            advice="Use device = 'auto' or 'cpu'.",
        )
    accelerator = "cuda" if cuda and device != "cpu" else "cpu"
    processes = launch.local_world_size()
    if accelerator == "cuda" and processes > torch.cuda.device_count():
        raise RecipeError(
            f"There are {processes} processes on this host, but {torch.cuda.device_count()} CUDA devices.",
            where="train.device",
            advice="Start one process for each device (torchrun --nproc-per-node), or use device = 'cpu'.",
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # each process would name itself
    found = Fabric(
        accelerator=accelerator,
        devices=processes,
        num_nodes=launch.world_size() // processes,
        strategy="ddp" if launch.world_size() > 1 else "auto",
        plugins=[_precision(precision, accelerator)],
    )
    found.launch()
    return found


def _precision(name: str, device: str) -> Precision:
    if name in ("fp32", "int8-qat"):  # the passes of int8-qat are in fp32, with rounded values
        return Precision()
    if name == "bf16":
        return MixedPrecision("bf16-mixed", device)
    # Given the name alone, Fabric takes bf16 instead on a CPU.
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))


class ConnectionLostError(SparsepipeError):
    """Another process of a distributed training ended early."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads, or this process's share of the usable cores if it is 0, in the block.

    More than the share are not used: threads that take turns on a core wait for each other and get nothing done.
    """
    share = max(usable_cores() // launch.local_world_size(), 1)
    if count > share:
        log.warning(
            "train.threads = %d is more than the %d cores that this process may use; it uses %d.", count, share, share
        )
    before = torch.get_num_threads()
    torch.set_num_threads(min(count or share, share))
    try:
        yield
    finally:
        torch.set_num_threads(before)
