"""The hooks of methods beside masks: weight transforms, extra losses, owned steps, learning rates, batches, state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_bench import batch, loss_of, network, sgd, train
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, relu
from torch.utils.checkpoint import checkpoint as checkpointed

from sparsepipe.errors import ModelError, RecipeError, SparsepipeError
from sparsepipe.sparsity.emergent import Emergent
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.autosparse import AutoSparseTopK
from sparsepipe.sparsity.methods.gap import GaP
from sparsepipe.sparsity.methods.l0_constrained import L0Constrained
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.modifiers.bort import Bort
from sparsepipe.sparsity.modifiers.combined import Modifier
from sparsepipe.sparsity.modifiers.extrapolation import Extrapolation
from sparsepipe.sparsity.network import Network
from sparsepipe.sparsity.sparsifier import Sparsifier
from sparsepipe.training import checkpoint

T = 0.02
"""The first threshold of `Soft`."""


def soft(weight: Tensor, threshold: Tensor) -> Tensor:
    return weight.sign() * relu(weight.abs() - threshold)


class Soft(Emergent):
    """Soft thresholds that are learnt with Adam, one for each weight."""

    name = "soft"

    def attach(self, network: Network) -> None:
        super().attach(network)
        network.variables = {name: nn.Parameter(torch.tensor(T)) for name in self.sparse_layers(network)}
        network.own_optimizer = torch.optim.Adam(network.variables.values(), lr=1e-3)

    def transforms(self, network: Network) -> list[str]:
        return self.sparse_layers(network)

    def transform_weight(self, network: Network, name: str, weight: Tensor, step: int, training: bool) -> Tensor:
        return soft(weight, network.variables[name])

    def effective(self, network: Network, name: str) -> Tensor:
        return soft(network.weights[name].parameter, network.variables[name])


class Mixed(nn.Module):
    """Kinds of layers that read their weights in different ways, and a weight that two of them share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.second.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.second(self.first(x)).relu())
        x = x + self.attention(x, x, x)[0]
        return self.last(self.memory(x)[0][:, -1])


def mixed_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, 6, generator=generator), torch.randint(0, 4, (5,), generator=generator)


def transformed_parameters(model: nn.Module, thresholds: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: soft(value, thresholds[name]) if name in thresholds else value for name, value in parameters.items()}


CALLS: dict[str, Callable[[Mixed, Tensor], Tensor]] = {
    "whole": lambda model, x: model(x),
    "parts": lambda model, x: model.forward(x),  # as a loop does that calls the layers or blocks of a model itself
    "checkpointed": lambda model, x: checkpointed(model, x, use_reentrant=False),
    "checkpointed parts": lambda model, x: checkpointed(model.forward, x, use_reentrant=False),
    "checkpointed reentrant": lambda model, x: checkpointed(model, x.requires_grad_(), use_reentrant=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_weight_transform_trains_like_a_model_that_computes_it_itself(accumulate: int, call: str) -> None:
    """The oracle: autograd through the transform, by functional_call, and one optimizer for each kind of parameter."""
    model, oracle = Mixed(), Mixed()
    optimizer, other = sgd(model.parameters()), sgd(oracle.parameters())
    sparsifier = Sparsifier(model, optimizer, Soft(), total_steps=6)
    names = [name for name, value in oracle.named_parameters() if value.ndim >= 2]
    assert list(sparsifier.masks) == names
    assert len(names) == 7
    thresholds = {name: nn.Parameter(torch.tensor(T)) for name in names}
    own = torch.optim.Adam(thresholds.values(), lr=1e-3)
    for step in range(6):
        for each in (optimizer, other, own):
            each.zero_grad()
        for part in range(accumulate):
            x, y = mixed_batch(step * accumulate + part)
            cross_entropy(CALLS[call](model, x), y).backward()
            cross_entropy(functional_call(oracle, transformed_parameters(oracle, thresholds), x), y).backward()
        for each in (optimizer, other, own):
            each.step()
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert all(value.item() != pytest.approx(T, abs=1e-5) for value in thresholds.values())
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x), functional_call(oracle, transformed_parameters(oracle, thresholds), x)
        )


def test_a_weight_transform_renames_nothing_and_freezing_keeps_the_outputs_bit_for_bit() -> None:
    model = network()
    keys = list(model.state_dict())
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, Soft(overrides=[{"layers": "0", "dense": True}]), total_steps=8)
    train(model, optimizer, range(8))
    assert list(model.state_dict()) == keys
    assert all(isinstance(value, nn.Parameter) for value in model.parameters())
    assert sparsifier.mask_set.sparsity == 0
    figures = sparsifier.metrics()
    x = batch(99)[0]
    before = model.eval()(x)
    masks = sparsifier.freeze()
    assert torch.equal(model(x), before)
    assert masks.sparsity == pytest.approx(figures["sparsity"])
    assert masks.densities() == figures["density"]
    assert 0.1 < masks.sparsity < 0.9
    assert masks["0.weight"].all()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    digest = masks.digest()
    assert sparsifier.freeze().digest() == digest  # once more changes nothing
    assert torch.equal(model(x), before)


def test_an_error_in_a_forward_pass_leaves_the_parameters_in_place() -> None:
    model = network()
    Sparsifier(model, sgd(model.parameters()), Soft(), total_steps=8)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, 6, 6))
    assert all(value is before[name] for name, value in model.named_parameters())
    copied = copy.deepcopy(model)
    assert torch.equal(copied(batch(0)[0]), copied(batch(0)[0]))
    assert all(isinstance(value, nn.Parameter) for value in copied.parameters())


def test_a_model_is_pickled_only_where_it_computes_with_what_it_holds() -> None:
    model = network()
    sparsifier = Sparsifier(model, sgd(model.parameters()), Soft(), total_steps=8)
    with pytest.raises(ModelError, match=r"other weights than it holds.*state_dict"):
        torch.save(model, io.BytesIO())
    sparsifier.freeze()
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    x = batch(0)[0]
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_compiled_models_and_averages_are_refused_where_weights_are_transformed() -> None:
    model = network()
    with pytest.raises(ModelError, match="compiled"):
        Sparsifier(torch.compile(model), sgd(model.parameters()), Soft(), total_steps=8)  # type: ignore[arg-type]
    sparsifier = Sparsifier(model, sgd(model.parameters()), Soft(), total_steps=8)
    with pytest.raises(ModelError, match="average"):
        sparsifier.follow(copy.deepcopy(model))


@pytest.mark.parametrize(
    ("method", "compiled", "modifiers"),
    [
        (AutoSparseTopK(sparsity=0.9), True, []),
        (L0Constrained(sparsity=0.5), True, []),
        (RigL(sparsity=0.9), True, [Extrapolation()]),
        (RigL(sparsity=0.9), False, [Bort(features="nowhere")]),
        (GaP(sparsity=0.9), False, []),
    ],
    ids=["top-k", "gates", "extrapolation", "features", "turns"],
)
def test_a_refused_sparsifier_leaves_weights_and_optimizer_as_they_were(
    method: Method, compiled: bool, modifiers: list[Modifier]
) -> None:
    model = network()
    optimizer = sgd(model.parameters())
    train(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    given = torch.compile(model) if compiled else model
    with pytest.raises(SparsepipeError):
        Sparsifier(given, optimizer, method, total_steps=8, modifiers=modifiers)
    after = model.state_dict(), optimizer.state_dict()["state"]
    leaves = [torch.utils._pytree.tree_leaves(each) for each in (before, after)]
    assert all(torch.equal(old, new) for old, new in zip(*leaves, strict=True))
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_emergent_methods_take_no_sparsity_for_a_layer() -> None:
    with pytest.raises(RecipeError, match="finds the sparsity"):
        Soft(overrides=[{"layers": "*", "sparsity": 0.5}])


class Ridge(Method):
    """Half the sum of squares of all weights, times a trainable factor."""

    name = "ridge"

    def attach(self, network: Network) -> None:
        network.variables = {"factor": nn.Parameter(torch.tensor(0.1))}
        network.own_optimizer = torch.optim.SGD(network.variables.values(), lr=1e-3)

    def extra_loss(self, network: Network, step: int) -> Tensor:
        squares: Tensor = sum(weight.parameter.square().sum() for weight in network.weights.values())  # type: ignore[assignment]
        return network.variables["factor"] * squares / 2


@pytest.mark.parametrize("clip", [False, True])
def test_an_extra_loss_acts_as_if_it_were_in_the_loss_of_the_loop(clip: bool) -> None:
    model, oracle = network(), network()
    optimizer, other = sgd(model.parameters()), sgd(oracle.parameters())
    sparsifier = Sparsifier(model, optimizer, Ridge(), total_steps=8)
    factor = nn.Parameter(torch.tensor(0.1))
    own = torch.optim.SGD([factor], lr=1e-3)
    for step in range(8):
        for each in (optimizer, other, own):
            each.zero_grad()
        loss_of(model, step).backward()
        squares: Any = sum(value.square().sum() for value in oracle.parameters() if value.ndim >= 2)
        (loss_of(oracle, step) + factor * squares / 2).backward()
        if clip:
            sparsifier.prepare_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        for each in (optimizer, other, own):
            each.step()
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert float(sparsifier.state_dict()["variables"]["factor"]) == pytest.approx(factor.item())
    assert factor.item() < 0.09


class PlainDescent(Method):
    """Moves all weights by plain gradient descent, and remembers the sum of what it moved."""

    name = "plain-descent"

    def attach(self, network: Network) -> None:
        network.memory["moved"] = {name: torch.zeros_like(value) for name, value in network.tensors.items()}

    def owned(self, network: Network) -> list[str]:
        return list(network.weights)

    def after_step(self, network: Network, step: int) -> None:
        for name, gradient in network.gradients.items():
            network.memory["moved"][name].sub_(gradient, alpha=network.lr(name))
            network.weights[name].parameter.sub_(gradient, alpha=network.lr(name))


@pytest.mark.parametrize("optimizer_of", [sgd, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True)])
def test_the_optimizer_passes_over_the_weights_whose_step_the_method_takes(optimizer_of: Any) -> None:
    model, oracle = network(), network()
    first = copy.deepcopy(model.state_dict())
    optimizer, other = (optimizer_of(each.parameters()) for each in (model, oracle))
    sparsifier = Sparsifier(model, optimizer, PlainDescent(), total_steps=8)
    for step in range(8):
        train(model, optimizer, [step])
        other.zero_grad()
        loss_of(oracle, step).backward()
        with torch.no_grad():
            for value in oracle.parameters():
                if value.ndim >= 2:
                    value.sub_(value.grad, alpha=0.05)
                    value.grad = None
        other.step()
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for name, moved in sparsifier.state_dict()["memory"]["moved"].items():
        torch.testing.assert_close(moved, model.get_parameter(name) - first[name], atol=1e-6, rtol=0)
        assert model.get_parameter(name) not in optimizer.state


class Halving(Method):
    """Half the learning rate at each step from the third on; the loop decides before that."""

    name = "halving"

    def lr_scale(self, network: Network, step: int) -> float | None:
        return None if step < 3 else 0.5 ** (step - 2)

    def after_step(self, network: Network, step: int) -> None:
        if step == 5:
            network.reset_optimizer()
            network.snapshot("fifth")

    def transform_batch(
        self, network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        assert model is network.model
        assert step == 9
        return -inputs, labels.flip(0)


def test_a_learning_rate_is_set_for_the_step_alone_and_optimizer_state_starts_anew() -> None:
    model, oracle = network(), network()
    optimizer, other = (torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, oracle))
    sparsifier = Sparsifier(model, optimizer, Halving(), total_steps=8)
    for step in range(1, 9):
        train(model, optimizer, [step])
        assert optimizer.param_groups[0]["lr"] == 0.01
        for group in other.param_groups:
            group["lr"] = 0.01 * (1 if step < 3 else 0.5 ** (step - 2))
        train(oracle, other, [step])
        if step == 5:
            other = torch.optim.AdamW(oracle.parameters(), lr=0.01)
            fifth = copy.deepcopy(oracle.state_dict())
    for ours, theirs in zip(model.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(fifth[name], value) for name, value in sparsifier.snapshots["fifth"].items())
    x, y = sparsifier.transform_batch(*batch(0))
    assert torch.equal(x, -batch(0)[0])
    assert torch.equal(y, batch(0)[1].flip(0))


def test_a_step_that_fails_leaves_the_learning_rate_of_the_loop() -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            if self.fails:
                raise MemoryError
            return loss

    model = network()
    optimizer = Failing(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, Halving(), total_steps=8)
    train(model, optimizer, range(4))

    def fail() -> float:
        assert optimizer.param_groups[0]["lr"] == 0.01 / 8
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        optimizer.step(fail)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert sparsifier.step == 4
    optimizer.fails = True
    with pytest.raises(MemoryError):
        train(model, optimizer, range(1))
    optimizer.fails = False
    train(model, optimizer, range(1))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert sparsifier.step == 5


class Everything(Soft, Ridge, PlainDescent, Halving):  # type: ignore[misc]
    """All hooks and all kinds of state at once."""

    name = "everything"

    def attach(self, network: Network) -> None:
        PlainDescent.attach(self, network)
        Soft.attach(self, network)
        network.variables["factor"] = nn.Parameter(torch.tensor(0.1))
        network.own_optimizer = torch.optim.Adam(network.variables.values(), lr=1e-3)

    def owned(self, network: Network) -> list[str]:
        return ["4.weight"]

    def after_step(self, network: Network, step: int) -> None:
        PlainDescent.after_step(self, network, step)
        Halving.after_step(self, network, step)


@pytest.mark.parametrize("cut", [1, 4, 6])
@pytest.mark.parametrize("order", ["sparsifier first", "sparsifier last"])
def test_the_state_of_all_hooks_resumes_bit_for_bit_through_a_checkpoint(cut: int, order: str, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network().to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = start()
    sparsifier = Sparsifier(model, optimizer, Everything(), total_steps=10)
    train(model, optimizer, range(cut))
    states = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sparsifier": sparsifier.state_dict(),
    }
    checkpoint.save(tmp_path, states)
    train(model, optimizer, range(cut, 10))

    again, other = start()
    saved: Any = checkpoint.load(tmp_path)
    if order == "sparsifier first":
        resumed = Sparsifier(again, other, Everything(), total_steps=10)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    if order == "sparsifier first":
        resumed.load_state_dict(saved["sparsifier"])
    else:
        resumed = Sparsifier(again, other, Everything(), total_steps=10, state=saved["sparsifier"])
    train(again, other, range(cut, 10))

    one, two = sparsifier.state_dict(), resumed.state_dict()
    for kind in ("variables", "snapshots", "memory"):
        flat = [torch.utils._pytree.tree_leaves(state[kind]) for state in (one, two)]
        assert len(flat[0]) == len(flat[1]) > 0
        assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    assert sparsifier.freeze().digest() == resumed.freeze().digest()
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
