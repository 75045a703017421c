"""Other runtimes beside onnxruntime, with made-up ones: absent, crashing, hanging, wrong. No peer needs to be there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from sparsepipe import environment
from sparsepipe.benchmark import harness, networks
from sparsepipe.benchmark.client import WorkerProcess
from sparsepipe.benchmark.peers import environments
from sparsepipe.benchmark.peers.deepsparse import DeepSparse
from sparsepipe.benchmark.peers.environments import Environment, NotInstalled
from sparsepipe.benchmark.peers.registry import PEERS, Peer, chosen
from sparsepipe.benchmark.worker import Said
from sparsepipe.cli import report as report_verb
from sparsepipe.cli.bench import command
from sparsepipe.errors import ArtefactError, GraphError, RecipeError
from sparsepipe.recipe import Export
from sparsepipe.reporting import markdown
from sparsepipe.reporting import peers as tables
from sparsepipe.settings import check
from sparsepipe.stages import export, peers, peers_row, suite

FAKES = """
import os, time
from sparsepipe.benchmark.runtimes import OnnxRuntime
class Good(OnnxRuntime):
    pass
class Wrong(OnnxRuntime):
    def run(self):
        return [output + 1 for output in super().run()]
class Crashes(OnnxRuntime):
    def prepare(self, work):
        os.abort()
class Refuses(OnnxRuntime):
    def prepare(self, work):
        raise ValueError("no such operator here")
class Hangs(OnnxRuntime):
    def load(self, model, threads):
        time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "COLD_STARTS", 1)
    monkeypatch.setenv("SPARSEPIPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "fakes.py").write_text(FAKES)
    here = Environment("here", (), ("numpy",), {"PYTHONPATH": str(tmp_path)})
    for kind in ("Good", "Wrong", "Crashes", "Refuses", "Hangs"):
        monkeypatch.setitem(PEERS, kind.lower(), Peer(kind, f"fakes:{kind}", here))
    nowhere = Environment("nowhere", ("some-package>=3",), ("no_such_module",))
    monkeypatch.setitem(PEERS, "absent", Peer("Absent", "fakes:Good", nowhere))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["input", "weight"], ["output"], transB=1)],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "weight")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    return tmp_path / "model.onnx"


def by_runtime(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["runtime"]: row for row in result["results"]}


def test_a_peer_that_is_absent_crashes_hangs_or_is_wrong_is_a_row_with_the_reason(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The others may take as long as a busy machine makes them.
    monkeypatch.setattr(harness, "patience", lambda one, _: 2.0 if one.runtime == "fakes:Hangs" else 60.0)
    names = ("good", "wrong", "crashes", "refuses", "hangs", "absent")
    rows = by_runtime(peers.measure([model], peers.Peers(peers=names, seconds=0.05)))
    assert list(rows) == ["onnxruntime", *names]
    assert {name for name, row in rows.items() if row["samples"]} == {"onnxruntime", "good"}
    for name, reason in (
        ("wrong", "not timed: its outputs differ"),
        ("crashes", "signal 6"),
        ("refuses", "no such operator here"),
        ("hangs", "no answer to 'load' within 2 s"),
        ("absent", "some-package>=3"),
    ):
        assert reason in rows[name]["note"]
        assert rows[name]["speedup"] is None
    assert rows["good"]["fidelity"] == {"max_relative_error": 0.0, "top1_agreement": 1.0, "samples": 64}
    wrong = rows["wrong"]["fidelity"]
    assert wrong["max_relative_error"] > 0.05
    assert wrong["top1_agreement"] == 1.0  # every class is larger by one


def test_int8_is_calibrated_on_a_dataset_and_says_how_far_it_is_off(model: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    data = tmp_path / "data.npz"
    np.savez(
        data,
        x_train=random.standard_normal((80, 16)).astype(np.float32),
        y_train=np.arange(80) % 5,
        x_test=random.standard_normal((40, 16)).astype(np.float32),
        y_test=np.arange(40) % 5,
    )
    arguments = [str(model), "--peers", "onnxruntime-int8", "--batch", "3", "--seconds", "0.05", "--json"]
    done = CliRunner().invoke(command, [*arguments, "--calibrate", f"npz:{data}", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    rows = by_runtime(result)
    assert list(rows) == ["onnxruntime", "onnxruntime-int8-qdq", "onnxruntime-int8-qoperator"]
    for name in list(rows)[1:]:
        facts = rows[name]["fidelity"]
        assert 0 < facts["max_relative_error"] < 0.1
        assert 0.8 < facts["top1_agreement"] <= 1.0
        assert facts["samples"] == 42  # 40 samples in batches of 3
    assert result["samples"].startswith("npz:")
    assert len(result["verdicts"]) == 1
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["results"] == result["results"]


def test_int8_files_beside_an_fp32_one_are_compared_with_it(tmp_path: Path) -> None:
    """Not with their own weights: what rounding costs would be hidden."""
    random = np.random.default_rng(2)
    weight = random.standard_normal((512, 512)).astype(np.float32)
    weight *= np.kron(random.random((128, 128)) < 0.1, np.ones((4, 4)))
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["input", "weight"], ["output"], transB=1)],
        "blocks",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 512])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(weight, "weight")],
    )
    source, data = tmp_path / "source.onnx", tmp_path / "data.npz"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    values = random.standard_normal((64, 512)).astype(np.float32)
    np.savez(data, x_train=values, y_train=np.arange(64), x_test=values, y_test=np.arange(64))
    settings = {"targets": ("dense", "universal"), "precision": ("fp32", "int8"), "calibrate": f"npz:{data}"}
    made = export.from_onnx(source, check(Export, settings, where="export"), tmp_path / "export")
    paths = [made.file(file["name"]) for file in made.metric("files").values()]
    result = peers.measure(paths[::-1], peers.Peers(peers=("good",), seconds=0.05, batch=(4,)))
    rows = by_runtime(result)
    assert list(rows) == ["onnxruntime", "sparsepipe-int8", "onnxruntime-int8", "sparsepipe", "good"]
    assert result["baseline"] == f"{paths[0].name}, onnxruntime"
    for name, row in rows.items():
        assert row["samples"], row["note"]
        error = row["fidelity"]["max_relative_error"]
        assert 1e-3 < error < 0.1 if "int8" in name else error < 1e-5
        assert row["fidelity"]["samples"] == 64


def test_a_row_of_the_suite_has_sparsepipe_in_every_form_beside_dense_onnxruntime(tmp_path: Path) -> None:
    config = suite.PeersSuite(peers=("onnxruntime-int8-qdq", "absent"), seconds=0.05, samples=3)
    row = peers_row.measure("resnet20", networks.build("resnet20"), 0.9, config, tmp_path, lambda count, note: None)
    rows = by_runtime(row)
    ours = ["sparsepipe", "sparsepipe-4x1", "sparsepipe-int8-4x4"]
    assert list(rows) == ["onnxruntime", "onnxruntime-int8-qdq", "absent", *ours]
    for name, found in rows.items():
        if name == "absent":
            assert "some-package>=3" in found["note"]
            continue
        error = found["fidelity"]["max_relative_error"]
        assert 1e-4 < error < 0.5 if "int8" in name else error < 1e-4
        assert found["samples"] > 0
        assert found["latency_ms"]["p50"]["low"] <= found["latency_ms"]["p50"]["high"]
        assert found["speedup"]["low"] <= found["speedup"]["high"]
    assert rows["sparsepipe"]["file_bytes"] < 0.3 * rows["onnxruntime"]["file_bytes"]
    assert str(Path.home()) not in json.dumps(row)


def test_the_worker_of_another_environment_imports_only_this_package() -> None:
    with WorkerProcess((sys.executable, "-I", str(environments.BOOTSTRAP))) as worker:
        assert worker.ask("stats", 30.0)["rss_bytes"] > 0


@pytest.mark.parametrize(("supported", "said"), [(1.0, []), (0.25, ["its engine runs 25% of the operators"])])
def test_deepsparse_says_how_much_of_a_network_its_own_engine_runs(
    model: Path, monkeypatch: pytest.MonkeyPatch, supported: float, said: list[str]
) -> None:
    made: dict[str, Any] = {}

    def engine(**settings: Any) -> Any:
        made.update(settings)
        return SimpleNamespace(fraction_of_supported_ops=supported)

    monkeypatch.setitem(sys.modules, "deepsparse", SimpleNamespace(Engine=engine))
    held = onnx.load(model)
    held.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(held, model)
    with Said() as heard:
        DeepSparse().load(str(model), 2)
    assert (made["batch_size"], made["num_cores"]) == (3, 2)
    assert [message.partition(";")[0] for message in heard.messages] == said


def test_what_pip_refuses_is_a_reason_and_leaves_nothing_behind(tmp_path: Path) -> None:
    missing = Environment("missing", (str(tmp_path / "none-1.0-py3-none-any.whl"),), ("none",))
    with pytest.raises(NotInstalled, match="pip cannot install it"):
        environments.install(missing)
    assert not environments.folder_of(missing).exists()


def test_names_stand_for_peers() -> None:
    assert list(chosen(["mnn", "onnxruntime-int8", "mnn"])) == [
        "mnn", "onnxruntime-int8-qdq", "onnxruntime-int8-qoperator",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"no peer 'tvm'.*deepsparse"):
        chosen(["tvm"])


def drawn_from(picture: Path) -> str:
    """The mark in a picture, as another program reads it."""
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
        return str(opened.info["Description"])


def test_table_and_picture_of_the_readme_are_those_of_the_committed_figures() -> None:
    """`sparsepipe report examples/benchmarks/peers.json --into README.md` makes them so."""
    root = Path(__file__).resolve().parents[2]
    figures = root / "examples" / "benchmarks" / "peers.json"
    shown = markdown.block((root / "README.md").read_text(), figures.name, where="README.md")
    result, picture = suite.read(figures), figures.with_suffix(".png")
    asked = suite.PeersSuite()
    assert [(row["network"], row["sparsity"]) for row in result["rows"]] == [
        (network, sparsity) for network in asked.networks for sparsity in asked.sparsity
    ]
    for row in result["rows"]:
        for one in row["results"]:
            assert one["note"] or one["speedup"]["low"] <= one["speedup"]["value"] <= one["speedup"]["high"]
    assert shown == tables.markdown(result, link=picture.relative_to(root).as_posix())
    assert drawn_from(picture) == tables.mark(result)


def made_up(name: str, model: Any, sparsity: float, *_: Any) -> dict[str, Any]:
    """A row as `peers_row.measure` gives it: sparsepipe takes (1 - sparsity) * 10 ms, dense 8 ms, a peer is absent."""

    def one(runtime: str, taken: float | None, note: str | None = None) -> dict[str, Any]:
        gain = taken and {"value": 8 / taken, "low": 7 / taken, "high": 9 / taken}
        latency = taken and {"value": taken, "low": taken, "high": taken}
        return {
            "runtime": runtime, "threads": 1, "latency_ms": {"p50": latency}, "speedup": gain, "noisy": False,
            "samples": 9 if taken else 0, "note": note,
            "fidelity": taken and {"max_relative_error": 2e-7, "top1_agreement": 0.5, "samples": 64},
        }  # fmt: skip

    return {
        "network": name, "title": name.upper(), "sparsity": sparsity, "measured": "2031-01-02T03:04:05+00:00",
        "results": [one("onnxruntime", 8.0), one("sparsepipe", (1 - sparsity) * 10), one("mnn", None, "not here")],
        "verdicts": [{"threads": 1, "noisy": name == "vgg19", "difference": 0.05, "conditions": {
            "frequency_mhz": {"low": 2000.0, "high": 2010.0 + sparsity}, "temperature_c": None, "throttled": None}}],
        "runtimes": [{"runtime": "onnxruntime", "version": "9.9"}],
    }  # fmt: skip


def test_the_suite_goes_on_where_it_was_interrupted_and_writes_document_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def measured(name: str, model: Any, sparsity: float, *rest: Any) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((name, sparsity))
        return made_up(name, model, sparsity)

    monkeypatch.setattr(peers_row, "measure", measured)
    monkeypatch.setattr(networks, "build", lambda name, seed: None)
    out, document = tmp_path / "peers.json", tmp_path / "README.md"
    config = suite.PeersSuite(networks=("mlp", "vgg19"), sparsity=(0.9, 0.95), peers=("mnn",))
    with pytest.raises(KeyboardInterrupt):
        suite.peers(config, out)
    assert [(row["network"], row["sparsity"]) for row in suite.read(out)["rows"]] == [("mlp", 0.9), ("mlp", 0.95)]
    monkeypatch.setattr(peers_row, "measure", made_up)
    result = suite.peers(config, out)
    assert [row["network"] for row in result["rows"]] == ["vgg19", "vgg19", "mlp", "mlp"]
    with pytest.raises(ArtefactError, match="not the same peers"):
        suite.peers(config.model_copy(update={"peers": ("openvino",)}), out)
    document.write_text("<!-- peers.json -->\n<!-- /peers.json -->\n")
    done = CliRunner().invoke(report_verb.command, [str(out), "--into", str(document)])
    assert done.exit_code == 0, done.output
    text = document.read_text()
    assert "| MLP | sparsepipe | 1 | 8.00 (7.00–9.00) | 16.00 (14.00–18.00) | 2.0e-07 | 50% |" in text
    assert "| MLP | onnxruntime | 1 | 8.00\u202fms (8.00–8.00) | 8.00\u202fms (8.00–8.00) | 2.0e-07 | 50% |" in text
    assert "| VGG19 | sparsepipe | 1 | 8.00 (7.00–9.00)! | 16.00 (14.00–18.00)! |" in text  # of noisy races
    assert "| MLP | mnn | 1 | – | – | – | – |" in text
    assert "![Times faster than dense onnxruntime by sparsity, in each runtime](peers.png)" in text
    assert "noisy in 2 of 4 races; two processes of the same file differed by up to 5.0%" in text
    assert "a clock of 2011 MHz throughout, the system does not tell the temperature" in text
    assert "mnn (VGG19, MLP): not here." in text
    assert drawn_from(out.with_suffix(".png")) == tables.mark(suite.read(out))
    changed = suite.read(out)
    changed["rows"][0]["results"][1]["speedup"]["value"] = 1.0
    assert drawn_from(out.with_suffix(".png")) != tables.mark(changed)


def test_what_may_only_be_evaluated_is_run_when_it_is_named_and_its_licence_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in (peers.Peers, suite.PeersSuite):
        assert "deepsparse" not in chosen(kind().peers)
    installed: list[str] = []
    monkeypatch.setattr(peers, "install", lambda environment: installed.append(environment.name))
    monkeypatch.setattr(networks, "build", lambda name, seed: None)
    monkeypatch.setattr(peers_row, "measure", made_up)
    with caplog.at_level("WARNING", "sparsepipe"):
        suite.peers(suite.PeersSuite(networks=("mlp",), sparsity=(0.9,), install_peers=True))
        assert "licence" not in caplog.text
        suite.peers(suite.PeersSuite(networks=("mlp",), sparsity=(0.9, 0.95), peers=("mnn", "deepsparse")))
    assert caplog.text.count("evaluation") == 1  # once for all rows
    peers._install(chosen(peers.Peers().peers), lambda count, note: None)
    assert sorted(installed) == ["mnn", "openvino"]


@pytest.mark.parametrize(("panels", "runtimes"), [(1, 7), (2, 7), (6, 12)])
def test_the_legend_fits_and_no_two_runtimes_look_the_same(panels: int, runtimes: int) -> None:
    """A runtime that could not run in the first network is in the legend, too."""
    names = [f"onnxruntime-int8-qoperator-{number}" for number in range(runtimes)]
    rows = []
    for panel in range(panels):
        found = [{"runtime": "onnxruntime", "threads": 1, "speedup": None, "noisy": False}]
        for place, name in enumerate(names):
            runs = panels == 1 or (panel, place) != (0, 2)
            gain = {"value": 1.0 + place, "low": 0.9 + place, "high": 1.2 + place}
            found.append({"runtime": name, "threads": 1, "speedup": gain if runs else None, "noisy": False})
        rows += [
            {"title": f"Network {panel}", "sparsity": sparsity, "results": found, "verdicts": []}
            for sparsity in (0.8, 0.95)
        ]
    page = tables.figure({"rows": rows})
    page.draw_without_rendering()
    (legend,) = page.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(names)
    inside, whole = legend.get_window_extent(), page.bbox
    assert whole.x0 <= inside.x0 < inside.x1 <= whole.x1
    assert whole.y0 <= inside.y0 < inside.y1 <= whole.y1
    looks = [
        {place: (line.get_marker(), line.get_linestyle()) for line in axes.lines for place in [line.get_ydata()[0]]
         if len(line.get_xdata()) == 2 and line.get_marker() not in ("None", "_")}
        for axes in page.axes
    ]  # fmt: skip
    assert len(set(looks[-1].values())) == runtimes
    for panel in looks:
        assert panel.items() <= looks[-1].items()


def test_a_batch_size_fixed_at_another_one_is_rows_with_the_reason(model: Path, tmp_path: Path) -> None:
    held = onnx.load(model)
    held.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(held, tmp_path / "fixed.onnx")
    config = peers.Peers(peers=("good",), seconds=0.05, batch=(3, 2))
    result = peers.measure([tmp_path / "fixed.onnx"], config)
    for row in result["results"]:
        assert bool(row["samples"]) == (row["batch"] == 2)
        assert ("fixed at 2" in (row["note"] or "")) == (row["batch"] == 3)
    assert [(row["runtime"], row["batch"]) for row in result["results"]] == [
        ("onnxruntime", 3), ("good", 3), ("onnxruntime", 2), ("good", 2),
    ]  # fmt: skip
    assert [verdict["batch"] for verdict in result["verdicts"]] == [2]
    with pytest.raises(GraphError, match=r"No file could be measured: .*fixed at 2"):
        peers.measure([tmp_path / "fixed.onnx"], config.model_copy(update={"batch": (3,)}))


def test_the_suite_says_how_long_it_takes_and_leaves_out_the_peers_that_are_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[tuple[str, ...]] = []

    def measured(name: str, model: Any, sparsity: float, config: suite.PeersSuite, *_: Any) -> dict[str, Any]:
        asked.append(config.peers)
        return made_up(name, model, sparsity) | {"took_s": 90.0}

    monkeypatch.setattr(peers_row, "measure", measured)
    monkeypatch.setattr(networks, "build", lambda name, seed: None)
    monkeypatch.setattr(environment, "usable_cores", lambda: 2)
    call = ["--suite", "peers", "--network", "mlp", "--peers", "mnn,openvino", "--seconds", "2"]
    call += ["--threads", "1,2", "--out", str(tmp_path / "peers.json")]
    with caplog.at_level("INFO", "sparsepipe"):
        done = CliRunner().invoke(command, [*call, "--sparsity", "0.9,0.95"])
    assert done.exit_code == 0, done.output
    assert asked == [("mnn", "openvino")] * 2
    # Two rows, two thread counts, dense onnxruntime twice, three forms of sparsepipe and two others: 28 times 2 s, or
    # three times as long, and a tenth of 2 s each to warm up.
    assert "2 rows in 6 runtimes: 61.6\u202fs to 2\u202fmin 54\u202fs of calls" in done.output
    with caplog.at_level("INFO", "sparsepipe"):
        done = CliRunner().invoke(command, [*call, "--sparsity", "0.9,0.95,0.98"])
    assert "1 row in 6 runtimes" in done.output
    assert "took 90.0\u202fs on average" in done.output
    for suite_name, option in (("kernels", "--peers"), ("peers", "--pattern")):
        refused = CliRunner().invoke(command, ["--suite", suite_name, option, "mnn"])
        assert refused.exit_code == 2
        assert f"{option} does not belong to --suite {suite_name}" in refused.output
