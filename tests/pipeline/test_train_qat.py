"""Training by int8-qat on real digits, from the recipe to the int8 file."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

for package in ("torch", "lightning_fabric", "onnxscript", "sklearn"):
    pytest.importorskip(package)

from int8_digits import exit_code, main_ok, outputs  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from sparsepipe.artefact import Artefact  # noqa: E402
from sparsepipe.formats.masks import load_masks  # noqa: E402
from sparsepipe.progress import Bar  # noqa: E402
from sparsepipe.recipe import parse  # noqa: E402
from sparsepipe.spec import MASKS_FILE, SPEC_FILE, WEIGHTS_FILE, ModelSpec  # noqa: E402
from sparsepipe.stages import freeze, train  # noqa: E402
from sparsepipe.training import checkpoint  # noqa: E402

NETWORK = "qat_network:uneven"


def trained(out: Path, digits: Path, precision: str, *, epochs: int = 3, resume: bool = False) -> Artefact:
    table: dict[str, Any] = {
        "model": NETWORK,
        "data": f"npz:{digits}",
        "method": {"name": "rigl", "sparsity": 0.5, "stop_at": 0.5, "update_every": 10},
        "optimizer": {"name": "adamw", "lr": 5e-3},
        "train": {"epochs": epochs, "batch_size": 64, "precision": precision, "qat_start": 0.6},
    }
    return train.run(train.TrainConfig.from_recipe(parse(table)), {}, out, resume=resume)


@pytest.fixture(scope="module")
def made(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return trained(tmp_path_factory.mktemp("qat") / "train", digits, "int8-qat")


def frozen(source: Artefact, out: Path) -> Path:
    return freeze.run(freeze.FreezeConfig(), {"train": source}, out).folder


def test_masks_are_those_of_training_in_fp32_and_zeros_are_exact(made: Artefact, digits: Path, tmp_path: Path) -> None:
    plain = trained(tmp_path / "train", digits, "fp32")
    masks, expected = (load_masks(one.file(MASKS_FILE)) for one in (made, plain))
    weights, others = (load_file(one.file(WEIGHTS_FILE)) for one in (made, plain))
    assert masks.keys() == expected.keys()
    assert all(np.array_equal(masks[name], expected[name]) for name in masks)
    assert not any(weights[name][~mask].any() for name, mask in masks.items())
    assert any(not np.array_equal(weights[name], others[name]) for name in masks)  # the rounding did something


def test_resumed_within_the_rounded_steps_it_is_the_same(
    made: Artefact, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, advance = 0, Bar.advance

    def counting(bar: Bar, count: int = 1, note: str | None = None) -> None:
        nonlocal steps
        steps += 1
        advance(bar, count, note)
        if steps == 40:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bar, "advance", counting)
        trained(tmp_path / "train", digits, "int8-qat")
    saved = checkpoint.load(tmp_path / "train.partial")
    assert saved is not None
    assert saved["loop"]["step"] == 40
    assert np.isfinite(saved["loop"]["ranges"].numpy()).all()
    resumed = trained(tmp_path / "train", digits, "int8-qat", resume=True)
    for name in (WEIGHTS_FILE, MASKS_FILE, SPEC_FILE):
        assert resumed.file(name).read_bytes() == made.file(name).read_bytes(), name


def test_the_export_takes_the_observed_ranges_and_needs_no_samples(
    made: Artefact, prepared: tuple[Any, Any], tmp_path: Path
) -> None:
    source = frozen(made, tmp_path / "freeze")
    options = ["--model", NETWORK, "--target", "dense", "--precision", "int8", "--out", str(tmp_path / "out")]
    main_ok(["export", str(source), *options])
    path = tmp_path / "out" / "model.dense.onnx"
    observed = ModelSpec.read(made.file(SPEC_FILE)).activation_ranges
    assert observed is not None
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = {n.input[0]: float(constants[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear"}
    for name in ("input", "relu", "bn2", "side"):
        low, high = observed[name]
        assert scales[name] == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-5)
    found = (outputs(path, prepared[0]).argmax(1) == prepared[1]).mean()
    # What training measured with rounded values, but for values on the edge between two steps.
    assert found == pytest.approx(made.metrics["int8_test_accuracy"], abs=0.015)


def test_max_drop_still_needs_samples(made: Artefact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = frozen(made, tmp_path / "freeze")
    options = ["--precision", "int8", "--max-drop", "1", "--out", str(tmp_path / "out")]
    assert exit_code(["export", str(source), "--model", NETWORK, *options]) == 2
    assert "--max-drop" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_more_accurate_than_quantising_afterwards(
    digits: Path, prepared: tuple[Any, Any], tmp_path: Path
) -> None:
    images, labels = prepared
    found = {}
    for precision in ("fp32", "int8-qat"):
        source = frozen(
            trained(tmp_path / precision / "train", digits, precision, epochs=10), tmp_path / precision / "freeze"
        )
        options = ["--model", NETWORK, "--target", "dense", "--precision", "int8", "--calibrate", f"npz:{digits}"]
        main_ok(["export", str(source), *options, "--out", str(tmp_path / precision / "out")])
        found[precision] = (
            outputs(tmp_path / precision / "out" / "model.dense.onnx", images).argmax(1) == labels
        ).mean()
        if precision == "fp32":
            fp32 = Artefact.read(tmp_path / precision / "train", "train").metrics["test_accuracy"]
    assert found["fp32"] < fp32 - 0.02  # quantised after training it clearly loses
    assert found["int8-qat"] > found["fp32"] + 0.01
