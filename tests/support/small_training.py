"""A training of a second on generated images, how to stop it, and how to tell whether two gave the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsepipe.artefact import Artefact
from sparsepipe.progress import Bar
from sparsepipe.recipe import parse
from sparsepipe.spec import FILM_FILE, MASKS_FILE, WEIGHTS_FILE
from sparsepipe.stages import train
from sparsepipe.training import checkpoint, metrics

SAMPLES, STEPS_PER_EPOCH, EPOCHS = 120, 6, 4
STEPS = STEPS_PER_EPOCH * EPOCHS


def small_network(input_shape: tuple[int, ...], classes: int, extra: int = 0) -> nn.Module:
    """A network with all that has state: convolutions, batch norm, and dropout, which draws from torch's generator."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, classes + extra),
    )


def small_images(samples: int = SAMPLES) -> dict[str, Any]:
    """Images [N, 6, 6, 2] of three classes that differ in brightness; no two images are the same."""
    generator = np.random.default_rng(0)
    labels = np.arange(samples + 30) % 3
    images = generator.integers(0, 80, (samples + 30, 6, 6, 2)) + 60 * labels[:, None, None, None]
    x, y = images.astype(np.uint8), labels
    return {"x_train": x[:samples], "y_train": y[:samples], "x_test": x[samples:], "y_test": y[samples:]}


def config(*overrides: str) -> train.TrainConfig:
    table = {
        "seed": 3,
        "model": "small:small_network",
        "data": "small:small_images",
        "method": {"name": "dst-ee", "sparsity": 0.6, "update_every": 3, "c": 1e-3},
        "augment": {"crop": 1, "flip": True},
        "train": {
            "epochs": EPOCHS,
            "batch_size": 16,
            "threads": 1,
            "validation": 0.2,
            "checkpoint_every": STEPS_PER_EPOCH,
        },
    }
    return train.TrainConfig.from_recipe(parse(table, overrides))


def run(out: Path, *overrides: str, resume: bool = False, restart: bool = False) -> Artefact:
    return train.run(config(*overrides), {}, out, resume=resume, restart=restart)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Call `action` once, right after training step `step` of the next run."""
    done = 0
    advance = Bar.advance

    def counting(bar: Bar, count: int = 1, note: str | None = None) -> None:
        nonlocal done
        advance(bar, count, note)
        done += count
        if done == step:
            action()

    monkeypatch.setattr(Bar, "advance", counting)


class KilledError(Exception):
    pass


def kill() -> None:
    raise KilledError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_result(one: Artefact, other: Artefact) -> None:
    """Weights, masks, and the whole state of the training are the same bits; times may differ."""
    film = {FILM_FILE} & {*one.manifest.outputs, *other.manifest.outputs}  # no film of a network that is always dense
    for name in (WEIGHTS_FILE, MASKS_FILE, *film):
        assert one.file(name).read_bytes() == other.file(name).read_bytes(), name
    states = [load_file(artefact.file(checkpoint.FILE)) for artefact in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    logs = [metrics.read(artefact.file(metrics.FILE)) for artefact in (one, other)]
    for log in logs:
        assert [record.pop("seconds") > 0 for record in log] == [True] * EPOCHS
    assert logs[0] == logs[1]
    times = {"seconds": 0, "cpu_seconds": 0}
    assert {**one.metrics, **times} == {**other.metrics, **times}
