"""Networks of the user that cannot be trained are refused before the first step, with one clear error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from torch import Tensor, nn  # noqa: E402

from sparsepipe.errors import ModelError  # noqa: E402
from sparsepipe.recipe import parse  # noqa: E402
from sparsepipe.stages import train  # noqa: E402


class TwoHeads(nn.Module):
    """As networks with an auxiliary head: a tuple in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        logits = self.layer(x.flatten(1))
        return (logits, logits) if self.training else logits


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return {}["missing"]  # type: ignore[no-any-return]


def two_heads(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return TwoHeads()


def failing(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Failing()


def leaving(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    sys.exit(0)


def lazy(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def normalised(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Linear(12, classes))


def without_weights(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d((1, classes)), nn.Flatten())


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("two_heads", (), "In training mode the network returns a tuple"),
        ("failing", (), "KeyError: 'missing'"),
        ("leaving", (), "SystemExit: 0"),
        ("lazy", (), "parameters without a shape: 1.weight"),
        ("normalised", ("train.batch_size=1",), "In training mode .* in batches of 1"),
        ("without_weights", (), "no weight of two or more dimensions"),
    ],
)
def test_a_network_that_cannot_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "network_module", sys.modules[__name__])
    table = {"model": f"network_module:{network}", "data": "digits", "method": {"name": "static", "sparsity": 0.5}}
    recipe = parse(table, options)
    with pytest.raises(ModelError, match=message):
        train.run(train.TrainConfig.from_recipe(recipe), {}, tmp_path / "train")
    assert list(tmp_path.iterdir()) == []
