"""Figures: plain data -> SVG text for the body of an HTML page, in the manner that `svg` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sparsepipe.reporting.contents import Estimate
from sparsepipe.reporting.svg import DENSE, GRID, INK, SPARSE, STYLE, SURFACE, new_figure, to_svg
from sparsepipe.reporting.units import clip, milliseconds

Role = Literal["sparse", "dense", "ink"]

_COLOURS: dict[Role, str] = {"sparse": SPARSE, "dense": DENSE, "ink": INK}

MAX_SEPARATE_BARS = 80


@dataclass(frozen=True)
class Line:
    """One curve. `role` gives colour and marker; a secondary curve is thin and without markers."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    role: Role
    secondary: bool = False


@dataclass(frozen=True)
class Bar:
    """Density of one layer in [0, 1]; a layer kept dense is hatched."""

    label: str
    value: float
    dense: bool


@dataclass(frozen=True)
class Dot:
    """Latencies of one file at one setting, in milliseconds."""

    label: str
    role: Role
    p50: Estimate
    tail: Estimate | None
    """p99 where it is known."""
    noisy: bool = False


def curves(
    lines: Sequence[Line],
    *,
    name: str,
    alt: str,
    x_label: str,
    y_label: str,
    per_cent: bool = False,
    log_scale: bool = False,
    bottom: float | None = None,
) -> str:
    """Curves over a common axis, with a legend above them.

    Args:
        lines: at least one; `x` counts something, None in `y` leaves a gap.
        name: unique in the page; prefix of the ids inside the SVG.
        alt: what the figure shows, in words.
        x_label: label of the x axis.
        y_label: label of the y axis, with its unit.
        per_cent: show the y values, which are fractions, as percentages.
        log_scale: logarithmic y axis, for values above zero.
        bottom: where the y axis begins; values below it are not drawn.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(440, 270)
        for line in lines:
            _draw_line(axes, line)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if per_cent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}\u202f%")
        if log_scale:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.02)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        if per_cent:
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
        if len(lines) > 1:
            figure.legend(loc="outside upper left", ncols=2, handlelength=2.6, columnspacing=1.6)
        return to_svg(figure, name, alt)


def density_bars(bars: Sequence[Bar], *, name: str, alt: str, mean: float | None = None) -> str:
    """Density of every layer in the order of the network; with hundreds of layers the bars touch.

    Args:
        bars: at least one.
        name: unique in the page; prefix of the ids inside the SVG.
        alt: what the figure shows, in words.
        mean: density of all weights together, drawn as a line.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(860, 230)
        draw = _separate_bars if len(bars) <= MAX_SEPARATE_BARS else _joined_bars
        for dense in (False, True):
            # Zero where the bar is of the other kind, so that both are drawn over the same positions.
            values = [bar.value if bar.dense == dense else 0.0 for bar in bars]
            if any(values):
                draw(axes, values, dense)
        if mean is not None:
            label = f"all weights together: {100 * mean:.1f}\u202f%"
            axes.axhline(mean, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
        axes.set_ylim(0, 1.02 * max(*(bar.value for bar in bars), 1e-3))
        axes.set_xlim(0.3, len(bars) + 0.7)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}\u202f%")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer, counted from the input")
        axes.set_ylabel("density")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1.8)
        return to_svg(figure, name, alt)


def _separate_bars(axes: Axes, values: Sequence[float], dense: bool) -> None:
    axes.bar(range(1, len(values) + 1), values, width=0.72, linewidth=0.8, **_bar_style(dense))


def _joined_bars(axes: Axes, values: Sequence[float], dense: bool) -> None:
    """One outline around all bars: quick to draw, and small."""
    edges = [at + 0.5 for at in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, linewidth=0.0, **_bar_style(dense))


def _bar_style(dense: bool) -> dict[str, Any]:
    if dense:
        return {"facecolor": SURFACE, "edgecolor": INK, "hatch": "////", "label": "kept dense"}
    return {"facecolor": SPARSE, "edgecolor": SPARSE, "label": "sparse"}


def latency_dots(dots: Sequence[Dot], *, name: str, alt: str) -> str:
    """Median latency with its interval, and p99 where known, one line for each file and setting.

    Args:
        dots: at least one, top to bottom.
        name: unique in the page; prefix of the ids inside the SVG.
        alt: what the figure shows, in words.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(440, 56 + 40 * len(dots))
        for row, dot in enumerate(dots):
            _draw_dot(axes, row, dot)
        axes.set_yticks([])
        axes.set_ylim(len(dots) - 0.55, -0.85)
        _latency_scale(axes, dots)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("latency of one call, ms")
        return to_svg(figure, name, alt)


def _draw_line(axes: Axes, line: Line) -> None:
    marker = {"sparse": "o", "dense": "s", "ink": None}[line.role]
    axes.plot(
        line.x,
        [float("nan") if value is None else value for value in line.y],
        color=_COLOURS[line.role],
        linestyle="--" if line.role == "dense" else "-",
        linewidth=1.0 if line.secondary else 1.9,
        marker=None if line.secondary else marker,
        markersize=4.5,
        # About a dozen markers tell the curves apart; one for each epoch would hide them.
        markevery=max(1, len(line.x) // 12),
        label=line.label,
    )


def _draw_dot(axes: Axes, row: int, dot: Dot) -> None:
    colour = _COLOURS[dot.role]
    if dot.tail is not None:
        axes.plot([dot.p50.value, dot.tail.value], [row, row], color=GRID, linewidth=1.6, zorder=2)
        _interval(axes, row, dot.tail, colour, marker="D", size=5.5, filled=False)
    _interval(axes, row, dot.p50, colour, marker="s" if dot.role == "dense" else "o", size=8, filled=True)
    tail = f" · p99 {milliseconds(dot.tail.value)}" if dot.tail else ""
    text = f"{clip(dot.label, 32)}: {milliseconds(dot.p50.value)}{tail}{' · noisy' if dot.noisy else ''}"
    axes.text(0.0, row - 0.3, text, transform=axes.get_yaxis_transform(), va="bottom")


def _interval(axes: Axes, row: int, estimate: Estimate, colour: str, *, marker: str, size: float, filled: bool) -> None:
    low = estimate.value if estimate.low is None else min(estimate.low, estimate.value)
    high = estimate.value if estimate.high is None else max(estimate.high, estimate.value)
    axes.errorbar(
        [estimate.value],
        [row],
        xerr=[[estimate.value - low], [high - estimate.value]],
        color=colour,
        marker=marker,
        markersize=size,
        markerfacecolor=colour if filled else SURFACE,
        markeredgewidth=1.4,
        elinewidth=1.6,
        capsize=5,
        zorder=3,
    )


def _latency_scale(axes: Axes, dots: Sequence[Dot]) -> None:
    """From zero, so that lengths compare; logarithmic only where the rows differ by more than an order of magnitude."""
    values = [estimate.value for dot in dots for estimate in (dot.p50, dot.tail) if estimate is not None]
    if min(values) > 0 and max(values) > 12 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(min(values) / 1.6, max(values) * 1.8)
    else:
        axes.set_xlim(0, 1.15 * max(values) or 1.0)
