"""The processes of a data-parallel training: all hold the same network, and must hold the same masks."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.nn.parameter import is_lazy

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.masks import pack_mask
from sparsepipe.sparsity.network import Network


class Replicas:
    """All processes of `group`, or of the default group of `torch.distributed`; a single one where there is none.

    Masks are never sent around. Each process computes them from what all share: the weights and the seed, which come
    from the first process at the start, and the gradients, which are averaged over the processes before the optimizer
    step. That this holds is checked by comparing digests.
    """

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self._group = group
        running = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size(group) if running else 1
        """Number of processes; -1 in a process that is outside the group."""

    def share(self, model: nn.Module, seed: int) -> int:
        """Give every process the model of the first, as DDP does when it wraps a model, and return its seed.

        Also what is never masked: methods may keep the first state of the whole model, and go back to it.
        """
        if self.count <= 1:
            return seed
        first = 0 if self._group is None else distributed.get_global_rank(self._group, 0)
        seeds = [seed]
        distributed.broadcast_object_list(seeds, src=first, group=self._group)
        for tensor in (*model.parameters(), *model.buffers()):
            if is_lazy(tensor) or not tensor.is_floating_point():
                continue
            # A copy, because the backends take dense memory in C order only.
            values = tensor.detach().contiguous()
            distributed.broadcast(values, src=first, group=self._group)
            tensor.detach().copy_(values)
        return seeds[0]

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.count > 1:
            for tensor in tensors:
                values = tensor.contiguous()
                distributed.all_reduce(values, group=self._group)
                tensor.copy_(values / self.count)

    def compare(self, network: Network, step: int) -> None:
        """Compare masks and counters; every process has to call this after the same optimizer step.

        Raises:
            ModelError: they differ; the message names the first layer and the processes.
        """
        if self.count <= 1:
            return
        ours = {name: _digest(network, name) for name in network.weights}
        found: list[dict[str, int]] = [{}] * self.count
        distributed.all_gather_object(found, ours, group=self._group)
        for name in dict.fromkeys(name for digests in found for name in digests):
            others = [rank for rank in range(1, self.count) if found[rank].get(name) != found[0].get(name)]
            if others:
                raise ModelError(
                    f"The masks of '{name}' are not the same on all processes after step {step}: "
                    f"{'process' if len(others) == 1 else 'processes'} {', '.join(map(str, others))} "
                    f"differ{'s' if len(others) == 1 else ''} from process 0.",
                    where="sparsifier",
                    advice="Let DistributedDataParallel or Fabric average the gradients before each step of the "
                    "optimizer, and make the Sparsifier with the same method on every process.",
                )


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over processes: top-k needs whole layers.

    Raises:
        ModelError: a parameter is a DTensor (FSDP2, tensor parallelism) or part of a flat parameter (FSDP1).
    """
    # A model can hold DTensors only where this module is loaded; importing it takes seconds.
    tensors = sys.modules.get("torch.distributed.tensor")
    for name, parameter in model.named_parameters():
        distributed_tensor = tensors is not None and isinstance(parameter, tensors.DTensor)
        if distributed_tensor or getattr(parameter, "_fsdp_flattened", False):
            raise ModelError(
                f"'{name.replace('_fsdp_wrapped_module.', '')}' is sharded over processes (FSDP or tensor "
                "parallelism), which is not supported: to choose the weights that stay, each process needs the whole "
                "layer.",
                where="model",
                advice="Train with DistributedDataParallel, which keeps the whole network on each process.",
            )


def _digest(network: Network, name: str) -> int:
    """CRC-32 of one mask's bits and counters: it needs no secrecy, and is many times faster than a hash that has it."""
    total = zlib.crc32(pack_mask(network.masks[name]).data)
    counter = network.masks.counters.get(name)
    return total if counter is None else zlib.crc32(counter.detach().cpu().reshape(-1).numpy().data, total)
