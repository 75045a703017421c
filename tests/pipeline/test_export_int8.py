"""int8 exports: the sparse file against onnxruntime's own quantised one, and against the fp32 file on real digits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
datasets = pytest.importorskip("sklearn.datasets")

from sparsepipe import export_onnx, recipe  # noqa: E402
from sparsepipe.cli.main import main  # noqa: E402
from sparsepipe.native import quantized  # noqa: E402
from sparsepipe.runtime import library_path, session  # noqa: E402
from sparsepipe.runtime.sessions import run  # noqa: E402
from sparsepipe.stages import export  # noqa: E402

SHAPE = (1, 8, 8)


class Small(torch.nn.Module):  # type: ignore[misc]
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


SPARSE = ("one", "two", "point", "hidden")


def mask(shape: torch.Size, random: np.random.Generator) -> torch.Tensor:
    """Three quarters of all blocks of 4 outputs by 4 inputs are zero."""
    blocks = random.random((shape[0] // 4, shape[1] // 4, *shape[2:])) < 0.25
    return torch.from_numpy(blocks.repeat(4, 0).repeat(4, 1).astype(np.float32))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [N, 8, 8, 1] uint8 0..255, with a test split."""
    found = datasets.load_digits()
    images = (found.images[..., None] * 15.9).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=images[:1200], y=found.target[:1200], x_test=images[1200:], y_test=found.target[1200:])
    return path


@pytest.fixture(scope="module")
def prepared(digits: Path) -> tuple[Any, Any]:
    """Test images as the network takes them, and their labels."""
    from sparsepipe import data

    dataset = data.load(f"npz:{digits}")
    rows = np.arange(len(dataset.test))
    return data.prepare(dataset.test.load(rows), dataset.preprocessing), dataset.test.labels


@pytest.fixture(scope="module")
def fp32(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-sparse network that was trained on the digits, as an ordinary ONNX file."""
    from sparsepipe import data

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
    out = tmp_path_factory.mktemp("fp32")
    return export_onnx(network, SHAPE, out / "export", targets=("dense",)).file("model.dense.onnx")


@pytest.fixture(scope="module")
def int8(fp32: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    main_ok(["export", str(fp32), "--precision", "int8", "--calibrate", f"npz:{digits}", "--out", str(out)])
    return out


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


def step_of(path: Path) -> float:
    """The scale of the network's output: what a difference of 1 is."""
    graph = onnx.load(path).graph
    last = next(node for node in graph.node if node.output[0] == graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return float(constants[last.input[1]])


def test_files_of_both_targets_and_no_other(int8: Path) -> None:
    assert sorted(path.name for path in int8.glob("*.onnx")) == ["model.dense.onnx", "model.universal.onnx"]


def test_sparse_layers_run_on_the_int8_operators_and_take_their_sums(int8: Path) -> None:
    graph = onnx.load(int8 / "model.universal.onnx").graph
    ours = Counter(node.op_type for node in graph.node if node.domain == "sparsepipe")
    assert ours == {"SparseQConv": 2, "SparseQConvAdd": 1, "SparseQLinear": 1}


def test_consecutive_sparse_layers_exchange_bytes(int8: Path) -> None:
    graph = onnx.load(int8 / "model.universal.onnx").graph
    producers = {node.output[0]: node for node in graph.node}
    summing = next(node for node in graph.node if node.op_type == "SparseQConvAdd")
    assert producers[summing.input[0]].op_type == "SparseQConv"
    for node in graph.node:
        if node.domain == "sparsepipe":
            assert producers[node.input[0]].op_type != "DequantizeLinear"


@pytest.mark.parametrize("library", [False, True])
def test_the_sparse_file_computes_what_the_plain_int8_file_does(
    int8: Path, prepared: tuple[Any, Any], library: bool
) -> None:
    if library and library_path() is None:
        pytest.skip("the kernel library was not built")
    expected = outputs(int8 / "model.dense.onnx", prepared[0])
    found = outputs(int8 / "model.universal.onnx", prepared[0], library=library)
    assert np.ptp(expected) > 20 * step_of(int8 / "model.dense.onnx")
    # A sum may differ by 1, and with it, through two layers, few outputs: most are equal.
    steps = np.abs(found - expected) / step_of(int8 / "model.dense.onnx")
    assert steps.max() < 1.5
    assert np.mean(steps > 0.5) < 0.02


def test_accuracy_is_that_of_fp32_within_a_point(fp32: Path, int8: Path, prepared: tuple[Any, Any]) -> None:
    images, labels = prepared
    expected = (outputs(fp32, images).argmax(1) == labels).mean()
    found = (outputs(int8 / "model.universal.onnx", images, library=True).argmax(1) == labels).mean()
    assert expected > 0.85
    assert found >= expected - 0.01


def test_zeros_stay_zero(fp32: Path, int8: Path) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(fp32).graph.initializer}
    model = onnx.load(int8 / "model.universal.onnx")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    seen = 0
    for name in SPARSE:
        weight = weights[f"{name}.weight"]
        values, deltas = stored[f"{name}.values"], stored[f"{name}.deltas"]
        decoded = quantized.decode(values, deltas, weight.shape, values.shape[1])
        assert not decoded[weight == 0].any()
        assert np.count_nonzero(decoded) > 0.9 * np.count_nonzero(weight)
        assert values.shape[1] == 4
        seen += 1
    assert seen == len(SPARSE)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_other_calibrations(method: str, fp32: Path, digits: Path, prepared: tuple[Any, Any], tmp_path: Path) -> None:
    config = recipe.Export(
        targets=("universal",), precision="int8", calibrate=f"npz:{digits}", calibration=method, calibration_samples=64
    )
    made = export.from_onnx(fp32, config, tmp_path / "out")
    assert made.metrics["calibration_samples"] == 64
    images, labels = prepared
    found = outputs(made.file("model.universal.onnx"), images).argmax(1)
    assert (found == labels).mean() > 0.8


def test_the_same_samples_give_the_same_file(fp32: Path, digits: Path, int8: Path, tmp_path: Path) -> None:
    config = recipe.Export(targets=("dense",), precision="int8", calibrate=f"npz:{digits}")
    made = export.from_onnx(fp32, config, tmp_path / "out")
    again = onnx.load(made.file("model.dense.onnx")).graph
    assert again.SerializeToString() == onnx.load(int8 / "model.dense.onnx").graph.SerializeToString()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--calibrate"),
        (["--target", "portable", "--calibrate", "{digits}"], "portable"),
        (["--measure", "--calibrate", "{digits}"], "--measure"),
        (["--calibrate", "{other}"], "shape"),
        (["--calibrate", "npz:/there/is/none.npz"], "none.npz"),
    ],
)
def test_refusals(
    options: list[str], word: str, fp32: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros((20, 9, 9, 1), np.uint8), y=np.arange(20) % 2)
    given = [option.format(digits=f"npz:{digits}", other=f"npz:{other}") for option in options]
    out = tmp_path / "out"
    assert exit_code(["export", str(fp32), "--precision", "int8", "--out", str(out), *given]) == 2
    assert word in capsys.readouterr().err
    assert not out.exists()
