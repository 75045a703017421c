"""A small block-sparse network for real digits, and how the tests of int8 run files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets

from sparsepipe import data, export_onnx
from sparsepipe.cli.main import main
from sparsepipe.runtime import session
from sparsepipe.runtime.sessions import run

SHAPE = (1, 8, 8)
SPARSE = ("one", "two", "point", "hidden")


class Small(torch.nn.Module):
    """Layers of each kind that int8 meets: a stem, blocks with a sum, ReLU and ReLU6, depthwise, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.one = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.two = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32)
        self.point = nn.Conv2d(32, 64, 1)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        relu = torch.nn.functional.relu
        x = relu(self.stem(x))
        x = relu(x + self.two(relu(self.norm(self.one(x)))))
        x = torch.nn.functional.relu6(self.depthwise(x))
        x = relu(self.point(x)).mean((2, 3))
        return self.head(relu(self.hidden(x)))


def write_digits(path: Path) -> Path:
    """x [N, 8, 8, 1] uint8 0..255, with a test split."""
    found = datasets.load_digits()
    images = (found.images[..., None] * 15.9).astype(np.uint8)
    np.savez(path, x=images[:1200], y=found.target[:1200], x_test=images[1200:], y_test=found.target[1200:])
    return path


def prepared_test(digits: Path) -> tuple[Any, Any]:
    """Test images as the network takes them, and their labels."""
    dataset = data.load(f"npz:{digits}")
    rows = np.arange(len(dataset.test))
    return data.prepare(dataset.test.load(rows), dataset.preprocessing), dataset.test.labels


def mask(shape: torch.Size, random: np.random.Generator) -> torch.Tensor:
    """Three quarters of all blocks of 4 outputs by 4 inputs are zero."""
    blocks = random.random((shape[0] // 4, shape[1] // 4, *shape[2:])) < 0.25
    return torch.from_numpy(blocks.repeat(4, 0).repeat(4, 1).astype(np.float32))


def train(digits: Path, out: Path) -> Path:
    """A block-sparse network that was trained on the digits, as an ordinary ONNX file."""
    dataset = data.load(f"npz:{digits}")
    images = torch.from_numpy(data.prepare(dataset.train.load(np.arange(len(dataset.train))), dataset.preprocessing))
    labels = torch.from_numpy(dataset.train.labels)
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    network = Small()
    masks = {name: mask(getattr(network, name).weight.shape, random) for name in SPARSE}
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(20):
        for rows in torch.randperm(len(images)).split(64):
            for name, kept in masks.items():
                getattr(network, name).weight.data *= kept
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    for name, kept in masks.items():
        getattr(network, name).weight.data *= kept
    return export_onnx(network, SHAPE, out, targets=("dense",)).file("model.dense.onnx")


def main_ok(arguments: list[str]) -> None:
    assert exit_code(arguments) == 0


def exit_code(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["sparsepipe", *arguments])
        main()
    return int(stopped.value.code or 0)


def outputs(path: Path, images: Any, *, library: bool = False) -> Any:
    opened = session(path, library=library)
    return run(opened, {opened.get_inputs()[0].name: images})[0]
