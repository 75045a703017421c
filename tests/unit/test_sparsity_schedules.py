"""AC/DC and GaP: their phases step by step, what they keep, and what they reach on digits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from digits_bench import accuracy, digits, fit
from sparse_bench import network, sgd, train
from torch import nn

from sparsepipe.errors import RecipeError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.acdc import ACDC
from sparsepipe.sparsity.methods.gap import GaP
from sparsepipe.sparsity.methods.lottery import Lottery
from sparsepipe.sparsity.methods.magnitude_oneshot import MagnitudeOneShot
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.sparsifier import Sparsifier


def test_the_phases_of_100_epochs_are_those_of_the_papers_recipe() -> None:
    starts = [*range(10, 75, 5), 75, 85]
    expected = [(7 * start, index % 2 == 0) for index, start in enumerate(starts)]
    assert ACDC().phases(700) == expected  # 7 steps for each epoch


def test_a_longer_training_has_more_phases_of_the_same_length() -> None:
    phases = ACDC(epochs_multiplier=2).phases(1400)
    assert phases[0] == (140, True)
    assert {later - earlier for (earlier, _), (later, _) in pairwise(phases[:-2])} == {35}
    assert phases[-1] == (1190, True)
    assert phases[-2][1] is False
    assert ACDC(epochs_multiplier=2).epochs_multiplier == 2


def test_phases_that_leave_no_room_are_refused() -> None:
    with pytest.raises(RecipeError, match="add up"):
        ACDC(warmup=0.5, final_dense=0.3, final_sparse=0.3)


def test_acdc_is_exactly_sparse_in_sparse_phases_and_dense_between_with_momentum_at_zero() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    method = ACDC(sparsity=0.8, distribution="global")
    sparsifier = Sparsifier(model, optimizer, method, total_steps=100)
    phases = dict(method.phases(100))
    sparse = False
    for step in range(1, 101):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, optimizer, [step])
        sparse = phases.get(step, sparse)
        nnz = sum(int(model.get_parameter(name).count_nonzero()) for name in sparsifier.masks)
        size = sparsifier.mask_set.size
        if sparse:
            assert abs(nnz - 0.2 * size) <= 1
        elif step in phases:
            # What was pruned is active again, and starts at zero with nothing gathered.
            assert sparsifier.mask_set.sparsity == 0
            assert not any(optimizer.state.values())
        elif step > 1:
            assert nnz > 0.7 * size  # units that never fire get no gradient
        if step == 85:
            # The twin is the network right before its last pruning: where the masks are on, nothing was changed.
            twin = sparsifier.snapshots["dense"]
            for name, mask in sparsifier.masks.items():
                assert torch.equal(twin[name][mask], model.get_parameter(name)[mask])
                assert not torch.equal(twin[name], before[name])
                assert int(twin[name].count_nonzero()) > 0.7 * mask.numel()
    assert sparsifier.masks_final


@pytest.mark.slow
def test_acdc_keeps_at_98_per_cent_what_one_shot_pruning_destroys() -> None:
    model, sparsifier = fit(ACDC(sparsity=0.98), epochs=100)
    assert sparsifier.freeze().sparsity == pytest.approx(0.98, abs=2e-5)
    assert accuracy(model) >= 95
    pruned, sparsifier = fit(MagnitudeOneShot(sparsity=0.98, prune_at=1.0, distribution="global"), epochs=100)
    assert sparsifier.freeze().sparsity == pytest.approx(0.98, abs=2e-5)
    assert accuracy(pruned) < 60


@pytest.mark.slow
def test_acdc_at_90_per_cent_is_about_as_accurate_as_its_dense_twin() -> None:
    model, sparsifier = fit(ACDC(sparsity=0.9), epochs=100)
    sparsifier.freeze()
    sparse = accuracy(model)
    model.load_state_dict(dict(sparsifier.snapshots["dense"]))
    assert sparse >= accuracy(model) - 1.5
    # Weights that are pruned come back at zero, and stay there where no sample has both an input and an output that is
    # not zero: pixels of the border, and units that fire for none. All others are dense.
    values, _, _, _ = digits()
    reached = filled = 0
    for layer in (module for module in model if isinstance(module, nn.Linear)):
        outputs = layer(values) if layer.out_features == 10 else layer(values).relu()
        gets_gradient = (outputs != 0).float().T @ (values != 0).float() > 0
        reached += int(gets_gradient.sum())
        filled += int(layer.weight[gets_gradient].count_nonzero())
        values = outputs
    assert reached > 0.7 * sparsifier.mask_set.size
    assert filled > 0.99 * reached


def gap_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))


@pytest.mark.parametrize("parallel", [False, True])
def test_exactly_the_scheduled_part_is_dense_and_all_others_are_at_the_target(parallel: bool) -> None:
    model = gap_network()
    optimizer = sgd(model.parameters())
    method = GaP(sparsity=0.9, distribution="uniform", partitions=3, rounds=2, finetune=0.25, parallel=parallel)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=80)
    names = list(sparsifier.masks)
    for step in range(80):  # turns of 10 steps: 0..9 part 0, 10..19 part 1, ...
        dense = names[step // 10 % 3] if step < 60 else None
        for name in names:
            size = sparsifier.masks[name].numel()
            assert sparsifier.mask_set.nnz_of(name) == (size if name == dense else round(0.1 * size)), (step, name)
        assert sparsifier.masks_final == (step >= 60)
        train(model, optimizer, [step])
        if step == 30:
            assert sparsifier.mask_set.exploration_rate() == 1
    assert sparsifier.freeze().sparsity == pytest.approx(0.9, abs=1 / 400)


def test_every_turn_of_gap_needs_a_step_of_its_own() -> None:
    """Nine steps before fine-tuning: enough for nine turns, and the last pruning, but not for twelve."""
    model = gap_network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, GaP(sparsity=0.9, partitions=3, rounds=3, finetune=0.25), total_steps=12)
    train(model, optimizer, range(12))
    assert sparsifier.masks_final
    assert sparsifier.freeze().sparsity == pytest.approx(0.9, abs=1 / 400)
    model = gap_network()
    with pytest.raises(RecipeError, match="12 turns, but there are only 9 steps"):
        Sparsifier(model, sgd(model.parameters()), GaP(partitions=3, rounds=4, finetune=0.25), total_steps=12)


def test_each_turn_starts_with_the_first_learning_rate_and_a_fresh_optimizer() -> None:
    model = gap_network()
    optimizer = sgd(model.parameters())
    method = GaP(sparsity=0.9, partitions=3, rounds=2, finetune=0.25)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=80)
    rates = [sparsifier.lr_scale(step) for step in range(1, 81)]
    assert [step for step, rate in enumerate(rates) if rate == 1] == [0, 10, 20, 30, 40, 50, 60]
    assert rates[5] == pytest.approx(0.5)
    assert sparsifier.lr_scale(90) == rates[-1]
    train(model, optimizer, range(10))
    assert not any(optimizer.state.values())


def test_the_copies_of_a_parallel_round_start_alike_and_give_their_own_part() -> None:
    """What training changes outside of a copy's own part is undone, for the next copy and for the result."""
    options = {"sparsity": 0.9, "partitions": 3, "rounds": 1, "finetune": 0.25, "distribution": "uniform"}
    model = gap_network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, GaP(parallel=True, **options), total_steps=40)  # type: ignore[arg-type]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    names = list(first)
    trained = []
    for turn in range(3):
        if turn:
            for name, value in model.state_dict().items():
                assert torch.equal(value, start[name]), name
        train(model, optimizer, range(turn * 10, turn * 10 + 9))
        trained.append(model.get_parameter(names[turn]).detach().clone())
        train(model, optimizer, [turn * 10 + 9])
    for name, part in zip(names, trained, strict=True):
        # All but the last step of each copy was seen: its part is in the result, moved by one more small step.
        result, mask = model.get_parameter(name), sparsifier.masks[name]
        assert torch.allclose(result[mask], part[mask], atol=0.02)
        assert not torch.equal(result, start[name])
    assert sparsifier.mask_set.sparsity == pytest.approx(0.9, abs=1 / 400)


def test_a_shared_weight_is_taken_from_the_copy_that_it_was_grown_in_under_each_of_its_names() -> None:
    """Three steps of -0.1 in each copy: in the end the weight has moved by those of its own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abc"})
    model["c"].weight = model["a"].weight
    weights = [model["a"].weight, model["b"].weight]
    options = {"partitions": 2, "rounds": 1, "restart": False, "distribution": "uniform"}
    optimizer = torch.optim.SGD(weights, lr=0.1)
    Sparsifier(model, optimizer, GaP(sparsity=0.5, parallel=True, **options), total_steps=8)  # type: ignore[arg-type]
    start = [weight.detach().clone() for weight in weights]
    for _ in range(6):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    for weight, before in zip(weights, start, strict=True):
        assert ((before == 0) & (weight != 0)).any(), "some of what was grown is left"
        assert (weight.detach() - before)[weight != 0].numpy() == pytest.approx(-0.3)


class Versioned(nn.Linear):
    """A layer that keeps something in the state dict that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 1}


@pytest.mark.parametrize("method", [ACDC(sparsity=0.5), Lottery(sparsity=0.5), GaP(partitions=2, parallel=True)])
def test_what_is_no_tensor_in_the_state_of_a_model_is_left_alone(method: Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Versioned(72, 8), nn.ReLU(), Versioned(8, 4))
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, method, total_steps=40)
    train(model, optimizer, range(40))
    sparsifier.freeze()
    for kind, snapshot in sparsifier.snapshots.items():
        assert all(isinstance(value, torch.Tensor) for value in snapshot.values())
        kept = sparsifier._network.revived(kind).state_dict()
        assert torch.equal(kept["1.weight"], snapshot["1.weight"])


@pytest.mark.slow
def test_gap_beats_static_masks_by_far_at_98_per_cent() -> None:
    options = {"sparsity": 0.98, "distribution": "uniform"}
    model, sparsifier = fit(GaP(partitions=3, rounds=3, finetune=20 / 74, **options), epochs=74)  # type: ignore[arg-type]
    assert sparsifier.freeze().sparsity == pytest.approx(0.98, abs=1e-4)
    static, _ = fit(Static(**options), epochs=74)  # type: ignore[arg-type]
    assert accuracy(model) > accuracy(static) + 20
