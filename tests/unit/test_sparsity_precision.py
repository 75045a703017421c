"""Sparse training in other number formats and memory layouts, under autocast, compiled, and with averaged weights."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from sparse_bench import batch, dst_ee, inactive_are_positive_zero, loss_of, network, randn, sgd, train
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsepipe.errors import ModelError
from sparsepipe.sparsity import network as sparsity_network
from sparsepipe.sparsity.method import Method
from sparsepipe.sparsity.methods.gmp import GMP
from sparsepipe.sparsity.methods.granet import GraNet
from sparsepipe.sparsity.methods.mest import MEST
from sparsepipe.sparsity.methods.static import Static
from sparsepipe.sparsity.sparsifier import Sparsifier


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type_stay_sparse(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(dtype)
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=1), total_steps=10)
    for step in range(10):
        optimizer.zero_grad()
        model.weight.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
        assert (model.weight[~sparsifier.masks["weight"]] == 0).all()
    assert sparsifier.mask_set.nnz == 51


@pytest.mark.parametrize("piece", [1, 100, 2**18])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_masked_in_pieces_are_masked_whole(
    piece: int, layout: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsity_network, "PIECE", piece)
    model = nn.Conv2d(6, 10, 3).to(dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=1.0), dst_ee(), total_steps=10)
    mask, before = sparsifier.masks["weight"], model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    with torch.no_grad():
        model.weight[~mask] = -1.0
    sparsifier.prepare_gradients()
    assert torch.equal(model.weight.grad, mask.to(dtype))
    sparsifier.freeze()
    assert torch.equal(model.weight.detach(), before)
    assert inactive_are_positive_zero(model.float(), sparsifier)


def test_channels_last_weights_keep_their_layout_and_get_the_same_masks() -> None:
    digests = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model: Any = nn.Conv2d(4, 8, 3)
        model.to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(model, optimizer, dst_ee(pattern="2x1"), total_steps=20)
        for step in range(20):
            gradient = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            model.weight.grad = gradient.to(memory_format=layout)
            optimizer.step()
        assert model.weight.is_contiguous(memory_format=layout)
        assert sparsifier.masks["weight"].is_contiguous(memory_format=layout)
        digests.append(sparsifier.mask_set.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast_and_bf16_parameters_stay_sparse_and_exact(parameters: torch.dtype) -> None:
    model = network().to(parameters)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=2, pattern="2x1"), total_steps=40)
    nnz = sparsifier.mask_set.nnz
    first = sparsifier.mask_set.digest()
    for step in range(20):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x.to(parameters)).float(), y)
        loss.backward()
        optimizer.step()
        assert sparsifier.mask_set.nnz == nnz
        for name, mask in sparsifier.masks.items():
            assert (model.get_parameter(name)[~mask] == 0).all()
    assert sparsifier.mask_set.digest() != first


def test_equal_half_precision_gradients_are_told_apart_by_nothing_but_their_index() -> None:
    """Sums over blocks are formed in float32: in bf16, 256 + 1 is 256."""
    model = nn.Linear(2, 4, bias=False).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = dst_ee(sparsity=0.5, c=0.0, pattern="2x1", update_every=1, drop_fraction=0.5, drop_schedule="constant")
    sparsifier = Sparsifier(model, optimizer, method, total_steps=10)
    inactive = ~sparsifier.masks["weight"]
    last = int(inactive.reshape(2, 2, 2).transpose(1, 2).all(-1).flatten().nonzero()[-1])
    row, column = divmod(last, 2)
    gradient = torch.where(inactive, 128.0, 0.0)
    gradient[2 * row : 2 * row + 2, column] = torch.tensor([256.0, 1.0])
    first = gradient.clone()
    other = int(inactive.reshape(2, 2, 2).transpose(1, 2).all(-1).flatten().nonzero()[0])
    first[2 * (other // 2) : 2 * (other // 2) + 2, other % 2] = torch.tensor([256.0, 0.0])
    model.weight.grad = first.to(torch.bfloat16)
    optimizer.step()
    assert sparsifier.masks["weight"][2 * row, column]


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_a_compiled_model_trains_to_the_same_masks_without_compiling_again(backend: str) -> None:
    digests = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        callable_model: Any = torch.compile(model, backend=backend) if compiled else model
        optimizer = torch.optim.SGD(callable_model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = Sparsifier(callable_model, optimizer, dst_ee(update_every=2), total_steps=40)
        assert list(sparsifier.masks) == ["0.weight", "2.weight"]
        for step in range(12):
            optimizer.zero_grad()
            callable_model(randn(16, 8, seed=step).double()).square().mean().backward()
            optimizer.step()
            for name, mask in sparsifier.masks.items():
                assert (model.get_parameter(name)[~mask] == 0).all()
        digests.append(sparsifier.mask_set.digest())
    assert digests[0] == digests[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_optimizer_step_keeps_the_masks_and_is_not_compiled_again() -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = network()
        optimizer = sgd(model.parameters())
        sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=2), total_steps=20)
        step: Any = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        graphs = []
        for number in range(8):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            assert inactive_are_positive_zero(model, sparsifier)
        results.append(sparsifier.mask_set.digest())
    assert results[0] == results[1]
    assert graphs[2] == graphs[-1] > 0  # momentum buffers come with the first step


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_names_of_masks_are_those_of_the_model_inside_its_wrapper(wrap: Any) -> None:
    model = network()
    wrapped = wrap(model)
    sparsifier = Sparsifier(wrapped, sgd(wrapped.parameters()), Static(), total_steps=1)
    assert list(sparsifier.masks) == ["0.weight", "4.weight", "6.weight"]


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_an_average_that_follows_a_pruned_model_ends_as_sparse(averaging: str) -> None:
    """Gradual pruning: the average holds weights from before they were pruned, unless it follows."""
    model = network()
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, GMP(sparsity=0.9, update_every=3), total_steps=30)
    function = {"multi_avg_fn": get_ema_multi_avg_fn(0.95)} if averaging == "ema" else {}
    average = AveragedModel(model, **function)  # type: ignore[arg-type]
    sparsifier.follow(average)
    for step in range(30):
        train(model, optimizer, [step])
        average.update_parameters(model)
    masks = sparsifier.freeze()
    assert masks.sparsity == pytest.approx(0.9, abs=1e-3)
    for name, mask in masks.items():
        weight = average.module.get_parameter(name)
        assert torch.equal(weight != 0, mask)


def test_a_copy_from_before_the_masks_is_cut_to_them_at_once() -> None:
    model = network()
    dense = copy.deepcopy(model)
    sparsifier = Sparsifier(model, sgd(model.parameters()), dst_ee(), total_steps=20)
    sparsifier.follow(dense)
    for name, mask in sparsifier.masks.items():
        assert torch.equal(dense.get_parameter(name) != 0, mask)


def test_an_average_resumes_as_it_was_and_keeps_following() -> None:
    def start() -> tuple[Any, Any, Sparsifier, AveragedModel]:
        model = network()
        optimizer = sgd(model.parameters())
        sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=2), total_steps=20)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        sparsifier.follow(average)
        return model, optimizer, sparsifier, average

    def advance(parts: tuple[Any, Any, Sparsifier, AveragedModel], steps: range) -> None:
        for step in steps:
            train(parts[0], parts[1], [step])
            parts[3].update_parameters(parts[0])

    straight = start()
    advance(straight, range(9))
    saved = copy.deepcopy([part.state_dict() for part in straight])
    advance(straight, range(9, 20))
    resumed = start()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    advance(resumed, range(9, 20))
    for ours, theirs in zip(straight[3].parameters(), resumed[3].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_copy_of_another_model_or_the_model_itself_cannot_follow() -> None:
    model = network()
    sparsifier = Sparsifier(model, sgd(model.parameters()), dst_ee(), total_steps=20)
    for copied in (model, nn.Linear(3, 3)):
        with pytest.raises(ModelError, match=r"no weight '0\.weight' of its own"):
            sparsifier.follow(copied)


def test_weights_that_are_computed_at_each_use_are_told_and_left_dense(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    sparsifier = Sparsifier(model, sgd(model.parameters()), Static(sparsity=0.5), total_steps=1)
    assert list(sparsifier.masks) == ["1.weight"]
    assert "computed anew" in caplog.text


def test_fp16_under_a_grad_scaler_grows_the_same_weights_whatever_the_scale_and_repeats_what_it_skips() -> None:
    """A power of two times a gradient that is a normal number in fp16 loses nothing, so only unscaling can differ."""
    digests, skipped = [], []
    for scale in (2.0**4, 2.0**8, 2.0**30):  # the last one overflows until it was halved often enough
        model = network()
        optimizer = sgd(model.parameters())
        sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=2, c=0.05), total_steps=30)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000, backoff_factor=2.0**-11)
        attempts = 0
        while sparsifier.step < 12:
            optimizer.zero_grad()
            before = sparsifier.mask_set.digest(), sparsifier.step, sparsifier.mask_set.rounds
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, sparsifier.step)
            scaler.scale(loss).backward()
            scale_before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            attempts += 1
            if scaler.get_scale() < scale_before:
                assert (sparsifier.mask_set.digest(), sparsifier.step, sparsifier.mask_set.rounds) == before
            assert inactive_are_positive_zero(model, sparsifier)
        skipped.append(attempts - 12)
        digests.append(sparsifier.mask_set.digest())
    assert skipped[0] == skipped[1] == 0 < skipped[2]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "method", [GMP(stop_at=1.0), GraNet(prune_until=1.0), MEST(variant="em&s", stop_at=1.0)], ids=lambda each: each.name
)
def test_a_skipped_step_costs_no_sparsity_where_pruning_goes_on_to_the_end(method: Method) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=20)
    for step in range(20):
        optimizer.zero_grad()
        scaler.scale(model(randn(4, 40, seed=step)).square().mean()).backward()
        if step == 3:
            model.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == 19
    assert sparsifier.freeze().nnz == 160
    assert model.weight.count_nonzero() == 160


def test_a_training_in_channels_last_under_autocast_stays_sparse() -> None:
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = sgd(model.parameters())
    sparsifier = Sparsifier(model, optimizer, dst_ee(update_every=2), total_steps=20)
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        assert inactive_are_positive_zero(model, sparsifier)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
