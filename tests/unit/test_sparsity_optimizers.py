"""Sparse training with any optimizer: exact zeros, fresh state, closures, parameter groups, shared parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sparse_bench import OPTIMIZERS, Bench, dst_ee, inactive_are_positive_zero, loss_of, network, randn, sgd, train
from torch import Tensor, nn

from sparsepipe.errors import ModelError
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.optimizer import let_hooks_run
from sparsepipe.sparsity.sparsifier import Sparsifier


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inactive_weights_are_exactly_zero_after_any_step_of_any_optimizer(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=20)
    nnz = sparsifier.mask_set.nnz
    for step in range(20):
        train(model, optimizer, [step])
        assert inactive_are_positive_zero(model, sparsifier)
        assert sparsifier.mask_set.nnz == nnz
    assert sparsifier.step == 20
    for parameter, state in optimizer.state.items():
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        mask = sparsifier.masks.get(name_of[id(parameter)])
        for key, value in state.items():
            plain = name not in (
                "noisy",
                "adagrad",
                "adamax",
                "rprop",
            )  # these hold nonzero state for weights without gradient
            if plain and mask is not None and isinstance(value, Tensor) and value.shape == mask.shape:
                assert (value[~mask] == 0).all(), key


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw foreach", "adamw fused"])
def test_active_weights_move_as_without_sparsifier_in_a_network_masked_by_hand(name: str) -> None:
    """Static masks against a loop that multiplies gradients and weights by them itself."""
    model, twin = network(), network()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, Static(sparsity=0.8), total_steps=10)
    twin.load_state_dict(model.state_dict())
    masks = {key: mask.float() for key, mask in sparsifier.masks.items()}
    other = OPTIMIZERS[name](twin.parameters())
    for step in range(10):
        train(model, optimizer, [step])
        other.zero_grad()
        loss_of(twin, step).backward()
        for key, parameter in twin.named_parameters():
            if key in masks:
                assert parameter.grad is not None
                parameter.grad *= masks[key]
        other.step()
        for key, parameter in twin.named_parameters():
            if key in masks:
                parameter.data *= masks[key]
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adamw fused", "noisy"])
@pytest.mark.parametrize("positional", [True, False])
def test_a_closure_gives_what_a_plain_step_gives(name: str, positional: bool) -> None:
    results = []
    for closures in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=20)
        torch.manual_seed(5)
        for step in range(20):

            def closure(step: int = step) -> Any:
                optimizer.zero_grad()  # noqa: B023
                with torch.enable_grad():
                    loss = loss_of(model, step)  # noqa: B023
                    loss.backward()
                return loss

            if not closures:
                train(model, optimizer, [step])
            elif positional:
                assert optimizer.step(closure) is not None
            else:
                assert optimizer.step(closure=closure) is not None
            assert inactive_are_positive_zero(model, sparsifier)
        results.append((sparsifier.mask_set.digest(), [parameter.detach().clone() for parameter in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(plain, closed) for plain, closed in zip(results[0][1], results[1][1], strict=True))


def test_lbfgs_evaluates_its_closure_many_times_and_stays_sparse() -> None:
    model = network()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=1), total_steps=10)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert inactive_are_positive_zero(model, sparsifier)
    assert losses[-1] < losses[0]


def test_a_parameter_shared_between_modules_has_one_mask() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, RigL(sparsity=0.5, update_every=2), total_steps=20)
    assert list(sparsifier.masks) == ["0.weight"]
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert sparsifier.mask_set.nnz == 32
    assert (model[2].weight[~sparsifier.masks["0.weight"]] == 0).all()


def test_different_parameters_in_the_same_memory_are_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ModelError, match=r"0\.weight' and '1\.weight"):
        Sparsifier(model, sgd(model.parameters()), Static(), total_steps=1)


def test_several_parameter_groups_and_one_method_for_two_networks() -> None:
    shared = dst_ee()
    digests = []
    for _ in range(2):
        model = network()
        groups: list[dict[str, Any]] = [
            {"params": model[:2].parameters(), "lr": 0.01},
            {"params": model[2:].parameters()},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        sparsifier = Sparsifier(model, optimizer, shared, total_steps=10)
        train(model, optimizer, range(10))
        digests.append(sparsifier.mask_set.digest())
    assert digests[0] == digests[1]


def test_the_optimizer_of_a_wrapper_is_found() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = network()
    optimizer = sgd(model.parameters())
    wrapper: Any = Wrapper(optimizer)
    sparsifier = Sparsifier(model, wrapper, dst_ee(), total_steps=10)
    train(model, optimizer, [0])
    assert sparsifier.step == 1


class Lookahead(torch.optim.Optimizer):
    """As in several libraries: another optimizer inside, slow weights of its own, and `__init__` not called."""

    def __init__(self, optimizer: torch.optim.Optimizer, inside: str) -> None:
        setattr(self, inside, optimizer)
        self.fast = inside
        self.param_groups = optimizer.param_groups
        self.state = defaultdict(dict)
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = getattr(self, self.fast).step(closure)
        self.steps += 1
        for parameter in self.param_groups[0]["params"] if self.steps % 3 == 0 else ():
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)
        return loss


@pytest.mark.parametrize("inside", ["optimizer", "_base_optimizer"])
def test_an_optimizer_that_keeps_another_one_is_followed_with_all_state_of_both(inside: str) -> None:
    fast: Any = None

    def lookahead(parameters: Any) -> Any:
        nonlocal fast
        fast = sgd(parameters)
        return Lookahead(fast, inside)

    bench = Bench(RigL(sparsity=0.7, update_every=6, drop_fraction=0.5), (10, 10), 100, lookahead)
    for t in range(5):
        bench.step(randn(10, 10, seed=t))
        assert not bench.weight[~bench.mask].any()
    before = bench.mask.clone()
    bench.step(randn(10, 10, seed=9))
    changed = bench.mask ^ before
    assert changed.any()
    for state in (
        bench.weight,
        fast.state[bench.weight]["momentum_buffer"],
        bench.optimizer.state[bench.weight]["slow"],
    ):
        assert (state[changed] == 0).all()
        assert (state[bench.mask & before] != 0).any()
    assert bench.sparsifier.step == 6


class SharpnessAware(torch.optim.Optimizer):
    """Its loop steps it in two halves; the second restores the weights and steps an optimizer inside."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = sgd(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_half(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["before"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.05)

    @torch.no_grad()
    def second_half(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["before"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        closure = torch.enable_grad()(closure)
        closure()
        self.first_half()
        self.zero_grad()
        closure()
        self.second_half()


@pytest.mark.parametrize("closure", [False, True])
def test_a_sharpness_aware_step_counts_once_whichever_way_the_loop_calls_it(closure: bool) -> None:
    model = network()
    optimizer = SharpnessAware(model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=20)
    first = sparsifier.mask_set.digest()
    for step in range(20):
        optimizer.zero_grad()
        if closure:
            optimizer.step(lambda step=step: backward(model, step))
        else:
            backward(model, step)
            optimizer.first_half()
            optimizer.zero_grad()
            backward(model, step)
            optimizer.second_half()
        assert inactive_are_positive_zero(model, sparsifier)
    assert sparsifier.step == 20
    assert sparsifier.mask_set.rounds == 3
    assert sparsifier.mask_set.digest() != first


def test_masks_that_no_step_has_followed_are_not_fixed_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    sparsifier = Sparsifier(model, sgd(model.parameters()), Static(sparsity=0.5), total_steps=2)
    train(model, sgd(model.parameters()), range(2))
    sparsifier.freeze()
    assert "took any step" in caplog.text


def test_a_step_whose_hooks_cannot_run_any_more_is_refused_before_anything_is_masked() -> None:
    model = network()

    class Fresh(Lookahead):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure)

    optimizer = Fresh(sgd(model.parameters()), "inner")
    vars(optimizer)["step"] = optimizer.step  # as a learning-rate schedule does, to see whether it is called
    with pytest.raises(ModelError, match=r"The step of this Fresh calls no hooks.*before a learning-rate schedule"):
        Sparsifier(model, optimizer, dst_ee(), total_steps=10)
    assert (model[4].weight != 0).all()


def backward(model: Any, step: int) -> Any:
    loss = loss_of(model, step)
    loss.backward()
    return loss


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_the_step_of_its_base_class_counts_once(closure: bool) -> None:
    """torch runs the hooks of both, the inner ones when the gradients are masked already."""

    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    results = []
    for kind in (torch.optim.SGD, Derived):
        model = network()
        optimizer: Any = kind(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=20)
        for step in range(14):
            optimizer.zero_grad()
            if closure:
                optimizer.step(lambda model=model, step=step: backward(model, step))
            else:
                backward(model, step)
                optimizer.step()
        assert sparsifier.step == 14
        results.append((sparsifier.mask_set.digest(), sparsifier.mask_set.counters, model.state_dict()))
    (masks, counters, weights), (same_masks, same_counters, same_weights) = results
    assert masks == same_masks
    assert all(torch.equal(counters[name], same_counters[name]) for name in counters)
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)


def test_a_step_that_failed_leaves_nothing_behind_for_the_next() -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    model = network()
    optimizer = Failing(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=1), total_steps=20)
    for step in range(6):
        optimizer.fails = step == 3
        with pytest.raises(MemoryError) if optimizer.fails else nullcontext():
            train(model, optimizer, [step])
        assert inactive_are_positive_zero(model, sparsifier)
    assert sparsifier.step == 5
    assert sparsifier.mask_set.rounds == 5


def test_a_sparsifier_may_join_a_training_that_is_under_way() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(3))
    sparsifier = Sparsifier(model, optimizer, dst_ee(), total_steps=10)
    assert inactive_are_positive_zero(model, sparsifier)
    mask = sparsifier.masks["4.weight"]
    assert (optimizer.state[model[4].weight]["exp_avg"][~mask] == 0).all()
    assert (optimizer.state[model[4].weight]["exp_avg"][mask] != 0).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_starts_grown_and_dropped_weights_anew(name: str) -> None:
    """At an update every floating-point state tensor of the weight's shape is zero where the mask changed."""
    bench = Bench(RigL(sparsity=0.7, update_every=6, drop_fraction=0.5), (10, 10), 100, OPTIMIZERS[name])
    for t in range(5):
        bench.step(randn(10, 10, seed=t))
    before = bench.mask.clone()
    bench.step(randn(10, 10, seed=9))
    changed = bench.mask ^ before
    assert changed.any()
    assert (bench.weight[changed] == 0).all()
    state = [value for value in bench.optimizer.state[bench.weight].values() if isinstance(value, Tensor)]
    shaped = [value for value in state if value.shape == bench.weight.shape]
    assert all((value[changed] == 0).all() for value in shaped)
    assert name == "adafactor" or shaped  # whose second moments are factored into rows and columns
    assert int(bench.mask.sum()) == 30


class Slow(Lookahead):
    """One that takes its slow weights when it is built."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, "fast_one")
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["slow"] = parameter.detach().clone()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "slow"])
def test_a_reset_optimizer_goes_on_like_one_that_was_just_built(name: str) -> None:
    make = OPTIMIZERS.get(name, lambda parameters: Slow(sgd(parameters)))
    bench = Bench(Static(sparsity=0.5), (10, 10), 100, make)
    for t in range(7):
        bench.step(randn(10, 10, seed=t))
    bench.sparsifier._network.reset_optimizer()
    other = nn.Parameter(bench.weight.detach().clone())
    optimizer = make([other])
    if isinstance(optimizer, Lookahead):
        optimizer.steps = 7
        let_hooks_run(optimizer)
    for t in range(7, 14):
        torch.manual_seed(t)
        bench.step(randn(10, 10, seed=t))
        torch.manual_seed(t)
        other.grad = randn(10, 10, seed=t) * bench.mask
        optimizer.step()
        with torch.no_grad():
            other.mul_(bench.mask)
    torch.testing.assert_close(bench.weight, other, rtol=1e-6, atol=1e-7)


class Nested(torch.optim.Optimizer):
    """Keeps its state in lists and dicts, some of it in integers, as optimizers that factor or quantise theirs do."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["moments"] = [{"first": torch.ones_like(parameter)}, (torch.ones_like(parameter), 3)]
            state["codes"] = torch.full_like(parameter, 7, dtype=torch.uint8)


def test_state_is_found_however_deep_and_integer_codes_are_left_alone() -> None:
    bench = Bench(RigL(sparsity=0.5, update_every=1), (6, 6), 100, Nested)
    before = bench.mask.clone()
    bench.step(randn(6, 6, seed=0))
    changed = bench.mask ^ before
    assert changed.any()
    state = bench.optimizer.state[bench.weight]
    for tensor in (state["moments"][0]["first"], state["moments"][1][0]):
        assert torch.equal(tensor == 0, changed)
    assert (state["codes"] == 7).all()


class Shampoo(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            state, gradient, scaled = self.state[parameter], parameter.grad, parameter.grad
            for side, size in enumerate(parameter.shape):
                factor = state.setdefault(f"factor {side}", 1e-4 * torch.eye(size))
                factor += gradient @ gradient.T if side == 0 else gradient.T @ gradient
                values, vectors = torch.linalg.eigh(factor)
                root = vectors * values.clamp(min=1e-12) ** -0.25 @ vectors.T
                scaled = root @ scaled if side == 0 else scaled @ root
            parameter.sub_(scaled, alpha=0.05)


@pytest.mark.parametrize("columns", [10, 11])
def test_a_preconditioner_of_the_shape_of_its_weight_is_refused_and_another_left_alone(columns: int) -> None:
    bench = Bench(RigL(sparsity=0.7, update_every=3), (10, columns), 100, Shampoo)
    for t in range(2):
        bench.step(randn(10, columns, seed=t))
    before = bench.weight.clone()
    if columns == 10:
        with pytest.raises(ModelError, match=r"matrix over the rows or columns of 'weight'.*square layers dense"):
            bench.step(randn(10, columns, seed=2))
    else:
        bench.step(randn(10, columns, seed=2))
        assert bench.sparsifier.mask_set.rounds == 1
    assert torch.linalg.eigvalsh(bench.optimizer.state[bench.weight]["factor 0"])[0] > 0
    assert not torch.equal(before, bench.weight)


def test_a_closure_that_is_called_again_never_sees_inactive_weights_move() -> None:
    """Directions of L-BFGS come from steps before the masks changed."""
    model = network()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=1, drop_fraction=0.5), total_steps=20)
    seen: list[bool] = []

    def closure() -> Any:
        optimizer.zero_grad()
        seen.append(inactive_are_positive_zero(model, sparsifier))
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    assert all(seen)
    assert len(seen) > 12
