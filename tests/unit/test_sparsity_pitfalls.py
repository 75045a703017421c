"""The 24 things that implementations of drop-and-grow training get wrong, one test or more for each, in their order."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparse_bench import (
    OPTIMIZERS,
    Bench,
    batch,
    dst_ee,
    inactive_are_positive_zero,
    loss_of,
    network,
    randn,
    sgd,
    train,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.distribution import erk
from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.methods.snfs import SNFS
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.scores import acquisition
from sparsepipe.sparsity.sparsifier import Sparsifier

FAMILY: list[Callable[..., DropGrow]] = [DSTEE, RigL, SET]


def trained(method: Method, steps: int = 20, scale: float = 1.0, seed: int = 0) -> tuple[Any, Sparsifier]:
    """The small network after some steps of SGD on a loss that is multiplied by `scale`."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / scale, momentum=0.9, nesterov=True)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=steps, seed=seed)
    for step in range(steps):
        optimizer.zero_grad()
        (scale * loss_of(model, step)).backward()
        optimizer.step()
    return model, sparsifier


def indices(mask: Tensor) -> list[int]:
    found: list[int] = mask.flatten().nonzero().flatten().tolist()
    return found


def test_01_the_bonus_is_added_to_the_magnitude_and_not_to_the_signed_gradient() -> None:
    gradient, counters = torch.tensor([-0.5, 0.1, -0.5]), torch.tensor([0, 0, 3], dtype=torch.int16)
    score = acquisition(gradient, counters, step=1000, c=0.0724, eps=1.0)
    bonus = 0.0724 * math.log(1000)  # about 0.5: the signed form would cancel the first score
    torch.testing.assert_close(score, torch.tensor([0.5 + bonus, 0.1 + bonus, 0.5 + bonus / 4]))
    signed = (gradient + bonus / (counters + 1.0)).abs()
    assert int(score.argmax()) == 0
    assert int(signed.argmax()) == 1


def test_01_a_negative_gradient_grows_like_a_positive_one() -> None:
    chosen = []
    for sign in (1.0, -1.0):
        bench = Bench(DSTEE(sparsity=0.8, c=0.1, update_every=1, drop_fraction=0.5), (10, 10), 100)
        bench.sparsifier.step = 49  # ln 50 = 3.9
        bench.step(sign * randn(10, 10, seed=1).abs())
        chosen.append(indices(bench.mask))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("method", FAMILY)
def test_02_counters_start_at_the_mask_and_count_each_update_once(method: Callable[..., DropGrow]) -> None:
    steps = 41
    bench = Bench(method(sparsity=0.75, update_every=2, stop_at=1.0), (12, 12), steps)
    always, updates = bench.mask.clone(), 0
    assert torch.equal(bench.counters, bench.mask.to(torch.int16))
    previous = bench.counters.clone()
    for t in range(1, steps):
        bench.step(randn(12, 12, seed=t))
        updates += t % 2 == 0
        always &= bench.mask
        expected = previous + bench.mask if t % 2 == 0 else previous
        assert torch.equal(bench.counters, expected)  # grown weights keep their old count, dropped ones too
        previous = bench.counters.clone()
    assert updates == 20
    assert int(bench.counters.sum()) == (updates + 1) * 36
    assert always.any()
    assert (bench.counters[always] == updates + 1).all()


def test_02_t_is_the_optimizer_step_and_the_bonus_zero_where_its_logarithm_is() -> None:
    gradient, counters = torch.tensor([1.0, -2.0]), torch.zeros(2, dtype=torch.int16)
    for step in (0, 1):
        assert acquisition(gradient, counters, step, c=10.0, eps=1.0).tolist() == [1.0, 2.0]
    method = dst_ee(update_every=5)
    seen: list[int] = []
    grow_score = method.grow_score
    method.grow_score = lambda net, name, step: (seen.append(step), grow_score(net, name, step))[1]  # type: ignore[method-assign, func-returns-value]
    trained(method)
    assert sorted(set(seen)) == [5, 10]


def test_02_the_bonus_of_an_update_is_that_of_the_step_and_not_of_the_round() -> None:
    """After 20 steps c ln t is 3.0 c, so N = 0 beats N = 3 by 2.2 c; were t the round, 2, by 0.5 c."""
    method = DSTEE(sparsity=0.5, c=1.0, update_every=10, drop_fraction=1.0, drop_schedule="constant")
    bench = Bench(method, (1, 4), 100)
    for _ in range(19):
        bench.step(torch.zeros(1, 4))
    bench.counters.copy_(torch.tensor([[3, 3, 0, 0]]))
    bench.step(torch.tensor([[1.5, 1.5, 0.0, 0.0]]))  # between the two differences
    assert bench.mask.tolist() == [[False, False, True, True]]


def test_03_just_dropped_weights_may_regrow_and_then_keep_value_and_state() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=4), (4, 4), 100, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    active = bench.mask.clone()
    gradient = active.float()  # only active weights have a gradient, so whatever is dropped grows again
    for _ in range(3):
        bench.step(gradient)
    reference = bench.weight.detach().clone()
    bench.step(gradient)
    assert torch.equal(bench.mask, active)
    assert (bench.weight[active] != 0).all()
    velocity = bench.optimizer.state[bench.weight]["momentum_buffer"]
    assert (velocity[active] > 3).all()
    torch.testing.assert_close(bench.weight.detach(), reference - 1e-3 * velocity)


def test_03_just_dropped_weights_can_be_excluded_while_others_are_left() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=1, exclude_just_dropped=True), (4, 4), 100)
    active, smallest = bench.mask.clone(), bench.weight.detach().abs().masked_fill(~bench.mask, math.inf).argmin()
    bench.step(active * 1e-6)
    assert not bench.mask.flatten()[smallest]
    assert int(bench.mask.sum()) == 8
    crowded = Bench(
        RigL(sparsity=0.1, update_every=1, drop_fraction=0.9, exclude_just_dropped=True, drop_schedule="constant"),
        (4, 5),
        100,
    )
    for t in range(20):
        crowded.step(randn(4, 5, seed=t))
        assert int(crowded.mask.sum()) == 18


def test_04_counts_at_the_start_are_exact_and_not_only_expected() -> None:
    for seed in range(5):
        _, sparsifier = trained(RigL(sparsity=0.85), steps=1, seed=seed)
        assert sparsifier.mask_set.nnz == round(0.15 * (8 * 2 * 9 + 128 * 32 + 32 * 4))


@pytest.mark.parametrize("gradient", ["zero", "one inactive", "all equal"])
def test_04_growth_never_hits_an_active_weight_where_scores_are_few_or_equal(gradient: str) -> None:
    """A dead unit has no gradient: inactive weights then score as low as active ones that are masked to zero."""
    bench = Bench(RigL(sparsity=0.5, update_every=1, drop_fraction=1.0, drop_schedule="constant"), (8, 8), 100)
    for _ in range(20):
        values = torch.full((8, 8), float(gradient == "all equal"))
        if gradient == "one inactive":
            values.view(-1)[int(bench.mask.view(-1).int().argmin())] = 1.0
        bench.step(values)
        assert int(bench.mask.sum()) == 32


def test_04_no_more_grows_than_there_is_room_for_in_a_nearly_dense_layer() -> None:
    bench = Bench(SET(sparsity=0.02, update_every=1, drop_fraction=0.9, drop_schedule="constant"), (10, 10), 100)
    for t in range(20):
        bench.step(randn(10, 10, seed=t))
        assert int(bench.mask.sum()) == 98


def test_05_layers_that_erk_keeps_dense_are_skipped_and_count_fully_in_r() -> None:
    _, sparsifier = trained(RigL(sparsity=0.6, update_every=5))
    masks = sparsifier.mask_set
    dense = [name for name in masks if masks[name].all()]
    assert dense == ["0.weight", "6.weight"]
    assert not set(dense) & set(masks.counters)
    assert {masks.reasons[name] for name in dense} == {"erk keeps it dense"}
    explored = sum(int((counter > 0).sum()) for counter in masks.counters.values())
    full = sum(masks[name].numel() for name in dense)
    assert masks.exploration_rate() == (explored + full) / masks.size


def test_06_erk_makes_ties_dense_together_and_spreads_what_clamping_would_lose() -> None:
    """By hand: eps = 2006.4 / (8 + 8 + 200) puts both small layers above 1, so they keep all 32 of their weights."""
    shapes = {"small": (4, 4), "twin": (4, 4), "large": (100, 100)}
    densities = erk(shapes, 0.8)
    assert densities["small"] == densities["twin"] == 1.0
    assert densities["large"] == pytest.approx((2006.4 - 32) / 10_000)
    clamped_only = 32 + 2006.4 / 216 * 200
    assert clamped_only < 1900
    # The kernel counts in sum(shape) / prod(shape).
    kernels = erk({"a": (8, 8, 3, 3), "b": (64, 64, 1, 1)}, 0.9)
    assert kernels["a"] / kernels["b"] == pytest.approx((22 / 576) / (130 / 4096))


@pytest.mark.parametrize(
    ("options", "dense", "reason"),
    [
        ({"distribution": "uniform"}, ["0.weight"], "uniform keeps the first convolution dense"),
        ({"distribution": "uniform", "first_conv": "sparse"}, [], None),
        ({"distribution": "erk"}, [], None),
        ({"distribution": "erk", "first_conv": "dense"}, ["0.weight"], "first_conv = dense"),
        ({"distribution": "er", "last_linear": "dense"}, ["6.weight"], "last_linear = dense"),
        ({"first_conv": "dense", "overrides": [{"layers": "0", "sparsity": 0.5}]}, [], None),
    ],
)
def test_07_first_convolution_and_last_linear_follow_a_policy_that_is_told(
    options: dict[str, Any], dense: list[str], reason: str | None
) -> None:
    model = network()
    sparsifier = Sparsifier(model, sgd(model.parameters()), Static(**{"sparsity": 0.95} | options), total_steps=1)
    assert [name for name, mask in sparsifier.masks.items() if mask.all()] == dense
    assert sparsifier.mask_set.reasons == dict.fromkeys(dense, reason)
    assert sparsifier.method.describe()["first_conv"] == options.get("first_conv", "auto")
    if options.get("distribution") != "uniform" and "overrides" not in options:  # others make up for dense layers
        assert sparsifier.mask_set.nnz == round(0.05 * sparsifier.mask_set.size)


def test_08_embeddings_norms_biases_depthwise_and_untrained_weights_stay_dense() -> None:
    model: Any = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 8),
            "tied": nn.Linear(8, 10),
            "conv": nn.Conv2d(8, 16, 3),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
            "multiplier": nn.Conv2d(16, 32, 3, groups=16),
            "grouped": nn.Conv2d(32, 32, 3, groups=4),
            "gray": nn.Conv2d(1, 8, 3),
            "up": nn.ConvTranspose2d(16, 8, 2),
            "norm": nn.LayerNorm([8, 8]),
            "attention": nn.MultiheadAttention(8, 2),
            "relative_position_bias": nn.Linear(8, 8),
            "frozen": nn.Linear(8, 8),
            "foreign": nn.Linear(8, 8),
        }
    )
    model["tied"].weight = model["embedding"].weight
    model["frozen"].requires_grad_(False)
    parameters = [parameter for name, parameter in model.named_parameters() if "foreign" not in name]
    sparsifier = Sparsifier(
        model, torch.optim.SGD(parameters, lr=0.1), Static(sparsity=0.5, pattern="2x1"), total_steps=1
    )
    names = ["conv", "grouped", "gray", "up", "attention.out_proj", "relative_position_bias"]
    assert sorted(sparsifier.masks) == sorted([f"{name}.weight" for name in names] + ["attention.in_proj_weight"])
    assert "transposed" in sparsifier.mask_set.reasons["up.weight"]


def test_08_a_weight_shared_between_modules_has_one_mask_and_counts_once() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    sparsifier = Sparsifier(model, sgd(model.parameters()), Static(sparsity=0.5), total_steps=1)
    assert list(sparsifier.masks) == ["0.weight"]
    assert sparsifier.mask_set.size == 64


def test_09_growth_sees_the_gradient_of_inactive_weights_and_the_optimizer_does_not() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=2), (6, 6), 100, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    gradient = torch.where(bench.mask, 0.01, 5.0)
    active = bench.mask.clone()
    for _ in range(2):
        bench.step(gradient)
    assert (bench.mask & ~active).any()
    assert bench.weight.grad is not None
    assert (bench.weight.grad[~active] == 0).all()
    assert (bench.optimizer.state[bench.weight]["momentum_buffer"][~active] == 0).all()


@pytest.mark.parametrize("prepared", [True, False])
def test_09_clipping_may_come_after_the_dense_gradients_were_taken(prepared: bool) -> None:
    """Then scores are those without clipping, and the norm that is clipped is that of the active weights."""
    method = DSTEE(sparsity=0.9, c=0.5, update_every=3)
    bench, twin = (Bench(method, (20, 20), 100, lambda p: torch.optim.SGD(p, lr=1.0)) for _ in range(2))
    for each in (bench, twin):  # different bonuses, so that the size of the gradients matters
        each.counters.copy_(randn(20, 20, seed=7).mul(2).abs().to(torch.int16))
    for t in range(3):
        gradient, active = randn(20, 20, seed=t), bench.mask.clone()
        before = bench.weight.detach().clone()
        bench.weight.grad = gradient.clone()
        if prepared:
            bench.sparsifier.prepare_gradients()
        norm = float(nn.utils.clip_grad_norm_([bench.weight], 1e-3))
        bench.optimizer.step()
        if t < 2:
            moved = float((bench.weight.detach() - before).norm())
        twin.weight.grad = gradient * active * (1e-3 / (gradient * active).norm())
        twin.weight.grad[~active] = gradient[~active]
        twin.optimizer.step()
        masked_norm = float((gradient * active).norm())
        assert (norm == pytest.approx(masked_norm, rel=1e-4)) == prepared
        assert (moved == pytest.approx(1e-3, rel=1e-3)) == prepared
    assert torch.equal(bench.mask, twin.mask) == prepared


def test_10_accumulated_micro_batches_equal_one_big_batch_and_count_as_one_step() -> None:
    digests = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 32), nn.Tanh(), nn.Linear(32, 4)).double()
        optimizer = sgd(model.parameters())
        sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=20)
        for step in range(20):
            optimizer.zero_grad()
            x, y = batch(step)
            for xs, ys in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                loss: Any = cross_entropy(model(xs), ys) / parts
                loss.backward()
            optimizer.step()
        digests.append(sparsifier.mask_set.digest())
        assert sparsifier.step == 20
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["sgd", "sgd fused", "adamw fused"])
@pytest.mark.parametrize("prepared", [True, False])
def test_11_scores_are_unscaled_and_a_skipped_step_counts_for_nothing(name: str, prepared: bool) -> None:
    digests = []
    for scaled in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        sparsifier = Sparsifier(model, optimizer, dst_ee(c=1e-3), total_steps=20)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=10_000)

        def finish_step() -> None:
            if prepared:
                scaler.unscale_(optimizer)  # noqa: B023
                sparsifier.prepare_gradients()  # noqa: B023
            scaler.step(optimizer)  # noqa: B023

        for step in range(12):
            if scaled and step == 3:  # the fourth step would be an update; it overflows once and is repeated
                before, counters = sparsifier.mask_set.digest(), copy.deepcopy(sparsifier.mask_set.counters)
                weights = copy.deepcopy(model.state_dict())
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step)).backward()
                model[4].weight.grad[sparsifier.masks["4.weight"]] = float("inf")
                finish_step()
                scaler.update(1024.0)
                assert sparsifier.step == 3
                assert sparsifier.mask_set.digest() == before
                assert all(torch.equal(counters[key], value) for key, value in sparsifier.mask_set.counters.items())
                assert all(torch.equal(weights[key], value) for key, value in model.named_parameters())
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            finish_step()
            scaler.update()
            assert inactive_are_positive_zero(model, sparsifier)
        assert sparsifier.step == 12
        digests.append(sparsifier.mask_set.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["sgd", "adamw fused"])
@pytest.mark.parametrize("clipped", [False, True])
def test_11_gradients_taken_before_they_are_unscaled_are_refused(
    name: str, clipped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Their scores are 65,536 times too large. Clipping hides the scale, except from a fused optimizer."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=20)
    scaler = torch.amp.GradScaler("cpu")
    seen = None
    for step in range(4):  # the fourth has the first update
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        sparsifier.prepare_gradients()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        try:
            scaler.step(optimizer)
        except ModelError as error:
            seen = error
        scaler.update()
    assert sparsifier.step == 3 + (seen is None)
    if clipped and "fused" not in name:
        assert seen is None
        assert "call scaler.unscale_(optimizer) before prepare_gradients()" in caplog.text
    else:
        assert "divided by 65536 after prepare_gradients()" in str(seen)


@pytest.mark.parametrize("norm", [1e-3, 1e3])
def test_11_clipping_after_unscaling_is_no_error_however_hard(norm: float, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=1), total_steps=20)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(12):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.unscale_(optimizer)
        sparsifier.prepare_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), norm)
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == sparsifier.mask_set.rounds == 12
    assert not caplog.records


def test_12_a_scaled_loss_leaves_rigl_unchanged_and_dst_ee_only_with_a_scaled_or_relative_c() -> None:
    shared: dict[str, Any] = {"sparsity": 0.8, "update_every": 5}
    digests = [trained(RigL(**shared), scale=k)[1].mask_set.digest() for k in (1.0, 1024.0)]
    assert digests[0] == digests[1]
    plain, same_c, scaled_c = (
        trained(DSTEE(c=c, **shared), scale=k)[1].mask_set.digest()
        for c, k in ((0.01, 1.0), (0.01, 1024.0), (10.24, 1024.0))
    )
    assert plain == scaled_c
    assert plain != same_c
    relative = [trained(DSTEE(c=0.5, relative_c=True, **shared), scale=k)[1].mask_set.digest() for k in (1.0, 1024.0)]
    assert relative[0] == relative[1] != digests[0]


@pytest.mark.parametrize("method", [DSTEE, SET, SNFS])
def test_13_ranks_that_share_the_averaged_gradient_share_masks_and_counters(method: Callable[..., DropGrow]) -> None:
    """Two ranks in one process: other data, other randomness, and gradients that are averaged after backward."""
    models = [network(), network()]
    optimizers = [sgd(model.parameters()) for model in models]
    options = {"sparsity": 0.8, "update_every": 3, "pattern": "2x1"}
    ranks = [
        Sparsifier(model, optimizer, method(**options), total_steps=20)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for step in range(18):
        for rank, model in enumerate(models):
            torch.manual_seed(100 * rank + step)
            torch.rand(rank + 1)
            optimizers[rank].zero_grad()
            loss_of(model, 2 * step + rank).backward()
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            mean = (mine.grad + theirs.grad) / 2
            mine.grad, theirs.grad = mean.clone(), mean.clone()
        for rank, optimizer in enumerate(optimizers):
            torch.manual_seed(rank)
            optimizer.step()
    assert ranks[0].mask_set.digest() == ranks[1].mask_set.digest()
    for name, counter in ranks[0].mask_set.counters.items():
        assert torch.equal(counter, ranks[1].mask_set.counters[name])


@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_14_grown_and_dropped_weights_have_fresh_state_and_others_keep_theirs(name: str) -> None:
    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        if name == "momentum_buffer":
            return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)

    bench = Bench(RigL(sparsity=0.7, update_every=6, drop_fraction=0.5), (10, 10), 100, make)
    for t in range(5):
        bench.step(randn(10, 10, seed=t))
    before = bench.mask.clone()
    bench.step(randn(10, 10, seed=9))
    grown, dropped = bench.mask & ~before, before & ~bench.mask
    assert grown.any()
    assert dropped.any()
    state = bench.optimizer.state[bench.weight][name]
    assert (state[grown] == 0).all()
    assert (bench.weight[grown] == 0).all()
    assert (state[~bench.mask] == 0).all()
    assert (state[before & bench.mask] != 0).all()


@pytest.mark.parametrize("name", ["adamw", "noisy", "sgd"])
def test_15_neither_weights_nor_their_average_hold_anything_inactive_at_any_evaluation(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=2), total_steps=30)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    sparsifier.follow(average)
    stale = copy.deepcopy(average)  # the same average without the Sparsifier's care
    for step in range(30):
        train(model, optimizer, [step])
        average.update_parameters(model)
        stale.update_parameters(model)
        assert inactive_are_positive_zero(model, sparsifier)
        for key, mask in sparsifier.masks.items():
            assert (average.module.get_parameter(key)[~mask] == 0).all()
    assert any((stale.module.get_parameter(key)[~mask] != 0).any() for key, mask in sparsifier.masks.items())
    always = sparsifier.mask_set.counters["4.weight"] == sparsifier.mask_set.counters["4.weight"].max()
    kept = average.module.get_parameter("4.weight")[always]
    torch.testing.assert_close(kept, stale.module.get_parameter("4.weight")[always])


def test_16_an_active_weight_of_value_zero_stays_active() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=5), (8, 8), 100)
    active = bench.mask.clone()
    with torch.no_grad():
        bench.weight.zero_()
    for _ in range(4):
        bench.step(torch.zeros(8, 8))
    assert torch.equal(bench.mask, active)
    state = bench.sparsifier.state_dict()
    again = Bench(RigL(sparsity=0.5, update_every=5), (8, 8), 100)
    again.sparsifier.load_state_dict(state)
    assert torch.equal(again.mask, active)
    assert int(again.counters.sum()) == 32
    assert bench.sparsifier.freeze().nnz == 32


def test_17_an_update_follows_the_step_and_uses_the_gradient_of_that_step() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=2), (6, 6), 100, lambda p: torch.optim.SGD(p, lr=0.1))
    bench.step(torch.zeros(6, 6))
    active = bench.mask.clone()
    place = tuple(active.logical_not().nonzero()[-1].tolist())
    gradient = torch.zeros(6, 6)
    gradient[place] = 5.0
    gradient[active] = 0.01
    before = bench.weight.detach().clone()
    bench.step(gradient)
    assert bench.mask[place]  # grown by this step's gradient at an inactive place
    assert bench.weight[place] == 0  # which moved nothing
    still = active & bench.mask
    torch.testing.assert_close(bench.weight[still].detach(), (before - 0.1 * gradient)[still])


def test_18_updates_stop_and_the_drop_fraction_falls_to_zero() -> None:
    bench = Bench(DSTEE(sparsity=0.8, update_every=10, stop_at=0.75), (10, 10), 100)
    masks, fractions, final = [], [], []
    for t in range(1, 101):
        bench.step(randn(10, 10, seed=t))
        masks.append(bench.mask.clone())
        fractions.append(bench.sparsifier.metrics()["drop_fraction"])
        final.append(bench.sparsifier.masks_final)
    changes = [t for t in range(2, 101) if not torch.equal(masks[t - 1], masks[t - 2])]
    assert all(t % 10 == 0 and t < 75 for t in changes)
    assert final == [t >= 70 for t in range(1, 101)]
    assert fractions[:74] == sorted(fractions[:74], reverse=True)
    assert fractions[74:] == [0.0] * 26
    assert fractions[0] == pytest.approx(0.3, abs=1e-3)


def test_18_the_step_of_the_stop_itself_has_no_update_with_a_fraction_that_does_not_fall() -> None:
    bench = Bench(RigL(sparsity=0.8, update_every=10, stop_at=0.7, drop_schedule="constant"), (10, 10), 100)
    masks = [bench.mask.clone()]
    for t in range(1, 101):
        bench.step(randn(10, 10, seed=t))
        masks.append(bench.mask.clone())
    changes = [t for t in range(1, 101) if not torch.equal(masks[t], masks[t - 1])]
    assert changes == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("cut", range(1, 20, 2))
def test_19_a_training_that_resumes_ends_in_the_same_bits(cut: int) -> None:
    def start(seed: int) -> tuple[Any, torch.optim.Optimizer, Sparsifier]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        methods = (
            dst_ee(update_every=3, c=0.05),
            SNFS(sparsity=0.8, update_every=3),
            SET(sparsity=0.8, update_every=3),
        )
        return model, optimizer, Sparsifier(model, optimizer, methods[cut % 3], total_steps=20, seed=seed)

    model, optimizer, sparsifier = start(3)
    train(model, optimizer, range(cut))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    train(model, optimizer, range(cut, 20))
    again, other, resumed = start(99)
    for target, state in zip((again, other, resumed), saved, strict=True):
        target.load_state_dict(state)
    train(again, other, range(cut, 20))
    assert resumed.mask_set.digest() == sparsifier.mask_set.digest()
    assert all(
        torch.equal(value, resumed.mask_set.counters[key]) for key, value in sparsifier.mask_set.counters.items()
    )
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))


def test_20_ties_go_to_the_lowest_index_every_time() -> None:
    bench = Bench(DSTEE(sparsity=0.75, c=0.1, update_every=1, drop_fraction=0.5, drop_schedule="constant"), (4, 8), 100)
    with torch.no_grad():
        bench.weight.copy_(bench.mask.float())
    active = indices(bench.mask)
    bench.step(torch.zeros(4, 8))  # step 1: no bonus, all scores are 0
    candidates = sorted({*range(32)} - set(active[4:]))
    assert indices(bench.mask) == sorted(active[4:] + candidates[:4])


def test_21_the_first_outputs_of_a_sparse_layer_can_be_as_large_as_those_of_a_dense_one() -> None:
    """Var(W x) is proportional to the fan-in: without `sparse_init` the layer's outputs shrink by sqrt(density)."""
    deviation = {}
    for scaled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(1000, 500, bias=False)
        nn.init.kaiming_normal_(model.weight, nonlinearity="linear")
        Sparsifier(model, sgd(model.parameters()), Static(sparsity=0.9, sparse_init=scaled), total_steps=1)
        with torch.no_grad():
            deviation[scaled] = float(model(randn(200, 1000, seed=1)).std())
    assert deviation[False] == pytest.approx(math.sqrt(0.1), rel=0.03)
    assert deviation[True] == pytest.approx(1.0, rel=0.03)


def test_21_masks_are_final_only_after_the_last_update() -> None:
    """So that what is selected had its statistics settled: the loop only considers epochs with final masks."""
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=4, stop_at=0.75), total_steps=40)
    digests, final = [], []
    for step in range(40):
        train(model, optimizer, [step])
        digests.append(sparsifier.mask_set.digest())
        final.append(sparsifier.masks_final)
    assert len(set(digests[final.index(True) :])) == 1
    assert digests[final.index(True)] != digests[final.index(True) - 1]


def test_22_memory_is_three_bytes_per_sparse_weight_and_none_for_dense_layers() -> None:
    weights = {"sparse": torch.zeros(64, 64), "dense": torch.zeros(64, 64)}
    masks = MaskSet.dense(weights)
    masks.start(weights, {"sparse": torch.zeros(64, 64, dtype=torch.bool)})
    stored = [masks["sparse"], masks["dense"], *masks.counters.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in stored) <= 3 * 64 * 64 + 1


def test_22_a_state_holds_masks_as_bits_and_counters_as_int16_that_never_wrap() -> None:
    bench = Bench(RigL(sparsity=0.9, update_every=1, stop_at=1.0), (32, 32), 100_000)
    bench.counters.fill_(32_766)
    for t in range(3):
        bench.step(randn(32, 32, seed=t))
    state = bench.sparsifier.state_dict()
    assert state["masks"]["weight"].dtype == torch.uint8
    assert state["masks"]["weight"].numel() == 32 * 32 // 8
    assert state["counters"]["weight"].dtype == torch.int16
    assert int(state["counters"]["weight"].min()) == 32_766
    assert int(state["counters"]["weight"].max()) == 32_767


def test_23_the_epoch_is_selected_on_samples_held_out_from_training_and_the_test_split_is_read_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample is known by its two first pixels, so that what was read, when and for what is seen.

    The labels are noise: the training accuracy rises to the end, while the validation accuracy has its best epoch
    somewhere, and the test accuracy elsewhere.
    """
    pytest.importorskip("lightning_fabric")
    from sparsepipe import data
    from sparsepipe.artefact import draft
    from sparsepipe.data import ArraySplit, Dataset
    from sparsepipe.recipe import parse
    from sparsepipe.spec import Preprocessing
    from sparsepipe.stages import trainer
    from sparsepipe.stages.assembly import Assembly
    from sparsepipe.stages.train import TrainConfig
    from sparsepipe.training.device import fabric
    from sparsepipe.training.loop import Epoch, Loop

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (90, 6, 6, 1), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(90)
    labels = generator.integers(0, 3, 90)
    splits = ArraySplit(pixels[:60], labels[:60]), ArraySplit(pixels[60:], labels[60:])
    dataset = Dataset("own", ("a", "b", "c"), *splits, (1, 6, 6), Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)))
    monkeypatch.setattr(data, "load", lambda *_: dataset)
    log: list[tuple[str, set[int]]] = []
    loops: list[Loop] = []
    epochs: list[Epoch] = []

    def watched(*arguments: Any) -> Assembly:
        training = assemble(*arguments)
        loops.append(training.loop)
        training.loop.model.register_forward_pre_hook(
            lambda model, inputs: log.append(
                ("train" if model.training else "evaluate", {round(value) for value in inputs[0][:, 0, 0, 0].tolist()})
            )
        )
        finish = training.loop._finish
        monkeypatch.setattr(training.loop, "_finish", lambda *given: epochs.append(finish(*given)) or epochs[-1])
        return training

    assemble = trainer.assemble
    monkeypatch.setattr(trainer, "assemble", watched)
    table = {
        "model": "mlp",
        "data": "own",
        "method": {"name": "dense"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "train": {"epochs": 8, "batch_size": 8, "validation": 0.4},
    }
    config = TrainConfig.from_recipe(parse(table))
    with draft(tmp_path / "out", "train", config, {}, resumable=True) as building:
        trainer.train(config, fabric("cpu", "fp32"), building, {}, None)

    (loop,) = loops
    trained = set().union(*(samples for kind, samples in log if kind == "train"))
    looked_at = [samples for kind, samples in log if kind == "evaluate"]
    held_out = set(range(60)) - trained
    assert len(trained) == 36
    assert looked_at[:8] == [held_out] * 8, "each epoch is scored on what was held out, and on all of it"
    assert looked_at[8:] == [held_out, set(range(60, 90))], "the test split is read once, after the selection"
    assert max(at for at, (kind, _) in enumerate(log) if kind == "train") < len(log) - 3
    accuracies = [epoch.validation.accuracy for epoch in epochs]
    assert loop.best is not None
    assert accuracies[loop.best["epoch"] - 1] == max(accuracies)
    assert accuracies[-1] < max(accuracies), "the last epoch is not the best one by accident"
    assert max(range(8), key=lambda at: epochs[at].train.accuracy) + 1 != loop.best["epoch"]


def test_24_masks_weights_and_state_change_in_place_and_keep_their_layout() -> None:
    torch.manual_seed(0)
    model: Any = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, DSTEE(sparsity=0.7, update_every=2), total_steps=30)

    def tensors() -> list[Tensor]:
        state = optimizer.state[model.weight]
        masks = sparsifier.mask_set
        return [masks["weight"], masks.counters["weight"], model.weight, state["exp_avg"], state["exp_avg_sq"]]

    for step in range(20):
        optimizer.zero_grad()
        model(randn(2, 4, 5, 5, seed=step).to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()
        if step == 0:
            addresses = [tensor.data_ptr() for tensor in tensors()]
            first = sparsifier.masks["weight"].clone()
    assert not torch.equal(first, sparsifier.masks["weight"])
    assert [tensor.data_ptr() for tensor in tensors()] == addresses
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors())
