"""Figures of benchmarks: bars with intervals, curves over sparsity, accuracy against latency. Data -> SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

from sparsepipe.reporting.svg import DENSE, INK, SPARSE, STYLE, SURFACE, new_figure, to_svg
from sparsepipe.reporting.units import clip

Interval = Mapping[str, Any]
KINDS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"facecolor": SURFACE, "edgecolor": DENSE, "hatch": "////", "label": "dense fp32"},
    "int8": {"facecolor": SURFACE, "edgecolor": INK, "hatch": "xxxx", "label": "dense int8"},
    "sparse": {"facecolor": SPARSE, "edgecolor": SPARSE, "hatch": "", "label": "sparse"},
}
"""Kind of file -> how its bar looks: by colour, and without colour by its hatch."""
MARKERS = ("o", "^", "D", "v", "P", "X", "*", "<")
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Bar:
    """`text` is written behind the bar; `estimate` has `value`, and perhaps `low` and `high`."""

    label: str
    kind: str
    estimate: Interval
    text: str


@dataclass(frozen=True)
class Series:
    """Speed-ups by sparsity, of one pattern."""

    label: str
    sparsity: Sequence[float]
    speedup: Sequence[Interval]


@dataclass(frozen=True)
class Point:
    """A file by its latency and its accuracy, a fraction."""

    label: str
    kind: str
    latency: Interval
    accuracy: Interval
    best: bool
    """No other file is both faster and at least as accurate."""


def bars(rows: Sequence[Bar], *, name: str, alt: str, x_label: str) -> str:
    """Horizontal bars from zero, top to bottom, each under its label, with its interval."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(440, 60 + 38 * len(rows))
        shown = set()
        for position, row in enumerate(rows):
            look = dict(KINDS[row.kind])
            label = look.pop("label")
            value, low, high = _bounds(row.estimate)
            axes.barh(
                position,
                value,
                height=0.42,
                linewidth=1.2,
                label=None if row.kind in shown else label,
                zorder=2,
                **look,
            )
            shown.add(row.kind)
            if high > low:
                axes.errorbar(
                    value,
                    position,
                    xerr=[[value - low], [high - value]],
                    color=INK,
                    elinewidth=1.4,
                    capsize=4,
                    zorder=3,
                )
            text = f"{clip(row.label, 38)}: {row.text}"
            axes.text(0.0, position - 0.27, text, transform=axes.get_yaxis_transform(), va="bottom", fontsize=10)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.6, -0.85)
        axes.set_xlim(0, 1.08 * max(_bounds(row.estimate)[2] for row in rows) or 1.0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.4)
        return to_svg(figure, name, alt)


def speedups(lines: Sequence[Series], int8: float | None, *, name: str, alt: str) -> str:
    """Speed-up over dense by sparsity, a line with its own marker and dashes for each pattern; 1 is dense."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(440, 240 + 17 * (len(lines) + 3) // 2)
        for number, line in enumerate(lines):
            values = [_bounds(estimate) for estimate in line.speedup]
            axes.errorbar(
                [100 * share for share in line.sparsity],
                [value for value, _, _ in values],
                yerr=[[value - low for value, low, _ in values], [high - value for value, _, high in values]],
                color=SPARSE if number % 2 == 0 else INK,
                marker=MARKERS[number % len(MARKERS)],
                linestyle=STYLES[number % len(STYLES)],
                markersize=6,
                linewidth=1.7,
                capsize=3,
                label=line.label,
            )
        axes.axhline(1.0, color=DENSE, linewidth=1.4, linestyle=(0, (4, 3)), label="dense fp32")
        if int8 is not None:
            axes.axhline(int8, color=INK, linewidth=1.4, linestyle=(0, (1, 2)), label=f"dense int8: {int8:.2f}×")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("zeros in the pruned layers, %")
        axes.set_ylabel("times faster than dense")
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.6)
        return to_svg(figure, name, alt)


def pareto(points: Sequence[Point], *, name: str, alt: str) -> str:
    """Accuracy against latency; what no other file beats in both is joined by a line."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(440, 310)
        markers = {"dense": "s", "int8": "^", "sparse": "o"}
        places = [(_bounds(point.latency)[0], 100 * point.accuracy["value"]) for point in points]
        width = max(x for x, _ in places) or 1.0
        height = max(100 * _bounds(point.accuracy)[2] for point in points) - min(y for _, y in places) or 1.0
        for number, point in enumerate(points):
            x, y = _bounds(point.latency), tuple(100 * value for value in _bounds(point.accuracy))
            near = [abs(x[0] - left) < 0.3 * width and abs(y[0] - up) < 0.1 * height for left, up in places[:number]]
            colour = {"dense": DENSE, "int8": INK, "sparse": SPARSE}[point.kind]
            axes.errorbar(
                x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]],
                color=colour, marker=markers[point.kind], markersize=8, elinewidth=1.2, capsize=3, zorder=3,
                markerfacecolor=colour if point.best else SURFACE,
            )  # fmt: skip
            above = 7 - 14 * sum(near)  # below the labels of earlier points
            axes.annotate(
                clip(point.label, 24), (x[0], y[0]), xytext=(8, above), textcoords="offset points", fontsize=10
            )
        front = sorted((_bounds(point.latency)[0], 100 * point.accuracy["value"]) for point in points if point.best)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.margins(0.25)
        axes.set_xlim(left=0)
        axes.set_xlabel("latency of one call, ms (median)")
        axes.set_ylabel("test accuracy, %")
        return to_svg(figure, name, alt)


def _bounds(estimate: Interval) -> tuple[float, float, float]:
    value = float(estimate["value"])
    low, high = (estimate.get(key) for key in ("low", "high"))
    return value, min(value if low is None else low, value), max(value if high is None else high, value)
