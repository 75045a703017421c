"""The stages freeze and convert on tiny artefacts, and their ways in for files from elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from sparsepipe.artefact import Artefact, draft, read_json
from sparsepipe.errors import ArtefactError, FormatError, GraphError, ModelError, SparsepipeError
from sparsepipe.recipe import Conversion
from sparsepipe.settings import Choice
from sparsepipe.spec import ModelSpec, Preprocessing
from sparsepipe.stages import convert, freeze

Array = np.ndarray[Any, Any]
SPEC = ModelSpec(
    model=Choice(name="mlp"),
    input_shape=(1, 8, 8),
    classes=("a", "b"),
    preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    method="dst-ee",
    pattern="4x1",
)


def blocks(shape: tuple[int, int], r: int, c: int, density: float = 0.1) -> Array:
    """A mask of whole blocks r x c."""
    generator = np.random.default_rng(3)
    return np.kron(generator.random((shape[0] // r, shape[1] // c)) < density, np.ones((r, c), bool))


def masks() -> dict[str, Array]:
    generator = np.random.default_rng(4)
    return {
        "conv.weight": generator.random((16, 8, 3, 3)) < 0.05,
        "fc.weight": blocks((64, 128), 4, 1),
        "head.weight": np.ones((2, 64), bool),
    }


def weights() -> dict[str, Array]:
    """Weights as training leaves them, with things in inactive places that must go."""
    generator = np.random.default_rng(5)
    state: dict[str, Array] = {
        name: np.asarray(generator.standard_normal(mask.shape), np.float32) for name, mask in masks().items()
    }
    inactive = np.flatnonzero(~masks()["conv.weight"])
    state["conv.weight"].reshape(-1)[inactive[:3]] = [-0.0, np.nan, -np.inf]
    return {
        **state,
        "conv.bias": np.array([-0.0, 1, 2], np.float32),
        "bn.running_var": np.ones(16, np.float32),
        "bn.num_batches_tracked": np.array(12, np.int64),
    }


def make_trained(folder: Path, state: dict[str, Array], mask_of: dict[str, Array], **metrics: Any) -> Artefact:
    """What `train` writes, packed here by hand."""
    packed = {name: np.packbits(mask.reshape(-1), bitorder="little") for name, mask in mask_of.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in mask_of.items()})
    with draft(folder, "train", SPEC, {}) as building:
        SPEC.write(building.folder)
        save_file(state, building.folder / "model.safetensors")
        save_file(packed, building.folder / "masks.safetensors", {"shapes": shapes})
        save_file({"optimizer.momentum": np.ones(9)}, building.folder / "checkpoint.safetensors")
        building.metrics |= metrics
    return Artefact.read(folder)


@pytest.fixture
def trained(tmp_path: Path) -> Artefact:
    return make_trained(tmp_path / "train", weights(), masks(), weights=sum(mask.size for mask in masks().values()))


@pytest.fixture
def frozen(tmp_path: Path, trained: Artefact) -> Artefact:
    return freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "freeze")


@pytest.fixture
def converted(tmp_path: Path, frozen: Artefact) -> Artefact:
    return convert.run(Conversion(), {"freeze": frozen}, tmp_path / "convert")


def test_frozen_weights_are_exact(trained: Artefact, frozen: Artefact) -> None:
    assert frozen.manifest.inputs == {"train": trained.digest}
    assert set(frozen.manifest.outputs) == {"model.json", "model.safetensors", "masks.safetensors"}
    state, before = load_file(frozen.file("model.safetensors")), weights()
    assert set(state) == set(before)
    for name, mask in masks().items():
        assert (state[name][~mask].view(np.uint32) == 0).all()
        assert state[name][mask].tobytes() == before[name][mask].tobytes()
    for name in set(before) - set(masks()):
        assert state[name].tobytes() == before[name].tobytes()
        assert state[name].dtype == before[name].dtype
    assert ModelSpec.read(frozen.file("model.json")) == SPEC
    assert frozen.file("masks.safetensors").read_bytes() == trained.file("masks.safetensors").read_bytes()


def test_frozen_metrics(frozen: Artefact) -> None:
    metrics = frozen.metrics
    nnz = {name: int(mask.sum()) for name, mask in masks().items()}
    size = {name: mask.size for name, mask in masks().items()}
    assert {layer["name"]: layer["nnz"] for layer in metrics["layers"]} == nnz
    assert metrics["nnz"] == sum(nnz.values())
    assert metrics["weights"] == sum(size.values())
    assert metrics["sparsity"] == pytest.approx(1 - sum(nnz.values()) / sum(size.values()))
    conv = next(layer for layer in metrics["layers"] if layer["name"] == "conv.weight")
    assert conv["shape"] == [16, 8, 3, 3]
    assert conv["sparsity"] == pytest.approx(1 - nnz["conv.weight"] / size["conv.weight"])
    assert metrics["digest"].startswith("sha256:")


def test_freezing_is_deterministic(tmp_path: Path, trained: Artefact, frozen: Artefact) -> None:
    again = freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "again")
    assert again.digest == frozen.digest
    assert again.metrics["digest"] == frozen.metrics["digest"]


def test_an_active_negative_zero_becomes_positive(tmp_path: Path) -> None:
    trained = make_trained(tmp_path / "train", {"w": np.full((1, 2), -0.0, np.float32)}, {"w": np.ones((1, 2), bool)})
    frozen = freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "freeze")
    assert (load_file(frozen.file("model.safetensors"))["w"].view(np.uint32) == 0).all()
    assert frozen.metrics["nnz"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["fc.weight", "conv.bias", "bn.running_var"])
def test_active_weights_that_are_not_finite_are_refused(name: str, value: float, tmp_path: Path) -> None:
    state = weights()
    place = np.flatnonzero(masks().get(name, np.ones(state[name].shape)))[:2]
    state[name].reshape(-1)[place] = [1, value]
    trained = make_trained(tmp_path / "train", state, masks())
    message = rf"train/model\.safetensors: '{name}' holds 1 of {state[name].size} values that are not finite"
    with pytest.raises(ArtefactError, match=message):
        freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "freeze")
    assert not (tmp_path / "freeze").exists()
    with draft(tmp_path / "old", "freeze", SPEC, {}) as building:  # as an earlier version wrote it
        SPEC.write(building.folder)
        save_file(state, building.folder / "model.safetensors")
    with pytest.raises(ArtefactError, match="values that are not finite"):
        convert.run(Conversion(), {"freeze": Artefact.read(tmp_path / "old")}, tmp_path / "convert")


def test_a_mask_of_zeros_and_infinities_is_no_damage(tmp_path: Path) -> None:
    causal = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    trained = make_trained(tmp_path / "train", weights() | {"attention.mask": causal}, masks())
    frozen = freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "freeze")
    np.testing.assert_array_equal(load_file(frozen.file("model.safetensors"))["attention.mask"], causal)


def test_weights_and_masks_must_belong_together(tmp_path: Path) -> None:
    def failing(state: dict[str, Array], mask_of: dict[str, Array], **metrics: Any) -> str:
        trained = make_trained(tmp_path / "train", state, mask_of, **metrics)
        with pytest.raises(ArtefactError) as caught:
            freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "freeze")
        assert not (tmp_path / "freeze").exists()
        return str(caught.value)

    weight, mask = np.ones((2, 4), np.float32), np.ones((2, 4), bool)
    assert "a mask for 'w', but no such weight" in failing({"v": weight}, {"w": mask})
    assert "'w' has shape [2, 4], its mask [4, 2]" in failing({"w": weight}, {"w": mask.T})
    assert "8 of the 16 weights that were trained with masks have none" in failing(
        {"w": weight, "v": weight}, {"w": mask}, weights=16
    )


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "masks.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, trained: Artefact, name: str) -> None:
    trained.file(name).unlink()
    with pytest.raises(ArtefactError, match=f"'{name}' is missing"):
        freeze.run(freeze.FreezeConfig(), {"train": trained}, tmp_path / "freeze")


def test_converted_weights_are_the_frozen_ones(frozen: Artefact, converted: Artefact) -> None:
    assert converted.manifest.inputs == {"freeze": frozen.digest}
    before, after = load_file(frozen.file("model.safetensors")), convert.load_weights(converted)
    assert set(after) == set(before)
    for name, array in before.items():
        assert (after[name].dtype, after[name].shape) == (array.dtype, array.shape)
        assert after[name].tobytes() == array.tobytes()
    from_frozen = convert.load_weights(frozen)
    assert all(from_frozen[name].tobytes() == array.tobytes() for name, array in before.items())
    assert ModelSpec.read(converted.file("model.json")) == SPEC


def test_the_table_of_layers(converted: Artefact) -> None:
    layers = {layer["name"]: layer for layer in converted.metrics["layers"]}
    assert read_json(converted.file("layers.json")) == converted.metrics["layers"]
    assert layers["conv.weight"]["format"] == "csr"
    assert layers["conv.weight"]["block"] is None
    assert (layers["fc.weight"]["format"], layers["fc.weight"]["block"]) == ("bsr", "4x1")
    assert layers["head.weight"]["format"] == "dense"
    assert layers["head.weight"]["reason"] == "It has no zeros."
    assert "zero; bsr 4x1 takes" in layers["fc.weight"]["reason"]
    tensors = load_file(converted.file("model.safetensors"))
    for name in ("conv.weight", "fc.weight"):
        stored = sum(array.nbytes for key, array in tensors.items() if key.startswith(f"{name}."))
        assert layers[name]["bytes"] == stored < layers[name]["dense_bytes"]
    assert converted.metrics["bytes_before"] == sum(array.nbytes for array in weights().values())
    assert converted.metrics["bytes_after"] == sum(array.nbytes for array in tensors.values())


def convert_one(tmp_path: Path, dense: Array, *formats: str, pattern: str = "unstructured") -> dict[str, Any]:
    with draft(tmp_path / "freeze", "freeze", freeze.FreezeConfig(), {}) as building:
        SPEC.model_copy(update={"pattern": pattern}).write(building.folder)
        save_file({"w": dense}, building.folder / "model.safetensors")
    config = Conversion.model_validate({"formats": formats}) if formats else Conversion()
    artefact = convert.run(config, {"freeze": Artefact.read(tmp_path / "freeze")}, tmp_path / "convert")
    (layer,) = artefact.metrics["layers"]
    assert convert.load_weights(artefact)["w"].tobytes() == dense.tobytes()
    return dict(layer)


def test_each_kind_of_weight_gets_its_format(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    values = generator.standard_normal((64, 64)).astype(np.float32)
    one_of_four = np.arange(64) % 4 == generator.integers(0, 4, (64, 1))
    cases = {
        ("csr", None): generator.random((64, 64)) < 0.05,
        ("bitmask", None): generator.random((64, 64)) < 0.5,
        ("bsr", "4x4"): blocks((64, 64), 4, 4),
        ("bsr", "1x4"): blocks((64, 64), 1, 4),
        ("nm", "1:4"): one_of_four,
        ("dense", None): np.ones((64, 64), bool),
    }
    for (name, block), mask in cases.items():
        layer = convert_one(tmp_path, np.where(mask, values, np.float32(0)))
        assert (layer["format"], layer["block"]) == (name, block)


def test_the_pattern_of_the_training_is_tried(tmp_path: Path) -> None:
    values = np.random.default_rng(6).standard_normal((64, 64)).astype(np.float32)
    layer = convert_one(tmp_path, np.where(blocks((64, 64), 16, 1), values, np.float32(0)), pattern="16x1")
    assert (layer["format"], layer["block"]) == ("bsr", "16x1")
    three_of_sixteen = np.where(np.arange(64) % 16 < 3, values, np.float32(0))
    layer = convert_one(tmp_path, three_of_sixteen, "nm", pattern="3:16")
    assert (layer["format"], layer["block"]) == ("nm", "3:16")


def test_only_the_formats_allowed_are_used(tmp_path: Path) -> None:
    values = np.random.default_rng(6).standard_normal((64, 64)).astype(np.float32)
    dense = np.where(blocks((64, 64), 4, 1, 0.05), values, np.float32(0))
    assert convert_one(tmp_path, dense, "bitmask")["format"] == "bitmask"
    assert convert_one(tmp_path, dense, "csr", "bitmask")["format"] == "csr"
    layer = convert_one(tmp_path, dense, "dense")
    assert (layer["format"], layer["bytes"]) == ("dense", layer["dense_bytes"])


def test_a_layer_that_no_format_makes_smaller_stays_dense(tmp_path: Path) -> None:
    dense = np.ones((64, 64), np.float32)
    dense[0, 0] = 0
    layer = convert_one(tmp_path, dense, "csr", "bitmask")
    assert layer["format"] == "dense"
    assert layer["reason"].startswith("0.0% of its weights are zero, but even bitmask would take 103.1%")


def test_all_zero_and_empty_layers(tmp_path: Path) -> None:
    layer = convert_one(tmp_path, np.zeros((8, 8), np.float32))
    assert layer["bytes"] < layer["dense_bytes"]
    assert layer["reason"].startswith("100.0% of its weights are zero")
    assert convert_one(tmp_path, np.zeros((0, 8), np.float32))["format"] == "dense"


def test_weights_are_read_from_networks_only(trained: Artefact) -> None:
    with pytest.raises(ArtefactError, match="not from 'train'"):
        convert.load_weights(trained)


def test_a_damaged_component_is_named(converted: Artefact) -> None:
    path = converted.file("model.safetensors")
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + header["conv.weight.indptr"]["data_offsets"][0]
    content[start] = 200
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"conv\.weight\.indptr: The first row pointer"):
        convert.load_weights(converted)


def test_neither_stage_imports_torch(tmp_path: Path, trained: Artefact) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from sparsepipe.artefact import Artefact
from sparsepipe.recipe import Conversion
from sparsepipe.stages import convert, freeze
from sparsepipe.inspection import inspect
from sparsepipe.spec import ModelSpec
out = Path({str(tmp_path)!r})
frozen = freeze.run(freeze.FreezeConfig(), {{"train": Artefact.read(out / "train")}}, out / "freeze")
convert.load_weights(convert.run(Conversion(), {{"freeze": frozen}}, out / "convert"))
inspect(out)
try:
    freeze.from_checkpoint(out / "x.pt", ModelSpec.read(out / "train" / "model.json"), out / "y")
except Exception as error:
    assert "pip install" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Checkpoints from elsewhere

NETWORKS = """
from torch import nn


def fc(input_shape, classes):
    return nn.ModuleDict({"fc": nn.Linear(128, 64)})


def pruned(input_shape, classes):
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def held(input_shape, classes):
    return nn.ModuleDict({"model": pruned(input_shape, classes)})


def kinds(input_shape, classes):
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("float16", "brain", "coo")})
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModelSpec]:
    """SPEC with a network of the user's own."""
    pytest.importorskip("torch")
    (tmp_path / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return lambda name: SPEC.model_copy(update={"model": Choice(name=f"own_networks:{name}")})


Own = Callable[[str], ModelSpec]


def test_zeros_of_a_safetensors_file_become_the_masks(tmp_path: Path, own: Own) -> None:
    dense = np.where(masks()["fc.weight"], weights()["fc.weight"], np.float32(-0.0))
    save_file({"fc.weight": dense, "fc.bias": np.zeros(64, np.float32)}, tmp_path / "net.safetensors")
    frozen = freeze.from_checkpoint(tmp_path / "net.safetensors", own("fc"), tmp_path / "frozen")
    assert frozen.manifest.stage == "freeze"
    assert frozen.metrics["nnz"] == masks()["fc.weight"].sum()
    assert frozen.metrics["weights"] == dense.size
    state = load_file(frozen.file("model.safetensors"))
    assert (state["fc.weight"].view(np.uint32)[dense == 0] == 0).all()
    packed = load_file(frozen.file("masks.safetensors"))["fc.weight"]
    np.testing.assert_array_equal(np.unpackbits(packed, bitorder="little"), masks()["fc.weight"].reshape(-1))
    assert ModelSpec.read(frozen.file("model.json")) == own("fc")
    converted = convert.run(Conversion(), {"freeze": frozen}, tmp_path / "converted")
    assert convert.load_weights(converted)["fc.weight"].tobytes() == state["fc.weight"].tobytes()


def test_a_checkpoint_with_nan_is_refused(tmp_path: Path, own: Own) -> None:
    weight = np.full((64, 128), np.nan, np.float32)
    save_file({"fc.weight": weight, "fc.bias": np.full(64, np.inf, np.float32)}, tmp_path / "net.safetensors")
    with pytest.raises(ArtefactError, match=r"'fc\.bias' holds 64 of 64 values.* Other tensors with such values: 1\."):
        freeze.from_checkpoint(tmp_path / "net.safetensors", own("fc"), tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()


def pruned_module() -> Any:
    torch = pytest.importorskip("torch")
    from torch.nn.utils.prune import l1_unstructured, random_unstructured

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2))
    l1_unstructured(module[0], "weight", amount=0.75)  # type: ignore[no-untyped-call]
    random_unstructured(module[2], "bias", amount=1)  # type: ignore[no-untyped-call]
    return module


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "args": [1, 2]},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model_state_dict": state, "model": "resnet"},
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_pruned_torch_checkpoints(tmp_path: Path, own: Own, wrap: Any, suffix: str) -> None:
    torch = pytest.importorskip("torch")
    module = pruned_module()
    torch.save(wrap(module.state_dict()), tmp_path / f"net{suffix}")
    frozen = freeze.from_checkpoint(tmp_path / f"net{suffix}", own("pruned"), tmp_path / "frozen")
    state = load_file(frozen.file("model.safetensors"))
    assert set(state) == {
        *("0.weight", "0.bias", "2.weight", "2.bias", "1.weight", "1.bias"),
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
    }
    for name, expected in (("0.weight", module[0].weight), ("2.bias", module[2].bias), ("0.bias", module[0].bias)):
        np.testing.assert_array_equal(state[name], expected.detach().numpy())
    assert {layer["name"]: layer["nnz"] for layer in frozen.metrics["layers"]} == {"0.weight": 12, "2.weight": 12}


def test_half_and_sparse_tensors_of_torch_checkpoints(tmp_path: Path, own: Own) -> None:
    torch = pytest.importorskip("torch")
    dense = torch.tensor([[0.0, 1.5], [0.0, -2.0]])
    torch.save(
        {"float16.weight": dense.half(), "brain.weight": dense.bfloat16(), "coo.weight": dense.to_sparse()},
        tmp_path / "net.pt",
    )
    frozen = freeze.from_checkpoint(tmp_path / "net.pt", own("kinds"), tmp_path / "frozen")
    state = load_file(frozen.file("model.safetensors"))
    assert {name: str(array.dtype) for name, array in state.items()} == {
        "float16.weight": "float16",
        "brain.weight": "float32",
        "coo.weight": "float32",
    }
    for array in state.values():
        np.testing.assert_array_equal(array, dense.numpy())


def test_a_network_that_has_a_part_called_model_keeps_its_names(tmp_path: Path, own: Own) -> None:
    torch = pytest.importorskip("torch")
    state = {f"model.{name}": tensor for name, tensor in pruned_module().state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    frozen = freeze.from_checkpoint(tmp_path / "net.pt", own("held"), tmp_path / "frozen")
    assert "model.0.weight" in load_file(frozen.file("model.safetensors"))


def test_weights_that_do_not_fit_the_network_are_named_before_anything_is_written(tmp_path: Path, own: Own) -> None:
    weight = np.ones((64, 127), np.float32)
    save_file({"fc.weight": weight, "head.weight": weight}, tmp_path / "net.safetensors")
    with pytest.raises(ModelError) as caught:
        freeze.from_checkpoint(tmp_path / "net.safetensors", own("fc"), tmp_path / "frozen")
    for part in ("missing: fc.bias", "unexpected: head.weight", "fc.weight (64, 127) instead of (64, 128)"):
        assert part in str(caught.value)
    unknown = SPEC.model_copy(update={"model": Choice(name="resnet21")})
    with pytest.raises(ModelError, match=r"no network 'resnet21'.*resnet20"):
        freeze.from_checkpoint(tmp_path / "net.safetensors", unknown, tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()


def test_without_torch_the_name_of_the_network_is_checked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    save_file({"model.fc.weight": np.ones((4, 4), np.float32)}, tmp_path / "net.safetensors")
    unknown = SPEC.model_copy(update={"model": Choice(name="resnet21")})
    with pytest.raises(ModelError, match="no network 'resnet21'"):
        freeze.from_checkpoint(tmp_path / "net.safetensors", unknown, tmp_path / "frozen")
    frozen = freeze.from_checkpoint(tmp_path / "net.safetensors", SPEC, tmp_path / "frozen")
    assert list(load_file(frozen.file("model.safetensors"))) == ["fc.weight"]


def failing_checkpoint(tmp_path: Path, content: Any) -> str:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(SparsepipeError) as caught:
        freeze.from_checkpoint(tmp_path / "net.pt", SPEC, tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()
    assert "net.pt" in str(caught.value)
    return str(caught.value)


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight, mask = torch.ones(2, 4), torch.ones(2, 4)
    fail = failing_checkpoint
    assert "'a.weight_orig' has no mask 'a.weight_mask'" in fail(tmp_path, {"a.weight_orig": weight})
    assert "'a.weight_mask' has no weight" in fail(tmp_path, {"a.weight_mask": mask})
    pair = {"a.weight_orig": weight, "a.weight_mask": mask.T.contiguous()}
    assert "'a.weight_orig' has shape [2, 4], its mask [4, 2]" in fail(tmp_path, pair)
    half = {"a.weight": weight, "a.weight_mask": mask / 2}
    assert "'a.weight_mask' has values besides 0 and 1" in fail(tmp_path, half)
    assert "a dict with the keys 'epoch', 'weights', not a state dict" in fail(
        tmp_path, {"epoch": 1, "weights": {"a": weight}}
    )
    assert "an object of type Tensor, not a state dict" in fail(tmp_path, weight)
    assert "an empty dict, not a state dict" in fail(tmp_path, {})
    assert "torch.complex64 cannot be read here" in fail(tmp_path, {"a": weight.to(torch.complex64)})
    assert "torch.float8_e4m3fn cannot be read here" in fail(tmp_path, {"a": weight.to(torch.float8_e4m3fn)})


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code of the file was run",)


def test_a_checkpoint_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing_checkpoint(tmp_path, {"state_dict": {"a": Hostile()}})
    assert "The file is refused: to load it would run code ('print')" in message.replace("builtins.", "")
    assert "weights_only" not in message
    assert "was run" not in capsys.readouterr().out


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, message in (
        ("junk.pt", "not a PyTorch checkpoint, or it is damaged"),
        ("junk.safetensors", "not a valid safetensors file"),
        ("junk.h5", "type '.h5' is not known"),
    ):
        (tmp_path / name).write_bytes(b"junk" * 10)
        with pytest.raises(ArtefactError, match=message):
            freeze.from_checkpoint(tmp_path / name, SPEC, tmp_path / "frozen")
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(ArtefactError, match=r"[Nn]o such file"):
            freeze.from_checkpoint(tmp_path / name, SPEC, tmp_path / "frozen")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ArtefactError, match="holds no tensors"):
        freeze.from_checkpoint(tmp_path / "empty.safetensors", SPEC, tmp_path / "frozen")


# ONNX files from elsewhere


def onnx_file(path: Path) -> dict[str, Array]:
    """Conv (initializer) -> Flatten -> MatMul (Constant node) -> Gemm (through Transpose); returns the weights."""
    generator = np.random.default_rng(8)

    def some(*shape: int) -> Array:
        return np.where(generator.random(shape) < 0.05, generator.standard_normal(shape), 0).astype(np.float32)

    arrays: dict[str, Array] = {
        "conv.w": some(8, 4, 3, 3),
        "conv.b": np.ones(8, np.float32),
        "mat": some(8 * 36, 32),
        "gemm": some(10, 32),
        "unused": some(4, 4),
        "scale": np.ones((1, 10), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Constant", [], ["mat"], value=numpy_helper.from_array(arrays["mat"], "inner")),
        helper.make_node("MatMul", ["f", "mat"], ["m"]),
        helper.make_node("Transpose", ["gemm"], ["gemm_t"], perm=[1, 0]),
        helper.make_node("Gemm", ["m", "gemm_t"], ["g"]),
        helper.make_node("Mul", ["g", "scale"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(arrays[name], name) for name in ("conv.w", "conv.b", "gemm", "unused", "scale")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return arrays


def test_the_weights_of_an_onnx_file(tmp_path: Path) -> None:
    arrays = onnx_file(tmp_path / "net.onnx")
    artefact = convert.from_onnx(tmp_path / "net.onnx", Conversion(), tmp_path / "converted")
    assert artefact.manifest.stage == "convert"
    assert set(artefact.manifest.outputs) == {"model.safetensors", "layers.json"}
    state = convert.load_weights(artefact)
    assert set(state) == {"conv.w", "mat", "gemm"}
    for name, array in state.items():
        assert array.tobytes() == arrays[name].tobytes()
    assert {layer["name"]: layer["format"] for layer in artefact.metrics["layers"]} == dict.fromkeys(
        ("conv.w", "gemm", "mat"), "csr"
    )


def test_graphs_in_a_file_have_names_of_their_own(tmp_path: Path) -> None:
    """One weight in each branch of an If and in a function, all called `w`, and one around them that both see."""
    values = {name: np.full((3, 3), place, np.float32) for place, name in enumerate(("then", "else", "function"))}
    values["outer"] = np.eye(3, dtype=np.float32)

    def branch(name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [f"{name}.m"]),
            helper.make_node("MatMul", [f"{name}.m", "outer"], [name]),
        ]
        out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3])]
        return helper.make_graph(nodes, name, [], out, [numpy_helper.from_array(values[name], "w")])

    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(values["function"]))
    inner = [constant, helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("own", "Dense", ["a"], ["b"], inner, imports[:1])
    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch("then"), else_branch=branch("else"))
    graph = helper.make_graph(
        [choice, helper.make_node("Dense", ["z"], ["y"], domain="own")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(values["outer"], "outer")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[function]), tmp_path / "net.onnx"
    )
    artefact = convert.from_onnx(tmp_path / "net.onnx", Conversion(), tmp_path / "converted")
    state = convert.load_weights(artefact)
    expected = {
        "outer": values["outer"],
        "w in the then_branch of If 'z'": values["then"],
        "w in the else_branch of If 'z'": values["else"],
        "w in the function 'Dense'": values["function"],
    }
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[name], value) for name, value in expected.items())


def test_an_onnx_file_with_nan_is_refused(tmp_path: Path) -> None:
    onnx_file(tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "conv.w")
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[:3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, "conv.w"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ArtefactError, match=rf"net\.onnx: 'conv\.w' holds 3 of {values.size} values"):
        convert.from_onnx(tmp_path / "net.onnx", Conversion(), tmp_path / "converted")


def test_an_onnx_file_without_weights_is_named(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(GraphError, match="No node of this file has a constant weight"):
        convert.from_onnx(tmp_path / "net.onnx", Conversion(), tmp_path / "converted")
