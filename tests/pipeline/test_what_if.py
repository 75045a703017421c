"""What-if and the suites of `bench` on tiny networks: structure and counts, never times."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from sparsepipe import environment
from sparsepipe.artefact import Artefact
from sparsepipe.benchmark import harness, records
from sparsepipe.cli import bench_tables
from sparsepipe.cli.bench import command
from sparsepipe.errors import GraphError, ModelError
from sparsepipe.graph.load import load
from sparsepipe.graph.resize import resize
from sparsepipe.stages import whatif
from sparsepipe.stages.whatif import WhatIf


@pytest.fixture(autouse=True)
def _one_cold_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)


@pytest.fixture
def dense_file(tmp_path: Path) -> Path:
    """Two convolutions and a classifier for images of any size; 64 x 16 x 9 weights are worth a sparse kernel."""
    random = np.random.default_rng(0)
    shapes = {"stem": (16, 3, 3, 3), "conv": (64, 16, 3, 3), "fc": (8, 64)}
    weights = {name: random.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "conv"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "height", "width"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = tmp_path / "dense.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_dense_file_is_measured_at_every_setting(dense_file: Path, tmp_path: Path) -> None:
    config = WhatIf(
        model=str(dense_file), sparsity=(0.5, 0.9), pattern=("unstructured", "4x1"), input=(2, 3, 12, 16), seconds=0.02
    )
    made = whatif.record(config, tmp_path / "out")
    assert made.manifest.inputs == {"model": f"sha256:{hashlib.sha256(dense_file.read_bytes()).hexdigest()}"}
    result = made.metrics
    assert result["input"] == {"image": [2, 3, 12, 16]}
    assert [(verdict["sparsity"], verdict["threads"], verdict["batch"]) for verdict in result["verdicts"]] == [
        (0.5, 1, 2), (0.9, 1, 2),
    ]  # fmt: skip
    assert [(row["sparsity"], row["pattern"], row["batch"]) for row in result["results"]] == [
        (0.5, "unstructured", 2), (0.5, "4x1", 2), (0.9, "unstructured", 2), (0.9, "4x1", 2),
    ]  # fmt: skip
    weights = {"stem": 432, "conv": 9216, "fc": 512}
    for row in result["results"]:
        kept = weights["stem"] + (1 - row["sparsity"]) * (weights["conv"] + weights["fc"])
        assert row["total_sparsity"] == pytest.approx(1 - kept / sum(weights.values()), abs=1e-3)
        assert 0 <= row["max_relative_error"] < 1e-5
        assert row["layers_sparse"] + row["layers_dense"] == 3
        assert row["dense"]["target"] == "dense"
        assert row["sparse"]["target"] == "universal"
        for kind in ("dense", "sparse"):
            assert row[kind]["samples"] > 0
            assert row[kind]["note"] is None or "cannot" not in row[kind]["note"]
        if row["sparsity"] == 0.9:
            assert row["layers_sparse"] >= 1
            assert row["sparse"]["file_bytes"] < row["dense"]["file_bytes"] / 2
    written = Artefact.read(tmp_path / "out", "whatif")
    assert json.loads(written.file("whatif.json").read_text()).items() <= result.items()


def test_int8_is_measured_beside_both_dense_forms(dense_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = WhatIf(
        model=str(dense_file),
        sparsity=(0.8,),
        pattern=("4x4", "unstructured"),
        precision="int8",
        input=(1, 3, 12, 16),
        seconds=0.02,
    )
    result = whatif.measure(config)
    json.dumps(result, allow_nan=False)
    block, scattered = result["results"]
    assert (block["pattern"], scattered["pattern"]) == ("4x4", "unstructured")
    assert block["layers_sparse"] >= 1
    assert scattered["layers_sparse"] == 0  # most blocks hold a value: plain int8 is faster
    for row in (block, scattered):
        assert row["max_relative_error"] < 0.02
        # A byte in place of four, and what a graph needs beside its weights.
        assert row["int8"]["file_bytes"] < 0.6 * row["dense"]["file_bytes"]
        for kind in ("dense", "int8", "sparse"):
            assert row[kind]["samples"] > 0
            assert "speedup_over_int8" in row[kind]
        own = row["int8"]["speedup_over_int8"]
        assert own is None or own["value"] == 1
    assert block["sparse"]["file_bytes"] < scattered["sparse"]["file_bytes"]
    # The rival runs in onnxruntime's fast mode, which its weights are made for; nothing else does.
    assert {one["exact_int8"] for one in result["environment"]["runtimes"]} == {False, True}
    assert [(one.label, one.kind) for one in records.READERS["whatif"](result)] == [
        ("dense beside 0.8", "dense"), ("int8 beside 0.8", "int8"), ("4x4 0.8 int8", "sparse"),
        ("unstructured 0.8 int8", "sparse"),
    ]  # fmt: skip
    bench_tables.what_if(result)
    assert "over dense int8" in capsys.readouterr().out


def test_a_network_of_the_zoo_is_built_with_random_weights() -> None:
    pytest.importorskip("torch")
    config = WhatIf(model="resnet8", sparsity=(0.9,), pattern=("unstructured",), input=(3, 3, 16, 16), seconds=0.02)
    result = whatif.measure(config)
    assert result["input"] == {"input": [3, 3, 16, 16]}
    (row,) = result["results"]
    # stem, 2 x 3 convolutions, 2 projections, classifier; the stem has 3 input channels and stays dense
    assert row["layers_sparse"] + row["layers_dense"] == 10
    assert row["layers_sparse"] > 0
    assert row["max_relative_error"] < 1e-5


def test_a_fixed_batch_is_taken_as_it_is_and_a_fixed_size_cannot_be_changed(dense_file: Path, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    model = resize(load(dense_file), {"": (2, 3, 8, 8)})
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, fixed)
    result = whatif.measure(WhatIf(model=str(fixed), sparsity=(0.9,), pattern=("4x1",), seconds=0.01))
    assert result["input"] == {"image": [2, 3, 8, 8]}
    with pytest.raises(GraphError, match=r"dimension 3 .* fixed at 8, so it cannot be 9"):
        resize(model, {"image": (2, 3, 8, 9)})
    with pytest.raises(GraphError, match=r"batch size .* fixed at 2"):
        resize(model, {"": (1, 3, 8, 8)})
    with pytest.raises(GraphError, match="4 dimensions, not the 2 of 2x3"):
        resize(model, {"": (2, 3)})
    with pytest.raises(GraphError, match="no input 'other'; it has image"):
        resize(model, {"other": (2, 3, 8, 8)})


def test_what_cannot_be_measured_is_refused_before_anything_is_built(dense_file: Path) -> None:
    with pytest.raises(ModelError, match="resnet50"):
        whatif.measure(WhatIf(model="resnet999"))
    with pytest.raises(GraphError, match="no such ONNX file"):
        whatif.measure(WhatIf(model="absent.onnx"))
    with pytest.raises(GraphError, match="2:4"):
        whatif.measure(WhatIf(model=str(dense_file), pattern=("2:4",)))


def test_weights_that_overflow_are_an_error_not_a_figure(dense_file: Path, tmp_path: Path) -> None:
    model = load(dense_file)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e15), tensor.name))
    onnx.save(model, tmp_path / "huge.onnx")
    with pytest.raises(GraphError, match="not finite"):
        whatif.measure(WhatIf(model=str(tmp_path / "huge.onnx"), input=(1, 3, 8, 8), sparsity=(0.5,)))


def test_a_file_needs_no_torch_and_a_name_says_which_extra_is_missing(dense_file: Path) -> None:
    code = f"""
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NoTorch())
from sparsepipe.errors import MissingExtraError
from sparsepipe.stages.whatif import WhatIf, measure
settings = dict(sparsity=(0.9,), pattern=("4x1",), seconds=0.01)
rows = measure(WhatIf(model={str(dense_file)!r}, input=(1, 3, 8, 8), **settings))["results"]
assert rows[0]["sparse"]["samples"] > 0
try:
    measure(WhatIf(model="resnet8", **settings))
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'pip install "sparsepipe[train]"' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model NAME|FILE.onnx"),
        (["FILE", "--model", "resnet8"], "ONNX files and --model exclude one another"),
        (["--model", "resnet8", "--suite", "kernels"], "--model and --suite exclude one another"),
        (["FILE", "--suite", "kernels"], "ONNX files and --suite exclude one another"),
        (["--suite", "kernels", "--out", "folder"], "--out names a file"),
        (["FILE", "--force"], "--force belongs to --suite"),
        (["FILE", "--sparsity", "0.9"], "--sparsity belongs to --model or --suite"),
        (["FILE", "--pattern", "4x1"], "--pattern belongs to --model or --suite"),
        (["--suite", "kernels", "--input", "1x3x32x32"], "--input belongs to --model or ONNX files"),
        (["--model", "resnet8", "--network", "mlp"], "--network belongs to --suite"),
        (["--model", "resnet8", "--input", "1x3x32x32", "--batch", "4"], "leave --batch out"),
        (["--suite", "kernels", "--batch", "4"], "--batch does not belong to --suite"),
        (["--model", "resnet8", "--sparsity", "0.8,much"], "not a list of numbers"),
        (["--model", "FILE", "--input", "224"], "4 dimensions, not the 1 of 224"),
        (["--model", "resnet8", "--input", "1x3xA"], "not a shape"),
        (["FILE", "--threads", "1;2"], "not a list of whole numbers"),
        (["FILE", "--threads", ","], "the list is empty"),
        (["--suite", "everything"], "kernels"),
        (["--compare", "FILE", "FILE", "--threads", "2", "--out", "z"], "leave --threads, --out out"),
        (["--compare", "FILE", "FILE", "--force"], "leave --force out"),
        (["--compare", "FILE", "FILE", "--no-pin", "--set", "seed=1"], "leave --pin, --set out"),
        (["FILE", "--compare", "FILE", "FILE"], "leave ONNX out"),
    ],
)
def test_forms_exclude_one_another_and_options_belong_to_theirs(
    arguments: list[str], message: str, dense_file: Path
) -> None:
    words = [str(dense_file) if word == "FILE" else word for word in arguments]
    done = CliRunner().invoke(command, words)
    assert done.exit_code != 0
    assert message in (done.output if done.exit_code == 2 else str(done.exception))


def test_lists_may_be_written_with_commas_or_by_repeating_the_option(
    dense_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[WhatIf] = []

    def record(config: WhatIf) -> dict[str, Any]:
        seen.append(config)
        return {}

    monkeypatch.setattr(whatif, "measure", record)
    monkeypatch.setattr(environment, "usable_cores", lambda: 2)
    words = ["--model", str(dense_file), "--sparsity", "0.8,0.9", "--sparsity", ".95", "--threads", "1,2,1,", "--json"]
    done = CliRunner().invoke(command, [*words, "--pattern", "2x1, unstructured", "--input", "4x3x8x8"])
    assert done.exit_code == 0, done.output
    assert seen[0].sparsity == (0.8, 0.9, 0.95)
    assert seen[0].pattern == ("2x1", "unstructured")
    assert (seen[0].threads, seen[0].input) == ((1, 2), {"": (4, 3, 8, 8)})


def test_the_table_prints(dense_file: Path) -> None:
    words = ["--sparsity", "0.9", "--pattern", "4x1", "--seconds", "0.05"]
    done = CliRunner().invoke(command, ["--model", str(dense_file), "--input", "1x3x8x8", *words])
    assert done.exit_code == 0, done.exception
    assert "4x1" in done.stdout
    assert "of the largest output" in done.stdout
    assert "image 1x3x8x8" in done.stdout
