"""The variants of drop-and-grow against their equations, one known outcome or more for each."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from sparse_bench import Bench, randn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.methods.deepr import DeepR
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.granet import GraNet
from sparsepipe.sparsity.methods.mest import MEST
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.rigl_itop import RigLITOP
from sparsepipe.sparsity.methods.set_itop import SETITOP
from sparsepipe.sparsity.methods.srigl import SRigL
from sparsepipe.sparsity.scores import acquisition
from sparsepipe.sparsity.sparsifier import Sparsifier


def test_the_signed_bonus_cancels_negative_gradients_and_the_paper_s_does_not() -> None:
    gradient, counters = torch.tensor([-0.5, 0.5, -2.0]), torch.zeros(3, dtype=torch.int16)
    step = round(math.exp(4))  # ln t is 4.007
    bonus = 0.1 * math.log(step)
    signed = acquisition(gradient, counters, step, 0.1, 1.0, signed=True)
    assert torch.allclose(signed, torch.tensor([0.5 - bonus, 0.5 + bonus, 2.0 - bonus]))
    plain = acquisition(gradient, counters, step, 0.1, 1.0)
    assert torch.allclose(plain, torch.tensor([0.5 + bonus, 0.5 + bonus, 2.0 + bonus]))


@pytest.mark.parametrize(("ratio", "overlap"), [(0.01, 0.994), (0.1, 0.946), (0.5, 0.757), (1.0, 0.592), (4.0, 0.50)])
def test_both_scores_agree_as_often_as_a_simulation_says(ratio: float, overlap: float) -> None:
    """g ~ N(0, 1), N in 0..4, eps 1, the highest 5%: the shares that facts/dst-ee.md 1.2 gives."""
    gradient = randn(400_000, seed=0)
    counters = torch.randint(0, 5, (400_000,), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    chosen = [
        set(acquisition(gradient, counters, 3, ratio / math.log(3), 1.0, signed=signed).topk(20_000).indices.tolist())
        for signed in (False, True)
    ]
    assert len(chosen[0] & chosen[1]) / 20_000 == pytest.approx(overlap, abs=0.02)


def test_c_falls_along_its_schedule() -> None:
    def c_of(step: int, **options: object) -> float:
        bench = Bench(DSTEE(c=0.5, update_every=10, stop_at=1.0, **options), (8, 8), 100)
        return float(bench.sparsifier.method.metrics(bench.sparsifier._network, step)["c"])

    assert [c_of(step, c_schedule="cosine") for step in (0, 50, 100)] == pytest.approx([0.5, 0.25, 0.0])
    stepped = {"c_schedule": "stepped", "c_factor": 0.5, "c_decay_every": 20}
    assert [c_of(step, **stepped) for step in (19, 20, 59, 60)] == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert c_of(100) == 0.5


def test_without_a_bonus_the_signed_score_is_rigl_s() -> None:
    benches = [
        Bench(method, (20, 20), 60)
        for method in (RigL(sparsity=0.8, update_every=3), DSTEE(sparsity=0.8, update_every=3, c=0.0, score="signed"))
    ]
    for t in range(50):
        for bench in benches:
            bench.step(randn(20, 20, seed=t))
    assert torch.equal(benches[0].mask, benches[1].mask)
    assert torch.equal(benches[0].weight, benches[1].weight)


def test_mest_drops_by_magnitude_and_gradient_together() -> None:
    bench = Bench(MEST(sparsity=0.5, update_every=1, drop_fraction=0.25, exclude_just_dropped=True), (2, 4), 10)
    bench.optimizer.param_groups[0]["lr"] = 0.0
    active = bench.mask.flatten().nonzero().flatten()
    gradient = torch.zeros(8)
    with torch.no_grad():
        bench.weight.view(-1)[active] = torch.tensor([0.1, -0.2, 0.3, 0.4])
    gradient[active] = torch.tensor([-0.5, 0.05, 0.0, 0.0])  # sums 0.6, 0.25, 0.3, 0.4
    bench.step(gradient.reshape(2, 4))
    left = bench.mask.flatten()[active].tolist()
    assert left == [True, False, True, True]
    assert bench.sparsifier.mask_set.nnz == 4


def test_mest_reads_no_gradient_of_an_inactive_weight() -> None:
    def masks(factor: float) -> Tensor:
        bench = Bench(MEST(sparsity=0.8, update_every=2), (20, 20), 60)
        for t in range(40):
            bench.step(torch.where(bench.mask, 1.0, factor) * randn(20, 20, seed=t))
        return bench.mask

    assert torch.equal(masks(1.0), masks(1e6))


def test_the_surplus_of_em_and_s_halves_and_is_gone_at_the_stop() -> None:
    """Sparsity 0.85, 0.875, 0.9 on the way to 0.9, as in the published configuration."""
    bench = Bench(MEST(variant="em&s", sparsity=0.9, update_every=5, stop_at=0.8), (20, 20), 100)
    seen = {0: bench.sparsifier.mask_set.nnz}
    for t in range(100):
        bench.step(randn(20, 20, seed=t))
        seen[t + 1] = bench.sparsifier.mask_set.nnz
        assert bench.sparsifier.masks_final == (t + 1 >= 80)
        assert bench.sparsifier.metrics()["drop_fraction"] == pytest.approx(1 - 40 / seen[t + 1])
    assert [seen[step] for step in (0, 5, 59, 60, 79, 80, 100)] == [60, 60, 60, 50, 50, 40, 40]
    with pytest.raises(RecipeError, match="needs room for more weights"):
        MEST(variant="em&s", sparsity=0.5, pattern="2:4")
    for option in ({"drop_scope": "global"}, {"redistribution": "nonzeros"}):
        with pytest.raises(RecipeError, match="no use for"):
            MEST(variant="em&s", **option)


def test_em_and_s_grows_what_was_just_dropped_only_where_nothing_else_is_left() -> None:
    for sparsity, target, size in ((0.5, 200, 300), (0.4, 240, 360)):  # 100 or 160 drop, 100 or 40 were inactive
        method = MEST(variant="em&s", sparsity=sparsity, update_every=1, exclude_just_dropped=True)
        bench = Bench(method, (20, 20), 100)
        before = bench.mask.clone()
        assert int(before.sum()) == size
        bench.step(randn(20, 20, seed=0))
        assert bench.mask[~before].all()
        assert int(bench.mask.sum()) == size
        assert int((bench.mask & before).sum()) == max(target, 2 * size - 400)


@pytest.mark.parametrize("density", [0.1, 0.05])
def test_set_itop_explores_as_much_as_random_growth_must(density: float) -> None:
    """E[R] = 1 - (1 - d) prod_q (1 - p_q d / (1 - d + p_q d)), facts/dst-ee.md 5.5."""
    updates, size = 24, 300
    method = SETITOP(sparsity=1 - density, update_every=4)
    bench = Bench(method, (size, size), updates * 4 + 1)
    for t in range(updates * 4 + 1):
        bench.step(randn(size, size, seed=t))
    missed = 1 - density
    for update in range(1, updates + 1):
        p = 0.005 + 0.495 / 2 * (1 + math.cos(math.pi * 4 * update / (updates * 4 + 1)))
        missed *= 1 - p * density / (1 - density + p * density)
    assert bench.sparsifier.mask_set.rounds == updates
    assert bench.sparsifier.mask_set.exploration_rate() == pytest.approx(1 - missed, abs=0.01)


def test_itop_methods_have_the_published_settings() -> None:
    assert (RigLITOP().update_every, SETITOP().update_every) == (4000, 1500)
    for method in (RigLITOP(), SETITOP()):
        assert (method.drop_fraction, method.drop_schedule, method.stop_at) == (0.5, "cosine-floor", 1.0)


def test_granet_follows_the_cubic_schedule_and_ends_at_the_target() -> None:
    bench = Bench(GraNet(sparsity=0.9, update_every=10, prune_until=0.5), (40, 40), 200)
    seen = {0: bench.sparsifier.mask_set.sparsity}
    masks = []
    for t in range(200):
        bench.step(randn(40, 40, seed=t))
        seen[t + 1] = bench.sparsifier.mask_set.sparsity
        masks.append(bench.mask.clone())
    for step in (0, 10, 30, 50, 90):
        assert seen[step] == pytest.approx(0.9 - 0.4 * (1 - step / 100) ** 3, abs=1 / 1600)
    assert bench.sparsifier.mask_set.nnz == 160
    assert seen[100] == seen[200] == 0.9
    assert (masks[119] & ~masks[118]).any(), "it drops and grows after the last pruning, too"


def test_granet_s_last_pruning_falls_on_its_step_whatever_the_interval() -> None:
    bench = Bench(GraNet(sparsity=0.9, update_every=1000, prune_until=0.5), (20, 20), 30)
    for t in range(15):
        bench.step(randn(20, 20, seed=t))
    assert bench.sparsifier.masks_final
    assert bench.sparsifier.mask_set.nnz == 40


@pytest.mark.parametrize("method", [GraNet, partial(MEST, variant="em&s", stop_at=1.0)])
def test_a_layer_that_a_global_distribution_fills_at_first_is_cut_later(method: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 20, bias=False), torch.nn.Linear(20, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.sign())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(
        model, optimizer, method(sparsity=0.8, distribution="global", update_every=10), total_steps=40
    )
    assert sparsifier.masks["1.weight"].all()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    for t in range(40):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = 1e-5 * randn(*parameter.shape, seed=2 * t + index)
        optimizer.step()
    assert sparsifier.freeze().nnz == 96
    assert sparsifier.mask_set.nnz_of("1.weight") < 80


def test_deepr_drifts_towards_zero_by_lr_times_l1_and_walks_by_its_temperature() -> None:
    """Without a gradient: |w_n| = |w_0| - n lr l1, and steps of standard deviation sqrt(2 lr T)."""
    for temperature, expected in ((0.0, 0.0), (1e-4, math.sqrt(2 * 0.01 * 1e-4))):
        bench = Bench(DeepR(sparsity=0.5, l1=0.01, temperature=temperature, update_every=1000), (80, 80), 100)
        before, mask = bench.weight.detach().clone(), bench.mask.clone()
        bench.step(torch.zeros(80, 80))
        moved = (bench.weight.detach() - before)[mask] * before[mask].sign()
        assert float(moved.mean()) == pytest.approx(-0.01 * 0.01, abs=1e-7 + expected / 10)
        assert float(moved.std()) == pytest.approx(expected, rel=0.05, abs=1e-8)
        assert not bench.weight.detach()[~mask].any()


def test_deepr_drops_what_crosses_zero_at_once_and_grows_as_many_at_zero() -> None:
    bench = Bench(DeepR(sparsity=0.8, l1=1e-3), (20, 20), 200)
    for t in range(60):
        before, mask, sign = bench.weight.detach().clone(), bench.mask.clone(), None
        sign = bench.sparsifier._network.memory["sign"]["weight"].clone()
        gradient = randn(20, 20, seed=t)
        bench.step(gradient)
        theta = (before - 0.01 * gradient) * sign
        crossed = mask & (theta < -1e-4)  # beyond doubt: drift and noise are smaller
        regrown = bench.mask & crossed
        assert not bench.weight.detach()[crossed].any()
        assert int(regrown.sum()) <= int(crossed.sum()) // 2 + 2, "candidates are all inactive ones"
        assert bench.sparsifier.mask_set.nnz == 80
        signs = bench.sparsifier._network.memory["sign"]["weight"]
        assert bool((bench.weight.detach()[bench.mask] * signs[bench.mask] >= 0).all())
    assert bench.sparsifier.mask_set.exploration_rate() > 0.3


def test_srigl_gives_each_live_neuron_as_many_weights_and_ablates_the_others_for_good() -> None:
    """Neuron 0 has neither large weights nor large gradients: it goes, and the others get what it had."""
    bench = Bench(SRigL(sparsity=0.5, update_every=1, drop_fraction=0.5, drop_schedule="constant"), (5, 16), 40)
    bench.optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        bench.weight.copy_(torch.where(bench.mask, 1 + randn(5, 16, seed=1).abs(), 0.0))
        bench.weight[0] *= 1e-3
    for t in range(20):
        gradient = randn(5, 16, seed=t)
        gradient[0] = 0
        bench.step(gradient)
        assert bench.mask.sum(dim=1).tolist() == [0, 10, 10, 10, 10]


def test_srigl_grows_what_was_just_dropped_only_where_nothing_else_is_left() -> None:
    """Active weights have by far the largest gradients, so that without the option they would grow again."""
    for exclude, dropped in ((True, 20), (False, 0)):
        options = {"sparsity": 0.5, "update_every": 1, "drop_fraction": 0.5, "min_salient": 0.0}
        method = SRigL(drop_schedule="constant", exclude_just_dropped=exclude, **options)
        bench = Bench(method, (5, 16), 40)
        before = bench.mask.clone()
        bench.step(torch.where(before, 1.0, 1e-3 * randn(5, 16, seed=0)))
        assert int((before & ~bench.mask).sum()) == dropped
        assert bench.mask.sum(dim=1).tolist() == [8] * 5
    crowded = Bench(SRigL(sparsity=0.125, update_every=1, drop_fraction=0.9, exclude_just_dropped=True), (5, 16), 40)
    for t in range(20):
        crowded.step(randn(5, 16, seed=t))
        assert set(crowded.mask.sum(dim=1).tolist()) == {14}


def test_srigl_without_ablation_keeps_the_constant_fan_in_of_all() -> None:
    bench = Bench(SRigL(sparsity=0.75, update_every=1, ablation=False), (6, 16), 60)
    first = bench.mask.clone()
    for t in range(40):
        bench.step(randn(6, 16, seed=t))
        assert bench.mask.sum(dim=1).tolist() == [4] * 6
    assert not torch.equal(first, bench.mask)


@pytest.mark.parametrize("ablation", [True, False])
def test_srigl_keeps_the_share_of_each_layer_whatever_its_weights_become(ablation: bool) -> None:
    """Under `global` the first weights decide the shares, and what ablation frees in one layer goes to no other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = SRigL(sparsity=0.8, distribution="global", update_every=2, stop_at=1.0, ablation=ablation)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=40)
    first = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    for _ in range(40):
        inputs = torch.randn(32, 32)
        optimizer.zero_grad()
        cross_entropy(model(inputs), inputs[:, :10].argmax(dim=1)).backward()
        optimizer.step()
        for name, mask in sparsifier.masks.items():
            fans = mask.sum(dim=1)
            live = fans[fans > 0]
            assert len(set(live.tolist())) == 1, name
            assert first[name] - len(live) < int(mask.sum()) <= first[name], name
