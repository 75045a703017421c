"""The figures of the page: what was logged and measured -> curves, bars and dots with their words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from sparsepipe.reporting import plots, units
from sparsepipe.reporting.contents import Benchmark, Epoch, Layer, Timing

SHORT_RUN = 9
"""Epochs below which every value is shown."""
MAX_DOTS = 24
"""Rows of one latency figure."""


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    caption: str


def learning_curves(sparse: Sequence[Epoch], dense: Sequence[Epoch]) -> Iterable[Figure]:
    """Loss and accuracy of the sparse run and its dense twin; either may have no epochs."""
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
    """Lowest value after the first third of a run, rounded down to a whole per cent; of all of a short run."""
    late = [
        value
        for line in lines
        for value in line.y[len(line.y) // 3 if len(line.y) >= SHORT_RUN else 0 :]
        if value is not None
    ]
    return math.floor(100 * min(late, default=0.0)) / 100


def _curve(rows: Sequence[Epoch], key: str, label: str, role: plots.Role, *, secondary: bool) -> plots.Line | None:
    values = [getattr(row, key) for row in rows]
    if all(value is None for value in values):
        return None
    return plots.Line(label, [row.epoch for row in rows], values, role, secondary)


_PROGRESS = (
    ("exploration_rate", "Exploration rate", "share of the weights that were active at least once until then"),
    ("churn", "Churn", "share of the active weights that an update drops and does not grow again at once"),
    ("drop_fraction", "Drop fraction", "share of the active weights that the next update would drop"),
    ("sparsity", "Sparsity", "share of the maskable weights that are zero"),
)


def exploration(rows: Sequence[Epoch]) -> Iterable[Figure]:
    """How the masks moved over the steps; what was not logged, or did not change, is left out."""
    for key, title, meaning in _PROGRESS:
        values = [getattr(row, key) for row in rows]
        known = [value for value in values if value is not None]
        if not any(known) or (key == "sparsity" and len(set(known)) == 1):
            continue
        alt = f"{title}: {meaning}. From {units.percent(known[0])} to {units.percent(known[-1])}."
        yield _progress(title, [plots.Line(title, _steps(rows), values, "sparse")], alt, title.lower(), per_cent=True)
    yield from _survival(rows)


def _survival(rows: Sequence[Epoch]) -> Iterable[Figure]:
    """How long weights stay, beside how long they could have stayed."""
    if not any(row.age for row in rows):
        return
    updates = [*accumulate(row.mask_updates or 0 for row in rows)]
    lines = [
        plots.Line("never dropped", _steps(rows), updates, "ink", secondary=True),
        plots.Line("90% are not older", _steps(rows), [row.age.get("p90") for row in rows], "dense"),
        plots.Line("median", _steps(rows), [row.age.get("median") for row in rows], "sparse"),
    ]
    alt = (
        "Survival age of the active weights: mask updates since a weight was last grown. Last values: "
        f"{_last_values(lines, per_cent=False)}."
    )
    yield _progress("Survival age", lines, alt, "mask updates", per_cent=False)


def _steps(rows: Sequence[Epoch]) -> list[int]:
    return [row.epoch if row.step is None else row.step for row in rows]


def _progress(title: str, lines: Sequence[plots.Line], alt: str, y_label: str, *, per_cent: bool) -> Figure:
    svg = plots.curves(
        lines,
        name=f"curve-{title.lower().replace(' ', '-')}",
        alt=alt,
        x_label="step",
        y_label=y_label,
        per_cent=per_cent,
    )
    return Figure(title, Markup(svg), alt)


def _last_values(lines: Sequence[plots.Line], *, per_cent: bool) -> str:
    last = [(line.label, next(value for value in reversed(line.y) if value is not None)) for line in lines]
    return "; ".join(f"{label} {units.percent(value) if per_cent else f'{value:.3g}'}" for label, value in last)


def density(layers: Sequence[Layer]) -> Figure | None:
    """Density of every layer, in the given order; None where no density is known."""
    known = [(layer, layer.density) for layer in layers if layer.density is not None]
    if not known:
        return None
    bars = [plots.Bar(layer.name, value, dense=value >= 1) for layer, value in known]
    mean = sum(layer.nnz or 0 for layer, _ in known) / sum(layer.size or 0 for layer, _ in known)
    lowest, highest = min(bars, key=lambda bar: bar.value), max(bars, key=lambda bar: bar.value)
    alt = (
        f"Density of {units.plural(len(bars), 'layer')} from the input to the output: lowest "
        f"{units.percent(lowest.value, 1)} ({lowest.label}), highest {units.percent(highest.value, 1)} "
        f"({highest.label}), {units.percent(mean, 1)} of all weights together."
    )
    return Figure("Density", Markup(plots.density_bars(bars, name="density", alt=alt, mean=mean)), alt)


def latencies(bench: Benchmark) -> Iterable[Figure]:
    """One figure for each batch size, files with few threads first."""
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
    name = timing.target or timing.file
    if timing.target and timing.precision not in (None, "fp32"):
        name = f"{timing.target} {timing.precision}"
    return plots.Dot(
        label=f"{name}, {units.plural(timing.threads or 1, 'thread')}",
        role="dense" if is_dense else "sparse",
        p50=median,
        tail=timing.percentile("p99"),
        noisy=bool(timing.noisy),
    )
