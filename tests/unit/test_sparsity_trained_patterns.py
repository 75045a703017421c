"""Patterns after training: kept exactly by every drop-and-grow method, and laid out as the kernels store them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sparse_bench import randn
from torch import nn
from torch.nn.functional import cross_entropy

from sparsepipe.formats import registry as formats
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
    # A last step with gradients everywhere: no active weight is zero because nothing reads what it computes.
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = randn(*parameter.shape, seed=number)
    optimizer.step()
    return model, sparsifier


def holds(active: np.ndarray, pattern: str) -> bool:
    """Whether whole groups are active, by numpy alone: as someone would see it who has nothing but the weights."""
    taps = active.reshape(active.shape[0], active.shape[1], -1)
    if "x" in pattern:
        r, c = map(int, pattern.split("x"))
        blocks = [
            taps[row : row + r, column : column + c]
            for row in range(0, taps.shape[0], r)
            for column in range(0, taps.shape[1], c)
        ]
        return all((block == block[:1, :1]).all() for block in blocks)  # one value at each kernel tap
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return all((taps[:, column : column + m].sum(1) == n).all() for column in range(0, taps.shape[1], m))
    if pattern == "channel":
        return bool((taps == taps[:, :1, :1]).all())
    return pattern == "unstructured" or len(set(taps.sum((1, 2)).tolist())) == 1


PATTERNS = ["unstructured", "2x1", "4x1", "1x4", "2x2", "2x4", "4x4", "1:4", "2:4", "channel", "constant-fan-in"]


@pytest.mark.parametrize("make", EVERY_METHOD)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_method_keeps_every_pattern_exactly_through_training(make: Callable[..., DropGrow], pattern: str) -> None:
    sparsity = {"1:4": 0.75, "2:4": 0.5}.get(pattern, 0.7)
    model, sparsifier = trained(make(sparsity=sparsity, pattern=pattern, update_every=2, drop_fraction=0.5))
    sparse = [name for name, mask in sparsifier.masks.items() if not mask.all()]
    assert sparse
    for name in sparse:
        weight = model.get_parameter(name).detach().numpy()
        assert np.array_equal(weight != 0, sparsifier.masks[name].numpy())
        assert holds(weight != 0, pattern), name
    explored = [int((sparsifier.mask_set.counters[name] == 0).sum()) for name in sparse]
    before = [sparsifier.masks[name].numel() - sparsifier.mask_set.nnz_of(name) for name in sparse]
    assert sum(explored) < sum(before)  # the masks did move


SPECIAL: list[dict[str, Any]] = [
    {"exclude_just_dropped": True},
    {"redistribution": "global"},
    {"drop_scope": "global", "redistribution": "nonzeros"},
]


@pytest.mark.parametrize("options", SPECIAL, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_hold_after_each_single_update_with_any_option_rank_and_layout(
    pattern: str, options: dict[str, Any]
) -> None:
    """Also in convolutions of one and three dimensions, in channels_last memory, and where a drop takes everything."""
    torch.manual_seed(0)
    layers: dict[str, Any] = {
        "plane": nn.Conv2d(8, 12, 3, bias=False).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        "line": nn.Conv1d(8, 12, 5, bias=False),
        "space": nn.Conv3d(4, 8, 2, bias=False),
        "flat": nn.Linear(16, 8, bias=False),
    }
    model = nn.ModuleDict(layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsity = {"1:4": 0.75, "2:4": 0.5}.get(pattern, 0.8)
    method = DSTEE(
        sparsity=sparsity, pattern=pattern, c=1e-2, update_every=1, drop_fraction=lambda step: (0.3, 1.0)[step % 2],
        **options,
    )  # fmt: skip
    sparsifier = Sparsifier(model, optimizer, method, total_steps=12)
    nonzeros = sparsifier.mask_set.nnz
    each = {name: sparsifier.mask_set.nnz_of(name) for name in sparsifier.masks}
    for step in range(8):
        for number, weight in enumerate(model.parameters()):
            weight.grad = randn(*weight.shape, seed=10 * step + number)
        optimizer.step()
        assert sparsifier.mask_set.nnz == nonzeros
        for name, mask in sparsifier.masks.items():
            assert holds(mask.numpy(), pattern), name
            assert not model.get_parameter(name)[~mask].any(), name
            assert "redistribution" in options or sparsifier.mask_set.nnz_of(name) == each[name]
    assert layers["plane"].weight.is_contiguous(memory_format=torch.channels_last)


def groups_of(shape: tuple[int, ...], pattern: str) -> list[list[list[tuple[int, ...]]]]:
    """Rows of groups of indices, each row with a number of active groups of its own, by the patterns' definitions."""
    rows: dict[Any, dict[Any, list[tuple[int, ...]]]] = {}
    for index in np.ndindex(*shape):
        output, channel, tap = index[0], index[1], index[2:]
        row: Any = None
        group: Any = index
        if "x" in pattern:
            r, c = map(int, pattern.split("x"))
            group = (output // r, channel // c, tap)
        elif ":" in pattern:
            row = (output, channel // int(pattern.split(":")[1]), tap)
        elif pattern == "channel":
            group = output
        elif pattern == "constant-fan-in":
            row = output
        rows.setdefault(row, {}).setdefault(group, []).append(index)
    return [list(groups.values()) for groups in rows.values()]


@pytest.mark.parametrize("c", [0.0, 0.05])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_update_is_the_search_over_sums_of_scores_that_the_definition_says(pattern: str, c: float) -> None:
    """Drop the groups of smallest sum |w|, grow those of largest sum(|g| + c ln t / (N + eps)), all in plain loops."""
    shape, fraction, eps, lr = (16, 8, 2, 2), 0.4, 0.5, 0.1
    torch.manual_seed(0)
    model = nn.Conv2d(8, 16, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    sparsity = {"1:4": 0.75, "2:4": 0.5}.get(pattern, 0.7)
    method = DSTEE(
        sparsity=sparsity, pattern=pattern, c=c, eps=eps, update_every=2, drop_fraction=fraction,
        drop_schedule="constant", stop_at=1.0,
    )  # fmt: skip
    sparsifier = Sparsifier(model, optimizer, method, total_steps=100)
    rows = groups_of(shape, pattern)
    weight = model.weight.detach().double().numpy().copy()
    mask = sparsifier.masks["weight"].numpy().copy()
    counters = mask.astype(float)
    moved = 0
    for step in range(1, 13):
        gradient = randn(*shape, seed=step)
        model.weight.grad = gradient.clone()
        optimizer.step()
        dense = gradient.double().numpy()
        weight = (weight - lr * dense) * mask
        if step % 2 == 0:
            active = [(row, group) for row, groups in enumerate(rows) for group in groups if mask[group[0]]]
            active.sort(key=lambda entry: sum(abs(weight[index]) for index in entry[1]))
            dropped = active[: int(len(active) * fraction)]
            before = mask.copy()
            for _, group in dropped:
                for index in group:
                    mask[index] = False
            bonus = c * math.log(step) / (counters + eps)
            for row, groups in enumerate(rows):
                missing = sum(1 for of_row, _ in dropped if of_row == row)
                free = [group for group in groups if not mask[group[0]]]
                free.sort(key=lambda group: -sum(abs(dense[index]) + bonus[index] for index in group))
                for group in free[:missing]:
                    for index in group:
                        mask[index] = True
            weight[mask != before] = 0.0
            counters += mask
            moved += int((mask != before).sum())
        assert np.array_equal(sparsifier.masks["weight"].numpy(), mask), step
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, atol=1e-5)
    assert moved > 20
    assert np.array_equal(sparsifier.mask_set.counters["weight"].numpy(), counters)


@pytest.mark.parametrize("make", EVERY_METHOD)
def test_overrides_by_glob_hold_through_training(make: Callable[..., DropGrow]) -> None:
    overrides = [
        {"layers": "3", "pattern": "4x1", "sparsity": 0.5},
        {"layers": "[06]", "dense": True},
        {"layers": "1*", "pattern": "2:4"},
        {"layers": "*", "sparsity": 0.99},  # the first match wins: this one is left for the layer 8
    ]
    method = make(sparsity=0.9, overrides=overrides, update_every=2, drop_fraction=0.5)
    model, sparsifier = trained(method)
    active = {name: (model.get_parameter(name) != 0).numpy() for name in sparsifier.masks}
    assert holds(active["3.weight"], "4x1")
    assert int(active["3.weight"].sum()) == 8 * 12 * 9 // 2
    assert sparsifier.masks["0.weight"].all()
    assert sparsifier.masks["6.weight"].all()
    assert holds(active["10.weight"], "2:4")
    assert int(active["8.weight"].sum()) == round(0.01 * 20 * 128)
    assert sparsifier.mask_set.reasons == {"0.weight": "override '[06]'", "6.weight": "override '[06]'"}


@pytest.mark.parametrize("make", EVERY_METHOD)
@pytest.mark.parametrize("pattern", ["2x1", "4x1", "1x4", "2x4", "4x4", "2:4", "1:4"])
def test_trained_patterns_are_stored_without_padding(make: Callable[..., DropGrow], pattern: str) -> None:
    """The compact formats hold as many values as there are active weights, and no zero among them."""
    sparsity = {"1:4": 0.75, "2:4": 0.5}.get(pattern, 0.7)
    model, sparsifier = trained(make(sparsity=sparsity, pattern=pattern, update_every=2, drop_fraction=0.5))
    sparse = [name for name, mask in sparsifier.masks.items() if not mask.all()]
    assert sparse
    for name in sparse:
        weight = model.get_parameter(name).detach().numpy()
        first, second = map(int, pattern.replace(":", "x").split("x"))
        sides = {"n": first, "m": second} if ":" in pattern else {"r": first, "c": second}
        stored = formats.encode(weight, "nm" if ":" in pattern else "bsr", **sides)
        values = stored.components["values"]
        assert values.size == sparsifier.mask_set.nnz_of(name)
        assert values.all()
        assert np.array_equal(formats.decode(stored), weight)


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
