"""Branches of orthogonal features (BORT): by hand, with methods, over an interruption, and on digits."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from digits_bench import accuracy, digits, fit
from sparse_bench import batch, inactive_are_positive_zero, network, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.errors import ModelError, RecipeError
from sparsepipe.sparsity import registry
from sparsepipe.sparsity.attacks import InputSpace, pgd
from sparsepipe.sparsity.methods.dense import Dense
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.modifiers.adversarial import Adversarial
from sparsepipe.sparsity.modifiers.bort import Bort, cosine
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.sparsifier import Sparsifier

STEPS = 12
"""Of one branch."""
UNIT = InputSpace(low=0.0, high=1.0)
Training = tuple[Any, Any, Sparsifier]


def start(method: Any, modifiers: list[Modifier], branches: int = 3) -> Training:
    model = network()
    optimizer = sgd(model.parameters())
    made = Sparsifier(
        model, optimizer, method, total_steps=branches * STEPS, samples=[batch(7)], modifiers=modifiers, seed=1
    )
    return model, optimizer, made


def advance(training: Training, first: int, last: int) -> None:
    model, optimizer, sparsifier = training
    model.train()
    for step in range(first, last):
        torch.manual_seed(step)  # loops restore the random state, from which attacks start
        optimizer.zero_grad()
        x, y = sparsifier.transform_batch(*batch(step))
        (cross_entropy(model(x), y) + sparsifier.batch_loss(x)).backward()
        optimizer.step()
        assert inactive_are_positive_zero(model, sparsifier)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_cosine_is_that_of_what_a_relu_lets_through() -> None:
    one, other = torch.tensor([[3.0, -1.0], [4.0, 0.0]]), torch.tensor([[0.0, 7.0], [5.0, -2.0]])
    assert cosine(one, other).item() == pytest.approx(4 * 5 / (5 * 74**0.5))
    assert cosine(one, -one) == 0  # anti-parallel features count as orthogonal already
    assert cosine(one, torch.zeros(2, 2)) == 0


def test_the_loss_of_a_branch_is_beta_times_its_mean_cosine_to_the_branches_before() -> None:
    model, _, sparsifier = training = start(Dense(), [Bort(branches=3, beta=2.0)])
    states = []
    for branch in range(3):
        advance(training, branch * STEPS, branch * STEPS + 5)
        x, _ = batch(50)
        features = model[:5](x)  # the second layer, behind the stem: convolution, norm, ReLU and flattening
        model(x)
        loss = sparsifier.batch_loss(x)
        cosines = []
        for state in states:
            earlier = network().eval()
            earlier.load_state_dict(state)
            with torch.no_grad():
                left, right = features.relu().flatten(), earlier[:5](x).relu().flatten()
            cosines.append(float(left @ right / left.norm() / right.norm()))
        assert float(torch.as_tensor(loss).detach()) == pytest.approx(
            2.0 * sum(cosines) / len(cosines) if cosines else 0.0, rel=1e-5
        )
        advance(training, branch * STEPS + 5, (branch + 1) * STEPS)
        states = [*sparsifier.snapshots.values()]
    assert len(states) == 2


METHODS: dict[str, dict[str, Any]] = {
    "rigl": {"sparsity": 0.8, "update_every": 3},
    "set": {"sparsity": 0.8, "update_every": 3},
    "snip": {"sparsity": 0.8},
    "static": {"sparsity": 0.8},
    "gmp": {"sparsity": 0.8, "update_every": 3},
    "acdc": {"sparsity": 0.8},
    "top-kast": {"sparsity": 0.8, "update_every": 3},
    "deepr": {"sparsity": 0.8},
    "autosparse-top-k": {"sparsity": 0.8},
    "l0-constrained": {"sparsity": 0.8, "gate_lr": 1.0, "dual_lr": 10.0},
    "xrda": {"lam": 1e-3},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_branch_is_a_whole_training_that_nothing_changes_later(name: str) -> None:
    """Frozen branches keep their bits, share the stem, and are as sparse as the method alone makes a network."""
    model, _, sparsifier = training = start(registry.create(name, METHODS[name]), [Bort(branches=3)])
    assert set(sparsifier.masks) == {"4.weight", "6.weight"}
    assert list(sparsifier.left_out) == ["0.weight"]
    seen: dict[str, Any] = {}
    for branch in range(3):
        advance(training, branch * STEPS, (branch + 1) * STEPS)
        kept = {kind: state for kind, state in sparsifier.snapshots.items() if kind.startswith("branch")}
        assert len(kept) == min(branch + 1, 2)
        assert all(same(state, kept[kind]) for kind, state in seen.items())
        seen = {kind: {key: value.clone() for key, value in state.items()} for kind, state in kept.items()}
    masks = sparsifier.freeze()
    branches = [*seen.values(), model.state_dict()]
    for one, other in pairwise(branches):
        for key in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
            assert torch.equal(one[key], other[key]), key
        assert not torch.equal(one["4.weight"], other["4.weight"])
        assert not torch.equal(one["4.weight"] != 0, other["4.weight"] != 0)
    if registry.METHODS[name].exact:
        for state in branches:
            nonzero = sum(int(state[key].count_nonzero()) for key in masks)
            assert nonzero <= round(0.2 * masks.size)
        assert masks.nnz == round(0.2 * masks.size)


MODIFIERS: dict[str, Any] = {
    "alone": lambda: [Bort(branches=3)],
    "adversarial": lambda: [Adversarial(epsilon=0.1, begin=0.25, steps=2), Bort(branches=3)],
}


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize("name", ["rigl", "snip", "autosparse-top-k", "l0-constrained"])
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, modifiers: str) -> None:
    def begin() -> Training:
        return start(registry.create(name, METHODS[name]), MODIFIERS[modifiers]())

    whole = begin()
    states = {}
    for first, last in pairwise([0, 5, STEPS, STEPS + 1, 2 * STEPS + 7, 3 * STEPS]):
        states[first] = [copy.deepcopy(part.state_dict()) for part in whole]
        advance(whole, first, last)
    for cut, saved in states.items():
        again = begin()
        for part, state in zip(again, saved, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        advance(again, cut, 3 * STEPS)
        assert same(again[0].state_dict(), whole[0].state_dict()), cut
        assert again[2].mask_set.digest() == whole[2].mask_set.digest()
    assert whole[2].freeze().digest() == again[2].freeze().digest()


def test_each_branch_has_the_learning_rates_and_steps_of_a_training_of_its_own() -> None:
    alone = start(RigL(sparsity=0.8, update_every=3), [], branches=1)
    _, _, sparsifier = start(RigL(sparsity=0.8, update_every=3), [Bort(branches=3)])
    rates = [sparsifier.lr_scale(step) for step in range(1, 3 * STEPS + 1)]
    assert rates[:STEPS] == rates[STEPS : 2 * STEPS] == rates[2 * STEPS :]
    assert rates[0] == 1
    assert rates[STEPS // 2] == pytest.approx(0.5)
    final = [alone[2].masks_final_after(step) for step in range(1, STEPS + 1)]
    assert [sparsifier.masks_final_after(step) for step in range(1, 3 * STEPS + 1)] == [False] * 2 * STEPS + final
    natural = [Adversarial(begin=0.5), Bort(branches=2)]
    _, _, sparsifier = start(Dense(), natural, branches=2)
    rates = [sparsifier.lr_scale(step) for step in range(1, 2 * STEPS + 1)]
    assert rates[STEPS : STEPS + 6] == rates[:6]
    assert rates[6] == pytest.approx(0.005)  # the slow start of the attack stands above the cosine


def test_what_cannot_be_branched_is_one_clear_error() -> None:
    one = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="one layer only"):
        Sparsifier(one, optimizer, Dense(), total_steps=8, modifiers=[Bort()])
    model = network()
    with pytest.raises(RecipeError, match="multiple of 3"):
        Sparsifier(model, sgd(model.parameters()), Dense(), total_steps=8, modifiers=[Bort(branches=3)])
    for options, message in (({"features": "nowhere"}, "no part 'nowhere'"), ({"stem": ["x*"]}, "matches no part")):
        with pytest.raises(ModelError, match=message):
            Sparsifier(model, sgd(model.parameters()), Dense(), total_steps=8, modifiers=[Bort(**options)])
    with pytest.raises(RecipeError, match="list of globs"):
        Bort(stem="conv1")
    _, _, sparsifier = start(Dense(), [Bort(branches=3)])
    with pytest.raises(ModelError, match="3 trainings"):
        sparsifier.follow(copy.deepcopy(model))


def test_parts_can_be_named_and_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[5].weight = model[3].weight
    optimizer = sgd(model.parameters())
    modifiers = [Bort(branches=2, stem=["1"], features="5")]
    sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.5), total_steps=8, modifiers=modifiers)
    advance((model, optimizer, sparsifier), 0, 8)
    first = sparsifier.snapshots["branch-0"]
    assert torch.equal(first["1.weight"], model[1].weight)
    assert torch.equal(model[3].weight, model[5].weight)
    assert not torch.equal(first["3.weight"], model[3].weight)


def robust(model: nn.Module, against: nn.Module | list[nn.Module]) -> float:
    _, _, x, y = digits()
    torch.manual_seed(0)
    found = pgd(against, x, y, epsilon=0.15, step_size=0.15 / 8, steps=20, space=UNIT)
    return 100 * float((model.eval()(found).argmax(1) == y).float().mean())


def features(model: nn.Module) -> Tensor:
    _, _, x, _ = digits()
    with torch.no_grad():
        return model.eval()[:3](x)  # type: ignore[index, no-any-return]


def branches_of(method: Any, beta: float) -> tuple[list[nn.Module], Sparsifier]:
    """A stem of 64 units and three branches of 64: 15 epochs each, PGD of 5 steps."""
    attack = Adversarial(epsilon=0.15, steps=5, begin=0.0, schedule=False, inputs=UNIT)
    modifiers: list[Modifier] = [attack, Bort(branches=3, beta=beta)]
    model, sparsifier = fit(method, epochs=45, sizes=(64, 64, 64, 10), modifiers=modifiers)
    sparsifier.freeze()
    found = []
    for state in (*sparsifier.snapshots.values(), model.state_dict()):
        branch = copy.deepcopy(model)
        branch.load_state_dict(dict(state))
        found.append(branch)
    return found, sparsifier


@pytest.mark.parametrize(("beta", "sparsity"), [(0.0, 0.0), (5.0, 0.0), (5.0, 0.7)])
def test_orthogonal_features_on_digits(beta: float, sparsity: float) -> None:
    branches, sparsifier = branches_of(RigL(sparsity=sparsity, update_every=20) if sparsity else Dense(), beta)
    cosines = [float(cosine(features(one), features(other))) for one, other in pairwise(branches)]
    cosines.append(float(cosine(features(branches[0]), features(branches[2]))))
    if beta:
        assert max(cosines) < 0.05
    else:
        assert min(cosines) > 0.2
    served = branches[-1]
    assert accuracy(served) >= 93
    assert robust(served, served) >= 50  # white-box, on the branch that is served
    if sparsity:
        assert sparsifier.mask_set.sparsity == pytest.approx(sparsity, abs=1e-3)
