"""The family DropGrow against a plain reimplementation, closed forms and the list of what others get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.pattern import NM, parse
from sparsepipe.sparsity.scores import acquisition
from sparsepipe.sparsity.sparsifier import Sparsifier

FAMILY: list[Callable[..., DropGrow]] = [DSTEE, RigL, SET]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.Flatten(),
        nn.Linear(576, 8),
    )


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 4, 8, 8, generator=generator), torch.randint(0, 8, (16,), generator=generator))
        for _ in range(count)
    ]


def train(method: Method, steps: int = 40, scale: float = 1.0, seed: int = 0) -> tuple[nn.Module, Sparsifier]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 / scale, momentum=0.9, nesterov=True)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=steps, seed=seed)
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss: Any = scale * cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return model, sparsifier


class Bench:
    """One linear layer whose gradients are given by hand."""

    def __init__(
        self,
        method: Method,
        shape: tuple[int, int],
        total_steps: int,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.01),
    ) -> None:
        torch.manual_seed(0)
        model = nn.Linear(shape[1], shape[0], bias=False)
        self.weight = model.weight
        self.optimizer = optimizer([model.weight])
        self.sparsifier = Sparsifier(model, self.optimizer, method, total_steps=total_steps)

    @property
    def mask(self) -> Tensor:
        return self.sparsifier.masks["weight"]

    @property
    def counters(self) -> Tensor:
        return self.sparsifier.mask_set.counters["weight"]

    def step(self, gradient: Tensor) -> None:
        self.weight.grad = gradient.clone()
        self.optimizer.step()


def best(scores: Sequence[float], candidates: Sequence[int], count: int) -> list[int]:
    return sorted(candidates, key=lambda index: (-scores[index], index))[:count]


@pytest.mark.parametrize("exclude", [False, True])
def test_masks_and_weights_follow_the_published_algorithm_exactly(exclude: bool) -> None:
    """Every update of DST-EE, with SGD and momentum, done over again with Python lists."""
    steps, every, c, eps, lr, momentum = 60, 4, 0.05, 0.5, 0.1, 0.9
    method = DSTEE(sparsity=0.7, c=c, eps=eps, update_every=every, drop_fraction=0.4, exclude_just_dropped=exclude)
    bench = Bench(method, (6, 10), steps, lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum))
    weight, velocity = bench.weight.detach().clone().flatten(), torch.zeros(60)
    active = set(bench.mask.flatten().nonzero().flatten().tolist())
    rounds = [int(index in active) for index in range(60)]
    updates = 0
    for t in range(1, steps + 1):
        gradient = torch.randn(60, generator=torch.Generator().manual_seed(t))
        bench.step(gradient.reshape(6, 10))
        inactive = [index for index in range(60) if index not in active]
        local = gradient.clone()
        local[inactive] = 0
        velocity = velocity * momentum + local
        weight = weight - lr * velocity
        if t % every == 0 and t < 0.75 * steps:
            updates += 1
            fraction = 0.4 / 2 * (1 + math.cos(math.pi * t / (0.75 * steps)))
            count = math.floor(fraction * len(active))
            dropped = set(sorted(active, key=lambda index: (abs(float(weight[index])), index))[:count])
            score = [abs(float(gradient[i])) + c * math.log(t) / (rounds[i] + eps) for i in range(60)]
            candidates = [i for i in range(60) if i not in active or (i in dropped and not exclude)]
            new = (active - dropped) | set(best(score, candidates, count))
            weight[list(active ^ new)] = 0
            velocity[list(active ^ new)] = 0
            active = new
            rounds = [number + (index in active) for index, number in enumerate(rounds)]
        assert set(bench.mask.flatten().nonzero().flatten().tolist()) == active
        torch.testing.assert_close(bench.weight.detach().flatten(), weight, rtol=1e-5, atol=1e-6)
    assert updates == 11
    assert bench.counters.flatten().tolist() == rounds


def test_c_zero_is_rigl_bit_for_bit() -> None:
    shared: dict[str, Any] = {"sparsity": 0.8, "update_every": 5, "drop_fraction": 0.3}
    dst_ee, rigl = train(DSTEE(c=0.0, **shared)), train(RigL(**shared))
    assert dst_ee[1].mask_set.digest() == rigl[1].mask_set.digest()
    for ours, theirs in zip(dst_ee[0].state_dict().values(), rigl[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert train(DSTEE(c=0.1, **shared))[1].mask_set.digest() != rigl[1].mask_set.digest()


def test_point_1_the_bonus_is_added_to_the_magnitude_and_not_to_the_signed_gradient() -> None:
    gradient, counters = torch.tensor([-0.5, 0.1, -0.5]), torch.tensor([0, 0, 3], dtype=torch.int16)
    score = acquisition(gradient, counters, step=1000, c=0.0724, eps=1.0)
    bonus = 0.0724 * math.log(1000)  # about 0.5: the signed form would cancel the first score
    torch.testing.assert_close(score, torch.tensor([0.5 + bonus, 0.1 + bonus, 0.5 + bonus / 4]))
    signed = (gradient + bonus / (counters + 1.0)).abs()
    assert int(score.argmax()) == 0
    assert int(signed.argmax()) == 1


def test_point_2_the_bonus_is_zero_where_the_logarithm_is_not_defined_or_zero() -> None:
    gradient, counters = torch.tensor([1.0, -2.0]), torch.zeros(2, dtype=torch.int16)
    for step in (0, 1):
        assert acquisition(gradient, counters, step, c=10.0, eps=1.0).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("method", FAMILY)
def test_point_2_counters_start_at_the_mask_and_count_each_update_once(method: Callable[..., DropGrow]) -> None:
    steps = 41
    bench = Bench(method(sparsity=0.75, update_every=2, stop_at=1.0), (12, 12), steps)
    always, updates = bench.mask.clone(), 0
    assert torch.equal(bench.counters, bench.mask.to(torch.int16))
    previous = bench.counters.clone()
    for t in range(1, steps):
        bench.step(torch.randn(12, 12, generator=torch.Generator().manual_seed(t)))
        updates += t % 2 == 0
        always &= bench.mask
        expected = previous + bench.mask if t % 2 == 0 else previous
        assert torch.equal(bench.counters, expected)  # grown weights keep their old count, dropped ones too
        previous = bench.counters.clone()
    assert updates == 20
    assert int(bench.counters.sum()) == (updates + 1) * 36
    assert always.any()
    assert (bench.counters[always] == updates + 1).all()


def test_point_3_just_dropped_weights_may_regrow_and_then_keep_value_and_state() -> None:
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


def test_point_3_just_dropped_weights_can_be_excluded_while_others_are_left() -> None:
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
        crowded.step(torch.randn(4, 5, generator=torch.Generator().manual_seed(t)))
        assert int(crowded.mask.sum()) == 18


ADVERSARIES: dict[str, Callable[[int, Tensor], Tensor]] = {
    "zero": lambda t, mask: torch.zeros(mask.shape),
    "equal": lambda t, mask: torch.ones(mask.shape),
    "active only": lambda t, mask: mask.float(),
    "inactive only": lambda t, mask: -(~mask).float() * 1e30,
    "one weight": lambda t, mask: torch.nn.functional.one_hot(torch.tensor(t % mask.numel()), mask.numel()).reshape(
        mask.shape
    ),
    "coarse": lambda t, mask: torch.randint(-1, 2, mask.shape, generator=torch.Generator().manual_seed(t)),
    "tiny": lambda t, mask: torch.full(mask.shape, 1e-45),
    "nan where inactive": lambda t, mask: torch.where(mask, 0.1, math.nan),
    "infinite where inactive": lambda t, mask: torch.where(mask, 0.1, math.inf * (-1) ** t),
}


@settings(max_examples=10)
@given(
    st.sampled_from(FAMILY),
    st.sampled_from(["unstructured", "2x1", "2x2", "2:4", "1:4", "channel", "constant-fan-in"]),
    st.sampled_from([0.3, 0.75, 0.9]),
    st.lists(st.sampled_from(sorted(ADVERSARIES)), min_size=1, max_size=3),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.booleans(),
)
def test_point_4_nnz_is_exact_through_1000_updates_whatever_the_gradients(
    method: Callable[..., DropGrow], pattern: str, sparsity: float, adversaries: list[str], drop: float, exclude: bool
) -> None:
    shape = parse(pattern)
    if isinstance(shape, NM):
        sparsity = 1 - shape.n / shape.m
    options: dict[str, Any] = {
        "sparsity": sparsity,
        "pattern": pattern,
        "update_every": 1,
        "stop_at": 1.0,
        "drop_fraction": drop,
    }
    bench = Bench(method(**options, drop_schedule="constant", exclude_just_dropped=exclude), (8, 12), 1001)
    nnz = int(bench.mask.sum())
    rows = shape.rows(bench.mask).sum(dim=1)
    for t in range(1000):
        bench.step(ADVERSARIES[adversaries[t % len(adversaries)]](t, bench.mask).float())
        assert int(bench.mask.sum()) == nnz
        if t % 50 == 0:
            kept = shape.rows(bench.mask)
            assert torch.equal(shape.unfold(kept, (8, 12)), bench.mask)  # whole groups
            assert torch.equal(kept.sum(dim=1), rows)  # the same number in every row
            assert (bench.weight[~bench.mask] == 0).all()


def test_point_4_counts_at_the_start_are_exact_and_not_only_expected() -> None:
    for seed in range(5):
        _, sparsifier = train(RigL(sparsity=0.85, update_every=100), steps=1, seed=seed)
        sizes = 4 * 8 * 9 + 8 * 16 * 9 + 576 * 8
        assert sparsifier.mask_set.nnz == round(0.15 * sizes)


def test_point_5_layers_that_erk_keeps_dense_are_skipped_and_count_fully_in_r() -> None:
    _, sparsifier = train(RigL(sparsity=0.8, update_every=5, overrides=[{"layers": "5", "sparsity": 0.9}]))
    masks = sparsifier.mask_set
    dense = [name for name in masks if masks[name].all()]
    assert dense == []
    _, sparsifier = train(RigL(sparsity=0.4, update_every=5, overrides=[{"layers": "5", "sparsity": 0.9}]))
    masks = sparsifier.mask_set
    dense = [name for name in masks if masks[name].all()]
    assert dense == ["0.weight"]
    assert dense[0] not in masks.counters
    assert masks.reasons[dense[0]] == "erk keeps it dense"
    explored = sum(int((counter > 0).sum()) for counter in masks.counters.values())
    assert masks.exploration_rate() == (explored + masks[dense[0]].numel()) / masks.size


def test_point_16_an_active_weight_of_value_zero_stays_active() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=5), (8, 8), 100)
    active = bench.mask.clone()
    with torch.no_grad():
        bench.weight.zero_()
    for _ in range(4):
        bench.step(torch.zeros(8, 8))
    assert torch.equal(bench.mask, active)
    restored = bench.sparsifier.state_dict()
    assert int(restored["counters"]["weight"].sum()) == 32


def test_point_17_an_update_follows_the_step_and_uses_the_gradient_of_that_step() -> None:
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


def test_point_18_updates_stop_and_the_drop_fraction_falls_to_zero() -> None:
    bench = Bench(DSTEE(sparsity=0.8, update_every=10, stop_at=0.75), (10, 10), 100)
    masks, fractions, final = [], [], []
    for t in range(1, 101):
        bench.step(torch.randn(10, 10, generator=torch.Generator().manual_seed(t)))
        masks.append(bench.mask.clone())
        fractions.append(bench.sparsifier.metrics()["drop_fraction"])
        final.append(bench.sparsifier.masks_final)
    changes = [t for t in range(2, 101) if not torch.equal(masks[t - 1], masks[t - 2])]
    assert all(t % 10 == 0 and t < 75 for t in changes)
    assert final == [t >= 70 for t in range(1, 101)]
    assert fractions[:74] == sorted(fractions[:74], reverse=True)
    assert fractions[74:] == [0.0] * 26
    assert fractions[0] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("drop_schedule", "expected"), [("cosine", 0.15), ("linear", 0.15), ("constant", 0.3), (lambda t: t / 1000, 0.05)]
)
def test_drop_fraction_schedules(drop_schedule: object, expected: float) -> None:
    options: dict[str, Any] = (
        {"drop_fraction": drop_schedule} if callable(drop_schedule) else {"drop_schedule": drop_schedule}
    )
    bench = Bench(RigL(sparsity=0.5, update_every=1000, stop_at=1.0, **options), (20, 20), 100)
    bench.sparsifier.step = 50
    assert bench.sparsifier.metrics()["drop_fraction"] == pytest.approx(expected)


def test_point_20_ties_go_to_the_lowest_index_every_time() -> None:
    bench = Bench(DSTEE(sparsity=0.75, c=0.1, update_every=1, drop_fraction=0.5, drop_schedule="constant"), (4, 8), 100)
    with torch.no_grad():
        bench.weight.copy_(bench.mask.float())
    active = bench.mask.flatten().nonzero().flatten().tolist()
    bench.step(torch.zeros(4, 8))  # step 1: no bonus, all scores are 0
    candidates = sorted({*range(32)} - set(active[4:]))
    assert bench.mask.flatten().nonzero().flatten().tolist() == sorted(active[4:] + candidates[:4])


@pytest.mark.parametrize(("density", "fraction", "rounds"), [(0.1, 0.5, 8), (0.05, 0.3, 12), (0.2, 0.2, 5)])
def test_random_growth_explores_as_its_formula_says(density: float, fraction: float, rounds: int) -> None:
    """E[R] = 1 - (1-d) prod_q (1 - p d / (1-d + p d)), within four standard deviations."""
    side = 120
    options: dict[str, Any] = {
        "update_every": 1,
        "stop_at": 1.0,
        "drop_fraction": fraction,
        "drop_schedule": "constant",
    }
    bench = Bench(SET(sparsity=1 - density, **options), (side, side), rounds + 1)
    for t in range(rounds):
        bench.step(torch.randn(side, side, generator=torch.Generator().manual_seed(t)))
    expected = 1 - (1 - density) * (1 - fraction * density / (1 - density + fraction * density)) ** rounds
    deviation = math.sqrt(expected * (1 - expected)) / side
    assert bench.sparsifier.mask_set.exploration_rate() == pytest.approx(expected, abs=4 * deviation)


@pytest.mark.parametrize(("sparsity", "rounds", "bound"), [(0.9, 10, 0.1 * (1 + 10 * 0.3)), (0.8, 40, 1.0)])
def test_a_huge_bonus_reaches_the_coverage_bound(sparsity: float, rounds: int, bound: float) -> None:
    """R_max = min(1, d (1 + sum p)): nothing is grown twice while anything was never active."""
    options: dict[str, Any] = {"update_every": 1, "stop_at": 1.0, "drop_fraction": 0.3, "drop_schedule": "constant"}
    method = DSTEE(sparsity=sparsity, c=1e6, eps=1e-6, **options)
    bench = Bench(method, (50, 40), rounds + 3)
    bench.sparsifier.step = 1  # ln t > 0 from the first update on
    for t in range(rounds):
        bench.step(torch.randn(50, 40, generator=torch.Generator().manual_seed(t)))
    assert bench.sparsifier.mask_set.exploration_rate() == pytest.approx(bound, abs=1e-9)


def test_point_12_a_scaled_loss_leaves_rigl_unchanged_and_dst_ee_only_with_a_scaled_c() -> None:
    shared: dict[str, Any] = {"sparsity": 0.8, "update_every": 5}
    digests = [train(RigL(**shared), scale=k)[1].mask_set.digest() for k in (1.0, 1024.0)]
    assert digests[0] == digests[1]
    plain, same_c, scaled_c = (
        train(DSTEE(c=c, **shared), scale=k)[1].mask_set.digest() for c, k in ((0.01, 1), (0.01, 1024), (10.24, 1024))
    )
    assert plain == scaled_c
    assert plain != same_c


@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_point_14_grown_and_dropped_weights_have_fresh_state_and_others_keep_theirs(name: str) -> None:
    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        if name == "momentum_buffer":
            return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)

    bench = Bench(RigL(sparsity=0.7, update_every=6, drop_fraction=0.5), (10, 10), 100, make)
    for t in range(5):
        bench.step(torch.randn(10, 10, generator=torch.Generator().manual_seed(t)))
    before = bench.mask.clone()
    bench.step(torch.randn(10, 10, generator=torch.Generator().manual_seed(9)))
    grown, dropped = bench.mask & ~before, before & ~bench.mask
    assert grown.any()
    assert dropped.any()
    state = bench.optimizer.state[bench.weight][name]
    assert (state[grown] == 0).all()
    assert (bench.weight[grown] == 0).all()
    assert (state[~bench.mask] == 0).all()
    assert (state[before & bench.mask] != 0).all()


def test_point_24_masks_weights_and_state_change_in_place() -> None:
    bench = Bench(DSTEE(sparsity=0.7, update_every=2), (10, 10), 100, lambda p: torch.optim.Adam(p, lr=0.01))
    bench.step(torch.ones(10, 10))
    state = bench.optimizer.state[bench.weight]
    tensors = [bench.mask, bench.counters, bench.weight, state["exp_avg"], state["exp_avg_sq"]]
    addresses = [tensor.data_ptr() for tensor in tensors]
    for t in range(20):
        bench.step(torch.randn(10, 10, generator=torch.Generator().manual_seed(t)))
    tensors = [bench.mask, bench.counters, bench.weight, state["exp_avg"], state["exp_avg_sq"]]
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_random_growth_depends_on_seed_name_and_step_alone() -> None:
    digests = []
    for disturbance in (0, 123):
        torch.manual_seed(disturbance)
        digests.append(train(SET(sparsity=0.8, update_every=5), seed=7)[1].mask_set.digest())
    assert digests[0] == digests[1]
    assert train(SET(sparsity=0.8, update_every=5), seed=8)[1].mask_set.digest() != digests[0]


def test_a_weight_without_gradient_keeps_its_mask_and_is_counted() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.5, update_every=1), total_steps=10)
    idle = sparsifier.masks["idle.weight"].clone()
    for _ in range(3):
        optimizer.zero_grad()
        model["used"](torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert torch.equal(sparsifier.masks["idle.weight"], idle)
    assert sparsifier.mask_set.counters["idle.weight"].max() == 4


def test_updates_that_can_never_happen_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    train(RigL(sparsity=0.5, update_every=100), steps=2)
    assert "never updates the masks" in caplog.text
