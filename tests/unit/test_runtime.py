"""Sessions, made-up inputs, and the comparison of outputs."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsepipe.errors import GraphError
from sparsepipe.runtime import compare, library, predict, run, session
from sparsepipe.runtime.compare import Tally, first_divergence
from sparsepipe.runtime.inputs import Input, inputs_of, merge, random_inputs, rename, resolve, sized
from sparsepipe.runtime.network import OnnxNetwork
from sparsepipe.runtime.samples import labelled_samples, random_samples


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> Path:
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def text_model(path: Path, rows: int = 50) -> Path:
    """Token ids and a mask to two outputs; the ids go through a Cast to a table of `rows` rows."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "wide"], ["embedded"]),
        helper.make_node("Unsqueeze", ["attention_mask", "axis"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["masked"]),
        helper.make_node("ReduceMean", ["masked"], ["pooled"], axes=[1], keepdims=0),
        helper.make_node("Identity", ["pooled"], ["logits"]),
    ]
    shape = ["batch", "length"]
    return save(
        path,
        nodes,
        [value("ids", TensorProto.INT32, shape), value("attention_mask", TensorProto.FLOAT, shape)],
        [value("logits", TensorProto.FLOAT, ["batch", 4]), value("embedded", TensorProto.FLOAT, [*shape, 4])],
        {
            "table": np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32),
            "axis": np.array([2], np.int64),
        },
    )


def test_the_library_that_was_not_built_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sparsepipe.__path__", [str(tmp_path)])
    assert library.library_path() is None
    status = library.status()
    assert (status["path"], status["loadable"]) == (None, False)
    assert "not built" in status["reason"]
    assert status["onnxruntime"] == onnxruntime.__version__


def test_a_library_that_does_not_load_is_a_reason_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sparsepipe.__path__", [str(tmp_path / "elsewhere"), str(tmp_path)])
    name = library.FILE_NAMES.get(sys.platform, library.DEFAULT_FILE_NAME)
    path = tmp_path / "native" / name
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    assert library.library_path() == str(path)
    status = library.status()
    assert status["loadable"] is False
    assert status["reason"]
    model = text_model(tmp_path / "m.onnx")
    with pytest.raises(GraphError, match=r"m\.onnx"):
        session(model)


def test_the_benchmark_of_the_kernels_takes_the_library_that_was_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsepipe.native import bench

    monkeypatch.setattr("sparsepipe.__path__", [str(tmp_path / "sources"), str(tmp_path)])
    monkeypatch.delenv("SPARSEPIPE_LIBRARY", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", "--models", "mlp"])
    taken: list[Path] = []
    monkeypatch.setattr(bench, "measure", lambda name, settings, library, seconds: taken.append(library) or ())
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "no kernel library" in capsys.readouterr().err
    path = tmp_path / "native" / library.FILE_NAMES.get(sys.platform, library.DEFAULT_FILE_NAME)
    path.parent.mkdir()
    path.touch()
    bench.main()
    assert taken == [path]


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_that_loads_is_registered_with_every_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "native" / library.FILE_NAMES.get(sys.platform, library.DEFAULT_FILE_NAME)
    path.parent.mkdir()
    marker = tmp_path / "registered"
    source = tmp_path / "ops.c"
    source.write_text(
        "#include <stdio.h>\n"
        "void *RegisterCustomOps(void *options, const void *api) {"
        f' fclose(fopen("{marker}", "w")); return 0; }}\n'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)
    monkeypatch.setattr("sparsepipe.__path__", [str(tmp_path)])
    expected = {"path": str(path), "loadable": True, "reason": None, "onnxruntime": onnxruntime.__version__}
    assert library.status() == expected
    marker.unlink()
    session(text_model(tmp_path / "m.onnx"))
    assert marker.exists()


def test_a_session_takes_threads_and_options_and_predicts(tmp_path: Path) -> None:
    weight = np.eye(3, 2, dtype=np.float32)
    value = helper.make_tensor_value_info
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        {"w": weight},
    )
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = session(path, threads=2, graph_optimization_level=level)
    options = opened.get_session_options()
    assert (options.intra_op_num_threads, options.graph_optimization_level) == (2, level)
    batches = [np.full((n, 3), n, np.float32) for n in (1, 4)]
    assert [found.tolist() for found in predict(opened, batches)] == [(batch @ weight).tolist() for batch in batches]
    assert session(path.read_bytes()).get_inputs()[0].name == "x"
    assert session(str(path)).get_inputs()[0].name == "x"
    with pytest.raises(GraphError, match="cannot run"):
        list(predict(opened, [np.zeros((1, 4), np.float32)]))
    with pytest.raises(GraphError, match="2 inputs"):
        list(predict(session(text_model(tmp_path / "text.onnx")), batches))


def test_int8_operators_of_onnxruntime_are_exact_on_every_processor() -> None:
    # The largest bytes: on x86 without VNNI the fast way adds pairs of these products in 16 bits.
    depth = 64
    constants = {
        "x_scale": np.float32(1), "x_zero": np.uint8(0), "w": np.full((depth, 3), 127, np.int8),
        "w_scale": np.float32(1), "w_zero": np.int8(0), "y_scale": np.float32(depth * 127), "y_zero": np.uint8(0),
    }  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", ["x", *constants], ["y"])],
        "largest",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, depth])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [2, 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.full((2, depth), 255, np.uint8)
    assert run(session(model.SerializeToString()), {"x": x})[0].tolist() == [[255] * 3] * 2


@pytest.mark.parametrize("external", [False, True])
def test_int8_operators_that_share_a_weight_are_exact_on_every_processor(tmp_path: Path, external: bool) -> None:
    depth = 64
    constants = {
        "one": np.float32(1), "low": np.uint8(0), "w": np.full((depth, depth), 127, np.int8),
        "ones": np.ones(depth, np.float32), "zeros": np.zeros(depth, np.int8), "large": np.float32(depth * 127),
    }  # fmt: skip
    nodes = [helper.make_node("DequantizeLinear", ["w", "ones", "zeros"], ["real"], name="weight", axis=1)]
    nodes.append(helper.make_node("DequantizeLinear", ["x", "one", "low"], ["x0"]))
    for place in range(3):
        nodes += [
            helper.make_node("MatMul", [f"x{place}", "real"], [f"product{place}"]),
            helper.make_node("QuantizeLinear", [f"product{place}", "large", "low"], [f"bytes{place}"]),
            helper.make_node("DequantizeLinear", [f"bytes{place}", "one", "low"], [f"x{place + 1}"]),
        ]
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.UINT8, [2, depth])], [value("x3", TensorProto.FLOAT, [2, depth])]
    path = save(tmp_path / "shared.onnx", nodes, *ends, {name: np.asarray(given) for name, given in constants.items()})
    if external:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    # 255 * 127 * 64 / (127 * 64) = 255, three times; by pairs in 16 bits it would be less.
    assert run(session(path), {"x": np.full((2, depth), 255, np.uint8)})[0].tolist() == [[255.0] * depth] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_profilling": True}, "no attribute 'enable_profilling'.*enable_profiling"),
        ({"add_session_config_entry": "x"}, "no attribute 'add_session_config_entry'"),
        ({"graph_optimization_level": "all"}, "'graph_optimization_level' cannot be 'all'"),
        ({"threads": 1.5}, "'intra_op_num_threads' cannot be 1.5"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(GraphError, match=words):
        session(text_model(tmp_path / "m.onnx"), **options)


def test_errors_of_onnxruntime_are_one_paragraph(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07garbage")
    for path in (broken, tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(GraphError) as raised:
            session(path)
        assert "\n" not in str(raised.value)
        assert path.name in str(raised.value)


def test_random_inputs_fit_a_network_of_several_inputs(tmp_path: Path) -> None:
    network = OnnxNetwork(text_model(tmp_path / "text.onnx"))
    bounds = network.index_bounds()
    assert bounds == {"ids": 50}
    made = random_inputs(network.inputs, 8, seed=3, bounds=bounds)
    assert made["ids"].dtype == np.int32
    assert made["ids"].shape == made["attention_mask"].shape == (8, 16)
    assert 2 < made["ids"].max() < 50
    assert made["attention_mask"].min() == 1
    again = random_inputs(network.inputs, 8, seed=3, bounds=bounds)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    other = random_inputs(network.inputs, 8, seed=4, bounds=bounds)
    assert not np.array_equal(made["ids"], other["ids"])
    logits, embedded = network.run(made)
    assert (logits.shape, embedded.shape) == ((8, 4), (8, 16, 4))


def test_the_sizes_of_free_dimensions() -> None:
    image = Input("image", "float", (None, 3, "h", "w"))
    text = Input("ids", "int64", ("length", "batch_size"))
    assert resolve([image], 2) == {"image": (2, 3, 224, 224)}
    assert resolve([text], 2) == {"ids": (2, 2)}
    fixed = Input("x", "float", (4, 3))
    assert resolve([fixed], 4) == {"x": (4, 3)}
    assert resolve([fixed, image], 2)["x"] == (4, 3)
    with pytest.raises(GraphError, match="fixed at 4"):
        resolve([fixed], 2)


def test_shapes_fix_what_is_free_and_nothing_else() -> None:
    image = Input("image", "float", (None, 3, "h", "w"))
    ids, mask = Input("ids", "int64", ("n", "length")), Input("mask", "float", ("n", "length", 2))
    assert sized([image], {}) == [image]
    assert sized([image], {"": (2, 3, 8, 9)}) == sized([image], {"image": (2, 3, 8, 9)})
    assert sized([image], {"": (2, 3, 8, 9)})[0].shape == (2, 3, 8, 9)
    # What one input says about a name holds for the others, too.
    assert [entry.shape for entry in sized([ids, mask], {"ids": (4, 7)})] == [(4, 7), (4, 7, 2)]
    assert resolve(sized([ids, mask], {"ids": (4, 7)}), 4) == {"ids": (4, 7), "mask": (4, 7, 2)}
    for inputs, shapes, reason in (
        ([image], {"": (2, 4, 8, 9)}, "size of dimension 1 of the input 'image' is fixed at 3, so it cannot be 4"),
        ([Input("x", "float", (1, "m"))], {"": (2, 5)}, "batch size of the input 'x' is fixed at 1"),
        ([image], {"": (2, 3, 8)}, "4 dimensions, not the 3 of 2x3x8"),
        ([image], {"picture": (2, 3, 8, 9)}, "no input 'picture'; it has image"),
        ([ids, mask], {"": (4, 7)}, "2 inputs .ids, mask., so a shape needs the name"),
        ([ids, mask], {"ids": (4, 7), "mask": (4, 8, 2)}, "dimension 1 of the input 'mask' is fixed at 7"),
    ):
        with pytest.raises(GraphError, match=reason):
            sized(inputs, shapes)


@pytest.mark.parametrize("data", ["inside", "outside"])
def test_a_newer_version_of_the_file_format_is_read_as_the_newest_known_one(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = helper.make_tensor_value_info
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 64])],
        [value("y", TensorProto.FLOAT, ["n", 64])],
        {"w": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)},
    )
    expected = run(session(path), {"x": np.eye(64, dtype=np.float32)})
    model = onnx.load(path)
    model.ir_version = 99
    onnx.save(model, path, save_as_external_data=data == "outside", location="m.bin", size_threshold=0)
    with caplog.at_level("WARNING", "sparsepipe"):
        found = run(session(path), {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_array_equal(found, expected)
    assert "m.onnx: its IR version 99 is newer than this onnxruntime reads" in caplog.text
    assert onnx.load(path).ir_version == 99


@pytest.mark.parametrize("kind", ["float16", "double", "int8", "uint8", "int64", "uint16", "bool"])
def test_every_type_of_input_can_be_made(kind: str) -> None:
    values = random_inputs([Input("x", kind, (None, 300))], 2, seed=0)["x"]
    assert values.shape == (2, 300)
    assert values.dtype.name == {"double": "float64"}.get(kind, kind)
    assert len(np.unique(values)) >= 2
    if kind not in ("float16", "double", "int8", "uint8"):
        assert set(np.unique(values).tolist()) == {0, 1}


def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", TensorProto.STRING, ["n"])],
        [value("y", TensorProto.STRING, ["n"])],
        {},
    )
    with pytest.raises(GraphError, match=r"tensor\(string\)"):
        inputs_of(session(path))


def test_two_networks_share_what_both_take() -> None:
    free, fixed = [Input("a", "float", ("n", 3, "s"))], [Input("b", "float16", (2, 3, None))]
    assert merge(free, fixed) == [Input("a", "float", (2, 3, "s"))]
    values = {"a": np.ones((2, 3, 1), np.float32)}
    assert rename(values, free, fixed)["b"].dtype == np.float16
    first, second = Input("x", "float", (None, 1)), Input("y", "int64", (None, 2))
    assert merge([first, second], [second, first]) == [first, second]
    for other in ([Input("b", "float", (None, 4, None))], [Input("b", "int32", (None, 3, None))], [first, second]):
        with pytest.raises(GraphError, match="cannot be compared"):
            merge(free, other)


def test_samples_fill_up_a_fixed_batch_and_the_filling_does_not_count() -> None:
    labels = np.arange(5)
    samples = labelled_samples(Input("x", "float", (2, 1)), labels, 64, lambda index: index[:, None].astype(np.float32))
    batches = list(samples)
    assert len(samples) == len(batches) == 3
    assert [batch.inputs["x"].ravel().tolist() for batch in batches] == [[0, 1], [2, 3], [4, 4]]
    assert [batch.count for batch in batches] == [2, 2, 1]
    assert batches[-1].outputs([np.zeros((2, 7)), np.zeros(3)])[0].shape == (1, 7)
    seen = [batch.labels for batch in batches]
    assert np.concatenate([part for part in seen if part is not None]).tolist() == labels.tolist()


def test_random_samples_are_the_same_each_time_and_large_ones_come_in_small_batches() -> None:
    samples = random_samples([Input("x", "float", (None, 8))], 10, 4, seed=1, bounds={})
    first, second = ([batch.inputs["x"] for batch in samples] for _ in range(2))
    assert [len(part) for part in first] == [4, 4, 2]
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    assert len(np.unique(np.concatenate(first), axis=0)) == 10
    assert random_samples([Input("x", "float", (None, 3, 512, 512))], 64, 64, 0, {}).size == 5


@pytest.mark.parametrize(
    ("shapes", "whole", "one"),
    [
        ([("n", 3), ()], [(4, 3), ()], [(1, 3), ()]),
        ([(), ("n", 3)], [(), (4, 3)], [(), (1, 3)]),
        ([()], [()], [()]),
        ([], [], []),
        ([("n", 3), ("m", 2)], [(4, 3), (4, 2)], [(1, 3), (1, 2)]),
        ([("n", 16), (4,)], [(4, 16), (4,)], [(1, 16), (4,)]),  # as long as the batch, by chance
        ([("n", "length"), ("length",)], [(4, 16), (16,)], [(1, 16), (16,)]),
        ([(2, 3), (5, 4)], [(2, 3), (5, 4)], [(2, 3), (5, 4)]),
        ([(5, 3), (2, 4)], [(5, 3), (2, 4)], [(5, 3), (2, 4)]),
        ([("n", 3), (5, 4)], [(5, 3), (5, 4)], [(5, 3), (5, 4)]),
    ],
)
def test_one_sample_is_a_row_of_the_inputs_that_have_rows_of_samples(
    shapes: list[Any], whole: list[Any], one: list[Any]
) -> None:
    inputs = [Input(f"x{place}", "float", shape) for place, shape in enumerate(shapes)]
    batch, *_ = random_samples(inputs, 8, 4, seed=0, bounds={})
    assert [value.shape for value in batch.inputs.values()] == whole
    sample = batch.only(1)
    assert [value.shape for value in sample.values()] == one
    assert all(np.isin(sample[name], batch.inputs[name]).all() for name in sample)
    assert [output.shape for output in batch.outputs([np.zeros((4, 7)), np.zeros(())])] == [(4, 7), ()]


finite_floats = st.floats(-1e3, 1e3, width=32)


@given(arrays(np.float32, (6, 3), elements=finite_floats), arrays(np.float32, (6, 3), elements=finite_floats))
def test_the_tally_over_batches_is_that_over_all_samples(reference: Any, candidate: Any) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    tally = Tally()
    for rows in (slice(0, 4), slice(4, 6)):
        tally.add([reference[rows]], [candidate[rows]], labels[rows])
    wide, other = reference.astype(float), candidate.astype(float)
    assert tally.samples == 6
    assert tally.max_abs == np.abs(wide - other).max()
    if np.abs(wide).max() > 0:
        assert tally.max_relative == np.abs(wide - other).max() / np.abs(wide).max()
    assert tally.agreement == np.mean(reference.argmax(1) == candidate.argmax(1))
    assert tally.correct == (candidate.argmax(1) == labels).sum()
    assert tally.reference_correct == (reference.argmax(1) == labels).sum()


def test_a_row_with_a_nan_is_wrong_whatever_its_label() -> None:
    tally, scores = Tally(), np.array([[3.0, 1.0], [1.0, 2.0]], np.float32)
    broken = scores.copy()
    broken[0] = np.nan
    assert tally.add([scores], [broken], np.array([0, 1])) == 0
    assert (tally.correct, tally.reference_correct, tally.agreement) == (1, 2, 0.5)
    assert math.isinf(tally.max_abs)
    assert not tally.passed(max_relative=1e9, min_agreement=0.1)


def test_equal_nan_and_infinities_are_no_difference() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 1.0]])
    assert compare.absolute_difference(values, values).max() == 0
    assert np.isinf(compare.absolute_difference(values, -values)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_outputs_that_are_not_finite_are_counted_and_never_pass(value: float, dtype: Any) -> None:
    good = np.array([[3.0, 1.0], [1.0, 2.0]], dtype)
    broken = np.where([[False, False], [True, True]], dtype(value), good)
    for reference, candidate, counts in ((broken, broken, (2, 2)), (good, broken, (2, 0)), (broken, good, (0, 2))):
        tally = Tally()
        tally.add([good], [good])
        assert tally.passed(0.0, 1.0)
        assert tally.note is None
        tally.add([reference], [candidate])
        assert (tally.not_finite, tally.reference_not_finite) == counts
        assert not tally.passed(max_relative=math.inf, min_agreement=0.0)
        assert math.isinf(tally.max_abs)
        assert math.isinf(tally.max_relative)
        assert math.isinf(tally.rms_of_range)
        assert f"{counts[0]} of the file, {counts[1]} of the reference" in str(tally.note)


def test_the_worst_sample_is_found_across_batches() -> None:
    tally, zeros = Tally(), np.zeros((3, 2), np.float32)
    for offsets, worst in (([0.1, 0.3, 0.2], 1), ([0.3, 0.1, 0.2], None), ([0.1, 0.1, 0.4], 2)):
        assert tally.add([zeros], [zeros + np.array(offsets, np.float32)[:, None]]) == worst


def test_outputs_that_cannot_be_subtracted_are_a_problem() -> None:
    ones = np.ones((2, 3))
    assert compare.mismatch([ones], [ones]) is None
    assert "2 outputs" in str(compare.mismatch([ones], [ones, ones]))
    assert "[2, 4]" in str(compare.mismatch([ones], [np.ones((2, 4))]))
    assert "numbers" in str(compare.mismatch([ones], [ones.astype(str)]))
    tally = Tally()
    tally.add([ones], [np.ones((2, 4))])
    assert not tally.passed(1e9, 0.1)


def test_the_worst_of_several_outputs_counts_relative_to_its_own_scale() -> None:
    tally = Tally()
    tally.add([np.full((1, 2), 100.0), np.full((1, 5), 0.01)], [np.full((1, 2), 100.1), np.full((1, 5), 0.011)])
    assert tally.max_abs == pytest.approx(0.1)
    assert tally.max_relative == pytest.approx(0.1)


def test_the_first_divergence_is_first_in_the_given_order() -> None:
    good, bad = np.ones((2, 2), np.float32), np.full((2, 2), 1.5, np.float32)
    reference = {"a": good, "ids": np.array([1]), "b": good, "c": good}
    found = first_divergence(["x", "ids", "a", "c", "b"], reference, {**reference, "b": bad, "c": bad}, 0.1)
    assert found == compare.Divergence("c", 0.5, 0.5)
    assert first_divergence(["a", "b"], reference, reference, 0.1) is None
    reshaped = {**reference, "a": good.reshape(4), "b": np.ones(3, np.float32)}
    assert first_divergence(["a", "b"], reference, reshaped, 0.1) == compare.Divergence("b", None, None)
    zeros = {"a": np.zeros(2, np.float32)}
    assert first_divergence(["a"], zeros, {"a": np.ones(2, np.float32)}, 0.1) == compare.Divergence("a", 1.0, None)


def test_intermediate_tensors_are_those_of_the_reference_evaluator(tmp_path: Path) -> None:
    path = text_model(tmp_path / "text.onnx")
    network = OnnxNetwork(path)
    assert network.tensors == ["wide", "embedded", "column", "masked", "pooled", "logits"]
    inputs = random_inputs(network.inputs, 2, seed=0, bounds={"ids": 50})
    names = ["masked", "absent", "pooled"]
    traced = network.trace(inputs, names)
    assert list(traced) == ["masked", "pooled"]
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in traced)
    expected = ReferenceEvaluator(model).run(["masked", "pooled"], inputs)
    for found, wanted in zip(traced.values(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
