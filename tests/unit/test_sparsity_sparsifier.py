"""Sparsifier: any optimizer, closures, mixed precision, accumulation, sharing, resuming, several processes."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsepipe.errors import ArtefactError, ModelError, RecipeError
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.methods.gmp import GMP
from sparsepipe.sparsity.methods.magnitude_oneshot import MagnitudeOneShot
from sparsepipe.sparsity.methods.rigl import RigL
from sparsepipe.sparsity.methods.set import SET
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.sparsifier import Sparsifier


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 6, 6, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)


def method(**options: Any) -> DSTEE:
    return DSTEE(**{"sparsity": 0.8, "update_every": 4, "c": 0.01} | options)


def loss_of(model: nn.Module, step: int) -> Any:
    x, y = batch(step)
    return cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def inactive_are_positive_zero(model: nn.Module, sparsifier: Sparsifier) -> bool:
    weights = dict(model.named_parameters())
    return all(not weights[name].detach()[~mask].view(torch.int32).any() for name, mask in sparsifier.masks.items())


class Noisy(torch.optim.Optimizer):
    """Moves every weight at random whatever its gradient: the worst that an optimizer can do to a mask."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                self.state[parameter]["average"] += torch.randn_like(parameter)
                parameter -= 0.01 * self.state[parameter]["average"]
                parameter.view(-1)[0] = -1.0
        return loss


class LionStyle(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with decoupled weight decay."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(0.99).sub_(group["lr"] * (0.9 * momentum + 0.1 * parameter.grad).sign())
                momentum.lerp_(parameter.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw maximize": lambda p: torch.optim.AdamW(p, lr=1e-2, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True, weight_decay=1e-3),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lion": LionStyle,
    "noisy": Noisy,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_point_15_inactive_weights_are_exactly_zero_after_any_step_of_any_optimizer(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = Sparsifier(model, optimizer, method(), total_steps=20)
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
        sparsifier = Sparsifier(model, optimizer, method(), total_steps=20)
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
    sparsifier = Sparsifier(model, optimizer, method(update_every=1), total_steps=10)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert inactive_are_positive_zero(model, sparsifier)
    assert losses[-1] < losses[0]


def test_point_8_embeddings_norms_biases_depthwise_and_untrained_weights_stay_dense() -> None:
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
    names = ["conv", "grouped", "gray", "up", "attention.out_proj"]
    assert sorted(sparsifier.masks) == sorted([f"{name}.weight" for name in names] + ["attention.in_proj_weight"])
    assert "transposed" in sparsifier.mask_set.reasons["up.weight"]


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


def test_point_9_and_10_accumulated_micro_batches_equal_one_big_batch() -> None:
    digests = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(72, 32), nn.Tanh(), nn.Linear(32, 4)).double()
        optimizer = sgd(model.parameters())
        sparsifier = Sparsifier(model, optimizer, method(), total_steps=20)
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
def test_point_11_scores_are_unscaled_and_a_skipped_step_counts_for_nothing(name: str) -> None:
    digests = []
    for scaled in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        sparsifier = Sparsifier(model, optimizer, method(c=1e-3), total_steps=20)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=10_000)
        for step in range(12):
            if scaled and step == 3:  # the fourth step would be an update; it overflows once and is repeated
                before, counters = sparsifier.mask_set.digest(), copy.deepcopy(sparsifier.mask_set.counters)
                optimizer.zero_grad()
                scaler.scale(loss_of(model, step)).backward()
                next(model.parameters()).grad[0, 0, 0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update(1024.0)
                assert sparsifier.step == 3
                assert sparsifier.mask_set.digest() == before
                assert all(torch.equal(counters[key], value) for key, value in sparsifier.mask_set.counters.items())
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert inactive_are_positive_zero(model, sparsifier)
        assert sparsifier.step == 12
        digests.append(sparsifier.mask_set.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type_stay_sparse(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(dtype)
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, method(update_every=1), total_steps=10)
    for step in range(10):
        optimizer.zero_grad()
        model.weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        assert (model.weight[~sparsifier.masks["weight"]] == 0).all()
    assert sparsifier.mask_set.nnz == 51


def test_channels_last_weights_keep_their_layout_and_get_the_same_masks() -> None:
    digests = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model: Any = nn.Conv2d(4, 8, 3)
        model.to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, method(pattern="2x1"), total_steps=20)
        for step in range(20):
            gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            model.weight.grad = gradient.to(memory_format=layout)
            optimizer.step()
        assert model.weight.is_contiguous(memory_format=layout)
        assert sparsifier.masks["weight"].is_contiguous(memory_format=layout)
        digests.append(sparsifier.mask_set.digest())
    assert digests[0] == digests[1]


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
def test_point_19_resuming_is_bit_exact(make: Callable[[], Method], cut: int) -> None:
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
    train(model, optimizer, range(10))
    with torch.no_grad():
        model[4].weight.add_(1.0)
    masks = sparsifier.freeze()
    assert inactive_are_positive_zero(model, sparsifier)
    assert masks.sparsity == pytest.approx(0.8, abs=1e-3)
    train(model, optimizer, [10])
    assert sparsifier.step == 10


def test_a_sparsifier_may_join_a_training_that_is_under_way() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(3))
    sparsifier = Sparsifier(model, optimizer, method(), total_steps=10)
    assert inactive_are_positive_zero(model, sparsifier)
    mask = sparsifier.masks["4.weight"]
    assert (optimizer.state[model[4].weight]["exp_avg"][~mask] == 0).all()
    assert (optimizer.state[model[4].weight]["exp_avg"][mask] != 0).any()


def test_several_parameter_groups_and_one_method_for_two_networks() -> None:
    shared = method()
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
    sparsifier = Sparsifier(model, wrapper, method(), total_steps=10)
    train(model, optimizer, [0])
    assert sparsifier.step == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Sparsifier(m, m, Static(), total_steps=1), ModelError, "torch.optim.Optimizer"),
        (lambda m: Sparsifier(m, sgd(m.parameters()), Static(), total_steps=0), RecipeError, "total_steps"),
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


RANK = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from sparsepipe.sparsity.methods.dst_ee import DSTEE
from sparsepipe.sparsity.sparsifier import Sparsifier
torch.set_num_threads(1)
rank, world, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4)).double()
wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
sparsifier = Sparsifier(model, optimizer, DSTEE(sparsity=0.8, c=0.01, update_every=3), total_steps=30)
torch.manual_seed(1000 + rank)  # the ranks' own randomness must not reach the masks
for step in range(30):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(32, 20, generator=generator).double(), torch.randint(0, 4, (32,), generator=generator)
    optimizer.zero_grad()
    cross_entropy(wrapped(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
    optimizer.step()
print(sparsifier.mask_set.digest(), float(model[0].weight.sum()))
"""


def test_point_13_two_ranks_with_half_the_batch_each_equal_one_rank(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    commands = [
        [sys.executable, str(script), str(rank), str(world), address] for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for command in commands]
    results = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({digest for digest, _ in results}) == 1
    sums = [float(total) for _, total in results]
    assert sums[0] == sums[1]
    assert sums[0] == pytest.approx(sums[2], rel=1e-12)
