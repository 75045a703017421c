"""MaskSet: bits, digests, counters, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepipe.errors import ArtefactError
from sparsepipe.sparsity.masks import COUNTER_LIMIT, MaskSet, unpack_mask

SHAPES = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


@given(SHAPES, st.integers(0, 2**32 - 1))
def test_masks_are_packed_as_numpy_packs_little_endian_bits_and_come_back(shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    masks = MaskSet({"layer.weight": mask})
    packed = masks.pack()
    assert packed["layer.weight"].numpy().tobytes() == np.packbits(mask.numpy().ravel(), bitorder="little").tobytes()
    assert torch.equal(unpack_mask("layer.weight", packed["layer.weight"], shape), mask)


def test_bits_follow_the_logical_order_whatever_the_memory_layout() -> None:
    mask = torch.rand(4, 3, 5, 5) < 0.5
    strided = mask.to(memory_format=torch.channels_last)
    assert torch.equal(MaskSet({"w": strided}).pack()["w"], MaskSet({"w": mask}).pack()["w"])
    assert MaskSet({"w": strided}).digest() == MaskSet({"w": mask}).digest()


def test_the_digest_depends_on_bits_names_and_shapes_and_not_on_order() -> None:
    a, b = torch.eye(4, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    digest = MaskSet({"a": a, "b": b}).digest()
    assert digest == MaskSet({"b": b.clone(), "a": a.clone()}).digest()
    flipped = a.clone()
    flipped[3, 0] = True
    others = [{"a": flipped, "b": b}, {"a": a, "c": b}, {"a": a, "b": b.reshape(4, 4)}, {"a": a}]
    assert len({digest, *(MaskSet(other).digest() for other in others)}) == 5


@pytest.mark.parametrize(
    ("bits", "message"), [(torch.zeros(2, dtype=torch.uint8), "needs 4 bytes"), (torch.zeros(4), "float32")]
)
def test_damaged_masks_are_refused_by_name(bits: torch.Tensor, message: str) -> None:
    with pytest.raises(ArtefactError, match=rf"w: .*{message}"):
        unpack_mask("w", bits, (3, 3, 3))


def test_statistics_count_dense_layers_too() -> None:
    weights = {"sparse": torch.zeros(10, 10), "dense": torch.zeros(5, 20)}
    masks = MaskSet.dense(weights)
    first = torch.zeros(10, 10, dtype=torch.bool)
    first[0] = True
    masks.start(weights, {"sparse": first})
    assert (masks.nnz, masks.size, masks.sparsity) == (110, 200, 0.45)
    assert masks.densities() == {"sparse": 0.1, "dense": 1.0}
    assert masks.exploration_rate() == 0.55
    masks.change(weights["sparse"], "sparse", first.roll(1, 0))
    masks.count()
    assert masks.exploration_rate() == 0.60
    assert masks.nnz == 110


def test_a_weight_that_was_dense_until_now_was_active_everywhere() -> None:
    weights = {"w": torch.zeros(4, 4)}
    masks = MaskSet.dense(weights)
    masks.change(weights["w"], "w", torch.eye(4, dtype=torch.bool))
    masks.count()
    assert masks.exploration_rate() == 1.0
    assert masks.counters["w"].tolist() == (torch.eye(4) + 1).tolist()


def test_counters_stop_at_the_limit_of_int16_instead_of_wrapping() -> None:
    weights = {"w": torch.zeros(2, 2)}
    masks = MaskSet.dense(weights)
    masks.start(weights, {"w": torch.eye(2, dtype=torch.bool)})
    masks.counters["w"].fill_(COUNTER_LIMIT - 1)
    for _ in range(3):
        masks.count()
    assert masks.counters["w"].tolist() == [[32767, 32766], [32766, 32767]]
