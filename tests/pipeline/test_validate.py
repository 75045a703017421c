"""The stage `validate` on hand-made ONNX files, whose differences and layers are known."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from scipy import stats

from sparsepipe import data as datasets
from sparsepipe.artefact import Artefact, draft
from sparsepipe.errors import ArtefactError, DataError, GraphError, ModelError
from sparsepipe.recipe import Conversion, Export
from sparsepipe.runtime.network import OnnxNetwork
from sparsepipe.settings import Choice
from sparsepipe.spec import WEIGHTS_FILE, ModelSpec, Preprocessing
from sparsepipe.stages import reference
from sparsepipe.stages.freeze import FreezeConfig
from sparsepipe.stages.validate import ValidateConfig, compare, compare_all, run

FEATURES, WIDTH, CLASSES = 6, 5, 3
LAYERS = ("hidden.0", "hidden.1", "head")
PREPROCESSING = Preprocessing(mean=(0.5,) * FEATURES, std=(2.0,) * FEATURES)
Weights = dict[str, np.ndarray[Any, np.dtype[Any]]]


@pytest.fixture
def weights() -> Weights:
    random = np.random.default_rng(5)
    sizes = [FEATURES, WIDTH, WIDTH, CLASSES]
    made: Weights = {}
    for index, name in enumerate(LAYERS):
        made[f"{name}.weight"] = random.standard_normal((sizes[index + 1], sizes[index])).astype(np.float32)
        made[f"{name}.bias"] = random.standard_normal(sizes[index + 1]).astype(np.float32)
    return made


def forward(weights: Weights, raw: Any) -> Any:
    values = (raw - 0.5) / 2.0
    for name in LAYERS[:-1]:
        values = np.maximum(values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"], 0)
    return values @ weights["head.weight"].T + weights["head.bias"]


def write(
    path: Path,
    weights: Weights,
    *,
    features: int = FEATURES,
    batch: int | str = "batch",
    names: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """The perceptron as ONNX; the result of each layer has the name of its module, or the one that `names` gives."""
    nodes, values = [], "input"
    for name in LAYERS:
        output = (names or {}).get(name, name)
        nodes.append(helper.make_node("Gemm", [values, f"{name}.weight", f"{name}.bias"], [output], transB=1))
        values = f"{output}/relu"
        nodes.append(helper.make_node("Relu", [output], [values]))
    nodes[-1] = helper.make_node("Identity", [output], ["logits"])
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, features])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, dict(metadata or {}))
    onnx.save(model, path)
    return path


def scaled(weights: Weights, name: str, factor: float) -> Weights:
    return {**weights, name: weights[name] * np.float32(factor)}


def spec(**changes: Any) -> ModelSpec:
    options = {"hidden": 2, "width": WIDTH}
    return ModelSpec(
        model=changes.pop("model", Choice(name="mlp", **options)),
        input_shape=(FEATURES,),
        classes=tuple("abc"),
        preprocessing=PREPROCESSING,
        **changes,
    )


@pytest.fixture
def samples(tmp_path: Path, weights: Weights) -> Choice:
    """A dataset of which the network gets just four in five test samples right."""
    random = np.random.default_rng(6)
    x = random.standard_normal((500, FEATURES)).astype(np.float32)
    y = forward(weights, x).argmax(1)
    y[400:][::5] = (y[400:][::5] + 1) % CLASSES
    y[:CLASSES] = range(CLASSES)
    np.savez(tmp_path / "data.npz", x=x[:400], y=y[:400], x_test=x[400:], y_test=y[400:])
    return Choice(name=f"npz:{tmp_path / 'data.npz'}")


def freeze(folder: Path, weights: Weights, description: ModelSpec) -> Artefact:
    with draft(folder, "freeze", FreezeConfig(), {}) as building:
        description.write(building.folder)
        save_file(weights, building.folder / WEIGHTS_FILE)
    return Artefact.read(folder)


def export(folder: Path, files: Mapping[str, Weights], description: ModelSpec | None = None) -> Artefact:
    metadata = {"sparsepipe.spec": description.model_dump_json()} if description else {}
    with draft(folder, "export", Export(), {}) as building:
        for target, values in files.items():
            write(building.folder / f"model.{target}.onnx", values, metadata=metadata)
        building.metrics["files"] = {target: {"name": f"model.{target}.onnx", "bytes": 1} for target in files}
    return Artefact.read(folder)


def only(result: Mapping[str, Any]) -> dict[str, Any]:
    (row,) = result["candidates"]
    assert result["passed"] is row["passed"]
    json.dumps(result, allow_nan=False)
    return dict(row)


def test_identical_files_pass_without_a_difference(tmp_path: Path, weights: Weights) -> None:
    first, second = write(tmp_path / "a.onnx", weights), write(tmp_path / "b.onnx", weights)
    result = compare(first, second)
    row = only(result)
    assert (row["file"], row["reference"], row["samples"]) == ("a.onnx", "b.onnx", 64)
    assert (row["passed"], row["max_abs"], row["max_relative"], row["agreement"]) == (True, 0.0, 0.0, 1.0)
    assert row["accuracy"] is row["reference_accuracy"] is row["first_divergence"] is None
    assert "no accuracy" in result["note"]


def test_a_difference_of_a_millionth_passes(tmp_path: Path, weights: Weights) -> None:
    other = scaled(scaled(weights, "head.weight", 1 + 1e-6), "head.bias", 1 + 1e-6)
    row = only(compare(write(tmp_path / "a.onnx", other), write(tmp_path / "b.onnx", weights)))
    assert row["passed"]
    assert 1e-7 < row["max_relative"] < 1e-5
    assert row["max_abs"] > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_the_perturbed_layer_is_the_one_that_is_named(tmp_path: Path, weights: Weights, layer: str) -> None:
    candidate = write(tmp_path / "a.onnx", scaled(weights, f"{layer}.weight", 1.2))
    row = only(compare(candidate, write(tmp_path / "b.onnx", weights)))
    assert not row["passed"]
    assert row["first_divergence"]["layer"] == layer
    assert 1e-3 < row["first_divergence"]["max_relative"] < 1
    assert row["first_divergence"]["max_abs"] > 0


def test_files_of_other_tools_diverge_at_the_first_name_that_they_share(tmp_path: Path, weights: Weights) -> None:
    candidate = write(tmp_path / "a.onnx", scaled(weights, "hidden.0.weight", 1.5), names={"hidden.0": "Gemm_0"})
    row = only(compare(candidate, write(tmp_path / "b.onnx", weights)))
    assert row["first_divergence"]["layer"] == "hidden.1"
    renamed = {name: f"Gemm_{name}" for name in LAYERS}
    candidate = write(tmp_path / "c.onnx", scaled(weights, "hidden.0.weight", 1.5), names=renamed)
    assert only(compare(candidate, write(tmp_path / "b.onnx", weights)))["first_divergence"]["layer"] == "logits"


def test_files_together_have_the_results_of_each_alone_and_share_the_work(
    tmp_path: Path, weights: Weights, samples: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        write(tmp_path / "same.onnx", weights),
        write(tmp_path / "worse.onnx", scaled(weights, "head.weight", -1)),
        write(tmp_path / "fixed.onnx", weights, batch=50),
        write(tmp_path / "same.again.onnx", weights, names={"hidden.0": "Gemm_0"}),
    ]
    reference = write(tmp_path / "reference.onnx", weights)
    alone = [compare(path, reference, samples) for path in paths]
    assert [result["passed"] for result in alone] == [True, False, True, True]
    loads, passes = Counter[str](), Counter[str]()
    load, run = datasets.load, OnnxNetwork.run
    monkeypatch.setattr(datasets, "load", lambda name, options: loads.update([name]) or load(name, options))
    monkeypatch.setattr(OnnxNetwork, "run", lambda self, inputs: passes.update([self.name]) or run(self, inputs))
    assert compare_all(paths, reference, samples) == alone
    # The file of a fixed batch is compared on batches of its own; of the one that fails, a sample is looked at again.
    assert loads.total() == 2
    assert passes["same.onnx"] == passes["same.again.onnx"] == 1
    assert passes["reference.onnx"] == 1 + passes["fixed.onnx"] + 1


def test_nan_fails_and_is_null_in_the_result(tmp_path: Path, weights: Weights) -> None:
    candidate = write(tmp_path / "a.onnx", scaled(weights, "hidden.1.bias", np.nan))
    row = only(compare(candidate, write(tmp_path / "b.onnx", weights)))
    assert not row["passed"]
    assert row["max_abs"] is row["max_relative"] is None
    assert row["agreement"] == 0.0
    assert row["first_divergence"] == {"layer": "hidden.1", "max_abs": None, "max_relative": None}
    assert "not finite" in row["note"]


def test_nan_in_both_is_noted_and_fails(tmp_path: Path, weights: Weights) -> None:
    broken = scaled(weights, "head.bias", np.nan)
    row = only(compare(write(tmp_path / "a.onnx", broken), write(tmp_path / "b.onnx", broken)))
    assert not row["passed"]
    assert row["max_abs"] is row["max_relative"] is None
    count = 64 * CLASSES
    assert f"not finite (NaN or infinite): {count} of the file, {count} of the reference" in row["note"]


def test_other_outputs_fail_and_other_inputs_are_refused(tmp_path: Path, weights: Weights) -> None:
    good = write(tmp_path / "good.onnx", weights)
    wide = {**weights, "head.weight": np.ones((4, WIDTH), np.float32), "head.bias": np.ones(4, np.float32)}
    row = only(compare(write(tmp_path / "wide.onnx", wide), good))
    assert not row["passed"]
    assert "[64, 4]" in row["note"]
    assert row["first_divergence"]["layer"] == "head"
    taller = {**weights, "hidden.0.weight": np.ones((WIDTH, 9), np.float32)}
    with pytest.raises(GraphError, match="cannot be compared"):
        compare(write(tmp_path / "taller.onnx", taller, features=9), good)


def test_a_fixed_batch_size_is_kept_to(tmp_path: Path, weights: Weights, samples: Choice) -> None:
    fixed = write(tmp_path / "fixed.onnx", scaled(weights, "head.weight", 1.5), batch=7)
    row = only(compare(fixed, write(tmp_path / "b.onnx", weights), samples))
    assert row["samples"] == 100
    assert row["first_divergence"]["layer"] == "head"
    assert only(compare(fixed, fixed))["samples"] == 70


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x08"])
def test_malformed_files_are_one_clear_error(tmp_path: Path, weights: Weights, content: bytes) -> None:
    good, bad = write(tmp_path / "good.onnx", weights), tmp_path / "bad.onnx"
    bad.write_bytes(content)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(GraphError, match=r"bad\.onnx"):
            compare(*pair)
    with pytest.raises(GraphError, match="no such"):
        compare(good, tmp_path / "absent.onnx")
    with pytest.raises(ArtefactError, match="no network"):
        compare(good, tmp_path)
    damaged = write(tmp_path / "damaged.onnx", weights, metadata={"sparsepipe.spec": "{"})
    with pytest.raises(GraphError, match=r"sparsepipe\.spec"):
        compare(damaged, good)


def test_accuracy_is_counted_on_the_test_split_with_its_own_preprocessing(
    tmp_path: Path, weights: Weights, samples: Choice
) -> None:
    described = {"sparsepipe.spec": spec(data=samples).model_dump_json()}
    good = write(tmp_path / "good.onnx", weights, metadata=described)
    result = compare(good, write(tmp_path / "plain.onnx", weights))
    row = only(result)
    interval = stats.binomtest(80, 100).proportion_ci(0.95, method="wilson")
    expected = {
        "value": 0.8,
        "low": pytest.approx(interval.low),
        "high": pytest.approx(interval.high),
        "correct": 80,
        "samples": 100,
    }
    assert row["accuracy"] == row["reference_accuracy"] == expected
    assert result["data"] == samples.name
    assert row["passed"]
    assert result["note"] is not None  # the classes are called 0, 1, 2 there


def test_the_users_dataset_needs_no_metadata_but_must_fit(tmp_path: Path, weights: Weights, samples: Choice) -> None:
    good = write(tmp_path / "good.onnx", weights)
    result = compare(good, good, samples)
    assert only(result)["accuracy"]["samples"] == 100
    assert "preprocessing" in result["note"]
    np.savez(tmp_path / "wide.npz", x=np.zeros((9, 4), np.float32), y=np.arange(9) % 3)
    with pytest.raises(DataError, match="shape"):
        compare(good, good, Choice(name=f"npz:{tmp_path / 'wide.npz'}"))
    np.savez(tmp_path / "many.npz", x=np.ones((16, FEATURES), np.float32), y=np.arange(16) % 4)
    with pytest.raises(DataError, match="4 classes"):
        compare(good, good, Choice(name=f"npz:{tmp_path / 'many.npz'}"))


@pytest.mark.parametrize("name", ["evil:load", "plugin:load", "hf:someone/something", "npz:/nowhere/at/all.npz"])
def test_a_dataset_that_only_the_file_names_runs_no_code_and_may_be_missing(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("evil", "plugin"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    described = {"sparsepipe.spec": spec(data=Choice(name=name)).model_dump_json()}
    result = compare(write(tmp_path / "a.onnx", weights, metadata=described), write(tmp_path / "b.onnx", weights))
    assert only(result)["passed"]
    assert result["data"] is None
    assert name in result["note"]
    assert not {"evil", "plugin"} & set(sys.modules)


class TestAgainstTorch:
    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        pytest.importorskip("torch")

    def test_every_exported_file_is_compared_with_the_network(
        self, tmp_path: Path, weights: Weights, samples: Choice
    ) -> None:
        frozen = freeze(tmp_path / "freeze", weights, spec())
        files = {"dense": weights, "portable": scaled(weights, "hidden.1.weight", 1.1)}
        exported = export(tmp_path / "export", files)
        config = ValidateConfig(data=samples, batch_size=33)
        result = run(config, {"freeze": frozen, "export": exported}, tmp_path / "validate")
        good, bad = result.metrics["candidates"]
        assert result.metrics["passed"] is False
        assert (good["file"], good["reference"], good["passed"]) == ("model.dense.onnx", "PyTorch", True)
        assert good["max_relative"] < 1e-5
        assert good["accuracy"]["correct"] == good["reference_accuracy"]["correct"] == 80
        assert (bad["passed"], bad["first_divergence"]["layer"]) == (False, "hidden.1")
        assert bad["reference_accuracy"] == good["accuracy"]
        assert json.loads(result.file("validation.json").read_text()).items() <= result.metrics.items()
        assert result.manifest.inputs.keys() == {"freeze", "export", "data"}

    def test_a_folder_is_a_reference_too(self, tmp_path: Path, weights: Weights, samples: Choice) -> None:
        artefact = freeze(tmp_path / "run" / "freeze", weights, spec(data=samples))
        candidate = write(tmp_path / "a.onnx", scaled(weights, "head.bias", 1 + 1e-6))
        for folder in (tmp_path / "run", tmp_path / "run" / "freeze", artefact):
            row = only(compare(candidate, folder))
            assert (row["reference"], row["passed"], row["samples"]) == ("PyTorch", True, 100)

    def test_a_converted_network_is_expanded(self, tmp_path: Path, weights: Weights) -> None:
        from sparsepipe.formats.masks import save_masks
        from sparsepipe.stages import convert

        sparse = {**weights, "hidden.0.weight": np.where(np.eye(WIDTH, FEATURES) > 0, 1, 0).astype(np.float32)}
        with draft(tmp_path / "freeze", "freeze", FreezeConfig(), {}) as building:
            spec().write(building.folder)
            save_file(sparse, building.folder / WEIGHTS_FILE)
            save_masks(building.folder / "masks.safetensors", {"hidden.0.weight": sparse["hidden.0.weight"] != 0})
        frozen = Artefact.read(tmp_path / "freeze")
        converted = convert.run(Conversion(), {"freeze": frozen}, tmp_path / "convert")
        exported = export(tmp_path / "export", {"dense": sparse})
        result = run(ValidateConfig(), {"convert": converted, "export": exported}, tmp_path / "validate")
        assert result.metrics["passed"]

    def test_code_that_an_artefact_names_is_not_imported(
        self, tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "my_network.py").write_text(
            "from sparsepipe.models.mlp import mlp\n"
            "def make(*, input_shape, classes):\n"
            f"    return mlp(input_shape=input_shape, classes=classes, hidden=2, width={WIDTH})\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        name = "my_network:make"
        artefact = freeze(tmp_path / "freeze", weights, spec(model=Choice(name=name)))
        candidate = write(tmp_path / "a.onnx", weights)
        for trusted in (None, "another:make"):
            with pytest.raises(ModelError, match=name):
                compare(candidate, artefact, trusted_model=trusted)
        assert "my_network" not in sys.modules
        assert only(compare(candidate, artefact, trusted_model=name))["passed"]
        sys.modules.pop("my_network")

    def test_modules_are_traced_by_path_and_call(self) -> None:
        import torch

        class Double(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2

        class Network(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.twice = Double()
                self.clip = torch.nn.ReLU(inplace=True)

            def forward(self, x: torch.Tensor) -> Any:
                return self.twice(self.clip(self.twice(x)))

        network = reference.TorchNetwork(Network(), (2,))
        values = {"input": np.array([[1.0, -1.0]], np.float32)}
        traced = network.trace(values, ["twice", "twice@1", "clip", "absent", "twice@2"])
        assert {name: value.tolist() for name, value in traced.items()} == {
            "twice": [[2.0, -2.0]],
            "clip": [[2.0, 0.0]],
            "twice@1": [[4.0, 0.0]],
        }


def test_without_torch_the_dense_file_stands_for_the_network(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    frozen = freeze(tmp_path / "run" / "freeze", weights, spec())
    exported = export(tmp_path / "run" / "export", {"dense": weights, "portable": weights}, spec())
    inputs = {"freeze": frozen, "export": exported}
    metrics = run(ValidateConfig(samples=8), inputs, tmp_path / "run" / "validate").metrics
    row = only(metrics)
    assert (row["file"], row["reference"], row["samples"]) == ("model.portable.onnx", "model.dense.onnx", 8)
    assert "torch is not installed" in metrics["note"]
    result = compare(write(tmp_path / "a.onnx", weights), tmp_path / "run")
    assert only(result)["reference"] == "model.dense.onnx"
    assert "torch is not installed" in result["note"]
    alone = export(tmp_path / "alone", {"dense": weights})
    with pytest.raises(ArtefactError, match="no exported file"):
        run(ValidateConfig(), {"freeze": frozen, "export": alone}, tmp_path / "validate")
    with pytest.raises(ArtefactError, match="no network"):
        compare(tmp_path / "a.onnx", frozen)
