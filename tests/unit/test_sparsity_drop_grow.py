"""The family DropGrow against a plain reimplementation, closed forms and the list of what others get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sparse_bench import Bench
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.sparsity.drop_grow import DropGrow
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
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
