"""The history of the masks against plain numpy over a full record of every mask and every dense gradient."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import sparsepipe
from sparsepipe.errors import ModelError
from sparsepipe.sparsity.history import FILMED_SIZE, MAX_FRAMES, MaskHistory
from sparsepipe.sparsity.masks import MaskSet
from sparsepipe.sparsity.methods.autosparse import AutoSparseTopK
from sparsepipe.sparsity.methods.top_kast import TopKAST
from sparsepipe.sparsity.sparsifier import Sparsifier

STEPS = 48


def network(channels_last: bool = False) -> Any:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 12),
        nn.Linear(12, 4),
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


@dataclass
class Record:
    """What an onlooker sees: each mask before the first update and after every one, and the gradients for each."""

    masks: dict[str, list[np.ndarray]] = field(default_factory=dict)
    gradients: list[dict[str, np.ndarray]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    taken: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Updates so far and the figures, each time they were taken."""


def train(method: Any, *, channels_last: bool = False, steps: int = STEPS, take_every: int = 12) -> tuple[Any, Record]:
    model = network(channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, method, total_steps=steps)
    sparsifier.watch()
    record = Record({name: [mask.numpy().copy()] for name, mask in sparsifier.masks.items()})
    for step in range(1, steps + 1):
        advance(model, optimizer, sparsifier, step, record)
        if step % take_every == 0:
            record.taken.append((len(record.steps), sparsifier.history.take()))
    return sparsifier, record


def advance(model: Any, optimizer: Any, sparsifier: Any, step: int, record: Record) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer.zero_grad()
    logits = model(torch.randn(8, 3, 8, 8, generator=generator))
    nn.functional.cross_entropy(logits, torch.randint(0, 4, (8,), generator=generator)).backward()
    gradients = {name: model.get_parameter(name).grad.numpy().copy() for name in sparsifier.masks}
    rounds = sparsifier.mask_set.rounds
    optimizer.step()
    if sparsifier.mask_set.rounds > rounds:
        record.steps.append(step)
        record.gradients.append(gradients)
        for name, mask in sparsifier.masks.items():
            record.masks[name].append(mask.numpy().copy())


def ages(masks: list[np.ndarray]) -> np.ndarray:
    """Age of each active weight: go back through the masks until it was off."""
    now = []
    for index in np.argwhere(masks[-1]):
        age = 0
        while age + 1 < len(masks) and masks[-2 - age][tuple(index)]:
            age += 1
        now.append(age)
    return np.array(now)


METHODS: dict[str, Callable[[], Any]] = {
    "dst-ee": lambda: sparsepipe.DSTEE(sparsity=0.8, update_every=2, stop_at=0.9),
    "explores": lambda: sparsepipe.DSTEE(sparsity=0.9, update_every=3, stop_at=1.0, c=0.1, drop_fraction=0.5),
    "rigl": lambda: sparsepipe.RigL(sparsity=0.7, update_every=4),
    "blocks": lambda: sparsepipe.DSTEE(sparsity=0.7, pattern="4x1", update_every=3, distribution="uniform"),
    "set": lambda: sparsepipe.SET(sparsity=0.8, update_every=3),
    "snfs": lambda: sparsepipe.SNFS(sparsity=0.8, update_every=4),
    "dsr": lambda: sparsepipe.DSR(sparsity=0.8, update_every=4),
    "gmp": lambda: sparsepipe.GMP(sparsity=0.8, update_every=5),
    "static": lambda: sparsepipe.Static(sparsity=0.8),
}


COMPUTED: dict[str, Callable[[], Any]] = {
    "top-kast": lambda: TopKAST(sparsity=0.8, update_every=3),
    "autosparse-top-k": lambda: AutoSparseTopK(sparsity=0.8, distribution="global"),
}
"""Methods that compute with fewer weights than their masks keep."""


@pytest.mark.parametrize("name", COMPUTED)
def test_the_mean_density_is_that_of_the_weights_that_forward_passes_computed_with(name: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, COMPUTED[name](), total_steps=STEPS)
    history, seen = sparsifier.watch(), dict[str, list[float]]()
    for layer in (0, 2, 5, 6):
        model[layer].register_forward_pre_hook(
            lambda module, args, layer=f"{layer}.weight": seen.setdefault(layer, []).append(
                float((module.weight != 0).double().mean())
            )
        )
    for step in range(1, STEPS + 1):  # top-kast ends at step 36, where it makes its choice the masks
        advance(model, optimizer, sparsifier, step, Record({layer: [] for layer in sparsifier.masks}))
        if step % 12 == 0:
            assert history.take()["mean_density"] == pytest.approx({key: np.mean(each) for key, each in seen.items()})
            seen.clear()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_all_figures_equal_those_of_an_onlooker_who_kept_every_mask(name: str, channels_last: bool) -> None:
    sparsifier, record = train(METHODS[name](), channels_last=channels_last)
    sparse = {layer for layer, masks in record.masks.items() if not all(mask.all() for mask in masks)}
    seen = 0
    for number, (updates, figures) in enumerate(record.taken):
        assert figures["mask_updates"] == updates - seen
        steps = range(12 * number + 1, 12 * number + 13)
        for layer, mean in figures["mean_density"].items():
            # An update comes after its step, which therefore ran with the mask before.
            masks = [record.masks[layer][sum(update < step for update in record.steps)] for step in steps]
            assert mean == pytest.approx(np.mean(masks))
        assert set(figures["mean_density"]) == set(figures["exploration"])
        everything, all_ages = [0, 0], []
        for layer in sparse & set(sparsifier.mask_set.counters):
            masks = record.masks[layer][: updates + 1]
            pairs = list(zip(masks[seen:], masks[seen + 1 :], strict=False))
            dropped = sum(int((old & ~new).sum()) for old, new in pairs)
            grown = sum(int((new & ~old).sum()) for old, new in pairs)
            active = sum(int(old.sum()) for old, _ in pairs)
            everything = [everything[0] + dropped, everything[1] + active]
            if pairs:
                assert figures["dropped"][layer] == pytest.approx(dropped / active)
                assert figures["grown"][layer] == pytest.approx(grown / active)
            if layer not in figures["exploration"]:  # still dense, so that it has no figures of its own
                assert all(mask.all() for mask in masks)
                continue
            assert figures["exploration"][layer] == pytest.approx(np.logical_or.reduce(masks).mean())
            expected = ages(masks)
            all_ages.extend(expected)
            for key, share in (("age_median", 0.5), ("age_p90", 0.9)):
                assert figures[key][layer] == np.quantile(expected, share, method="inverted_cdf")
        assert figures["churn"] == (pytest.approx(everything[0] / everything[1]) if everything[1] else None)
        if all_ages:
            for key, share in (("median", 0.5), ("p90", 0.9)):
                assert figures["age"][key] == np.quantile(all_ages, share, method="inverted_cdf")
        seen = updates
    for layer in sparse:
        counts = sparsifier.history.ages(layer)
        assert counts == np.bincount(ages(record.masks[layer]), minlength=len(record.masks[layer])).tolist()
    if name not in ("static", "gmp"):
        assert any(max(figures["dropped"].values()) > 0 for _, figures in record.taken)


@pytest.mark.parametrize("name", ["dst-ee", "rigl", "blocks", "snfs"])
def test_gradients_are_those_of_the_weights_that_were_inactive_when_they_were_computed(name: str) -> None:
    _, record = train(METHODS[name]())
    seen = 0
    for updates, figures in record.taken:
        assert set(figures["inactive_gradient_norm"]) == (set(figures["dropped"]) if updates > seen else set())
        for layer, value in figures["inactive_gradient_norm"].items():
            inactive = ~record.masks[layer][updates - 1]
            gradient = record.gradients[updates - 1][layer][inactive].astype(np.float64)
            mean = np.abs(gradient).mean() if len(gradient) else 0.0  # where weights trade places, a layer may fill up
            assert value == pytest.approx(np.sqrt((gradient**2).sum()), rel=1e-5)
            assert figures["inactive_gradient_mean"][layer] == pytest.approx(mean, rel=1e-5)
        seen = updates


def test_methods_without_dense_gradients_have_no_gradients_to_show() -> None:
    _, record = train(METHODS["set"]())
    assert all(figures["inactive_gradient_norm"] == {} for _, figures in record.taken)


def test_a_gradient_that_is_not_finite_is_none() -> None:
    masks = sparsepipe.MaskSet({})
    masks.start({"w": torch.zeros(2, 2)}, {"w": torch.tensor([[True, False], [False, True]])})
    history = MaskHistory(masks)
    history.end_round(1, {"w": torch.full((2, 2), float("inf"))})
    assert history.take()["inactive_gradient_norm"] == {"w": None}


@pytest.mark.parametrize("name", METHODS)
def test_the_film_shows_the_masks_of_its_layer(name: str) -> None:
    sparsifier, record = train(METHODS[name](), steps=96)
    film = sparsifier.history.finish()
    frames = record.masks[film.layer]
    assert film.rounds[0] == 0
    assert film.rounds[-1] == len(record.steps)
    assert len(film.rounds) <= MAX_FRAMES + 1
    assert len(film.rounds) > min(len(record.steps), MAX_FRAMES // 2)
    assert np.ptp(np.diff(film.rounds[:-1])) == 0 if len(film.rounds) > 3 else True
    for number, step, bits in zip(film.rounds, film.steps, film.bits, strict=True):
        assert step == ([0, *record.steps])[number]
        mask = np.unpackbits(bits.numpy(), bitorder="little")[: frames[number].size].reshape(film.shape)
        assert np.array_equal(mask, frames[number])
    assert sparsifier.history.finish().rounds == film.rounds


def test_the_film_is_of_the_layer_that_is_named() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, METHODS["rigl"](), total_steps=10)
    assert sparsifier.watch().film.layer == max(sparsifier.mask_set.counters, key=sparsifier.mask_set.nnz_of)
    history = sparsifier.watch(film="0.weight")
    assert history.film.layer == "0.weight"
    assert sparsifier.watch() is sparsifier.watch(film="0.weight") is history
    with pytest.raises(ModelError, match="no mask of 'nothing'"):
        sparsifier.watch(film="nothing")


@pytest.mark.parametrize("loaded", ["by its method", "as it is made"])
@pytest.mark.parametrize("cut", [1, 17, 31])
@pytest.mark.parametrize("name", ["explores", "gmp", "top-kast"])
def test_a_resumed_history_is_that_of_an_uninterrupted_training(name: str, cut: int, loaded: str) -> None:
    make = (METHODS | COMPUTED)[name]
    whole, record = train(make(), take_every=STEPS)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first = Sparsifier(model, optimizer, make(), total_steps=STEPS)
    first.watch()
    onlooker = Record({layer: [] for layer in first.masks})
    for step in range(1, cut + 1):
        advance(model, optimizer, first, step, onlooker)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), first.state_dict()], file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if loaded == "by its method":
        second = Sparsifier(model, optimizer, make(), total_steps=STEPS)
        for part, state in zip((model, optimizer, second), saved, strict=True):
            part.load_state_dict(state)
    else:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        second = Sparsifier(model, optimizer, make(), total_steps=STEPS, state=saved[2])
    history = second.watch()
    for step in range(cut + 1, STEPS + 1):
        advance(model, optimizer, second, step, onlooker)
    assert history.take() == record.taken[-1][1]
    ours, theirs = history.finish(), whole.history.finish()
    assert (ours.layer, ours.rounds, ours.steps) == (theirs.layer, theirs.rounds, theirs.steps)
    assert all(torch.equal(one, other) for one, other in zip(ours.bits, theirs.bits, strict=True))


def test_watching_changes_nothing_and_may_begin_at_any_time() -> None:
    watched, _ = train(METHODS["explores"]())
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, METHODS["explores"](), total_steps=STEPS)
    onlooker = Record({layer: [mask.numpy().copy()] for layer, mask in sparsifier.masks.items()})
    for step in range(1, STEPS + 1):
        advance(model, optimizer, sparsifier, step, onlooker)
        if step == STEPS // 2:
            history, begin = sparsifier.watch(), len(onlooker.steps)
    assert sparsifier.mask_set.digest() == watched.mask_set.digest()
    for layer in sparsifier.mask_set.counters:
        expected = np.minimum(ages(onlooker.masks[layer]), len(onlooker.steps) - begin)
        assert history.ages(layer) == np.bincount(expected, minlength=len(onlooker.steps) - begin + 1).tolist()


def test_it_takes_two_bytes_for_each_active_weight() -> None:
    sparsifier, _ = train(METHODS["explores"]())
    state = sparsifier.history.state_dict()
    held = sum(tensor.numel() * tensor.element_size() for tensor in state["born"].values())
    assert held == 2 * sum(sparsifier.mask_set.nnz_of(name) for name in sparsifier.mask_set.counters)
    assert all(tensor.untyped_storage().nbytes() == 2 * tensor.numel() for tensor in state["born"].values())


def test_ages_stay_right_beyond_as_many_updates_as_int16_counts() -> None:
    weights = {"w": torch.ones(4, 8)}
    masks = MaskSet.dense(weights)
    masks.start(weights, {"w": torch.arange(32).reshape(4, 8) % 2 == 0})
    history = MaskHistory(masks)
    masks.rounds = 32_763  # as after so many updates that changed nothing
    for step in range(8):
        mask = masks["w"].clone()
        mask.view(-1)[2 * step : 2 * step + 2] = torch.tensor([False, True])
        history.change("w", mask, None)
        masks.change(weights["w"], "w", mask)
        masks.count()
        history.end_round(step, {})
    resumed = MaskHistory(masks)
    resumed.load_state_dict(history.state_dict())
    for each in (history, resumed):
        counts = each.ages("w")
        assert counts[:8] == [1] * 8
        assert counts[-1] == 8 == sum(counts[8:])
        assert len(counts) == 32_771 + 1


def test_a_layer_is_filmed_unasked_only_if_its_frames_are_small() -> None:
    sizes = {"huge": FILMED_SIZE + 1, "giant": 2 * FILMED_SIZE, "small": 100, "smaller": 80}
    for names, chosen in ((("huge", "smaller", "small"), "small"), (("giant", "huge"), "huge")):
        masks = sparsepipe.MaskSet({})
        kept = {name: torch.arange(sizes[name]) % 4 == 0 for name in names}
        masks.start({name: mask.float() for name, mask in kept.items()}, kept)
        film = MaskHistory(masks).film
        assert film is not None
        assert film.layer == chosen
