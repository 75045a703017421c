"""The stage `report` on a run folder as the other stages write it, with hostile names in every place that is shown."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from sparsepipe import recipe
from sparsepipe.artefact import Artefact, draft, write_json, write_text
from sparsepipe.errors import ArtefactError, MissingExtraError
from sparsepipe.formats.film import save_film
from sparsepipe.reporting import film
from sparsepipe.stages import report

HOSTILE = "<script>alert(1)</script>"
HOSTILE_NOTE = 'Neighbour took the core "><img src=https://evil.example/x.png onerror=alert(2)> \u202e'
MACHINE = {
    "cpu": "Example CPU 9000",
    "isa": ["avx2", "fma"],
    "memory_bytes": 17_179_869_184,
    "caches": {"L1": "32K", "L2": "1024K"},
    "virtual": True,
    "governor": None,
}


class Config(BaseModel):
    """Any configuration: the report reads those of the other stages as plain data."""

    model_config = ConfigDict(extra="allow")


TRAIN_CONFIG = recipe.parse(
    {
        "model": {"name": "resnet20", "width": 16},
        "data": {"name": "mnist5k"},
        "method": {"name": "dst-ee", "sparsity": 0.9, "c": 0.001, "distribution": "erk"},
        "train": {"epochs": 24, "dense_twin": True},
    }
)


def layer_shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 1, 3, 3)}
    for block in range(blocks):
        wide = 16 * 2 ** min(3 * block // blocks, 2)
        shapes[f"layers.{block}.conv1.weight"] = (wide, wide, 3, 3)
        shapes[f"layers.{block}.conv2.weight"] = (wide, wide, 3, 3)
    return {**shapes, HOSTILE: (10, 64), "head $\\frac{1}{0}$ & co": (10, 64)}


def make_masks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Sparser where the layer is larger; the first layer dense; some input channels never used, for a visible mask."""
    generator = np.random.default_rng(3)
    masks = {}
    for name, shape in shapes.items():
        density = min(1.0, 28 / math.sqrt(math.prod(shape)))
        used = generator.random(shape[1]) ** 2
        share = (density * used / used.mean()).reshape(1, -1, *[1] * (len(shape) - 2))
        masks[name] = np.ones(shape, bool) if name == "conv1.weight" else generator.random(shape) < share
    return masks


def layer_rows(masks: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(mask.shape),
            "nnz": int(mask.sum()),
            "size": mask.size,
            "sparsity": 1 - float(mask.mean()),
        }
        for name, mask in masks.items()
    ]


def write_epochs(path: Path, epochs: int, density: Mapping[str, float], *, sparse: bool) -> None:
    lines = []
    for epoch in range(1, epochs + 1):
        left, lag = math.exp(-epoch / 5), 0.04 if sparse else 0.0
        line = {
            "epoch": epoch,
            "step": 32 * epoch,
            "lr": 0.05 * (1 + math.cos(math.pi * epoch / epochs)),
            "train_loss": 1.9 * left + 0.03 + lag + 0.02 * math.sin(3.0 * epoch),
            "train_accuracy": 0.99 - 0.7 * left - lag / 4,
            "validation_loss": None if epoch == 3 else 1.7 * left + 0.09 + lag + 0.04 * math.sin(5.0 * epoch),
            "validation_accuracy": 0.982 - 0.6 * left - lag / 4 + 0.004 * math.sin(4.0 * epoch),
            "sparsity": 0.9 if sparse else 0.0,
            "exploration_rate": 0.1 + 0.5 * (1 - math.exp(-epoch / 8)) if sparse else 1.0,
            "drop_fraction": max(0.0, 0.15 * (1 + math.cos(math.pi * epoch / 18))) * (epoch < 18) if sparse else 0.0,
            "density": density,
            **(motion(epoch, density) if sparse else {}),
            "seconds": 2.1 * epoch,
        }
        lines.append(json.dumps(line))
    write_text(path, "\n".join(lines) + "\n")


def motion(epoch: int, density: Mapping[str, float]) -> dict[str, Any]:
    """What is logged of the masks: updates until epoch 18, one an epoch; the last layer loses nothing."""
    updated, layers = epoch <= 18, [name for name, value in density.items() if value < 1]
    churn = {name: 0.2 * (18 - epoch) / 18 if name != layers[-1] else 0.0 for name in layers if updated}
    gradients = {name: 10.0 ** -(1 + at % 4) for at, name in enumerate(layers) if updated}
    return {
        "mask_updates": int(updated),
        "churn": 0.2 * (18 - epoch) / 18 if updated else None,
        "age": {"median": epoch // 2, "p90": epoch},
        "dropped": churn,
        "grown": churn,
        "exploration": {name: density[name] * (1 + epoch / 48) for name in layers},
        "age_median": dict.fromkeys(layers, epoch // 2),
        "age_p90": dict.fromkeys(layers, epoch),
        "inactive_gradient_norm": {name: 10 * value for name, value in gradients.items()},
        "inactive_gradient_mean": {name: None if epoch == 5 else value for name, value in gradients.items()},
    }


FILMED = "layers.2.conv1.weight"


def film_frames(mask: np.ndarray) -> list[np.ndarray]:
    """Three masks: the one given, the first 20 active weights elsewhere, and nothing new."""
    moved = mask.ravel().copy()
    moved[np.flatnonzero(moved)[:20]] = False
    moved[np.flatnonzero(~mask.ravel())[:20]] = True
    return [mask, moved.reshape(mask.shape), moved.reshape(mask.shape)]


def training_metrics(masks: Mapping[str, np.ndarray], *, sparse: bool) -> dict[str, Any]:
    size, nnz = sum(mask.size for mask in masks.values()), sum(int(mask.sum()) for mask in masks.values())
    return {
        "test_accuracy": 0.976 if sparse else 0.981,
        "test_correct": 976 if sparse else 981,
        "test_samples": 1000,
        "validation_accuracy": 0.9775,
        "epoch_selected": 21,
        "sparsity": 1 - nnz / size if sparse else 0.0,
        "nnz": nnz if sparse else size,
        "weights": size,
        "parameters": size + 700,
        "exploration_rate": 0.574 if sparse else 1.0,
        "mask_updates": 18 if sparse else 0,
        "inference_flops": 81_102_336 * (0.213 if sparse else 1.0),
        "inference_flops_multiple": 0.213 if sparse else 1.0,
        "training_flops": 3 * 81_102_336 * 3600 * 24 * (0.241 if sparse else 1.0),
        "training_flops_multiple": 0.241 if sparse else 1.0,
        "dense_gradient_every": 100 if sparse else None,
        "dense_macs": 40_551_168,
        "seconds": 103.7 if sparse else 71.2,
        "data": {"name": "mnist5k", "train": 3600, "validation": 400, "test": 1000},
    }


def converted(row: Mapping[str, Any]) -> dict[str, Any]:
    dense, compact = 4 * row["size"], 6 * row["nnz"] + 2 * (row["shape"][0] + 1)
    smaller = compact < dense
    return {
        **row,
        "format": "csr" if smaller else "dense",
        "block": None,
        "dense_bytes": dense,
        "bytes": min(dense, compact),
        "reason": "smallest of csr, bsr 4x1, bitmask"
        if smaller
        else f"no format is smaller: csr takes {compact} bytes",
    }


def exported(row: Mapping[str, Any]) -> dict[str, Any]:
    dense, compact = 4 * row["size"], 12 * row["nnz"]
    return {
        **row,
        "op": "Gemm" if len(row["shape"]) == 2 else "Conv",
        "dense_bytes": dense,
        "bytes": min(dense, compact),
        "sparse": compact < dense,
        "reason": "12 bytes for each nonzero is less than dense"
        if compact < dense
        else "above the break-even of 66.7%",
    }


def timing(file: str, target: str, threads: int, batch: int, median: float, speedup: float | None) -> dict[str, Any]:
    def around(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value * (1 - width), "high": value * (1 + width)}

    noisy = threads == 2 and batch == 1
    return {
        "file": file,
        "target": target,
        "threads": threads,
        "batch": batch,
        "samples": 1840 if batch == 1 else 96,
        "latency_ms": {
            "p50": around(median, 0.012),
            "p90": around(1.11 * median, 0.02),
            "p99": around(1.34 * median, 0.06) if batch == 1 else None,
        },
        "speedup": None if speedup is None else around(speedup, 0.02),
        "cpu_ms": 0.98 * median * threads,
        "load_ms": 12.4,
        "first_call_ms": 3.3 * median,
        "rss_bytes": 61_200_000,
        "peak_rss_bytes": 74_900_000,
        "file_bytes": 1_093_422 if target == "dense" else 352_018,
        "self_difference": 0.047 if noisy else 0.004,
        "noisy": noisy,
        "note": HOSTILE_NOTE if noisy else None,
    }


def bench_metrics() -> dict[str, Any]:
    results = []
    for threads in (1, 2):
        for batch in (1, 16):
            median = 1.42 * batch**0.9 / threads**0.8
            results.append(timing("model.dense.onnx", "dense", threads, batch, median, None))
            results.append(timing("model.portable.onnx", "portable", threads, batch, 0.996 * median, 1.004))
    return {
        "baseline": "model.dense.onnx",
        "results": results,
        "verdicts": [
            {
                "threads": threads,
                "batch": batch,
                "difference": 0.012,
                "limit": 0.03,
                "noisy": False,
                "blocks": 40,
                "blocks_disturbed": 3,
                "conditions": {"note": HOSTILE},
            }
            for threads in (1, 2)
            for batch in (1, 16)
        ],
        "environment": {**MACHINE, "runtimes": [{"runtime": HOSTILE}]},
    }


def validation_metrics() -> dict[str, Any]:
    accuracy = {"value": 0.976, "low": 0.9646, "high": 0.9838, "correct": 976, "samples": 1000}
    good = {
        "file": "model.dense.onnx",
        "reference": "freeze (PyTorch)",
        "samples": 1000,
        "max_abs": 3.1e-6,
        "max_relative": 2.2e-7,
        "agreement": 1.0,
        "passed": True,
        "accuracy": accuracy,
        "reference_accuracy": accuracy,
        "first_divergence": None,
    }
    bad = {
        **good,
        "file": "model.portable.onnx",
        "max_abs": 0.21,
        "max_relative": 0.013,
        "agreement": 0.991,
        "passed": False,
        "accuracy": {**accuracy, "value": 0.969, "correct": 969, "low": 0.9564, "high": 0.978},
        "first_divergence": {"layer": HOSTILE, "max_abs": 0.04, "max_relative": 0.006},
    }
    return {"passed": False, "candidates": [good, bad], "data": "mnist5k", "note": None}


def export_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "files": {
            "dense": {"name": "model.dense.onnx", "bytes": 1_093_422},
            "portable": {"name": "model.portable.onnx", "bytes": 352_018},
        },
        "sparsity": 0.9,
        "opset": 18,
        "layers": [exported(row) for row in rows],
    }


def make_run(folder: Path, blocks: int = 9, epochs: int = 24) -> dict[str, Artefact]:
    """One artefact of every stage, chained by digests."""
    masks = make_masks(layer_shapes(blocks))
    rows = layer_rows(masks)
    table = TRAIN_CONFIG.model_dump(mode="json", by_alias=True)
    training = {
        key: table[key] for key in ("seed", "model", "data", "method", "augment", "optimizer", "schedule", "train")
    }
    found: dict[str, Artefact] = {}

    def stage(
        name: str,
        made_by: str,
        config: Mapping[str, Any],
        needs: tuple[str, ...],
        metrics: Mapping[str, Any],
        files: Callable[[Path], None] | None = None,
    ) -> None:
        inputs = {need: found[need].digest for need in needs}
        if made_by == "train":
            inputs["data"] = "sha256:" + "d" * 64
        with draft(folder / name, made_by, Config(**config), inputs) as building:
            write_json(building.folder / "result.json", dict(metrics))
            if files is not None:
                files(building.folder)
            building.metrics.update(metrics)
        found[name] = Artefact.read(folder / name)

    def save_masks(path: Path) -> None:
        bits = {name: np.packbits(mask.ravel(), bitorder="little") for name, mask in masks.items()}
        shapes = json.dumps({name: masks[name].shape for name in sorted(masks)})
        save_file(bits, path / "masks.safetensors", metadata={"shapes": shapes})

    def sparse_files(path: Path) -> None:
        save_masks(path)
        write_epochs(
            path / "metrics.jsonl", epochs, {name: float(mask.mean()) for name, mask in masks.items()}, sparse=True
        )

        frames = film_frames(masks[FILMED])
        bits = [np.packbits(frame.ravel(), bitorder="little") for frame in frames]
        save_film(path / "mask_film.safetensors", FILMED, frames[0].shape, (0, 8, 16), (0, 256, 512), bits)

    def dense_files(path: Path) -> None:
        write_epochs(path / "metrics.jsonl", epochs, dict.fromkeys(masks, 1.0), sparse=False)

    total = sum(row["size"] for row in rows)
    nnz = sum(row["nnz"] for row in rows)
    compact = [converted(row) for row in rows]
    frozen = {"sparsity": 1 - nnz / total, "nnz": nnz, "weights": total, "digest": "sha256:" + "f" * 64, "layers": rows}
    sizes = {
        "bytes_before": 4 * total,
        "bytes_after": sum(row["bytes"] for row in compact),
        "layers": compact,
    }
    tolerance = {**table["validate"], "data": table["data"]}
    training["train"]["dense_twin"] = False  # as the stage stores it
    twin = {**training, "method": {"name": "dense"}}
    stage("train", "train", training, (), training_metrics(masks, sparse=True), sparse_files)
    stage("train-dense", "train", twin, (), training_metrics(masks, sparse=False), dense_files)
    stage("freeze", "freeze", {}, ("train",), frozen, save_masks)
    stage("convert", "convert", table["convert"], ("freeze",), sizes)
    stage("export", "export", table["export"], ("convert",), export_metrics(rows))
    stage("validate", "validate", tolerance, ("freeze", "export"), validation_metrics())
    stage("bench", "bench", table["bench"], ("export",), bench_metrics())
    return found


class Page(HTMLParser):
    """What a browser would build: elements with their attributes, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._stack: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._stack.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._stack:
            return
        self.text += data
        if self._stack and self._stack[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(run: Mapping[str, Artefact], out: Path, title: str = "quickstart") -> str:
    return report.run(report.ReportConfig(title=title), run, out).file("report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def html(run: dict[str, Artefact], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(run, tmp_path_factory.mktemp("full") / "report")


SECTIONS = [
    "Result",
    "How it was made",
    "Training",
    "Masks over training",
    "Layers",
    "Masks",
    "Sizes",
    "Validation",
    "Speed",
]


def test_a_whole_run_fills_every_section(html: str) -> None:
    page = Page(html)
    assert [heading for heading in page.headings if heading in SECTIONS] == SECTIONS
    assert page.headings[0] == "quickstart"
    assert "left out" not in page.text.lower()
    for expected in (
        "98.10\u202f%",  # the dense twin's test accuracy
        "97.60\u202f%",  # the sparse run's
        "96.90\u202f%",  # of the exported sparse file
        "−0.50\u202fpoints",
        "1.09\u202fMB",
        "352\u202fkB",
        "1.90\u202fms",  # p99
        "3.1\u202f×\u202f10⁻⁶",
        "no format is smaller",
        "above the break-even",
        "▲ noisy",
        "2 threads, batch 1: noisy machine: two runs of the same file differed by 1.2%",
        "does not support the percentile",
        "Example CPU 9000",
        "sparsepipe run recipe.toml",
    ):
        assert expected in page.text, expected
    figures = [heading for heading in page.headings if heading not in SECTIONS]
    assert {
        "Loss",
        "Accuracy",
        "Exploration rate",
        "Churn",
        "Drop fraction",
        "Survival age",
        "Latency at batch 1",
    } <= set(figures)


def test_hostile_names_stay_text(html: str) -> None:
    page = Page(html)
    assert not page.of("script")
    assert HOSTILE in page.text
    assert "onerror=alert(2)>" in page.text
    assert "\u202e" not in html
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "head $\\frac{1}{0}$ & co" in page.text


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "audio", "video"), tag
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    assert not re.search(r"@import|@font-face", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    # The one address in the page is that of the hostile note, as text.
    assert set(re.findall(r"\w+://[\w./]+", html)) == {"https://evil.example/x.png"}
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_can_be_read_without_eyes_or_colours_or_width(html: str) -> None:
    page = Page(html)
    assert page.of("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.of("meta"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {link["href"] for link in page.of("a")}
    assert anchors <= {f"#{name}" for name in ids}
    assert len(anchors) == len(SECTIONS)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))
    assert all(image["alt"] for image in page.of("img"))
    assert len(re.findall(r'<div class="scroll"[^>]*>\s*<table', html)) == len(page.of("table"))
    assert "✓ passed" in page.text
    assert "✗ failed" in page.text
    assert "kept dense" in page.text


@pytest.mark.parametrize("stage", report.STAGES)
def test_one_stage_alone_gives_a_page_that_says_what_is_left_out(
    run: dict[str, Artefact], tmp_path: Path, stage: str
) -> None:
    page = Page(write({stage: run[stage]}, tmp_path / "report"))
    assert [heading for heading in page.headings if heading in SECTIONS] == SECTIONS
    filled = {
        "train": {"Training", "Masks over training", "Layers", "Masks"},
        "train-dense": {"Training"},
        "freeze": {"Layers", "Masks"},
        "convert": {"Layers", "Sizes"},
        "export": {"Layers", "Sizes"},
        "validate": {"Validation"},
        "bench": {"Speed"},
    }[stage]
    absent = set(re.findall(r"(\w[\w ]*) \(left out\)", page.text))
    assert absent - {"Result"} == set(SECTIONS) - filled - {"Result", "How it was made"}
    assert page.text.count("Left out: ") == len(absent)


def test_equal_artefacts_give_equal_bytes(run: dict[str, Artefact], html: str, tmp_path: Path) -> None:
    assert write(run, tmp_path / "again") == html
    assert write(dict(reversed(run.items())), tmp_path / "reversed") == html


def test_the_film_shows_what_came_and_went(html: str) -> None:
    frames = film_frames(make_masks(layer_shapes(9))[FILMED])
    strips = re.findall(r'<svg class="frame".*?</svg>', html)
    assert len(strips) == len(frames)
    for at, strip in enumerate(strips):
        before, now = frames[max(at - 1, 0)], frames[at]
        expected = {"kept": before & now, "grown": now & ~before, "dropped": before & ~now}
        for role, mask in expected.items():
            (path,) = re.findall(f'<path class="{role}" d="([^"]*)"', strip)
            inset, squares = film.GLYPHS[role][0], re.findall(r"M(\d+) (\d+)h", path)
            found = sorted(((int(y) - inset) // film.CELL, (int(x) - inset) // film.CELL) for x, y in squares)
            window = mask.reshape(mask.shape[0], -1)[: film.ROWS, : film.COLUMNS // 9 * 9]
            assert found == [tuple(place) for place in np.argwhere(window).tolist()]
    text = Page(html).text
    assert "step 256, update 8: 20 grown, 20 dropped" in text
    assert "step 512, update 16: 0 grown, 0 dropped" in text


def test_each_sparse_layer_has_a_row_of_how_its_mask_moved(html: str) -> None:
    (table,) = re.findall(r'<table class="motion">.*?</table>', html, re.DOTALL)
    density = {name: float(mask.mean()) for name, mask in make_masks(layer_shapes(9)).items()}
    sparse = [name for name, value in density.items() if value < 1]
    rows = re.findall(r"<tr>(<th scope=.row.*?)</tr>", table, re.DOTALL)
    assert len(rows) == len(sparse)
    last = motion(24, density)
    means = {0.1: "0.1", 0.01: "0.01", 0.001: "0.001", 0.0001: "1.0\u202f×\u202f10⁻⁴"}
    settled = motion(18, density)["inactive_gradient_mean"]  # that of the last update
    for row, name in zip(rows, sparse, strict=True):
        text = Page(row).text
        assert name in text
        assert f"{100 * last['exploration'][name]:.1f}\u202f%" in text
        assert ">12<" in row  # median age
        assert "p90 24" in text
        assert text.endswith(f"mean {means[settled[name]]}")
    assert "grown by an update" not in Page(table).text  # as many as were dropped
    # The density never changed, the last layer dropped nothing, and gradients stayed as they are.
    assert table.count('class="spark"') == 3 * len(sparse) - 1


def test_flops_are_shown_with_the_formula_and_its_source(html: str) -> None:
    text = Page(html).text
    for expected in (
        "17.3\u202fMFLOP",
        "81.1\u202fMFLOP",
        "5.07\u202fTFLOP",
        "21.0\u202fTFLOP",
        "arXiv 1911.11134",
        "ΔT = 100",
    ):
        assert expected in text, expected


def test_the_picture_of_a_mask_shows_its_bits(html: str) -> None:
    from PIL import Image

    masks = make_masks(layer_shapes(9))
    largest = [image for image in Page(html).of("img") if "layers.8.conv2.weight" in str(image["alt"])]
    data = str(largest[0]["src"]).removeprefix("data:image/png;base64,")
    opacity = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("LA"))[..., 1]
    np.testing.assert_array_equal(opacity == 255, masks["layers.8.conv2.weight"].reshape(64, -1))
    assert set(np.unique(opacity)) == {0, 255}


def test_layers_stand_in_the_order_of_the_network(run: dict[str, Artefact], tmp_path: Path) -> None:
    text = Page(write({"train": run["train"]}, tmp_path / "report")).text
    text = text[text.index("nonzeros") :]  # the table of densities and what follows
    # In the file of masks they are sorted by name, which would put the head before the layers.
    assert text.index("layers.8.conv2.weight64") < text.index("head $") < text.index("Masks", text.index("head $"))


def test_the_recipe_in_the_page_is_the_recipe(run: dict[str, Artefact], html: str) -> None:
    text = report.recipe_text(run)
    assert recipe.parse(tomllib.loads(text)) == TRAIN_CONFIG
    assert text in Page(html).text


def test_inputs_are_traced_to_the_artefacts_shown(run: dict[str, Artefact], tmp_path: Path) -> None:
    complete = Page(write(run, tmp_path / "complete")).text
    assert "freeze ✓, export ✓" in complete
    other = Page(write({name: run[name] for name in ("freeze", "validate")}, tmp_path / "part")).text
    assert "freeze ✓, export ✓" not in other
    assert run["export"].digest[7:19] in other


def test_the_headline_is_stored_with_the_report(run: dict[str, Artefact], tmp_path: Path) -> None:
    from sparsepipe.reporting.summary import summarise

    artefact = report.run(report.ReportConfig(), run, tmp_path / "report")
    assert artefact.metrics == json.loads(json.dumps(summarise(run))) | {"seconds": artefact.metrics["seconds"]}
    assert artefact.manifest.inputs == {name: made.digest for name, made in run.items()}


def foreign_export(folder: Path, layers: int) -> Artefact:
    """The export of an ONNX file from elsewhere, with many layers."""
    row = {"shape": [256, 256, 3, 3], "nnz": 58_983, "size": 589_824, "sparsity": 0.9}
    rows = [{"name": f"/backbone/stage/block.{index}/conv/weight_quantized", **row} for index in range(layers)]
    with draft(folder / "export", "export", Config(), {"onnx": "sha256:" + "0" * 64}) as building:
        building.metrics.update(export_metrics(rows))
    return Artefact.read(folder / "export")


def test_a_very_large_model_still_gives_a_small_page(tmp_path: Path) -> None:
    html = write({"export": foreign_export(tmp_path, 3000)}, tmp_path / "report")
    page = Page(html)
    assert len(html.encode()) < 3_000_000
    assert "3000 layers, one by one" in page.text
    assert "2500 more layers are not shown" in page.text
    assert all("open" not in details for details in page.of("details"))


def test_a_title_is_made_where_none_is_given(tmp_path: Path) -> None:
    assert (
        Page(write({"export": foreign_export(tmp_path, 2)}, tmp_path / "report", "")).headings[0] == "sparsepipe report"
    )


def test_no_artefact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nothing to report on.*train, train-dense"):
        report.run(report.ReportConfig(), {}, tmp_path / "report")


def test_a_missing_package_is_named_with_its_extra(
    run: dict[str, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for module in [name for name in sys.modules if name.startswith("sparsepipe.reporting.html")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("sparsepipe.reporting.html", raising=False)
    with pytest.raises(MissingExtraError, match=r"'jinja2'.*sparsepipe\[report\]"):
        report.run(report.ReportConfig(), run, tmp_path / "report")


def test_a_metric_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    with draft(tmp_path / "bench", "bench", Config(), {}) as building:
        building.metrics.update({"results": [{"file": "a.onnx", "threads": "many"}]})
    with pytest.raises(ArtefactError, match=r"bench: The metric 'results\.0\.threads' cannot be shown"):
        report.run(report.ReportConfig(), {"bench": Artefact.read(tmp_path / "bench")}, tmp_path / "report")


def test_a_broken_line_of_the_log_is_named(tmp_path: Path) -> None:
    with draft(tmp_path / "train", "train", Config(), {}) as building:
        write_text(building.folder / "metrics.jsonl", '{"epoch": 1}\n{"epoch": \n')
    with pytest.raises(ArtefactError, match=r"metrics\.jsonl, line 2: The line is not valid JSON"):
        report.run(report.ReportConfig(), {"train": Artefact.read(tmp_path / "train")}, tmp_path / "report")


def test_a_failed_measurement_is_a_row_with_its_reason(tmp_path: Path) -> None:
    failed = {**timing("model.portable.onnx", "portable", 1, 1, 1.0, None), "samples": 0, "noisy": False}
    failed |= {"latency_ms": dict.fromkeys(("p50", "p90", "p99")), "note": "the worker ended with signal 9"}
    with draft(tmp_path / "bench", "bench", Config(), {}) as building:
        building.metrics.update({"baseline": "model.dense.onnx", "results": [failed], "environment": {}})
    page = Page(write({"bench": Artefact.read(tmp_path / "bench")}, tmp_path / "report"))
    assert "the worker ended with signal 9" in page.text
    assert "Latency at batch 1" not in page.headings
    assert "✓ quiet" not in page.text


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a headless browser with a new profile and no network services."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
        *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.browser
def test_the_page_opens_in_a_browser_without_a_message_on_its_console(html: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html, encoding="utf-8")
    done = browse(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    seen = Page(done.stdout)
    assert [heading for heading in seen.headings if heading in SECTIONS] == SECTIONS
    assert not seen.of("script")
    assert len(seen.of("svg")) == len(Page(html).of("svg")) >= 7


@pytest.mark.browser
def test_the_browser_tests_would_see_a_message_on_the_console(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<!DOCTYPE html><script>console.error("seen")</script>', encoding="utf-8")
    assert "CONSOLE" in browse(page, tmp_path / "profile", "--dump-dom").stderr


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "background"), [("1", (255, 255, 255)), ("0", (20, 23, 27))])
def test_the_page_is_drawn_in_the_colours_that_the_reader_prefers(
    html: str, tmp_path: Path, scheme: str, background: tuple[int, int, int]
) -> None:
    from PIL import Image

    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(html, encoding="utf-8")
    setting = f"--blink-settings=preferredColorScheme={scheme}"
    browse(page, tmp_path / "profile", setting, "--window-size=390,2400", f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert tuple(colours[counts.argmax()]) == background
    assert 0.02 < 1 - counts.max() / len(pixels) < 0.6  # neither empty nor full
