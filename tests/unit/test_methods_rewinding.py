"""Lottery tickets and Top-KAST, step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from digits_bench import accuracy, fit
from sparse_bench import Bench, network, randn, sgd, train

from sparsepipe.sparsity.methods.lottery import Lottery
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.methods.top_kast import TopKAST
from sparsepipe.sparsity.sparsifier import Sparsifier


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("rewind_to", "early", "prunings"), [(0.0, 0, [10, 20, 30]), (0.25, 3, [12, 22, 31])])
def test_each_round_prunes_and_puts_the_network_back_to_the_early_step(
    rewind_to: float, early: int, prunings: list[int]
) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    method = Lottery(sparsity=0.875, rounds=3, rewind_to=rewind_to)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=40)
    assert method.prunings(40) == prunings
    states = {0: state_of(model)}
    sizes = []
    for step in range(1, 41):
        train(model, optimizer, [step])
        states[step] = state_of(model)
        if step in prunings:
            sizes.append(sparsifier.mask_set.nnz)
            for name, value in states[early].items():
                mask = sparsifier.masks.get(name, torch.ones_like(value, dtype=torch.bool))
                assert torch.equal(states[step][name], torch.where(mask, value, torch.zeros_like(value))), name
            assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
        elif step > early + 1:
            assert not torch.equal(states[step]["4.weight"], states[step - 1]["4.weight"])
        assert sparsifier.masks_final == (step >= prunings[-1])
    size = sparsifier.mask_set.size
    assert sizes == pytest.approx([size / 2, size / 4, size / 8], abs=1)  # each round keeps 0.125^(1/3) = 1/2
    twin = sparsifier.snapshots["dense"]["4.weight"]
    assert twin.count_nonzero() == twin.numel()
    assert not torch.equal(twin, states[early]["4.weight"])


def test_one_shot_keeps_the_largest_magnitudes_of_the_trained_network_not_of_the_early_one() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, Lottery(sparsity=0.8, rounds=1, rewind_to=0.0), total_steps=20)
    first = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in sparsifier.masks])
    train(model, optimizer, range(10))
    twin = sparsifier.snapshots["dense"]
    final = torch.cat([twin[name].abs().flatten() for name in sparsifier.masks])
    mask = torch.cat([mask.flatten() for mask in sparsifier.masks.values()])
    assert final[mask].min() >= final[~mask].max()
    assert first[mask].min() < first[~mask].max()


def test_every_round_follows_a_whole_cosine_from_its_point_on() -> None:
    model = network()
    method = Lottery(sparsity=0.8, rounds=2, rewind_to=0.5)  # rounds of 20 steps: 20 + 10 + 10
    sparsifier = Sparsifier(model, sgd(model.parameters()), method, total_steps=40)
    assert method.prunings(40) == [20, 30]
    whole = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    scales = [sparsifier.lr_scale(step) for step in range(1, 41)]
    assert scales == pytest.approx(whole + whole[10:] + whole[10:])
    other = Lottery(sparsity=0.8, restart=False)
    assert Sparsifier(model, sgd(model.parameters()), other, total_steps=40).lr_scale(7) is None


@pytest.mark.slow
def test_tickets_beat_random_masks_by_far_at_98_per_cent() -> None:
    options: dict[str, Any] = {"sparsity": 0.98}
    ticket, sparsifier = fit(Lottery(rounds=4, **options), epochs=75)
    assert sparsifier.freeze().sparsity == pytest.approx(0.98, abs=1e-4)
    static, _ = fit(Static(distribution="uniform", **options), epochs=75)
    assert accuracy(ticket) > max(accuracy(static) + 10, 92)


def test_top_kast_computes_with_a_updates_b_and_leaves_the_rest_where_it_was() -> None:
    """Against sets by a sort, and the step of SGD with its penalty by hand."""
    method = TopKAST(sparsity=0.9, backward=2.5, penalty=0.1, update_every=1000)
    bench = Bench(method, (10, 20), 4000, lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.2))
    first = bench.weight.detach().clone()
    order = first.abs().flatten().argsort(descending=True)
    forward, backward = (torch.zeros(200, dtype=torch.bool) for _ in range(2))
    forward[order[:20]] = True
    backward[order[:50]] = True
    forward, backward = forward.reshape(10, 20), backward.reshape(10, 20)
    model = bench.sparsifier._model
    x = randn(5, 20, seed=1)
    assert torch.allclose(model(x), x @ (first * forward).T, atol=1e-6)
    gradient = randn(10, 20, seed=2)
    bench.step(gradient)
    penalty = 0.1 * first * torch.where(forward, 1.0, 10.0)  # 1 / D
    moved = first - 0.01 * (gradient + penalty + 0.2 * first)
    assert torch.allclose(bench.weight, torch.where(backward, moved, first), atol=1e-6)
    assert torch.equal(bench.weight[~backward], first[~backward])


def test_what_explores_in_vain_makes_room_for_weights_that_were_outside() -> None:
    method = TopKAST(sparsity=0.9, backward=2.0, penalty=1.0, update_every=5, stop_at=0.5)
    bench = Bench(method, (10, 20), 200, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    memory = bench.sparsifier._network.memory
    first = memory["backward"]["weight"].clone()
    for step in range(99):
        bench.step(torch.zeros(10, 20))
        assert bench.sparsifier.metrics()["sparsity"] == pytest.approx(0.9)
        assert int(memory["backward"]["weight"].sum()) == 40
        assert step > 3 or torch.equal(memory["backward"]["weight"], first)
    assert (memory["backward"]["weight"] & ~first).any()
    assert not bench.sparsifier.masks_final
    chosen = memory["mask"]["weight"].clone()
    bench.step(torch.zeros(10, 20))
    assert bench.sparsifier.masks_final
    assert torch.equal(bench.mask, chosen)
    for _ in range(100):
        bench.step(randn(10, 20, seed=3))
        assert torch.equal(bench.mask, chosen)
        assert not bench.weight[~chosen].any()


def test_a_layer_that_is_full_at_first_is_still_cut_under_a_global_distribution() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 16, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0).add_(0.1 * randn(4, 4, seed=0))
        model[1].weight.copy_(0.01 * randn(16, 4, seed=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = TopKAST(sparsity=0.5, distribution="global", penalty=0.0, update_every=1, stop_at=1.0)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=10)
    assert sparsifier.metrics()["density"]["0.weight"] == 1
    with torch.no_grad():
        for name in ("0.weight", "1.weight"):  # the first layer shrinks below most of the second
            model.get_parameter(name).grad = model.get_parameter(name).detach() * (0.999 if name == "0.weight" else 0)
    optimizer.step()
    density = sparsifier.metrics()["density"]["0.weight"]
    assert density < 1
    x = torch.eye(4)
    weights = [model.get_parameter(name).detach() for name in ("0.weight", "1.weight")]
    masks = sparsifier._network.memory["mask"]
    first, second = (weight * masks[name] for name, weight in zip(("0.weight", "1.weight"), weights, strict=True))
    assert torch.allclose(model(x), x @ first.T @ second.T)
    assert sparsifier.freeze().sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_top_kast_is_far_better_than_random_masks_at_98_per_cent() -> None:
    options: dict[str, Any] = {"sparsity": 0.98, "distribution": "uniform"}
    model, sparsifier = fit(TopKAST(update_every=20, **options), epochs=75)
    assert sparsifier.freeze().sparsity == pytest.approx(0.98, abs=1e-4)
    static, _ = fit(Static(**options), epochs=75)
    assert accuracy(model) > accuracy(static) + 10
