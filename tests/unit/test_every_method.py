"""What holds for every registered method, whatever it does: a new one is tested by being registered."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sparse_bench import batch, inactive_are_positive_zero, loss_of, network  # noqa: E402

from sparsepipe.sparsity import registry  # noqa: E402
from sparsepipe.sparsity.sparsifier import Sparsifier  # noqa: E402

STEPS, EPOCH = 40, 4
"""Optimizer steps of a training, and of an epoch."""

SHARED: dict[str, Any] = {"sparsity": 0.8, "update_every": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "dst-ee": {"c": 0.01},
    "autosparse": {"threshold_init": -3.0},
    "str": {"threshold_init": -3.0},
    "xrda": {"lam": 1e-4},
    "directional": {"c": 0.3},
    "structured-directional": {"c": 0.8},
    "l0-constrained": {"gate_lr": 0.3, "dual_lr": 2.0},
}
"""What a method needs beside the shared options to do something in so short a training."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in registry.METHODS},
    "dst-ee signed": ("dst-ee", {"score": "signed", "c_schedule": "cosine"}),
    "dst-ee stepped": ("dst-ee", {"c_schedule": "stepped", "c_decay_every": 5, "exclude_just_dropped": True}),
    "mest em&s": ("mest", {"variant": "em&s"}),
    "granet global": ("granet", {"distribution": "global"}),
    "srigl without ablation": ("srigl", {"ablation": False}),
    "acdc longer": ("acdc", {"epochs_multiplier": 2.0}),
    "gap parallel": ("gap", {"parallel": True, "partitions": 2, "rounds": 2}),
    "lottery from the start": ("lottery", {"rewind_to": 0.0}),
    "l0 layer top-k": ("l0-constrained", {"constraint": "layer", "finish": "top-k", "gate_lr": 0.1, "dual_lr": 0.1}),
    "l0 nupi": ("l0-constrained", {"dual": "nupi"}),
    "xrda stepped": ("xrda", {"schedule": "stepped", "lam": 1e-4}),
    "directional projected": ("directional", {"project": 4, "c": 0.3}),
    "structured-directional projected": ("structured-directional", {"project": 4, "c": 0.8}),
}
"""Other kinds of a method that are worth the whole test: label -> method and options."""

Training = tuple[Any, Any, Sparsifier]


def method_of(label: str) -> Any:
    name, options = VARIANTS[label]
    return registry.create(name, SHARED | OPTIONS.get(name, {}) | options)


def start(label: str) -> Training:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return (
        model,
        optimizer,
        Sparsifier(model, optimizer, method_of(label), total_steps=STEPS, seed=1, samples=[batch(7)]),
    )


def advance(training: Training, first: int, last: int) -> None:
    model, optimizer, sparsifier = training
    model.train()
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert inactive_are_positive_zero(model, sparsifier)
        if step % EPOCH == EPOCH - 1:
            sparsifier.on_epoch_end(step // EPOCH)


CUTS = (1, 17, 32)
"""Steps after which a training is interrupted."""


@cache
def finished(label: str) -> tuple[Training, Any, list[Any]]:
    """A whole training with its masks, and its states at the cuts; the tests only read it."""
    training = start(label)
    states = []
    for first, last in pairwise([0, *CUTS, STEPS]):
        advance(training, first, last)
        states.append([copy.deepcopy(part.state_dict()) for part in training])
    return training, training[2].freeze(), states


@pytest.mark.parametrize("label", VARIANTS)
def test_masks_are_bools_of_weights_alone_and_meet_the_target(label: str) -> None:
    (model, _, sparsifier), masks, _ = finished(label)
    parameters = dict(model.named_parameters())
    assert sparsifier.masks_final
    assert set(masks) <= {"0.weight", "4.weight", "6.weight"}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == parameters[name].shape
        assert torch.equal(parameters[name] * mask, parameters[name])
    for name in set(parameters) - set(masks):  # norms and biases
        assert bool((parameters[name] != 0).all()), name
    assert (masks.sparsity > 0.01) is (label != "dense")
    if VARIANTS[label][0] == "random":  # the first convolution stays dense, and is not made up for
        assert masks["0.weight"].all()
        assert masks.nnz == 144 + round(0.2 * (32 * 128 + 4 * 32))
    elif label != "dense" and registry.METHODS[VARIANTS[label][0]].exact:
        assert method_of(label).target.distribution != "uniform", "no method is exact with it"
        assert masks.nnz == masks.size - round(0.8 * masks.size)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("label", VARIANTS)
def test_a_training_that_resumes_ends_in_the_same_bits(label: str, cut: int) -> None:
    whole, masks, states = finished(label)
    again = start(label)
    for part, state in zip(again, states[CUTS.index(cut)], strict=True):
        part.load_state_dict(copy.deepcopy(state))
    advance(again, cut, STEPS)
    others = again[2].freeze()
    assert masks.digest() == others.digest()
    assert all(torch.equal(counter, others.counters[name]) for name, counter in masks.counters.items())
    expected, found = whole[0].state_dict(), again[0].state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class SideBySide(torch.nn.Module):
    """The networks of all methods in one: an export costs seconds, however small the network."""

    def __init__(self, networks: list[Any]) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, inputs: Any) -> Any:
        return torch.cat([network(inputs) for network in self.networks], dim=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The logits that the exported file gives for each label."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import sparsepipe

    out = tmp_path_factory.mktemp("exported")
    networks = SideBySide([copy.deepcopy(finished(label)[0][0]) for label in VARIANTS]).eval()
    sparsepipe.export_onnx(networks, (2, 6, 6), out, targets=["portable"])
    session = onnxruntime.InferenceSession(out / "model.portable.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: batch(99)[0].numpy()})
    return dict(zip(VARIANTS, np.split(logits, len(VARIANTS), axis=1), strict=True))


@pytest.mark.parametrize("label", VARIANTS)
def test_the_exported_file_gives_the_logits_of_the_network(label: str, exported: Any) -> None:
    model = copy.deepcopy(finished(label)[0][0]).eval()
    with torch.no_grad():
        expected = model(batch(99)[0]).numpy()
    assert np.ptp(expected, axis=0).max() > 0.01, "logits that do not depend on the input would prove nothing"
    np.testing.assert_allclose(exported[label], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", registry.METHODS)
def test_options_are_told_and_jsonable(name: str) -> None:
    import json

    method = registry.create(name, {})
    told = json.loads(json.dumps(method.describe()))
    assert told["method"] == name
    own = [option for option in registry.options_of(name) if option in vars(method)]
    assert set(own) <= set(told), "a checkpoint made with another value would not be refused"
