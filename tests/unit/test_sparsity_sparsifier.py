"""Sparsifier: its state and how it resumes, what it refuses, and its end."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_bench import dst_ee as method
from sparse_bench import inactive_are_positive_zero, network, sgd, train
from torch import Tensor, nn

from sparsepipe.errors import ArtefactError, ModelError, RecipeError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.gmp import GMP
from sparsepipe.sparsity.methods.magnitude_oneshot import MagnitudeOneShot
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.sparsifier import Sparsifier


def as_a_file_would(state: Any) -> Any:
    """The state after its plain values went through JSON and its tensors through bytes."""
    if isinstance(state, Tensor):
        return torch.frombuffer(bytearray(state.numpy().tobytes()), dtype=state.dtype).reshape(state.shape)
    if isinstance(state, dict):
        return {key: as_a_file_would(value) for key, value in state.items()}
    return json.loads(json.dumps(state))


METHODS: list[Callable[[], Method]] = [
    method,
    lambda: method(pattern="4x1", distribution="uniform"),
    lambda: SET(sparsity=0.8, update_every=4),
    lambda: GMP(sparsity=0.8, update_every=4, distribution="global"),
    lambda: MagnitudeOneShot(sparsity=0.8, prune_at=0.4),
    lambda: MagnitudeOneShot(sparsity=0.8, prune_at=0.7),
]


@pytest.mark.parametrize("make", METHODS)
@pytest.mark.parametrize("cut", [1, 13, 24])
def test_resuming_is_bit_exact(make: Callable[[], Method], cut: int) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, make(), total_steps=40, seed=3)
    train(model, optimizer, range(cut))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    state = as_a_file_would(sparsifier.state_dict())
    train(model, optimizer, range(cut, 40))

    again = network()
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed = Sparsifier(again, other, make(), total_steps=40, seed=99)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(state)
    assert resumed.step == cut
    train(again, other, range(cut, 40))

    assert resumed.mask_set.digest() == sparsifier.mask_set.digest()
    assert resumed.metrics() == sparsifier.metrics()
    assert resumed.mask_set.rounds == sparsifier.mask_set.rounds
    assert resumed.mask_set.reasons == sparsifier.mask_set.reasons
    assert resumed.masks_final
    for name, counter in sparsifier.mask_set.counters.items():
        assert torch.equal(counter, resumed.mask_set.counters[name])
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_state_holds_bits_and_int16_and_is_a_copy() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, method(), total_steps=40)
    state = sparsifier.state_dict()
    frozen = copy.deepcopy(state)
    assert {mask.dtype for mask in state["masks"].values()} == {torch.uint8}
    assert {counter.dtype for counter in state["counters"].values()} == {torch.int16}
    train(model, optimizer, range(10))
    assert all(torch.equal(state["counters"][name], counter) for name, counter in frozen["counters"].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0.7}, r"'sparsity': 0\.8 there, 0\.7 here"),
        ({"c": 0.5}, r"'c': 0\.01 there, 0\.5 here"),
        ({"distribution": "er"}, "'distribution': erk there, er here"),
        ({"overrides": [{"layers": "4", "dense": True}]}, "'overrides'"),
    ],
)
def test_a_state_made_with_other_options_is_refused_with_the_difference_named(
    change: dict[str, Any], message: str
) -> None:
    model = network()
    state = Sparsifier(model, sgd(model.parameters()), method(), total_steps=10).state_dict()
    other = Sparsifier(model, sgd(model.parameters()), method(**change), total_steps=10)
    with pytest.raises(ArtefactError, match=message):
        other.load_state_dict(state)


def test_a_state_of_another_method_or_model_is_refused_with_the_difference_named() -> None:
    model, wider = network(), nn.Sequential(nn.Linear(8, 16))
    state = Sparsifier(model, sgd(model.parameters()), RigL(), total_steps=10).state_dict()
    with pytest.raises(ArtefactError, match="'method': rigl there, set here"):
        Sparsifier(model, sgd(model.parameters()), SET(), total_steps=10).load_state_dict(state)
    with pytest.raises(ArtefactError, match=r"shape of '0\.weight': \[8, 2, 3, 3\] there, \[16, 8\] here"):
        Sparsifier(wider, sgd(wider.parameters()), RigL(), total_steps=10).load_state_dict(state)


@pytest.mark.parametrize("given", ["to load_state_dict", "to the constructor"])
def test_a_state_of_a_longer_training_is_refused_unless_its_steps_are_changed_on_purpose(given: str) -> None:
    """With other total_steps all schedules jump at the resume, and updates that were over begin again."""
    model = network()
    optimizer = sgd(model.parameters())
    state = Sparsifier(model, optimizer, method(), total_steps=40).state_dict()

    def resume(state: dict[str, Any]) -> Sparsifier:
        if given == "to the constructor":
            return Sparsifier(model, optimizer, method(), total_steps=60, state=state)
        resumed = Sparsifier(model, optimizer, method(), total_steps=60)
        resumed.load_state_dict(state)
        return resumed

    with pytest.raises(ArtefactError, match=r"another 'total_steps': 40 there, 60 here.*total_steps=40"):
        resume(state)
    assert resume({**state, "total_steps": 60}).mask_set.nnz == 874


def test_weights_that_join_the_optimizer_later_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = sgd(model[0].parameters())
    sparsifier = Sparsifier(model, optimizer, method(), total_steps=40)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": model[1].parameters()})
    train(model, optimizer, range(2))
    assert not caplog.records, "a normalisation stays dense anyway"
    optimizer.add_param_group({"params": [*model[4].parameters(), *model[6].parameters()]})
    train(model, optimizer, range(2))
    (record,) = caplog.records
    assert record.getMessage().startswith("'4.weight', '6.weight': trained only since")
    assert list(sparsifier.masks) == ["0.weight"]
    assert set(Sparsifier(model, optimizer, method(), total_steps=40).masks) == {"0.weight", "4.weight", "6.weight"}


def test_weights_that_are_frozen_at_first_are_named_once_they_train(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    model[:5].requires_grad_(False)
    optimizer = sgd(model.parameters())
    with caplog.at_level("INFO", logger="sparsepipe"):
        sparsifier = Sparsifier(model, optimizer, method(), total_steps=40)
    train(model, optimizer, range(2))
    assert not caplog.records, "nothing stays dense for its kind"
    model[4].requires_grad_(True)
    train(model, optimizer, range(2))
    (record,) = caplog.records
    assert record.getMessage().startswith("'4.weight': trained only since the Sparsifier was made")
    assert list(sparsifier.masks) == ["6.weight"]
    assert set(Sparsifier(model, optimizer, method(), total_steps=40).masks) == {"4.weight", "6.weight"}


@pytest.mark.parametrize("given", ["to load_state_dict", "to the constructor"])
def test_what_is_no_state_of_a_sparsifier_is_refused_and_changes_nothing(given: str) -> None:
    model = network()
    sparsifier = Sparsifier(model, sgd(model.parameters()), method(), total_steps=10)
    digest = sparsifier.mask_set.digest()
    with pytest.raises(ArtefactError, match="not the state of a Sparsifier: there is no 'step'"):
        if given == "to load_state_dict":
            sparsifier.load_state_dict(model.state_dict())
        else:
            Sparsifier(model, sgd(model.parameters()), method(), total_steps=10, state=model.state_dict())
    assert sparsifier.mask_set.digest() == digest
    assert inactive_are_positive_zero(model, sparsifier)


def test_a_second_sparsifier_of_the_same_weights_takes_the_place_of_the_first(caplog: pytest.LogCaptureFixture) -> None:
    """As when a cell of a notebook runs again: two would keep what is in both masks, which is less than either says."""
    model = network()
    optimizer = sgd(model.parameters())
    first = Sparsifier(model, optimizer, method(), total_steps=40, seed=0)
    train(model, optimizer, range(3))
    second = Sparsifier(model, optimizer, method(), total_steps=40, seed=1)
    assert "ends after its step 3" in caplog.text
    train(model, optimizer, range(3, 12))
    assert (first.step, second.step) == (3, 9)
    assert inactive_are_positive_zero(model, second)
    nonzero = sum(int(model.get_parameter(name).count_nonzero()) for name in second.masks)
    assert nonzero > 0.8 * second.mask_set.nnz  # those of dead units stay zero; two independent masks share a fifth


def test_two_sparsifiers_of_different_weights_share_an_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    parts = [Sparsifier(part, optimizer, SET(sparsity=0.8), total_steps=9) for part in (model[:4], model[4:])]
    train(model, optimizer, range(5))
    assert [part.step for part in parts] == [5, 5]
    assert "ends after" not in caplog.text


def test_weights_loaded_before_the_sparsifier_was_made_are_noticed() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, method(), total_steps=40)
    train(model, optimizer, range(5))
    weights, state = copy.deepcopy(model.state_dict()), sparsifier.state_dict()
    again = network()
    again.load_state_dict(weights)
    other = sgd(again.parameters())
    Sparsifier(again, other, method(), total_steps=40, seed=1).load_state_dict(state)
    with pytest.raises(ArtefactError, match="loaded too early"):
        train(again, other, [5])


def test_freeze_ends_sparse_training_and_leaves_the_optimizer_alone() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, method(), total_steps=10)
    average = copy.deepcopy(model)
    sparsifier.follow(average)
    train(model, optimizer, range(10))
    with torch.no_grad():
        model[4].weight.add_(1.0)
        average[4].weight.add_(1.0)
    masks = sparsifier.freeze()
    assert inactive_are_positive_zero(model, sparsifier)
    assert inactive_are_positive_zero(average, sparsifier)
    assert masks.sparsity == pytest.approx(0.8, abs=1e-3)
    train(model, optimizer, [10])
    assert sparsifier.step == 10


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Sparsifier(m, m, Static(), total_steps=1), ModelError, "torch.optim.Optimizer"),
        (lambda m: Sparsifier(m, sgd(m.parameters()), Static(), total_steps=0), RecipeError, "total_steps"),
        (lambda m: Sparsifier(m, sgd(m.parameters()), "dst-ee", total_steps=1), RecipeError, "method, not 'dst-ee'"),
        (lambda m: Sparsifier(m, sgd(nn.Linear(2, 2).parameters()), Static(), total_steps=1), ModelError, "no weight"),
        (
            lambda m: Sparsifier(nn.BatchNorm1d(3), sgd(m.parameters()), Static(), total_steps=1),
            ModelError,
            "no weight",
        ),
        (
            lambda m: Sparsifier(lazy := nn.LazyLinear(3), sgd(lazy.parameters()), Static(), total_steps=1),
            ModelError,
            "no shape",
        ),
    ],
)
def test_what_cannot_be_trained_sparse_is_refused(
    make: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(network())
