"""The page of benchmarks: its table against the JSON, hostile names, and how a browser opens it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from sparsepipe.artefact import draft
from sparsepipe.benchmark import records
from sparsepipe.cli.bench import command
from sparsepipe.cli.profile import command as profile_command
from sparsepipe.errors import ArtefactError
from sparsepipe.reporting import bench_page, bench_plots
from sparsepipe.settings import Section
from sparsepipe.stages import bench_report

HOSTILE = "<script>alert(1)</script>.onnx"
SECTIONS = ["Latency", "Speed-up by sparsity", "Accuracy and latency", "Memory", "Layers", "All figures", "Machine"]


def process(file: str, ms: float, speedup: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "file": file, "target": None, "threads": 1, "batch": 1, "samples": 500,
        "latency_ms": {"p50": {"value": ms, "low": 0.9 * ms, "high": 1.1 * ms}, "p90": None, "p99": None},
        "speedup": speedup and {"value": speedup, "low": 0.9 * speedup, "high": 1.1 * speedup},
        "cpu_ms": ms, "load_ms": 12.0, "first_call_ms": 20.0, "rss_bytes": 70_000_000, "peak_rss_bytes": 80_000_000,
        "idle_rss_bytes": 50_000_000, "inputs": {}, "file_bytes": 1_000_000, "blocks": 20, "blocks_dropped": 0,
        "self_difference": 0.01, "noisy": False, "note": None,
    }  # fmt: skip
    return {**row, **changes}


def files_result() -> dict[str, Any]:
    return {
        "baseline": "dense.onnx",
        "results": [
            process("dense.onnx", 8.0, 1.0),
            process(HOSTILE, 2.0, 4.0, noisy=True),
            process("int8.onnx", 3.0, 2.7),
            process("broken.onnx", 1.0, None, latency_ms={"p50": None}, note="the process ended", rss_bytes=None),
        ],
        "environment": {"cpu": "Example CPU 9000", "settings": {"threads": [1], "batch": [1], "seconds": 2.0}},
    }


def what_if_result() -> dict[str, Any]:
    rows = [
        {"pattern": pattern, "sparsity": sparsity, "threads": 1, "batch": 1, "dense": process("dense", 8.0, 1.0),
         "sparse": process(f"{pattern} {sparsity}", 8.0 / gain, gain)}
        for pattern, factor in (("unstructured", 1.0), ("4x1", 1.5))
        for sparsity, gain in ((0.8, 1.5 * factor), (0.9, 2.5 * factor), (0.95, 4.0 * factor))
    ]  # fmt: skip
    return {"schema_version": 1, "model": "resnet20", "input": {}, "results": rows, "environment": {}}


def profile_result() -> dict[str, Any]:
    roof = {"peak_gflops": 100.0, "peak_by": "a product", "memory_gbs": 10.0, "cache_gbs": 80.0, "overhead_us": 0.1,
            "ridge": 10.0, "method": "measured"}  # fmt: skip
    layers = [
        {"name": name, "node": name, "op": op, "stored_as": stored, "density": 0.1, "us": us, "share": 0.3,
         "gflops": gflops, "peak_share": gflops / 100, "intensity": 3.0, "bandwidth_gbs": 5.0, "bandwidth_share": 0.5,
         "reasons": ["unstructured"], "dense": None, "shape": [1], "nnz": 1, "size": 10}
        for name, op, stored, us, gflops in (
            ("a.weight", "SparseConv", "csr", 90.0, 20.0), ("b.weight", "Conv", "dense", 30.0, 60.0)
        )
    ]  # fmt: skip
    total = {"us": 130.0, "layers_us": 120.0, "other_us": 5.0, "between_us": 5.0, "calls": 20, "gflops": 1.0}
    return {
        "schema_version": 1, "kind": "profile", "file": "m.onnx", "against": None, "threads": 1, "batch": 1,
        "roofline": roof, "layers": layers, "reasons": {"unstructured": "no sharing"}, "total": total,
        "other": [{"op": "MaxPool", "what": "operator", "count": 1, "us": 5.0, "bytes": 1}], "method": "profiled",
        "environment": {"cpu": "Example"},
    }  # fmt: skip


class Tables(HTMLParser):
    """Rows of every table by its caption, and all tags and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.headings: list[str] = []
        self._caption, self._row, self._text, self._open = "", list[str](), "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag in ("caption", "td", "th", "h2"):
            self._text, self._open = "", tag
        elif tag == "tr":
            self._row = []

    def handle_data(self, data: str) -> None:
        if self._open:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._caption = self._text
        elif tag in ("td", "th"):
            self._row.append(self._text)
        elif tag == "h2":
            self.headings.append(self._text)
        elif tag == "tr" and self._caption:
            self.tables.setdefault(self._caption, []).append(self._row)
        elif tag == "table":
            self._caption = ""
        if tag == self._open:
            self._open = ""


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    sources = []
    for name, result in (("bench", files_result()), ("whatif", what_if_result()), ("profile", profile_result())):
        sources.append(tmp_path / f"{name}.json")
        sources[-1].write_text(json.dumps(result))
    out = tmp_path / "page.html"
    bench_report.write(sources, out, title="Figures")
    return out, json.loads(out.with_suffix(".json").read_text())


def test_the_table_of_the_page_holds_what_the_json_holds(written: tuple[Path, dict[str, Any]]) -> None:
    page, data = written
    assert (data["schema_version"], data["kind"]) == (1, "report")
    head, *rows = Tables(page.read_text(encoding="utf-8")).tables["Measurements"]
    assert len(rows) == len(data["rows"]) == 4 + 3 + 6
    column = {name: position for position, name in enumerate(head)}
    for cells, row in zip(rows, data["rows"], strict=True):
        assert cells[column["file"]] == row["label"]
        assert cells[column["threads"]] == str(row["threads"])
        for name, key, unit in (("latency", "latency_ms", "ms"), ("speed-up", "speedup", "×")):
            text = cells[column[name]].replace("\u202f", "")
            if row[key] is None:
                assert text == "–"
                continue
            value, interval = text.rstrip(")").split(" (")
            assert float(value.removesuffix(unit)) == pytest.approx(row[key]["value"], rel=6e-3)
            assert [float(part) for part in interval.split("–")] == pytest.approx(
                [row[key]["low"], row[key]["high"]], rel=6e-3
            )


def test_what_was_measured_becomes_figures_notes_and_commands(written: tuple[Path, dict[str, Any]]) -> None:
    page, data = written
    text = page.read_text(encoding="utf-8")
    seen = Tables(text)
    assert [heading for heading in seen.headings if heading in SECTIONS] == SECTIONS
    assert seen.tags.count("svg") == 2 + 1 + 2 + 1  # latency and memory of both results, one curve, one roofline
    assert "script" not in seen.tags
    assert "var(--sparse)" in text  # colours follow the reader's scheme
    assert any("broken.onnx" in note and "the process ended" in note for note in data["notes"])
    assert any("noisy in 1 of 13" in note for note in data["notes"])
    assert data["commands"][1].startswith("sparsepipe bench --model resnet20")
    assert "--seconds 2" in data["commands"][0]
    assert [row[0] for row in seen.tables["Layers of m.onnx"][1:]] == ["a.weight", "b.weight"]
    markdown = page.with_suffix(".md").read_text(encoding="utf-8")
    assert all(row["label"] in markdown for row in data["rows"])


def test_the_command_of_a_result_is_one_that_the_command_line_takes(tmp_path: Path) -> None:
    """With the names of the files, not of their rows, and all options that matter."""
    (tmp_path / "m.onnx").touch()
    file = str(tmp_path / "m.onnx")
    settings = {"threads": [1, 2], "batch": [4], "seconds": 0.5, "pin": False, "input": {},
                "peers": ["mnn", "openvino"],
                "calibrate": {"name": "mnist5k", "options": {}}}  # fmt: skip
    beside = files_result() | {
        "results": [process(f"{file}, {name}", 8.0, 1.0, runtime=name) for name in ("onnxruntime", "mnn")],
        "environment": {"settings": settings},
        "verdicts": [{"threads": 2, "batch": 4, "difference": 0.2, "limit": 0.03, "noisy": True, "blocks": 40,
                      "blocks_disturbed": 3, "conditions": {"note": "the clock varied"}}],
    }  # fmt: skip
    changes = {"calibrate": None, "peers": [], "pin": True, "input": {"": [1, 3, 8, 8]}}
    edge = files_result() | {
        "profile": "edge", "results": [process(file, 8.0, 1.0, limit={"bytes": 268435456})],
        "environment": {"settings": settings | changes},
    }  # fmt: skip
    data = bench_page.page({"a": beside, "b": edge}, title="t")
    first, second = ([*shlex.split(line)] for line in data["commands"])
    assert first[:3] == second[:3] == ["sparsepipe", "bench", file]
    taken = command.make_context("bench", first[2:]).params
    assert taken["onnx"] == (tmp_path / "m.onnx",)
    assert (taken["peers"], taken["threads"], taken["batch"]) == (("mnn", "openvino"), (1, 2), (4,))
    assert (taken["calibrate"], taken["seconds"], taken["pin"]) == ("mnist5k", 0.5, False)
    taken = command.make_context("bench", second[2:]).params
    assert (taken["profile"], taken["memory_limit"], taken["threads"]) == ("edge", "268435456", ())
    assert taken["input_"] == {"": (1, 3, 8, 8)}
    assert any("noisy machine: two runs of the same file differed by 20.0%" in note for note in data["notes"])
    assert any("the clock varied" in note for note in data["notes"])


def test_the_commands_of_a_suite_and_of_a_profile_name_what_was_measured() -> None:
    committed = json.loads((Path(__file__).parents[2] / "examples" / "benchmarks" / "peers.json").read_text())
    line = shlex.split(bench_page._command(committed | {"rows": committed["rows"][:5]}))
    taken = command.make_context("bench", line[2:]).params
    assert (taken["suite"], taken["network"]) == ("peers", ("resnet50", "mobilenet-v1"))
    assert (taken["sparsity"], taken["seconds"]) == ((0.8, 0.9, 0.95, 0.98), 1.0)
    assert taken["peers"] == tuple(committed["settings"]["peers"])
    measured = {"kind": "profile", "file": __file__, "against": None, "threads": 1, "batch": 2}
    line = shlex.split(bench_page._command(measured | {"settings": {"seconds": 0.5, "input": {"x": [2, 3]}}}))
    taken = profile_command.make_context("profile", line[2:]).params
    assert (taken["seconds"], taken["threads"], taken["input_"]) == (0.5, 1, {"x": (2, 3)})


def test_accuracy_stands_against_latency() -> None:
    shares = {"dense.onnx": 0.9, HOSTILE: 0.88, "int8.onnx": 0.87}
    known = {name: {"value": share, "low": share - 0.01, "high": share + 0.01} for name, share in shares.items()}
    data = bench_page.page({"b": files_result()}, title="t", accuracy={"b": known})
    figures = list(bench_page._pareto(data["rows"]))
    assert len(figures) == 1
    assert all(text in figures[0].caption.replace("\u202f", "") for text in ("90.00%", "88.00%", "87.00%"))
    assert "Accuracy against latency" in bench_page.render(data)


def test_each_run_keeps_the_accuracy_of_its_own_files(tmp_path: Path) -> None:
    """The files of two runs have the same names."""
    shares = {"first": 0.9, "second": 0.5}
    for run, share in shares.items():
        with draft(tmp_path / run / "bench", "bench", Section(), {}) as building:
            building.metrics.update(files_result())
        with draft(tmp_path / run / "validate", "validate", Section(), {}) as building:
            compared = {"file": "int8.onnx", "accuracy": {"value": share}}
            building.metrics.update({"passed": True, "candidates": [compared]})
    data = bench_report.write([tmp_path / run for run in shares], tmp_path / "page.html")
    shown = {Path(row["source"]).parent.name: row["accuracy"]["value"] for row in data["rows"] if row["accuracy"]}
    assert shown == shares


def test_labels_of_files_with_the_same_accuracy_stand_below_each_other() -> None:
    shares = {name: {"value": 0.9, "low": 0.88, "high": 0.92} for name in ("one", "two", "far")}
    points = [bench_plots.Point(name, "sparse", {"value": ms}, share, True)
              for (name, share), ms in zip(shares.items(), (1.0, 1.01, 3.0), strict=True)]  # fmt: skip
    svg = bench_plots.pareto(points, name="p", alt="a")
    at = {found[2]: float(found[1]) for found in re.finditer(r'<text [^>]*?y="([\d.]+)"[^>]*>(\w+)<', svg)}
    assert at["two"] - at["one"] > 8  # more than the letters are high
    assert at["far"] == at["one"]


def test_records_name_the_same_measurement_alike() -> None:
    first, second = records.read(what_if_result(), where="a"), records.read(what_if_result(), where="b")
    assert [record.key for record in first] == [record.key for record in second]
    assert len({record.key for record in first}) == len(first)
    assert [record.kind for record in records.read(files_result(), where="a")][:3] == ["dense", "sparse", "int8"]


def test_a_suite_of_runtimes_is_a_curve_for_each(tmp_path: Path) -> None:
    rows = [
        {"network": "n", "title": "Net", "sparsity": sparsity, "input": [1, 3],
         "results": [process(name, 8 / gain, gain, runtime=name) for name, gain in (
             ("onnxruntime", 1.0), ("sparsepipe", ours), ("mnn", 9.0), ("onnxruntime-int8", 2.0),
             ("sparsepipe-int8-4x4", 1.5 * ours))]}
        for sparsity, ours in ((0.9, 2.0), (0.95, 3.0))
    ]  # fmt: skip
    found = records.read({"rows": rows}, where="suite")
    assert [record.kind for record in found[:5]] == ["dense", "sparse", "sparse", "int8", "sparse"]
    beside = [process("m.onnx", 8.0, 1.0, target="dense", runtime=name) for name in (
        "onnxruntime", "openvino", "openvino-int8", "onnxruntime-int8-qdq", "mnn", "sparsepipe")]  # fmt: skip
    kinds = [one.kind for one in records.read({"baseline": "m.onnx", "results": beside}, where="files")]
    assert kinds == ["dense", "dense", "int8", "int8", "sparse", "sparse"]
    assert len({record.key for record in found}) == 10
    data = bench_page.page({"s": {"rows": rows}}, title="t")
    (figure,) = bench_page._speedups(found)
    assert "sparsepipe: 2.00× at 90%, 3.00× at 95%" in figure.caption
    assert "mnn" in figure.caption
    assert "Net" in bench_page.render(data)
    headline = bench_page._headline(found)  # the best of sparsepipe, although another runtime is faster
    assert headline is not None
    assert headline == (
        "The largest of 4 speed-ups: 4.50× (4.05–4.95) over its dense file, of Net, sparsepipe-int8-4x4 0.95 "
        "(1 thread, batch 1)."
    )
    quiet = [replace(record, noisy=record.sparsity == 0.95) for record in found]
    assert "3.00× (2.70–3.30)" in str(bench_page._headline(quiet))
    foreign = {"baseline": "a.onnx", "results": [process("a.onnx", 2.0, 1.0), process("b.onnx", 1.0, 2.0)]}
    headline = bench_page._headline(records.read(foreign, where="r"))
    assert "1 speed-up: 2.00× (1.80–2.20) over a.onnx, of b.onnx" in str(headline)


def test_results_of_two_machines_are_not_drawn_into_one_picture(tmp_path: Path) -> None:
    data = bench_page.page({"here/bench.json": files_result(), "there/bench.json": files_result()}, title="t")
    text = bench_page.render(data)
    assert Tables(text).tags.count("svg") == 2 * 2  # latency and memory of each
    for name in ("here/bench.json", "there/bench.json"):
        assert f"1 thread, batch 1, wall time ({name})" in text
    head, *rows = Tables(text).tables["Measurements"]
    assert [row[head.index("source")] for row in rows] == ["here/bench.json"] * 4 + ["there/bench.json"] * 4


def test_a_page_of_quiet_measurements_is_noisy_where_two_processes_of_one_file_differ() -> None:
    verdict = {"threads": 1, "batch": 1, "difference": 0.2, "limit": 0.03, "noisy": True, "blocks": 40,
               "blocks_disturbed": 0, "conditions": {"note": "cool", "frequency_mhz": None, "temperature_c": None,
                                                     "throttled": None}}  # fmt: skip
    for result in (files_result() | {"results": files_result()["results"][:1]}, what_if_result()):
        quiet, noisy = (
            bench_page.page({"a/b.json": result | {"verdicts": [verdict | {"noisy": noise}]}, "c/d.json": result},
                            title="t")
            for noise in (False, True)
        )  # fmt: skip
        assert (quiet["noisy"], noisy["noisy"]) == (False, True)
        assert "no measurement flagged as noisy" in bench_page.render(quiet)
        assert "measured on a noisy machine" in bench_page.render(noisy)
        (note,) = noisy["notes"]
        assert note.startswith("a/b.json: ")
        assert "20.0%" in note


def test_a_picture_of_many_bars_is_of_one_sparsity() -> None:
    rows = [
        {"network": "n", "title": "Net", "sparsity": sparsity, "input": [1, 3],
         "results": [process("onnxruntime", 8.0, 1.0), *(process(f"peer{n}", 6.0, 1.3) for n in range(8))]}
        for sparsity in (0.8, 0.9, 0.95)
    ]  # fmt: skip
    found = records.read({"rows": rows}, where="suite")
    (figure,) = bench_page._latencies(found)
    assert all(f"peer{number} 0.9:" in str(figure.svg) for number in range(8))
    assert "0.8:" not in str(figure.svg)
    assert figure.caption == "18 more are in the table."


@pytest.mark.parametrize("result", [[], {}, {"rows": [{}]}, {"results": [{"file": "a"}]}])
def test_what_is_no_result_is_refused(result: Any) -> None:
    with pytest.raises(ArtefactError):
        records.read(result, where="r.json")


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "background"), [("1", (255, 255, 255)), ("0", (20, 23, 27))])
def test_a_browser_opens_the_page_without_a_message(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, scheme: str, background: tuple[int, int, int]
) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    from PIL import Image

    picture = tmp_path / "page.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={scheme}", "--window-size=390,2400", f"--screenshot={picture}",
        written[0].as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert tuple(colours[counts.argmax()]) == background
    assert 0.02 < 1 - counts.max() / len(pixels) < 0.6
