"""Modifiers: attacks with known optima, learning rates, composition with methods, resuming, outcomes on digits."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from digits_bench import accuracy, digits, fit
from sparse_bench import batch, dst_ee, inactive_are_positive_zero, network, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.errors import ArtefactError, RecipeError
from sparsepipe.recipe import parse, with_modifiers
from sparsepipe.sparsity import registry as methods
from sparsepipe.sparsity.attacks import InputSpace, pgd
from sparsepipe.sparsity.methods.dense import Dense
from sparsepipe.sparsity.methods.magnitude_oneshot import MagnitudeOneShot
from sparsepipe.sparsity.modifiers import registry
from sparsepipe.sparsity.modifiers.adversarial import Adversarial
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.modifiers.extrapolation import Extrapolation
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.training import checkpoint

UNIT = InputSpace(low=0.0, high=1.0)
TOTAL = 24


def attack(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, space: InputSpace = UNIT, **options: Any) -> Tensor:
    return pgd(model, x, y, epsilon=epsilon, step_size=epsilon / 4, steps=20, space=space, **options)


@pytest.mark.parametrize("random_start", [True, False])
def test_on_a_linear_network_the_attack_finds_the_corner_of_the_ball_in_the_units_of_pixels(random_start: bool) -> None:
    mean, std = np.array([0.2, 0.6]), np.array([0.5, 0.25])
    pixels = np.random.default_rng(0).random((5, 2, 3, 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 2, bias=False)).double()
    direction = (model[1].weight[1] - model[1].weight[0]).detach().numpy().reshape(2, 3, 3)
    inputs = torch.tensor((pixels - mean[:, None, None]) / std[:, None, None])
    space = InputSpace(mean.tolist(), std.tolist(), 0.0, 1.0)
    found = attack(model, inputs, torch.zeros(5, dtype=torch.int64), 0.1, space, random_start=random_start)
    # For label 0 the loss grows along the difference of the rows, so the worst pixels are one step of 0.1 that way.
    worst = np.clip(pixels + 0.1 * np.sign(direction), 0, 1)
    np.testing.assert_allclose(found.numpy() * std[:, None, None] + mean[:, None, None], worst, atol=1e-12)


def test_an_attack_stays_in_the_ball_raises_the_loss_and_leaves_the_network_alone() -> None:
    model = network()
    model[1].eval()
    x, y = batch(0, 64)
    x = x.sigmoid()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = attack(model, x, y, 0.05)
    assert float((found - x).abs().max()) <= 0.05 + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert model.training
    assert not model[1].training
    assert model[0].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        model.eval()
        assert float(cross_entropy(model(found), y)) > float(cross_entropy(model(x), y))


def test_the_learning_rate_starts_slowly_and_decays_fast_after_the_natural_steps() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    modifier = Adversarial(begin=0.5, peak=0.8, first=0.08, last=0.008, peak_at=0.4)
    sparsifier = Sparsifier(model, optimizer, Dense(), total_steps=42, modifiers=[modifier])
    rates = [sparsifier.lr_scale(step) for step in range(1, 43)]
    assert rates[:21] == [None] * 21
    own = np.array(rates[21:], float)  # 21 steps: the 9th is at 0.4
    np.testing.assert_allclose(own[[0, 4, 8, 20]], [0.08, 0.44, 0.8, 0.008])
    assert (np.diff(own[:9]) > 0).all()
    assert (np.diff(own[8:]) < 0).all()
    np.testing.assert_allclose(own[9:] / own[8:-1], 0.01 ** (1 / 12))
    assert not sparsifier.masks_final
    x, y = batch(0)
    assert torch.equal(sparsifier.transform_batch(x, y)[0], x)


class Shift(Modifier):
    """Adds to inputs, and multiplies them."""

    name = "shift"

    def __init__(self, name: str, factor: float, offset: float) -> None:
        self.name = name  # type: ignore[misc]
        self.factor, self.offset = factor, offset

    def transform_batch(self, network: Any, model: Any, inputs: Tensor, labels: Tensor, step: int) -> Any:
        return inputs * self.factor + self.offset, labels


def test_batches_pass_through_modifiers_in_their_order_and_none_may_be_there_twice() -> None:
    model = network()
    make = [Shift("one", 2, 0), Shift("two", 1, 3)]
    sparsifier = Sparsifier(model, sgd(model.parameters()), dst_ee(), total_steps=4, modifiers=make)
    assert torch.equal(sparsifier.transform_batch(torch.ones(1), torch.ones(1))[0], torch.full((1,), 5.0))
    assert sparsifier.method.name == "dst-ee"
    with pytest.raises(RecipeError, match="twice"):
        Sparsifier(model, sgd(model.parameters()), dst_ee(), total_steps=4, modifiers=[*make, make[0]])
    with pytest.raises(RecipeError, match="no modifier"):
        Sparsifier(model, sgd(model.parameters()), dst_ee(), total_steps=4, modifiers=[Dense()])  # type: ignore[list-item]


def steps_of(model: nn.Module, optimizer: Any, sparsifier: Sparsifier, steps: Iterable[int]) -> None:
    for step in steps:
        torch.manual_seed(step)  # loops restore the random state, from which the attack starts
        optimizer.zero_grad()
        x, y = sparsifier.transform_batch(*batch(step))
        cross_entropy(model(x), y).backward()
        optimizer.step()


MODIFIERS: dict[str, Any] = {
    "adversarial": lambda: [Adversarial(epsilon=0.1, begin=0.25, steps=2)],
    "past": lambda: [Extrapolation()],
    "current": lambda: [Extrapolation(gradient="current")],
    "both": lambda: [Adversarial(epsilon=0.1, begin=0.25, steps=2), Extrapolation(gradient="current")],
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_resumed_training_equals_an_uninterrupted_one_and_masks_hold(name: str, tmp_path: Any) -> None:
    def start() -> tuple[Any, Any, Sparsifier]:
        model = network()
        optimizer = sgd(model.parameters())
        made = Sparsifier(model, optimizer, dst_ee(), total_steps=TOTAL, modifiers=MODIFIERS[name]())
        return model, optimizer, made

    whole = start()
    steps_of(*whole, range(TOTAL))
    plain, optimizer = network(), None
    optimizer = sgd(plain.parameters())
    steps_of(plain, optimizer, Sparsifier(plain, optimizer, dst_ee(), total_steps=TOTAL), range(TOTAL))
    assert not torch.equal(plain[0].weight, whole[0][0].weight)
    for cut in (3, 13):
        first = start()
        steps_of(*first, range(cut))
        state = {key: each.state_dict() for key, each in zip("mos", first, strict=True)}
        checkpoint.save(tmp_path, state)
        loaded = checkpoint.load(tmp_path)
        second = start()
        for key, each in zip("mos", second, strict=True):
            each.load_state_dict(loaded[key])
        steps_of(*second, range(cut, TOTAL))
        for ours, theirs in zip(second[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
        assert inactive_are_positive_zero(second[0], second[2])
    other = network()
    with pytest.raises(ArtefactError, match="modifiers"):
        Sparsifier(other, sgd(other.parameters()), dst_ee(), total_steps=TOTAL).load_state_dict(loaded["s"])


@pytest.mark.parametrize("method", ["rigl", "l0-constrained", "xrda"])
@pytest.mark.parametrize("name", ["adversarial", "past"])
def test_modifiers_resume_beside_growth_gates_and_owned_steps(name: str, method: str) -> None:
    def start() -> tuple[Any, Any, Sparsifier]:
        model = network()
        optimizer = sgd(model.parameters())
        made = methods.create(method, {"sparsity": 0.7, "update_every": 4})
        return model, optimizer, Sparsifier(model, optimizer, made, total_steps=TOTAL, modifiers=MODIFIERS[name]())

    whole, first, second = start(), start(), start()
    steps_of(*whole, range(TOTAL))
    steps_of(*first, range(13))
    for ours, theirs in zip(second, first, strict=True):
        ours.load_state_dict(deepcopy(theirs.state_dict()))
    steps_of(*second, range(13, TOTAL))
    assert whole[2].freeze().digest() == second[2].freeze().digest()
    for ours, theirs in zip(second[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert inactive_are_positive_zero(second[0], second[2])


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"]
)
def test_zeta_is_the_gradient_whatever_the_optimizer_makes_of_it(options: dict[str, Any]) -> None:
    """Some add the momentum to `.grad` in place, and fused ones write the gradient that they unscaled there."""
    model, lr, rate, momentum, scale = nn.Linear(1, 1, bias=False).double(), 0.1, 0.5, 0.9, 8.0
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=True, **options)
    if options.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)  # type: ignore[attr-defined]
    else:
        scale = 1.0
    Sparsifier(model, optimizer, Dense(), total_steps=30, modifiers=[Extrapolation(rate=rate)])
    w, zeta, velocity = 1.0, 0.0, 0.0
    for _ in range(30):
        optimizer.zero_grad()
        (scale * 0.25 * model(torch.ones(1, 1, dtype=torch.float64)) ** 2).sum().backward()
        optimizer.step()
        zeta = 0.5 * (w - rate * lr * zeta)
        velocity = momentum * velocity + zeta
        w -= lr * (zeta + momentum * velocity)
        assert model.weight.item() == pytest.approx(w, rel=1e-6)


def test_current_extrapolation_of_transformed_weights_is_refused() -> None:
    model = network()
    made = methods.create("l0-constrained", {"sparsity": 0.7})
    with pytest.raises(RecipeError, match="gradients that extrapolation takes"):
        Sparsifier(
            model, sgd(model.parameters()), made, total_steps=TOTAL, modifiers=[Extrapolation(gradient="current")]
        )


@pytest.mark.parametrize("h", [0.5, 2.0])
def test_past_extrapolation_follows_the_recursion_of_a_quadratic(h: float) -> None:
    model, lr, rate = nn.Linear(1, 1, bias=False).double(), 0.1, 0.5
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    Sparsifier(model, optimizer, Dense(), total_steps=30, modifiers=[Extrapolation(rate=rate)])
    w, zeta = 1.0, 0.0
    for _ in range(30):
        optimizer.zero_grad()
        (h / 2 * model(torch.ones(1, 1, dtype=torch.float64)) ** 2).sum().backward()
        optimizer.step()
        zeta = h * (w - rate * lr * zeta)
        w -= lr * zeta
        assert model.weight.item() == pytest.approx(w, rel=1e-12)


def test_the_shift_follows_the_learning_rate_of_a_schedule() -> None:
    """gh = rate * lr stays below lr when lr falls a hundredfold: the recursion, with the rate of each step."""
    h, rate = 2.0, 0.5
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, Dense(), total_steps=12, modifiers=[Extrapolation(rate=rate)])
    w, shift = 1.0, 0.0
    for step in range(12):
        lr = optimizer.param_groups[0]["lr"] = 0.1 * 10 ** (-step / 6)
        optimizer.zero_grad()
        (h / 2 * model(torch.ones(1, 1, dtype=torch.float64)) ** 2).sum().backward()
        optimizer.step()
        gradient = h * (w - shift)
        w -= lr * gradient
        shift = rate * lr * gradient
        assert model.weight.item() == pytest.approx(w, rel=1e-12)


def final_norm(gradient: str, rate: float, lr: float, steps: int, game: bool, h: float = 1.0) -> float:
    """Of (x, y) after SGD from (1, 1): both descend h/2 (x^2 + y^2), or x descends xy while y climbs it."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = (nn.Linear(1, 1, bias=False).double() for _ in range(2))

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.stack([self.x.weight[0, 0], self.y.weight[0, 0]])

    def loss(point: Tensor, labels: Tensor) -> Tensor:
        x, y = point
        if not game:
            return h / 2 * (x * x + y * y)
        return x * y.detach() - x.detach() * y  # the gradient of y is that of its own loss, -xy

    model = Point()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    modifiers = [Extrapolation(rate=rate, gradient=gradient)] if rate else []
    sparsifier = Sparsifier(model, optimizer, Dense(), total_steps=steps, modifiers=modifiers, loss=loss)
    for _ in range(steps):
        optimizer.zero_grad()
        inputs, labels = sparsifier.transform_batch(torch.zeros(1), torch.zeros(1))
        loss(model(inputs), labels).backward()
        optimizer.step()
    return float(torch.cat([each.detach().flatten() for each in model.parameters()]).norm()) / 2**0.5


@pytest.mark.parametrize(
    ("h", "lr", "factor"), [(1.0, 0.1, 0.91), (1.0, 0.9, 0.91), (1.0, 1.2, 1.24), (4.0, 0.1, 0.76)]
)
def test_the_extragradient_of_a_quadratic_shrinks_by_its_factor_and_diverges_above_one(
    h: float, lr: float, factor: float
) -> None:
    """1 - lr h + lr gamma h^2 for each step; where lr h is above 1 it diverges, SGD from 2 on only."""
    assert final_norm("current", 1.0, lr, 9, game=False, h=h) == pytest.approx(factor**9, rel=1e-9)


def past_in_the_game() -> float:
    """The recursion in complex numbers, z = x + iy with the gradient -iz: 200 steps at lr 0.1."""
    z, past = 1 + 1j, 0j
    for _ in range(200):
        past = -1j * (z - 0.1 * past)
        z -= 0.1 * past
    return abs(z) / 2**0.5


@pytest.mark.parametrize(
    ("gradient", "rate", "expected"),
    [("past", 0.0, (1 + 0.01) ** 100), ("current", 1.0, (1 - 0.01 + 0.0001) ** 100), ("past", 1.0, past_in_the_game())],
)
def test_in_the_bilinear_game_extrapolation_turns_the_spiral_inwards(
    gradient: str, rate: float, expected: float
) -> None:
    """200 steps at lr 0.1: x 2.7048 without, x 0.3697 by the extragradient, x 0.3660 by the past one."""
    assert final_norm(gradient, rate, 0.1, 200, game=True) == pytest.approx(expected, rel=2e-4)


def test_full_batches_with_momentum_diverge_by_the_current_gradient_at_the_rate_of_the_optimizer() -> None:
    """A trap that the defaults avoid; the past gradient is stable there."""
    found = {}
    for gradient in ("current", "past"):
        modifiers = [Extrapolation(rate=1.0, gradient=gradient)]
        model, _ = fit(Dense(), epochs=40, batch=1437, cosine=False, weight_decay=0.0, lr=0.3, modifiers=modifiers)
        found[gradient] = accuracy(model)
    assert found["current"] < 30
    assert found["past"] > 85


@pytest.mark.parametrize("gradient", ["past", "current"])
def test_extrapolation_of_rate_zero_is_the_optimizer_bit_for_bit(gradient: str) -> None:
    results = []
    for modifiers in ([], [Extrapolation(rate=0.0, gradient=gradient)]):
        model = network()
        optimizer = sgd(model.parameters())
        steps_of(model, optimizer, Sparsifier(model, optimizer, dst_ee(), total_steps=8, modifiers=modifiers), range(8))
        results.append(model.state_dict())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*map(dict.values, results), strict=True))


def test_current_extrapolation_steps_with_the_gradient_of_the_batch_at_the_shifted_point() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    modifiers = [Extrapolation(rate=0.5, gradient="current")]
    sparsifier = Sparsifier(model, optimizer, Dense(), total_steps=5, modifiers=modifiers)
    w = model.weight.detach().numpy().copy()
    for step in range(5):
        generator = np.random.default_rng(step)
        x, y = generator.standard_normal((7, 6)), generator.integers(0, 4, 7)

        def slope(at: Any, x: Any = x, y: Any = y) -> Any:  # softmax regression: (p - onehot)^T x / n
            scores = np.exp(x @ at.T)
            return (scores / scores.sum(1, keepdims=True) - np.eye(4)[y]).T @ x / len(x)

        optimizer.zero_grad()
        inputs, labels = sparsifier.transform_batch(torch.tensor(x), torch.tensor(y))
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        w = w - 0.3 * slope(w - 0.5 * 0.3 * slope(w))
        np.testing.assert_allclose(model.weight.detach().numpy(), w, atol=1e-12)
        assert torch.equal(model(torch.tensor(x)), torch.tensor(x) @ model.weight.T)  # nothing is left shifted


def test_past_extrapolation_on_digits_is_stable_at_the_rate_of_the_optimizer() -> None:
    model, _ = fit(Dense(), epochs=20, batch=256, modifiers=[Extrapolation(rate=1.0)])
    assert accuracy(model) >= 95


def test_recipes_name_modifiers_in_three_forms_and_keep_their_options() -> None:
    base: dict[str, Any] = {"model": "mlp", "data": "digits"}
    assert parse(dict(base)).modifiers == ()
    short = parse(dict(base), ["modifiers=adversarial, extrapolation"])
    assert [each.name for each in short.modifiers] == ["adversarial", "extrapolation"]
    table = parse({**base, "modifiers": ["extrapolation", {"name": "adversarial", "epsilon": 0.2}]})
    only = with_modifiers(table, "adversarial")
    assert [(each.name, each.options) for each in only.modifiers] == [("adversarial", {"epsilon": 0.2})]
    with pytest.raises(RecipeError, match="no modifier 'adversary'"):
        registry.create("adversary")
    with pytest.raises(RecipeError, match="no option 'eps'"):
        registry.create("adversarial", {"eps": 0.1})
    with pytest.raises(RecipeError, match="no option 'inputs'"):
        registry.create("adversarial", {"inputs": UNIT})


def robust(model: nn.Module, epsilon: float) -> float:
    _, _, x, y = digits()
    torch.manual_seed(0)
    found = pgd(model.eval(), x, y, epsilon=epsilon, step_size=epsilon / 8, steps=20, space=UNIT)
    return 100 * float((model(found).argmax(1) == y).float().mean())


@pytest.mark.parametrize("method", [Dense(), MagnitudeOneShot(sparsity=0.9, prune_at=0.5, distribution="global")])
def test_adversarial_fine_tuning_makes_robust_what_was_not_and_keeps_the_sparsity(method: Any) -> None:
    scores: list[float] = []

    def watch(model: nn.Module, sparsifier: Sparsifier) -> None:
        if sparsifier.step == 40 * 22:
            scores.append(robust(model, 0.15))

    modifier = Adversarial(epsilon=0.15, begin=0.8, inputs=UNIT)
    model, sparsifier = fit(method, epochs=50, modifiers=[modifier], after_step=watch)
    assert scores[0] < 25
    assert robust(model, 0.15) >= 55
    assert accuracy(model) >= 94
    if not isinstance(method, Dense):
        assert sparsifier.freeze().sparsity == pytest.approx(0.9, abs=1e-4)
