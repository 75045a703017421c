"""Batches for training and evaluation: samples on the device, in an order that only seed and epoch decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsepipe.data import ArraySplit, Split
from sparsepipe.spec import Preprocessing
from sparsepipe.training.augment import Augmentation
from sparsepipe.training.seeds import generator

AHEAD = 3
"""Batches that are loaded before they are needed, where samples do not lie in memory."""

Batch = tuple[Tensor, Tensor]


class Source(Protocol):
    """Samples of one split."""

    def __len__(self) -> int: ...

    def batches(self, order: Sequence[Tensor]) -> Iterator[Batch]:
        """Raw samples and labels on the device, one batch for each int64 tensor of indices in `order`."""
        ...


class InMemory:
    """A split whose samples all lie on the device, as they are stored: one byte a pixel."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self._raw = torch.from_numpy(split.load(np.arange(len(split)))).to(device)
        self._labels = torch.from_numpy(np.array(split.labels, np.int64)).to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, order: Sequence[Tensor]) -> Iterator[Batch]:
        for indices in order:
            chosen = indices.to(self._raw.device)
            yield self._raw.index_select(0, chosen), self._labels.index_select(0, chosen)


class OnDemand:
    """A split whose samples are loaded when they are needed, by a thread that runs a few batches ahead."""

    def __init__(self, split: Split, device: torch.device) -> None:
        self._split = split
        self._device = device

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, order: Sequence[Tensor]) -> Iterator[Batch]:
        executor = ThreadPoolExecutor(1, thread_name_prefix="sparsepipe-batches")
        pending: deque[Future[Batch]] = deque()
        try:
            for indices in order:
                pending.append(executor.submit(self._load, indices.numpy()))
                if len(pending) > AHEAD:
                    yield self._move(pending.popleft())
            while pending:
                yield self._move(pending.popleft())
        finally:
            executor.shutdown(cancel_futures=True)

    def _load(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Batch:
        raw = torch.from_numpy(self._split.load(indices))
        labels = torch.from_numpy(np.asarray(self._split.labels[indices], np.int64))
        return (raw.pin_memory(), labels.pin_memory()) if self._device.type == "cuda" else (raw, labels)

    def _move(self, batch: Future[Batch]) -> Batch:
        raw, labels = batch.result()
        return raw.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


def source(split: Split, device: torch.device) -> Source:
    """The samples of `split`: kept on the device if they are in memory already, else loaded batch by batch."""
    return InMemory(split, device) if isinstance(split, ArraySplit) else OnDemand(split, device)


class Normalise:
    """From raw samples to what the network takes, as `sparsepipe.data.prepare` does it, on the device."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        std = np.asarray(preprocessing.std)
        self._gain = torch.from_numpy((preprocessing.scale / std).astype(np.float32)).to(device)
        self._offset = torch.from_numpy((np.asarray(preprocessing.mean) / std).astype(np.float32)).to(device)

    def __call__(self, raw: Tensor) -> Tensor:
        """float32 [n, C, H, W], with the channels last in memory, of [n, H, W, C]; [n, F] of [n, F]."""
        # Converting first is faster than multiplying mixed types; the copy spares the caller's float samples.
        prepared = raw.to(torch.float32, copy=True).mul_(self._gain).sub_(self._offset)
        return prepared.permute(0, 3, 1, 2) if prepared.ndim == 4 else prepared


class TrainingBatches:
    """Shuffled, augmented batches. What a batch holds depends on seed, epoch and step only.

    All processes of a distributed run draw one permutation and one set of augmentations for the global batch; process
    `rank` takes every `world`-th sample of it. A last batch that is not full is left out.

    Args:
        samples: the training samples.
        normalise: from raw samples to inputs.
        augmentation: what to do to images.
        batch_size: samples of one batch of one process.
        seed: of the order and of the augmentation.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self,
        samples: Source,
        normalise: Normalise,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._samples = samples
        self._normalise = normalise
        self._augmentation = augmentation
        self._seed = seed
        self._mine = slice(rank, None, world)
        self.global_size = min(batch_size, len(samples) // world) * world
        self.steps = len(samples) // self.global_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Inputs and labels of the steps `first`, `first` + 1, ... of one epoch."""
        order = torch.randperm(len(self._samples), generator=generator(self._seed, "order", epoch))
        chosen = [part[self._mine] for part in torch.split(order, self.global_size)[first : self.steps]]
        for step, (raw, labels) in enumerate(self._samples.batches(chosen), first):
            yield self._normalise(self._augment(raw, epoch, step)), labels

    def _augment(self, raw: Tensor, epoch: int, step: int) -> Tensor:
        if not self._augmentation.active:
            return raw
        random = generator(self._seed, "augmentation", epoch, step)
        draws = self._augmentation.draw(self.global_size, raw.shape[1], raw.shape[2], random)
        return self._augmentation.apply(raw, draws.select(self._mine).to(raw.device))


class EvaluationBatches:
    """Every sample once, in order; with several processes each takes every `world`-th."""

    def __init__(
        self, samples: Source, normalise: Normalise, *, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self._samples = samples
        self._normalise = normalise
        mine = torch.arange(len(samples))[rank::world]
        self._order = torch.split(mine, batch_size) if len(mine) else ()

    def __iter__(self) -> Iterator[Batch]:
        for raw, labels in self._samples.batches(self._order):
            yield self._normalise(raw), labels
