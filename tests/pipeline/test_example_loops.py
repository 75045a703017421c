"""The examples of loops run: interrupted, resumed by the loop's own checkpoints, exactly sparse, and exported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from torch.utils.data import TensorDataset  # noqa: E402

from sparsepipe.runtime import session  # noqa: E402

LOOPS = Path(__file__).parents[2] / "examples" / "loops"
EPOCHS = 4
STEPS = 20  # optimizer steps in an epoch: 40 batches of 35 samples, two for each step


class Interrupted(Exception):
    """Stands for whatever ends a training."""


class Failing(TensorDataset):
    """Fails at its last epoch but one, in the middle."""

    def __init__(self, whole: TensorDataset) -> None:
        super().__init__(*whole.tensors)
        self._left = int((EPOCHS - 1.5) * len(whole))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        self._left -= 1
        if self._left < 0:
            raise Interrupted
        return super().__getitem__(index)


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(LOOPS))
    yield
    for path in LOOPS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def interrupted_and_resumed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    example, digits = importlib.import_module(name), importlib.import_module("digits")
    train, test = digits.load()
    with monkeypatch.context() as patch:
        patch.setattr(digits, "load", lambda: (Failing(train), test))
        with pytest.raises(Interrupted):
            example.main(folder, epochs=EPOCHS, **options)
    result: dict[str, Any] = example.main(folder, epochs=EPOCHS, **options)
    return result


def check(
    result: dict[str, Any], network: Any, *, sparsity: float, folder: Path, input_shape: tuple[int, ...] = (1, 8, 8)
) -> None:
    """`network` is what was exported; its weights may have a longer or a shorter name than those of the masks."""
    masks, weights = result["masks"], dict(result["model"].named_parameters())
    weights |= {name.removeprefix("model."): weight for name, weight in weights.items()}
    total = sum(mask.numel() for mask in masks.values())
    assert masks.nnz == total - round(sparsity * total)
    for name, mask in masks.items():
        assert not weights[name].detach()[~mask].view(torch.int32).any(), "inactive weights are +0.0"
    # Masks change after every tenth step before three quarters of all: 5 times. A counter starts at the first mask, so
    # their sum is (updates + 1) x nnz, but only if it was not lost in the middle.
    updates = len([step for step in range(1, EPOCHS * STEPS) if step % 10 == 0 and step < 0.75 * EPOCHS * STEPS])
    assert updates == 5
    assert masks.counters
    for name, counter in masks.counters.items():
        assert int(counter.sum()) == (updates + 1) * int(masks[name].sum()), name

    images = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.eval()(images)
    expected = expected.numpy()
    for target in ("dense", "portable", "universal"):
        found = session(folder / "onnx" / f"model.{target}.onnx").run(None, {"input": images.numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = interrupted_and_resumed("plain_pytorch", tmp_path, monkeypatch)
    check(resumed, resumed["model"], sparsity=0.9, folder=tmp_path)
    assert resumed["accuracy"] > 0.8
    (tmp_path / "whole").mkdir()
    whole = importlib.import_module("plain_pytorch").main(tmp_path / "whole", epochs=EPOCHS)
    for name, value in whole["model"].state_dict().items():
        assert torch.equal(value, resumed["model"].state_dict()[name]), name


def test_the_trainer_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    result = interrupted_and_resumed("lightning_trainer", tmp_path, monkeypatch)
    assert result["accuracy"] > 0.8
    check(result, result["model"].network, sparsity=0.9, folder=tmp_path)


def test_the_trainer_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    result = interrupted_and_resumed("huggingface_trainer", tmp_path, monkeypatch)
    check(result, result["model"], sparsity=0.8, folder=tmp_path)
    assert result["accuracy"] > 0.8


def test_a_model_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch fails in its own way
        pytest.skip(f"timm needs a torchvision that fits torch {torch.__version__}: {error}")
    result = interrupted_and_resumed("timm_model", tmp_path, monkeypatch, model_name="test_resnet")
    check(result, result["model"], sparsity=0.8, folder=tmp_path, input_shape=(1, 32, 32))
