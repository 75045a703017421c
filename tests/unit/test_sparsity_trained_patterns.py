"""Patterns after training: kept exactly by every drop-and-grow method, and laid out as the kernels store them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sparse_bench import randn
from torch import nn
from torch.nn.functional import cross_entropy

from sparsepipe.native.operators import encode
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.methods.dsr import DSR
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.methods.snfs import SNFS
from sparsepipe.sparsity.sparsifier import Sparsifier

EVERY_METHOD: list[Callable[..., DropGrow]] = [DSTEE, RigL, SET, SNFS, DSR]


class ConvNet(nn.Sequential):
    """Channel counts are multiples of 4, but for the input's; no unit ever dies, so every trained weight moves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Conv2d(8, 12, 3, bias=False),
            nn.BatchNorm2d(12),
            nn.Tanh(),
            nn.Conv2d(12, 8, 1),
            nn.Flatten(),
            nn.Linear(8 * 16, 20),
            nn.Tanh(),
            nn.Linear(20, 4),
        )


def trained(method: DropGrow, steps: int = 20) -> tuple[ConvNet, Sparsifier]:
    model = ConvNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        labels = torch.randint(0, 4, (8,), generator=torch.Generator().manual_seed(step))
        cross_entropy(model(randn(8, 3, 8, 8, seed=step)), labels).backward()
        optimizer.step()
    return model, sparsifier


@pytest.mark.parametrize("make", EVERY_METHOD)
@pytest.mark.parametrize(
    "pattern", ["2x1", "4x1", "1x4", "2x2", "2x4", "4x4", "1:4", "2:4", "channel", "constant-fan-in"]
)
def test_every_method_keeps_every_pattern_exactly_through_training(make: Callable[..., DropGrow], pattern: str) -> None:
    """Read off the masks with numpy alone, as someone would who only has the weights."""
    sparsity = {"1:4": 0.75, "2:4": 0.5}.get(pattern, 0.7)
    _, sparsifier = trained(make(sparsity=sparsity, pattern=pattern, update_every=2, drop_fraction=0.5))
    sparse = [name for name, mask in sparsifier.masks.items() if not mask.all()]
    assert sparse
    for name in sparse:
        mask = sparsifier.masks[name].numpy()
        mask = mask.reshape(mask.shape[0], mask.shape[1], -1)
        if "x" in pattern:
            r, c = map(int, pattern.split("x"))
            for row in range(0, mask.shape[0], r):
                for column in range(0, mask.shape[1], c):
                    block = mask[row : row + r, column : column + c]
                    assert (block == block[:1, :1]).all()  # one value in each kernel tap
        elif ":" in pattern:
            n, m = map(int, pattern.split(":"))
            for column in range(0, mask.shape[1], m):
                assert (mask[:, column : column + m].sum(1) == n).all()
        elif pattern == "channel":
            assert (mask == mask[:, :1, :1]).all()
        else:
            assert len(set(mask.sum((1, 2)).tolist())) == 1
    explored = [int((sparsifier.mask_set.counters[name] == 0).sum()) for name in sparse]
    before = [sparsifier.masks[name].numel() - sparsifier.mask_set.nnz_of(name) for name in sparse]
    assert sum(explored) < sum(before)  # the masks did move


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("make", [DSTEE, SNFS])
def test_trained_blocks_are_those_of_the_kernels(make: Callable[..., DropGrow], block: int) -> None:
    """A block holds n consecutive outputs in one column of [O, I * kernel]: what is stored is what was trained."""
    model, sparsifier = trained(make(sparsity=0.7, pattern=f"{block}x1", update_every=3, first_conv="dense"), steps=25)
    for name in ("3.weight", "6.weight", "8.weight", "10.weight"):
        weight, mask = model.get_parameter(name).detach().numpy(), sparsifier.masks[name].numpy()
        if mask.all():
            continue
        values, deltas = encode(weight, block)
        stored = values.any(axis=1)
        fillers = int((~stored).sum())
        assert stored.sum() * block == mask.sum() == np.count_nonzero(weight)
        assert (values[stored] != 0).all()  # no zero inside a block
        assert len(values) == len(deltas) == mask.sum() // block + fillers
        # The kernels' order: blocks of outputs, then columns.
        columns = weight.reshape(weight.shape[0] // block, block, -1).transpose(0, 2, 1).reshape(-1, block)
        assert np.array_equal(np.cumsum(deltas)[stored], np.flatnonzero(columns.any(axis=1)))


def test_sums_of_scores_choose_blocks() -> None:
    """One large gradient loses against two that are together larger; the bonus of DST-EE counts for each element."""
    model = nn.Linear(2, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = RigL(sparsity=0.75, pattern="2x1", update_every=1, drop_fraction=1.0, drop_schedule="constant")
    sparsifier = Sparsifier(model, optimizer, method, total_steps=10)
    model.weight.grad = torch.tensor([[5.0, 3.0], [0.0, -3.0], [1.0, 1.0], [1.0, 1.0]])
    optimizer.step()
    assert sparsifier.masks["weight"].tolist() == [[False, True], [False, True], [False, False], [False, False]]
