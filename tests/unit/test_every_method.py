"""What holds for every registered method, whatever it does: a new one is tested by being registered."""

from __future__ import annotations

import copy
from pathlib import Path
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
}
"""What a method needs beside the shared options to do something in so short a training."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in registry.METHODS},
    "dst-ee signed": ("dst-ee", {"score": "signed", "c_schedule": "cosine"}),
    "dst-ee stepped": ("dst-ee", {"c_schedule": "stepped", "c_decay_every": 5, "exclude_just_dropped": True}),
    "mest em&s": ("mest", {"variant": "em&s"}),
    "granet global": ("granet", {"distribution": "global"}),
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


def finished(label: str) -> tuple[Training, Any]:
    training = start(label)
    advance(training, 0, STEPS)
    return training, training[2].freeze()


@pytest.mark.parametrize("label", VARIANTS)
def test_masks_are_bools_of_weights_alone_and_meet_the_target(label: str) -> None:
    (model, _, sparsifier), masks = finished(label)
    parameters = dict(model.named_parameters())
    assert sparsifier.masks_final
    assert set(masks) <= {"0.weight", "4.weight", "6.weight"}
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == parameters[name].shape
        assert torch.equal(parameters[name] * mask, parameters[name])
    for name in set(parameters) - set(masks):  # norms and biases
        assert bool((parameters[name] != 0).all()), name
    if label != "dense" and registry.METHODS[VARIANTS[label][0]].exact:
        counted = masks.nnz
        if method_of(label).target.distribution == "uniform":  # the first convolution stays dense
            assert masks["0.weight"].all()
            assert counted == 144 + round(0.2 * (32 * 128 + 4 * 32))
        else:
            assert counted == masks.size - round(0.8 * masks.size)


@pytest.mark.parametrize("cut", [1, 17, 32])
@pytest.mark.parametrize("label", VARIANTS)
def test_a_training_that_resumes_ends_in_the_same_bits(label: str, cut: int) -> None:
    whole = start(label)
    advance(whole, 0, cut)
    saved = [copy.deepcopy(part.state_dict()) for part in whole]
    advance(whole, cut, STEPS)
    again = start(label)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    advance(again, cut, STEPS)
    masks, others = whole[2].freeze(), again[2].freeze()
    assert masks.digest() == others.digest()
    assert all(torch.equal(counter, others.counters[name]) for name, counter in masks.counters.items())
    expected, found = whole[0].state_dict(), again[0].state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("label", VARIANTS)
def test_the_exported_file_gives_the_logits_of_the_network(label: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import sparsepipe

    (model, _, _), _ = finished(label)
    model.eval()
    inputs = batch(99)[0]
    with torch.no_grad():
        expected = model(inputs).numpy()
    sparsepipe.export_onnx(model, (2, 6, 6), tmp_path / "out", targets=["portable"])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.portable.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", registry.METHODS)
def test_options_are_told_and_jsonable(name: str) -> None:
    import json

    method = registry.create(name, {})
    told = json.loads(json.dumps(method.describe()))
    assert told["method"] == name
    own = [option for option in registry.options_of(name) if option in vars(method)]
    assert set(own) <= set(told), "a checkpoint made with another value would not be refused"
