"""Redistribution across layers: exact totals, the published rules by hand, and what does not trade."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sparse_bench import loss_of, network, randn, sgd, train
from torch import Tensor, nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.distribution import allocate
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.flops import training_multiple
from sparsepipe.sparsity.methods.dsr import DSR
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.methods.snfs import SNFS
from sparsepipe.sparsity.sparsifier import Sparsifier

LIMITS = st.tuples(st.integers(0, 5), st.integers(0, 60)).map(lambda pair: (pair[0], pair[0] + pair[1]))
SHARE = st.one_of(st.floats(0, 1e6), st.just(0.0), st.just(math.nan), st.just(math.inf), st.just(-1.0))


@given(st.lists(st.tuples(LIMITS, SHARE), min_size=1, max_size=6), st.floats(0, 1))
def test_allocation_is_exact_and_within_limits(layers: list[tuple[tuple[int, int], float]], where: float) -> None:
    low, high = [limits[0] for limits, _ in layers], [limits[1] for limits, _ in layers]
    total = sum(low) + round(where * (sum(high) - sum(low)))
    counts = allocate(total, [share for _, share in layers], low, high)
    assert sum(counts) == total
    assert all(least <= count <= most for least, count, most in zip(low, counts, high, strict=True))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(0, 1000))
def test_allocation_is_proportional_to_within_one_where_no_limit_is_met(shares: list[float], total: int) -> None:
    counts = allocate(total, shares, [0] * len(shares), [total] * len(shares))
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1 + 1e-6


def test_what_a_full_layer_cannot_take_goes_to_the_others_in_proportion() -> None:
    assert allocate(100, [8, 1, 1], [0] * 3, [20, 200, 200]) == [20, 40, 40]
    assert allocate(100, [8, 3, 1], [0] * 3, [20, 200, 200]) == [20, 60, 20]
    assert allocate(12, [1, 0, 0], [0] * 3, [4, 30, 10]) == [4, 6, 2]  # without a share: by room, 30 to 10
    assert allocate(10, [1, 1, 1], [0] * 3, [100] * 3) == [4, 3, 3]


@given(st.lists(st.tuples(LIMITS, st.floats(0.01, 100)), min_size=2, max_size=5), st.floats(0, 1))
def test_nobody_with_the_larger_share_gets_less_unless_full(
    layers: list[tuple[tuple[int, int], float]], where: float
) -> None:
    low, high = [0] * len(layers), [limits[1] for limits, _ in layers]
    assume(sum(high) > 0)
    total = round(where * sum(high))
    shares = [share for _, share in layers]
    counts = allocate(total, shares, low, high)
    for one in range(len(layers)):
        for other in range(len(layers)):
            if shares[one] >= shares[other] and counts[one] < high[one]:
                assert counts[one] >= counts[other] - 1


class Layers:
    """Linear layers in one network whose weights and gradients are given by hand."""

    def __init__(self, method: DropGrow, *shapes: tuple[int, int], total_steps: int = 100) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(shape[1], shape[0], bias=False) for shape in shapes))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.sparsifier = Sparsifier(self.model, self.optimizer, method, total_steps=total_steps)

    @property
    def weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.model.parameters()]

    @property
    def masks(self) -> list[Tensor]:
        return [mask.clone() for mask in self.sparsifier.masks.values()]

    @property
    def nnz(self) -> list[int]:
        return [int(mask.sum()) for mask in self.masks]

    def step(self, gradients: list[Tensor]) -> None:
        for weight, gradient in zip(self.model.parameters(), gradients, strict=True):
            weight.grad = gradient.clone()
        self.optimizer.step()


ONCE: dict[str, Any] = {"sparsity": 0.75, "distribution": "uniform", "update_every": 1, "drop_schedule": "constant"}


def test_snfs_drops_in_each_layer_and_shares_out_by_mean_momentum() -> None:
    """By hand: 25 of 100 active; 5 dropped in each; mean |momentum| 4 to 1, so 8 and 2 of 10 grow.

    The mean is over what was active before the drop: (5 x 12 + 20 x 2) / 25 = 4 in the first layer.
    """
    layers = Layers(SNFS(drop_fraction=0.2, momentum=0.5, **ONCE), (10, 10), (10, 10))
    before = layers.masks
    assert [int(mask.sum()) for mask in before] == [25, 25]
    gradients = [torch.full((10, 10), 2.0), -torch.ones(10, 10)]
    gradients[0][~before[0]] = 100 + torch.arange(75.0)  # which inactive weights; only active ones decide how many
    gradients[1][~before[1]] = 100 + torch.arange(75.0)
    magnitudes = [
        weight.abs().masked_fill(~mask, math.inf) for weight, mask in zip(layers.weights, before, strict=True)
    ]
    dropped = [set(magnitude.flatten().argsort()[:5].tolist()) for magnitude in magnitudes]
    gradients[0].view(-1)[list(dropped[0])] = 12.0
    layers.step(gradients)
    assert layers.nnz == [28, 22]
    for now, mask, gone, gradient in zip(layers.masks, before, dropped, gradients, strict=True):
        grown = set((now & ~mask).flatten().nonzero().flatten().tolist())
        best = gradient.masked_fill(mask, -math.inf).flatten().argsort(descending=True)[: len(grown)]
        assert grown == set(best.tolist())
        assert set((mask & ~now).flatten().nonzero().flatten().tolist()) == gone


def test_the_momentum_of_snfs_is_the_running_mean_of_dense_gradients_until_the_masks_are_final() -> None:
    layers = Layers(SNFS(momentum=0.9, **{**ONCE, "update_every": 4}, stop_at=0.5), (6, 8), (8, 6), total_steps=20)
    expected = [torch.zeros(6, 8), torch.zeros(8, 6)]
    for t in range(20):
        gradients = [randn(6, 8, seed=2 * t), randn(8, 6, seed=2 * t + 1)]
        layers.step(gradients)
        averages = layers.sparsifier.state_dict()["averages"]
        assert bool(averages) == (t + 1 < 8)  # the updates are at 4 and 8
        expected = [0.9 * mean + 0.1 * gradient for mean, gradient in zip(expected, gradients, strict=True)]
        for average, mean in zip(averages.values(), expected, strict=False):
            torch.testing.assert_close(average, mean)


def test_snfs_costs_a_dense_weight_gradient_at_every_step() -> None:
    assert training_multiple(0.1, SNFS().dense_gradient_every) == pytest.approx((2 * 0.1 + 1) / 3)


def test_dsr_drops_across_layers_and_shares_out_by_what_survived() -> None:
    """By hand: the second layer's weights are a thousandth, so all of the drop hits it; growth goes by survivors."""
    layers = Layers(DSR(drop_fraction=0.3, **ONCE), (10, 10), (10, 10))
    with torch.no_grad():
        layers.model[1].weight.mul_(1e-3)
    before, magnitude = layers.masks, layers.weights[1].abs().clone()
    layers.step([torch.zeros(10, 10)] * 2)
    # 15 of 50 are dropped, all from the second: 25 and 10 survive, and 15 grow by 25 to 10: 10.7 and 4.3.
    assert layers.nnz == [36, 14]
    assert (layers.masks[0] & before[0]).sum() == 25
    survivors = magnitude.flatten().argsort(descending=True)[:10]
    assert layers.masks[1].flatten()[survivors].all()


def test_redistribution_by_magnitude_goes_by_the_mean_weight_before_the_drop() -> None:
    """By hand: 5 of 25 weights of 0.2 and 20 of 1.2 have a mean of 1, beside 0.25: 8 and 2 of the 10 dropped grow."""
    layers = Layers(RigL(redistribution="magnitude", drop_fraction=0.2, **ONCE), (10, 10), (10, 10))
    with torch.no_grad():
        for weight, mask, small, large in zip(layers.weights, layers.masks, (0.2, 0.25), (1.2, 0.25), strict=True):
            places = mask.flatten().nonzero().flatten()
            weight.view(-1)[places[:5]] = small
            weight.view(-1)[places[5:]] = large
    layers.step([torch.ones(10, 10), 100 * torch.ones(10, 10)])
    assert layers.nnz == [28, 22]


def test_a_drop_across_layers_takes_the_lowest_mean_magnitudes_and_spares_one_group_of_each_layer() -> None:
    method = SET(drop_scope="global", drop_fraction=0.5, exclude_just_dropped=True, **ONCE)
    layers = Layers(method, (10, 10), (10, 10))
    with torch.no_grad():
        layers.model[1].weight.mul_(1e-6)
    before, weights = layers.masks, [weight.abs().clone() for weight in layers.weights]
    layers.step([torch.zeros(10, 10)] * 2)
    survivors = [int((now & mask).sum()) for now, mask in zip(layers.masks, before, strict=True)]
    assert survivors == [24, 1]  # 25 of 50 go: 24 of the second layer, whose largest stays, and one of the first
    assert layers.nnz == [25, 25]  # without redistribution each layer grows back what it lost
    assert weights[1].argmax() == (layers.weights[1].abs()).argmax()


def test_global_growth_takes_the_best_gradients_of_all_layers_together() -> None:
    layers = Layers(RigL(redistribution="global", drop_fraction=0.4, **ONCE), (8, 10), (12, 10), (5, 4))
    before = layers.masks
    gradients = [randn(8, 10, seed=1), 0.3 * randn(12, 10, seed=2), 2 * randn(5, 4, seed=3)]
    for gradient, mask in zip(gradients, before, strict=True):
        gradient[mask] = 0
    total = sum(math.floor(0.4 * int(mask.sum())) for mask in before)
    everything = torch.cat([gradient.abs().flatten() for gradient in gradients])
    best = set(everything.argsort(descending=True)[:total].tolist())
    layers.step(gradients)
    grown = torch.cat([(now & ~mask).flatten() for now, mask in zip(layers.masks, before, strict=True)])
    assert set(grown.nonzero().flatten().tolist()) == best
    assert sum(layers.nnz) == sum(int(mask.sum()) for mask in before)


@pytest.mark.parametrize("redistribution", ["score", "magnitude", "nonzeros", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2x1", "2x2", "channel"])
@pytest.mark.parametrize("drop_scope", ["layer", "global"])
def test_totals_are_exact_through_a_training_and_layers_do_trade(
    redistribution: str, pattern: str, drop_scope: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 4))
    optimizer = sgd(model.parameters())
    method = RigL(sparsity=0.8, update_every=2, redistribution=redistribution, pattern=pattern, drop_scope=drop_scope)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=40)
    nnz, first = sparsifier.mask_set.nnz, sparsifier.mask_set.densities()
    for step in range(40):
        train(model, optimizer, [step])
        assert sparsifier.mask_set.nnz == nnz
        assert min(sparsifier.mask_set.densities().values()) > 0
    if pattern == "unstructured" and (redistribution, drop_scope) != ("nonzeros", "layer"):
        # Equal shares dropped everywhere leave the nonzeros, and so the shares grown, as they were.
        assert sparsifier.mask_set.densities() != first


def test_layers_whose_density_is_settled_do_not_trade() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    overrides = [{"layers": "4", "sparsity": 0.6}, {"layers": "6", "pattern": "2:4"}]
    method = RigL(sparsity=0.5, update_every=1, redistribution="score", overrides=overrides)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=20)
    nnz = {name: sparsifier.mask_set.nnz_of(name) for name in sparsifier.masks}
    train(model, optimizer, range(15))
    assert {name: sparsifier.mask_set.nnz_of(name) for name in sparsifier.masks} == nnz
    assert (sparsifier.masks["6.weight"].reshape(4, 8, 4).sum(-1) == 2).all()


def test_redistribution_that_can_change_nothing_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    Sparsifier(model, sgd(model.parameters()), SNFS(sparsity=0.8, pattern="constant-fan-in"), total_steps=400)
    assert "No two layers can trade" in caplog.text


@pytest.mark.parametrize("method", [SNFS, DSR])
@pytest.mark.parametrize("wrong", [{"redistribution": "fair"}, {"drop_scope": "net"}, {"sparsity": 2}])
def test_wrong_options_are_refused_by_name(method: Callable[..., DropGrow], wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        method(**wrong)


def test_a_network_learns_with_momentum_growth() -> None:
    """The loss on one batch falls: grown weights get gradients and are used."""
    model = network()
    optimizer = sgd(model.parameters())
    Sparsifier(model, optimizer, SNFS(sparsity=0.9, update_every=5), total_steps=60)
    first = loss_of(model, 0).item()
    train(model, optimizer, [0] * 60)
    assert loss_of(model, 0).item() < 0.5 * first
