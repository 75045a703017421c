"""Batches: order by seed and epoch alone, shares of processes, preprocessing, samples that load on demand."""

from __future__ import annotations

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sparsepipe.data import ArraySplit, prepare  # noqa: E402
from sparsepipe.data.split import IntArray, Raw  # noqa: E402
from sparsepipe.errors import DataError  # noqa: E402
from sparsepipe.spec import Preprocessing  # noqa: E402
from sparsepipe.training.augment import Augmentation  # noqa: E402
from sparsepipe.training.batches import (  # noqa: E402
    EvaluationBatches,
    InMemory,
    Normalise,
    OnDemand,
    TrainingBatches,
    source,
)

CPU = torch.device("cpu")
IDENTITY = Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,))


class LazySplit:
    """A split that is not in memory; it remembers which thread loaded it, and can hold a broken sample."""

    def __init__(self, split: ArraySplit, broken: int | None = None) -> None:
        self._split = split
        self._broken = broken
        self.labels = split.labels
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return len(self._split)

    def load(self, indices: IntArray) -> Raw:
        self.threads.add(threading.current_thread().name)
        if self._broken in indices:
            raise DataError("The image cannot be decoded.", where="7.png")
        return self._split.load(indices)

    def subset(self, indices: IntArray) -> LazySplit:
        raise NotImplementedError


def numbered(count: int) -> ArraySplit:
    """Images of 2x2 pixels; image i is filled with i and has the label i."""
    inputs = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 1)).copy()
    return ArraySplit(inputs, np.arange(count, dtype=np.int64))


def training(count: int = 50, **settings: int) -> TrainingBatches:
    options = {"batch_size": 8, "seed": 1, **settings}
    return TrainingBatches(source(numbered(count), CPU), Normalise(IDENTITY, CPU), Augmentation(), **options)


def labels(batches: TrainingBatches, epoch: int, first: int = 0) -> list[list[int]]:
    return [batch.tolist() for _, batch in batches.epoch(epoch, first)]


def test_an_epoch_is_a_permutation_without_the_part_batch() -> None:
    batches = training(50)
    seen = labels(batches, 0)
    assert batches.steps == 6
    assert [len(batch) for batch in seen] == [8] * 6
    flat = [label for batch in seen for label in batch]
    assert len(set(flat)) == 48
    assert flat != sorted(flat)


def test_inputs_and_labels_stay_together() -> None:
    for inputs, wanted in training().epoch(0):
        assert inputs.shape == (8, 1, 2, 2)
        assert torch.equal(inputs, wanted.float()[:, None, None, None].expand(8, 1, 2, 2))


def test_order_depends_on_seed_and_epoch_only() -> None:
    batches = training()
    first = labels(batches, 3)
    labels(batches, 0)
    assert labels(batches, 3) == first == labels(training(), 3)
    assert labels(batches, 4) != first
    assert labels(training(seed=2), 3) != first


def test_an_epoch_can_be_entered_anywhere() -> None:
    assert labels(training(), 2, first=4) == labels(training(), 2)[4:]


def test_augmentation_is_the_same_wherever_the_epoch_is_entered() -> None:
    def epoch(first: int) -> list[torch.Tensor]:
        batches = TrainingBatches(
            source(numbered(40), CPU), Normalise(IDENTITY, CPU), Augmentation(crop=1), batch_size=8, seed=0
        )
        return [inputs for inputs, _ in batches.epoch(1, first)]

    whole = epoch(0)
    assert all(torch.equal(late, early) for late, early in zip(epoch(3), whole[3:], strict=True))
    assert not torch.equal(whole[0] > 0, whole[1] > 0)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one_large_process(world: int) -> None:
    def epoch(size: int, rank: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = TrainingBatches(
            source(numbered(50), CPU),
            Normalise(IDENTITY, CPU),
            Augmentation(crop=1, flip=True),
            batch_size=size,
            seed=3,
            rank=rank,
            world=world,
        )
        return list(batches.epoch(0))

    one = epoch(4 * world, 0, 1)
    ranks = [epoch(4, rank, world) for rank in range(world)]
    for step, (inputs, wanted) in enumerate(one):
        for rank in range(world):
            assert torch.equal(ranks[rank][step][1], wanted[rank::world])
            assert torch.equal(ranks[rank][step][0], inputs[rank::world])


def test_a_batch_larger_than_the_split_is_the_split() -> None:
    batches = training(5, batch_size=64)
    assert batches.steps == 1
    assert sorted(labels(batches, 0)[0]) == list(range(5))


def test_evaluation_sees_every_sample_once_in_order() -> None:
    batches = EvaluationBatches(source(numbered(21), CPU), Normalise(IDENTITY, CPU), batch_size=8)
    for _ in range(2):
        assert torch.cat([wanted for _, wanted in batches]).tolist() == list(range(21))
    shares = [
        EvaluationBatches(source(numbered(21), CPU), Normalise(IDENTITY, CPU), batch_size=8, rank=rank, world=2)
        for rank in range(2)
    ]
    seen = sorted(label for share in shares for _, wanted in share for label in wanted.tolist())
    assert seen == list(range(21))


@pytest.mark.parametrize(
    ("raw", "preprocessing"),
    [
        (
            np.random.default_rng(0).integers(0, 256, (5, 4, 3, 2), dtype=np.uint8),
            Preprocessing(scale=1 / 255, mean=(0.3, 0.6), std=(0.2, 0.25)),
        ),
        (
            np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32),
            Preprocessing(scale=1.0, mean=(0.5, -1.0, 2.0), std=(0.1, 3.0, 7.0)),
        ),
    ],
)
def test_normalisation_equals_that_of_the_data_room_bit_for_bit(raw: Raw, preprocessing: Preprocessing) -> None:
    kept = raw.copy()
    prepared = Normalise(preprocessing, CPU)(torch.from_numpy(raw))
    assert np.array_equal(prepared.numpy(), prepare(raw, preprocessing))
    assert np.array_equal(raw, kept)


def test_images_come_with_channels_last_in_memory() -> None:
    raw = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    prepared = Normalise(Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3), CPU)(raw)
    assert prepared.is_contiguous(memory_format=torch.channels_last)


def test_samples_in_memory_are_kept_there_and_others_are_loaded_by_a_thread() -> None:
    lazy = LazySplit(numbered(50))
    assert isinstance(source(numbered(50), CPU), InMemory)
    on_demand = source(lazy, CPU)
    assert isinstance(on_demand, OnDemand)
    batches = TrainingBatches(on_demand, Normalise(IDENTITY, CPU), Augmentation(), batch_size=8, seed=1)
    assert labels(batches, 2) == labels(training(), 2)
    assert lazy.threads == {"sparsepipe-batches_0"}


def test_an_error_in_the_loading_thread_reaches_the_loop() -> None:
    on_demand = OnDemand(LazySplit(numbered(20), broken=13), CPU)
    batches = EvaluationBatches(on_demand, Normalise(IDENTITY, CPU), batch_size=4)
    with pytest.raises(DataError, match=r"7\.png"):
        list(batches)


def test_leaving_an_epoch_early_ends_the_loading_thread() -> None:
    batches = TrainingBatches(
        OnDemand(LazySplit(numbered(80)), CPU), Normalise(IDENTITY, CPU), Augmentation(), batch_size=4, seed=0
    )
    epoch = batches.epoch(0)
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sparsepipe-batches")]
