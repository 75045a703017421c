"""The parts of the report: numbers as text, the headline, figures, mask pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparsepipe.artefact import Artefact, Manifest
from sparsepipe.reporting import summary, units
from sparsepipe.reporting.contents import Estimate

NARROW = "\u202f"


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.percent, 0.98765, "98.77 %"),
        (units.count, 1_234_567, "1 234 567"),
        (units.size, 999, "999 B"),
        (units.size, 1_000, "1.00 kB"),
        (units.size, 999_600, "1.00 MB"),
        (units.size, 352_018, "352 kB"),
        (units.size, 25_557_032, "25.6 MB"),
        (units.milliseconds, 0.8164, "0.816 ms"),
        (units.milliseconds, 0.005347, "0.00535 ms"),
        (units.milliseconds, 0.09996, "0.100 ms"),
        (units.milliseconds, 9.996, "10.0 ms"),
        (units.milliseconds, 99.96, "100 ms"),
        (units.milliseconds, 123.4, "123 ms"),
        (units.ratio, 2.4142, "2.41×"),
        (units.ratio, 123.4, "123×"),
        (units.points, -0.00311, "−0.31 points"),
        (units.points, 0.002, "+0.20 points"),
        (units.scientific, 0.0, "0"),
        (units.scientific, 0.0131, "0.013"),
        (units.scientific, 3.14e-7, "3.1 × 10⁻⁷"),
        (units.duration, 71.24, "71.2 s"),
        (units.duration, 185.0, "3 min 05 s"),
        (units.duration, 7_620.0, "2 h 07 min"),
    ],
)
def test_numbers_read_as_a_person_writes_them(function: Callable[[float], str], value: float, text: str) -> None:
    assert function(value).replace(NARROW, " ") == text


@pytest.mark.parametrize(
    "function",
    [units.percent, units.count, units.size, units.milliseconds, units.ratio, units.points, units.scientific],
)
def test_what_is_not_known_is_a_dash(function: Callable[[None], str]) -> None:
    assert function(None) == units.MISSING


def test_shapes_and_digests_are_shortened() -> None:
    assert units.dims((64, 32, 3, 3)) == "64 × 32 × 3 × 3"
    assert units.short_digest("sha256:0123456789abcdef") == "0123456789ab"


@given(st.text(st.characters()))
def test_printable_text_can_be_written_and_keeps_what_is_visible(text: str) -> None:
    shown = units.printable(text)
    assert len(shown) == len(text)
    shown.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e]", shown)
    assert [after for before, after in zip(text, shown, strict=True) if before.isalnum()] == [
        character for character in text if character.isalnum()
    ]


def artefact(stage: str, **metrics: Any) -> Artefact:
    manifest = Manifest(
        stage=stage, config={}, inputs={}, outputs={}, versions={}, metrics=metrics, created="2026-11-23T04:00:00+00:00"
    )
    return Artefact(Path(stage), manifest)


def interval(value: float, width: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def timing(file: str, median: float, **other: Any) -> dict[str, Any]:
    latency = {"p50": interval(median), "p90": interval(1.2 * median), "p99": interval(1.5 * median)}
    return {"file": file, "threads": 1, "batch": 1, "latency_ms": latency, "file_bytes": 1000, **other}


TRAIN = artefact("train", test_accuracy=0.96, test_correct=960, test_samples=1000, sparsity=0.9, nnz=100, weights=1000)
DENSE = artefact("train", test_accuracy=0.97, test_correct=970, test_samples=1000)
EXPORT = artefact(
    "export",
    files={"dense": {"name": "d.onnx", "bytes": 4000}, "portable": {"name": "p.onnx", "bytes": 1250}},
    sparsity=0.9,
)
VALIDATE = artefact(
    "validate",
    passed=True,
    candidates=[
        {"file": "d.onnx", "accuracy": {**interval(0.96, 0.01), "correct": 960, "samples": 1000}},
        {"file": "runs/x/export/p.onnx", "accuracy": {**interval(0.95, 0.01), "correct": 950, "samples": 1000}},
    ],
)
BENCH = artefact(
    "bench",
    baseline="d.onnx",
    results=[
        timing("d.onnx", 2.0, target="dense", speedup=interval(1.0)),
        timing("p.onnx", 1.6, target="portable", speedup=interval(1.25)),
        timing("d.onnx", 1.0, target="dense", threads=2),
        timing("p.onnx", 0.9, target="portable", threads=2, noisy=True),
    ],
)
RUN = {"train": TRAIN, "train-dense": DENSE, "export": EXPORT, "validate": VALIDATE, "bench": BENCH}


def test_the_summary_puts_each_figure_in_its_place() -> None:
    found = summary.summarise(RUN)
    assert (found["sparsity"], found["nnz"], found["weights"]) == (0.9, 100, 1000)
    values = {column: value["value"] for column, value in found["accuracy"].items() if column != "difference"}
    assert values == {"dense": 0.97, "sparse": 0.96, "exported_dense": 0.96, "exported_sparse": 0.95}
    assert found["accuracy"]["difference"] == pytest.approx(-0.01)
    assert found["files"] == {
        "dense": {"name": "d.onnx", "bytes": 4000},
        "sparse": {"name": "p.onnx", "bytes": 1250},
        "ratio": 3.2,
    }
    assert (found["latency"]["threads"], found["latency"]["batch"]) == (1, 1)
    assert found["latency"]["dense"]["p50"]["value"] == 2.0
    assert found["latency"]["sparse"]["p99"]["value"] == pytest.approx(2.4)
    assert found["speedup"] == interval(1.25)
    assert found["valid"] is True
    assert found["noisy"] is True


def test_the_interval_of_a_tested_accuracy_is_that_of_wilson() -> None:
    expected = stats.binomtest(960, 1000).proportion_ci(0.95, method="wilson")
    found = summary.summarise({"train": TRAIN})["accuracy"]["sparse"]
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_the_table_has_a_line_for_each_quantity() -> None:
    headers, lines = summary.rows(summary.summarise(RUN))
    assert headers == ["", "dense", "sparse", "change", "measured on"]
    table = {line[0]: [cell.replace(NARROW, " ") for cell in line[1:4]] for line in lines}
    assert table == {
        "Sparsity": ["0 %", "90.00 %", "10.00× fewer weights"],
        "Test accuracy, trained": ["97.00 % (95.7–97.9)", "96.00 % (94.6–97.0)", "−1.00 points"],
        "Test accuracy, exported": ["96.00 % (95.0–97.0)", "95.00 % (94.0–96.0)", ""],
        "File size": ["4.00 kB", "1.25 kB", "3.20× smaller"],
        "Latency, median (p50)": ["2.00 ms (1.90–2.10)", "1.60 ms (1.50–1.70)", "speed-up 1.25× (1.15–1.35)"],
        "Latency, p99": ["3.00 ms (2.90–3.10)", "2.40 ms (2.30–2.50)", ""],
    }


def test_the_table_of_a_training_alone_has_no_lines_about_files() -> None:
    lines = summary.rows(summary.summarise({"train": TRAIN}))[1]
    assert [line[0] for line in lines] == ["Sparsity", "Test accuracy, trained"]
    assert summary.rows(summary.summarise({}))[1] == []


def test_foreign_files_are_compared_with_the_baseline() -> None:
    found = summary.summarise(
        {
            "bench": artefact(
                "bench", baseline="theirs.onnx", results=[timing("ours.onnx", 1.0), timing("theirs.onnx", 3.0)]
            )
        }
    )
    assert found["files"]["dense"] == {"name": "theirs.onnx", "bytes": 1000}
    assert found["files"]["sparse"] == {"name": "ours.onnx", "bytes": 1000}
    assert found["latency"]["dense"]["p50"]["value"] == 3.0


def test_the_universal_file_is_the_one_that_counts_where_there_is_one() -> None:
    files = {**EXPORT.metrics["files"], "universal": {"name": "u.onnx", "bytes": 800}}
    assert summary.summarise({"export": artefact("export", files=files)})["files"]["sparse"]["name"] == "u.onnx"


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"train": TRAIN}, "No dense twin"),
        ({"validate": artefact("validate", passed=False, candidates=[])}, "Validation failed"),
        ({"bench": BENCH}, "noisy"),
        (
            {
                "bench": artefact(
                    "bench",
                    baseline="d.onnx",
                    results=[timing("d.onnx", 1.0), timing("p.onnx", 1.0, speedup=interval(1.02))],
                )
            },
            "includes 1",
        ),
        (
            {
                "bench": artefact(
                    "bench",
                    baseline="d.onnx",
                    results=[
                        timing("d.onnx", 1.0, self_difference=0.01),
                        timing("p.onnx", 1.0, self_difference=0.03, speedup=interval(1.02, 0.01)),
                    ],
                )
            },
            "noise of the measurement",
        ),
        (
            {"bench": artefact("bench", results=[timing("p.onnx", 1.0, latency_ms={"p50": interval(1), "p99": None})])},
            "does not support",
        ),
    ],
)
def test_what_a_reader_must_know_is_noted(run: dict[str, Artefact], words: str) -> None:
    assert words in " ".join(summary.summarise(run)["notes"])


def test_two_processes_of_one_file_that_differ_make_a_noisy_run() -> None:
    """Although each measurement by itself was quiet; of another setting, they say nothing of the speed-up."""

    def found(threads: int) -> dict[str, Any]:
        verdict = {"threads": threads, "batch": 1, "difference": 0.2, "limit": 0.03, "noisy": True, "blocks": 40,
                   "blocks_disturbed": 0, "conditions": {"note": "the clock varied"}}  # fmt: skip
        rows = [timing("d.onnx", 1.2, self_difference=0.01), timing("p.onnx", 1.0, speedup=interval(1.15, 0.05))]
        return summary.summarise({"bench": artefact("bench", baseline="d.onnx", results=rows, verdicts=[verdict])})

    same, other = found(threads=1), found(threads=2)
    assert same["noisy"] is other["noisy"] is True
    assert (same["latency"]["self_difference"], other["latency"]["self_difference"]) == (0.2, 0.01)
    assert any("noise of the measurement" in note for note in same["notes"])
    assert not any("noise of the measurement" in note for note in other["notes"])


def test_numbers_that_are_none_or_not_finite_are_not_known() -> None:
    run = {"train": artefact("train", test_accuracy=float("nan"), sparsity=None, nnz=None)}
    found = summary.summarise(run)
    assert found["accuracy"]["sparse"] is None
    assert found["sparsity"] is None


def test_the_summary_imports_nothing_heavy() -> None:
    code = (
        "import sys, sparsepipe.reporting.summary as s; s.rows(s.summarise({}));"
        "print([m for m in ('matplotlib', 'jinja2', 'torch', 'onnx', 'scipy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestFigures:
    """SVG text that stands in a page beside others."""

    plots = pytest.importorskip("sparsepipe.reporting.plots", exc_type=ImportError)

    def curve(self, name: str = "a", label: str = "sparse") -> str:
        lines = [
            self.plots.Line(label, [1, 2, 3], [0.5, None, 0.1], "sparse"),
            self.plots.Line("dense", [1, 2, 3], [0.4, 0.2, 0.1], "dense", secondary=True),
        ]
        return str(self.plots.curves(lines, name=name, alt='Two "curves"', x_label="epoch", y_label="loss"))

    def all(self) -> list[str]:
        bar, dot = self.plots.Bar, self.plots.Dot
        few = [bar("a", 1.0, True), bar("b", 0.2, False)]
        many = [bar(f"layer {index}", (index % 9 + 1) / 10, index % 50 == 0) for index in range(300)]
        dots = [
            dot("dense, 1 thread", "dense", Estimate(value=2.0, low=1.9, high=2.1), Estimate(value=2.5), noisy=True),
            dot("sparse, 1 thread", "sparse", Estimate(value=0.1), None),
        ]
        return [
            self.curve(),
            self.plots.curves(
                [self.plots.Line("x", [1, 2], [0.2, 2.0], "ink")],
                name="log",
                alt="-",
                x_label="x",
                y_label="y",
                log_scale=True,
            ),
            self.plots.density_bars(few, name="few", alt="-", mean=0.5),
            self.plots.density_bars(many, name="many", alt="-"),
            self.plots.latency_dots(dots, name="dots", alt="-"),
        ]

    def test_each_is_one_element_with_a_label_and_no_fixed_colours_or_fonts(self) -> None:
        for svg in self.all():
            root = ElementTree.fromstring(svg)
            assert root.tag == "svg"
            assert root.attrib["role"] == "img"
            assert root.attrib["aria-label"]
            assert "width" not in root.attrib
            assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
            assert "font-family" not in svg
            assert "://" not in svg
            assert "<style" not in svg
            assert "currentColor" in svg

    def test_references_lead_to_ids_of_the_same_figure(self) -> None:
        for svg in self.all():
            ids = set(re.findall(r' id="([^"]+)"', svg))
            used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
            assert used
            assert used <= ids

    def test_two_figures_share_no_id(self) -> None:
        one, two = (set(re.findall(r' id="([^"]+)"', self.curve(name))) for name in ("a", "b"))
        assert one
        assert not one & two

    def test_equal_data_give_equal_text(self) -> None:
        assert self.all() == self.all()

    def test_hostile_labels_are_text(self) -> None:
        label = 'x</text><script>alert("1")</script> $\\frac{1}{0}$ \x00\ud800\u202e url(#q) #010203'
        svg = self.curve(label=label)
        texts = ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("text")]
        assert units.printable(label) in texts
        assert "<script" not in svg

    def test_a_figure_without_pyplot_leaves_no_state(self) -> None:
        import matplotlib

        before = dict(matplotlib.rcParams)
        self.curve()
        assert dict(matplotlib.rcParams) == before


class TestMaskPictures:
    masks = pytest.importorskip("sparsepipe.reporting.masks")

    @given(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.integers(0, 2**32 - 1),
    )
    def test_shrinking_takes_the_mean_of_each_cell(
        self, shape: tuple[int, int], limit: tuple[int, int], seed: int
    ) -> None:
        mask = np.random.default_rng(seed).random(shape) < 0.3
        found, (height, width) = self.masks.shrink(mask, *limit)
        assert found.shape[0] <= limit[0]
        assert found.shape[1] <= limit[1]
        for row in range(found.shape[0]):
            for column in range(found.shape[1]):
                cell = mask[row * height : (row + 1) * height, column * width : (column + 1) * width]
                assert found[row, column] == pytest.approx(cell.mean())

    def test_the_largest_sparse_masks_are_drawn_and_stay_small(self) -> None:
        generator = np.random.default_rng(0)
        masks = {
            "large": generator.random((1024, 256, 3, 3)) < 0.05,
            "small": generator.random((16, 16)) < 0.1,
            "dense": np.ones((2048, 2048), bool),
            "empty": np.zeros((8, 8), bool),
        }
        pictures = self.masks.pictures(masks, limit=3)
        assert [picture.name for picture in pictures] == ["large", "small", "empty"]
        large = pictures[0]
        assert large.nnz == masks["large"].sum()
        assert large.cell == (8, 4)
        assert (large.height, large.width) == (128, 576)
        assert len(large.data_uri) < 60_000
        assert large.data_uri.startswith("data:image/png;base64,")
