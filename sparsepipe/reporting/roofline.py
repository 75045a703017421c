"""The roofline of a profile: each layer by its operations a byte and its speed, under what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes

from sparsepipe.reporting import layer_table
from sparsepipe.reporting.figures import Figure
from sparsepipe.reporting.svg import DENSE, INK, SPARSE, STYLE, SURFACE, new_figure, standalone, to_svg

LABELLED = 5
"""Layers that are numbered in the picture: those that take longest."""
OFFSETS = ((7, 5), (-14, 5), (7, -13), (-14, -13))
"""Of numbers from the middle of their marks, in points."""


def figure(result: Mapping[str, Any], *, name: str = "roofline") -> Figure:
    """The picture for the page; `name` is unique in it."""
    return Figure(f"Roofline of {result['file']}", Markup(_draw(result, name)), _caption(result))


def document(result: Mapping[str, Any]) -> str:
    """The picture as an SVG file of its own, on white."""
    return standalone(_draw(result, "roofline"))


def _draw(result: Mapping[str, Any], name: str) -> str:
    roof = result["roofline"]
    rows = [row for row in result["layers"] if row["gflops"] and row["intensity"]]
    with matplotlib.rc_context(STYLE):
        picture, axes = new_figure(660, 400)
        axes.set_xscale("log")
        axes.set_yscale("log")
        x = [row["intensity"] for row in rows]
        low, high = min([*x, 0.5]) / 2, max([*x, 2 * roof["ridge"]]) * 2
        _roofs(axes, roof, low, high)
        for sparse in (False, True):
            found = [row for row in rows if row["op"].startswith("Sparse") == sparse]
            _points(axes, found, sparse)
        for number, row in enumerate(_longest(result), start=1):
            offset = OFFSETS[number % len(OFFSETS)]  # layers that take as long often lie side by side
            at = (row["intensity"], row["gflops"])
            axes.annotate(str(number), at, xytext=offset, textcoords="offset points", weight="bold", zorder=4)
        axes.set_xlim(low, high)
        bottom = min([*(row["gflops"] for row in rows), roof["peak_gflops"] / 100])
        axes.set_ylim(bottom / 2, roof["peak_gflops"] * 1.9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("operations on nonzeros for each byte moved (FLOP/B)")
        axes.set_ylabel("GFLOP/s on nonzeros")
        if rows:
            picture.legend(loc="outside upper left", ncols=2)
        return to_svg(picture, name, _alt(result))


def _roofs(axes: Axes, roof: Mapping[str, Any], low: float, high: float) -> None:
    peak = roof["peak_gflops"]
    kinds: tuple[tuple[str, str, Any], ...] = (("memory", "memory_gbs", "-"), ("L2 cache", "cache_gbs", (0, (4, 3))))
    for label, key, style in kinds:
        ridge = peak / roof[key]
        axes.plot([low, ridge], [low * roof[key], peak], color=INK, linewidth=1.3, linestyle=style, zorder=1)
        axes.text(ridge * 1.04, peak * 0.86, f"{label} {roof[key]:.0f} GB/s", ha="left", va="top", fontsize=9.5)
    first = peak / max(roof["memory_gbs"], roof["cache_gbs"])
    axes.plot([min(first, high), high], [peak, peak], color=INK, linewidth=1.3, zorder=1)
    axes.text(high / 1.1, peak * 1.08, f"peak {peak:.0f} GFLOP/s", ha="right", va="bottom", fontsize=9.5)


def _points(axes: Axes, rows: list[Mapping[str, Any]], sparse: bool) -> None:
    if not rows:
        return
    longest = max(row["us"] for row in rows)
    axes.scatter(
        [row["intensity"] for row in rows],
        [row["gflops"] for row in rows],
        s=[20 + 90 * row["us"] / longest for row in rows],
        marker="o" if sparse else "s",
        facecolor=SPARSE if sparse else SURFACE,
        edgecolor=SPARSE if sparse else DENSE,
        linewidth=1.4,
        label="sparse kernel" if sparse else "dense operator",
        zorder=3,
    )


def _longest(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = [row for row in result["layers"] if row["gflops"] and row["intensity"]]
    return sorted(rows, key=lambda row: -row["us"])[:LABELLED]


def _caption(result: Mapping[str, Any]) -> str:
    numbered = "; ".join(
        f"{number}: {row['name']}, {layer_table.micro(row['us'])}"
        for number, row in enumerate(_longest(result), start=1)
    )
    return f"Larger marks take longer. {numbered}."


def _alt(result: Mapping[str, Any]) -> str:
    roof = result["roofline"]
    rows = "; ".join(
        f"{row['name']}: {row['gflops']:.1f} GFLOP/s at {row['intensity']:.2g} FLOP/B" for row in _longest(result)
    )
    return (
        f"Layers of {result['file']} under a peak of {roof['peak_gflops']:.0f} GFLOP/s and {roof['memory_gbs']:.0f} "
        f"GB/s of memory. The longest: {rows}."
    )
