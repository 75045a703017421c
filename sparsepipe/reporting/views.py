"""What the page shows of each part of a run: contents -> plain values and figures for the template.

Every function gives None where the artefact that it shows is absent; the template then says so in one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from sparsepipe.reporting import masks, plots, units
from sparsepipe.reporting.contents import Benchmark, Contents, Epoch, Layer, Timing, read_epochs

MAX_LAYERS = 500
"""Rows of a table of layers; the page says how many more there are."""
MAX_DOTS = 24
"""Rows of one latency figure."""


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Layers:
    """A table of layers, cut to a length that a browser shows well."""

    shown: Sequence[Layer]
    left_out: int

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Layers:
        return cls(layers[:MAX_LAYERS], max(len(layers) - MAX_LAYERS, 0))

    @property
    def count(self) -> int:
        return len(self.shown) + self.left_out


def chain(contents: Contents) -> list[dict[str, Any]]:
    """The stages in order: when each was made, how long it took, its digest, and which of the others it was made of."""
    known = {artefact.digest: stage for stage, artefact in contents.artefacts.items()}
    return [
        {
            "stage": stage,
            "created": artefact.manifest.created,
            "seconds": _number(artefact.metrics.get("seconds")),
            "digest": artefact.digest,
            "inputs": [
                {"name": name, "digest": digest, "stage": known.get(digest)}
                for name, digest in artefact.manifest.inputs.items()
            ],
            "files": len(artefact.manifest.outputs),
        }
        for stage, artefact in contents.artefacts.items()
    ]


def versions(contents: Contents) -> dict[str, str]:
    """Package versions of all stages; where stages differ, all versions are named."""
    found: dict[str, list[str]] = {}
    for artefact in contents.artefacts.values():
        for name, version in artefact.manifest.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(several) for name, several in found.items()}


def training(contents: Contents) -> dict[str, Any] | None:
    """Curves and key figures of the sparse run and its dense twin."""
    if contents.train is None and contents.dense is None:
        return None
    sparse, dense = (read_epochs(contents.artefacts.get(stage)) for stage in ("train", "train-dense"))
    return {
        "columns": [(label, run) for label, run in (("sparse", contents.train), ("dense twin", contents.dense)) if run],
        "epochs": {"sparse": len(sparse), "dense twin": len(dense)},
        "figures": [*_learning_curves(sparse, dense), *_exploration(sparse)],
    }


def _learning_curves(sparse: Sequence[Epoch], dense: Sequence[Epoch]) -> Iterable[Figure]:
    runs: tuple[tuple[plots.Role, Sequence[Epoch]], ...] = (("sparse", sparse), ("dense", dense))
    for quantity, per_cent in (("loss", False), ("accuracy", True)):
        lines = [
            line
            for role, rows in runs
            for split, key in (("validation", f"validation_{quantity}"), ("training", f"train_{quantity}"))
            if (line := _curve(rows, key, f"{role}, {split}", role, secondary=split == "training")) is not None
        ]
        if lines:
            values = [value for line in lines for value in line.y if value is not None]
            # A loss falls by orders of magnitude; an accuracy ends where only a zoomed axis tells two runs apart.
            log_scale = not per_cent and min(values) > 0
            bottom = _late_minimum(lines) if per_cent else None
            alt = f"{quantity.capitalize()} over the epochs. Last values: {_last_values(lines, per_cent=per_cent)}."
            if bottom is not None and min(values) < bottom:
                alt += f" The axis begins at {units.percent(bottom, 0)}: earlier values are below it."
            svg = plots.curves(
                lines,
                name=f"curve-{quantity}",
                alt=alt,
                x_label="epoch",
                y_label=quantity + (", log scale" if log_scale else ""),
                per_cent=per_cent,
                log_scale=log_scale,
                bottom=bottom,
            )
            yield Figure(quantity.capitalize(), Markup(svg), alt)


def _late_minimum(lines: Sequence[plots.Line]) -> float:
    """Lowest value after the first third of a run, rounded down to a whole per cent."""
    late = [value for line in lines for value in line.y[len(line.y) // 3 :] if value is not None]
    return math.floor(100 * min(late, default=0.0)) / 100


def _curve(rows: Sequence[Epoch], key: str, label: str, role: plots.Role, *, secondary: bool) -> plots.Line | None:
    values = [getattr(row, key) for row in rows]
    if all(value is None for value in values):
        return None
    return plots.Line(label, [row.epoch for row in rows], values, role, secondary)


_PROGRESS = (
    ("exploration_rate", "Exploration rate", "share of the weights that were active at least once until then"),
    ("drop_fraction", "Drop fraction", "share of the active weights that an update of the masks replaces"),
    ("sparsity", "Sparsity", "share of the maskable weights that are zero"),
)


def _exploration(rows: Sequence[Epoch]) -> Iterable[Figure]:
    for key, title, meaning in _PROGRESS:
        values = [getattr(row, key) for row in rows]
        known = [value for value in values if value is not None]
        if not any(known) or (key == "sparsity" and len(set(known)) == 1):
            continue
        steps = [row.epoch if row.step is None else row.step for row in rows]
        line = plots.Line(title, steps, values, "sparse")
        alt = f"{title}: {meaning}. From {units.percent(known[0])} to {units.percent(known[-1])}."
        svg = plots.curves(
            [line], name=f"curve-{key.replace('_', '-')}", alt=alt, x_label="step", y_label=title.lower(), per_cent=True
        )
        yield Figure(title, Markup(svg), alt)


def _last_values(lines: Sequence[plots.Line], *, per_cent: bool) -> str:
    last = [(line.label, next(value for value in reversed(line.y) if value is not None)) for line in lines]
    return "; ".join(f"{label} {units.percent(value) if per_cent else f'{value:.3g}'}" for label, value in last)


def layers(contents: Contents) -> dict[str, Any] | None:
    """Density of every layer, with the format and the bytes that were chosen for it."""
    rows = _layers(contents)
    if not rows:
        return None
    chosen = {layer.name: layer for layer in (contents.convert.layers if contents.convert else [])}
    joined = [_with_format(layer, chosen.get(layer.name)) for layer in rows]
    bars = [
        plots.Bar(layer.name, layer.density, dense=layer.density >= 1) for layer in joined if layer.density is not None
    ]
    figure = None
    if bars:
        size, nnz = sum(layer.size or 0 for layer in joined), sum(layer.nnz or 0 for layer in joined)
        lowest, highest = min(bars, key=lambda bar: bar.value), max(bars, key=lambda bar: bar.value)
        alt = (
            f"Density of {units.plural(len(bars), 'layer')} from the input to the output: lowest "
            f"{units.percent(lowest.value, 1)} ({lowest.label}), highest {units.percent(highest.value, 1)} "
            f"({highest.label}), {units.percent(nnz / size, 1)} of all weights together."
        )
        figure = Figure("Density", Markup(plots.density_bars(bars, name="density", alt=alt, mean=nnz / size)), alt)
    return {"figure": figure, "table": Layers.of(joined)}


def _layers(contents: Contents) -> list[Layer]:
    """The layers of the latest stage of the chain that lists them all, else as the masks of the training give them."""
    for record in (contents.freeze, contents.convert, contents.export):
        if record is not None and record.layers:
            return _from_input_to_output(record.layers, contents)
    found = [
        Layer(name=name, shape=mask.shape, nnz=int(mask.sum()), size=mask.size)
        for name, mask in masks.read(contents.artefacts.get("train")).items()
    ]
    return _from_input_to_output(found, contents)


def _from_input_to_output(rows: Iterable[Layer], contents: Contents) -> list[Layer]:
    """Each weight once, in the order of the network, which the training's log and the exported graph know."""
    epochs = read_epochs(contents.artefacts.get("train"))
    logged = list(epochs[-1].density) if epochs else []
    exported = [layer.name for layer in contents.export.layers] if contents.export else []
    rank = {name: position for position, name in reversed(list(enumerate(logged or exported)))}
    once: dict[str, Layer] = {}
    for layer in rows:
        once.setdefault(layer.name, layer)
    return sorted(once.values(), key=lambda layer: rank.get(layer.name, len(rank)))


def _with_format(layer: Layer, converted: Layer | None) -> Layer:
    return (
        layer if converted is None else layer.model_copy(update={"format": converted.format, "bytes": converted.bytes})
    )


def mask_pictures(contents: Contents) -> tuple[masks.Picture, ...] | None:
    return masks.pictures(masks.read(contents.artefacts.get("freeze") or contents.artefacts.get("train"))) or None


def sizes(contents: Contents) -> dict[str, Any] | None:
    """Sizes per file and per layer, with the reason for each layer's form."""
    if contents.export is None and contents.convert is None:
        return None
    files = contents.export.files if contents.export else {}
    dense = files["dense"].bytes if "dense" in files else None
    return {
        "files": [
            {
                "name": file.name,
                "target": target,
                "bytes": file.bytes,
                "ratio": dense / file.bytes if dense and file.bytes and target != "dense" else None,
            }
            for target, file in files.items()
        ],
        "opset": contents.export.opset if contents.export else None,
        "export": Layers.of(contents.export.layers) if contents.export else None,
        "convert": Layers.of(contents.convert.layers) if contents.convert else None,
        "before": contents.convert.bytes_before if contents.convert else None,
        "after": contents.convert.bytes_after if contents.convert else None,
    }


def validation(contents: Contents) -> dict[str, Any] | None:
    """Every candidate against its reference, and the tolerance that was asked for."""
    if contents.validate is None:
        return None
    config = contents.artefacts["validate"].manifest.config
    return {
        "passed": contents.validate.passed,
        "candidates": contents.validate.candidates,
        "data": contents.validate.data,
        "note": contents.validate.note,
        "max_relative": _number(config.get("max_relative")),
        "min_agreement": _number(config.get("min_agreement")),
    }


def speed(contents: Contents) -> dict[str, Any] | None:
    """Timings, a figure for each batch size, the notes of the runs, and the machine."""
    bench = contents.bench
    if bench is None:
        return None
    return {
        "baseline": bench.baseline,
        "results": bench.results,
        "is_baseline": bench.is_baseline,
        "figures": [*_latency_figures(bench)],
        "notes": [(timing, timing.note) for timing in bench.results if timing.note],
        "noisy": sum(bool(timing.noisy) for timing in bench.results),
        "incomplete": any(
            timing.percentile("p90") is None or timing.percentile("p99") is None for timing in bench.results
        ),
        "environment": list(flatten(bench.environment)),
    }


def _latency_figures(bench: Benchmark) -> Iterable[Figure]:
    batches = sorted({timing.batch or 1 for timing in bench.results})
    for batch in batches:
        timings = [timing for timing in bench.results if (timing.batch or 1) == batch and timing.percentile("p50")]
        timings.sort(key=lambda timing: timing.threads or 1)
        dots = [dot for timing in timings[:MAX_DOTS] if (dot := _dot(timing, bench)) is not None]
        if dots:
            rows = "; ".join(f"{dot.label}: {units.milliseconds(dot.p50.value)}" for dot in dots)
            more = f" {len(timings) - MAX_DOTS} more are in the table." if len(timings) > MAX_DOTS else ""
            alt = f"Median latency at batch {batch}. {rows}.{more}"
            svg = plots.latency_dots(dots, name=f"latency-{batch}", alt=alt)
            yield Figure(f"Latency at batch {batch}", Markup(svg), more.strip())


def _dot(timing: Timing, bench: Benchmark) -> plots.Dot | None:
    median = timing.percentile("p50")
    if median is None:
        return None
    is_dense = bench.is_baseline(timing) or timing.target == "dense"
    return plots.Dot(
        label=f"{timing.target or timing.file}, {units.plural(timing.threads or 1, 'thread')}",
        role="dense" if is_dense else "sparse",
        p50=median,
        tail=timing.percentile("p99"),
        noisy=bool(timing.noisy),
    )


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as lines of (key, value), keys joined with a space; tables in a list are numbered."""
    for key, value in table.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name} ")
        else:
            yield name, _setting(str(key), value)


def _setting(key: str, value: Any) -> str:
    if value is None or value == []:
        return units.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("_bytes"):
        return units.size(value)
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def subject(contents: Contents) -> dict[str, str | None]:
    """What was trained, on what and how, as the configuration of the training names it."""
    artefact = contents.artefacts.get("train")
    config = artefact.manifest.config if artefact else {}
    named = {key: config.get(key) for key in ("model", "data", "method")}
    return {
        key: str(choice["name"]) if isinstance(choice, Mapping) and "name" in choice else None
        for key, choice in named.items()
    }
