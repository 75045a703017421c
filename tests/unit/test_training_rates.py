"""Learning rates against their closed forms."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from sparsepipe.errors import RecipeError  # noqa: E402
from sparsepipe.training import optimizers, rates  # noqa: E402


def create(name: str, **settings: object) -> rates.Rate:
    defaults: dict[str, object] = {"total": 100, "warmup": 0, "milestones": (0.5, 0.75), "gamma": 0.1}
    return rates.create(name, **{**defaults, **settings})  # type: ignore[arg-type]


def test_cosine_falls_from_one_through_a_half_to_almost_zero() -> None:
    rate = create("cosine")
    assert rate(0) == 1
    assert rate(50) == pytest.approx(0.5)
    assert rate(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert 0 < rate(99) < 3e-4


def test_cosine_equals_torchs_own_scheduler() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    rate = create("cosine", total=40)
    for step in range(40):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * rate(step))
        optimizer.step()
        scheduler.step()


def test_multistep_multiplies_at_each_milestone() -> None:
    rate = create("multistep", total=160, gamma=0.1)
    assert [rate(step) for step in (0, 79, 80, 119, 120, 159)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_constant_stays() -> None:
    assert {create("constant")(step) for step in range(100)} == {1.0}


@pytest.mark.parametrize("name", ["cosine", "multistep", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_full_rate(name: str) -> None:
    rate = create(name, warmup=4)
    assert [rate(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_runs_over_what_the_warm_up_leaves() -> None:
    rate = create("cosine", warmup=20)
    assert rate(60) == pytest.approx(0.5)
    assert rate(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


def test_a_warm_up_longer_than_the_training_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"schedule\.warmup.*100 steps"):
        create("cosine", warmup=100)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(RecipeError, match="cosine, multistep, constant"):
        create("linear")


def optimizer(name: str, model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    defaults = {
        "lr": 0.1,
        "weight_decay": 0.5,
        "momentum": 0.9,
        "nesterov": True,
        "betas": (0.8, 0.9),
        "decay_norms": True,
    }
    return optimizers.create(name, model, **{**defaults, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_can_spare_biases_and_norms(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer(name, model, decay_norms=False).param_groups
        for parameter in group["params"]
    }
    expected = {"0.weight": 0.5, "0.bias": 0, "1.weight": 0, "1.bias": 0}
    assert {key: decays[id(parameter)] for key, parameter in model.named_parameters()} == expected
    assert [group["weight_decay"] for group in optimizer(name, model).param_groups] == [0.5]


def test_optimizers_take_their_own_settings() -> None:
    model = nn.Linear(2, 2)
    sgd, adamw = optimizer("sgd", model), optimizer("adamw", model)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, True)
    assert adamw.defaults["betas"] == (0.8, 0.9)


def test_nesterov_without_momentum_is_plain_sgd() -> None:
    assert optimizer("sgd", nn.Linear(2, 2), momentum=0.0).defaults["nesterov"] is False


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(RecipeError, match="sgd, adamw"):
        optimizer("lion", nn.Linear(2, 2))
