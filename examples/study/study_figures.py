"""The figures of examples/RESULTS.md about the study: standalone SVG, dark on white, told apart by shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullLocator
from study_choice import FILES, file_label, files
from study_report import EXPLORING, METHODS
from study_rows import (
    REFERENCE,
    SWEEP_SPARSITY,
    VALIDATION,
    Estimate,
    Results,
    Run,
    bonus,
    layer_gradients,
    mean,
    minus,
    sweep,
)
from study_words import PRIMARY, PRIMARY_SPARSITY, SPARSITIES

from sparsepipe.reporting.comparison import MARKERS, NARROW, STYLES
from sparsepipe.reporting.svg import DENSE, INK, SPARSE, STYLE, new_figure, standalone, to_svg


def accuracy(results: Results) -> str | None:
    """Test accuracy against sparsity."""
    found = {method: {s: runs for s in SPARSITIES if (runs := results.by_seed(method, s))} for method in METHODS}
    if not any(found.values()):
        return None

    def draw(axes: Axes) -> None:
        for number, (method, by_sparsity) in enumerate(found.items()):
            if not by_sparsity:
                continue
            estimates = [mean(runs, "test_accuracy") for runs in by_sparsity.values()]
            # Side by side, so that intervals can be told apart.
            shift = 0.0012 * (number - (len(found) - 1) / 2)
            _points(axes, [s + shift for s in by_sparsity], [e for e in estimates if e], method, number, STYLES)
        if dense := mean(results.by_seed("dense"), "test_accuracy"):
            axes.axhline(dense["value"], color=DENSE, linewidth=1.6, linestyle=(0, (1, 1)), label="dense")
        axes.xaxis.set_major_formatter(_per_cent(0))
        axes.set_xticks(SPARSITIES)
        axes.set_xlabel("sparsity")
        axes.set_ylabel("test accuracy")

    return _drawn(draw, "accuracy")


def exploration(results: Results) -> str | None:
    """Validation accuracy of each run against the exploration rate that it reached, at each sparsity."""
    panels = {sparsity: found for sparsity in SPARSITIES if (found := _explorers(results, sparsity))}
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure, whole = new_figure(720, 300)
        figure.delaxes(whole)
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (sparsity, found) in zip(places, panels.items(), strict=True):
            for number, (label, runs) in enumerate(found.items()):
                axes.plot(
                    [run.metrics["exploration_rate"] for run in runs],
                    [run.metrics["validation_accuracy"] for run in runs],
                    linestyle="none",
                    marker=MARKERS[number],
                    markersize=6,
                    markerfacecolor="none",
                    markeredgewidth=1.3,
                    color=SPARSE if label.startswith(REFERENCE) else INK,
                    label=label,
                )
            axes.set_title(f"{100 * sparsity:g}{NARROW}%", fontsize="medium")
            axes.set_xlim(0, 1)
            axes.yaxis.set_major_formatter(_per_cent(1))
            axes.yaxis.set_major_locator(MaxNLocator(6, min_n_ticks=3))
        figure.supxlabel("exploration rate: share of the weights that were active at any time", fontsize="medium")
        figure.supylabel("validation accuracy", fontsize="medium")
        shown = {str(line.get_label()): line for axes in places for line in axes.lines if len(line.get_xdata())}
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=5)
        return _svg(figure, "exploration")


def _explorers(results: Results, sparsity: float) -> dict[str, list[Run]]:
    """The runs of drop-and-grow methods and static masks at a sparsity, those of DST-EE with any c, by method."""
    found = {method: [*results.by_seed(method, sparsity).values()] for method in METHODS if method != "gmp"}
    other = [*(sweep(results) if sparsity == SWEEP_SPARSITY else [])]
    if sparsity == PRIMARY_SPARSITY:
        other += [run for options in EXPLORING for run in results.by_seed(REFERENCE, sparsity, **options).values()]
    chosen = {run.name for run in found[REFERENCE]}
    found[f"{REFERENCE}, other c or schedule"] = [run for run in other if run.name not in chosen]
    return found if any(found.values()) else {}


def paired(results: Results) -> str | None:
    """Differences of DST-EE and the methods that a verdict is about, seed by seed."""
    own = results.by_seed(REFERENCE, PRIMARY_SPARSITY)
    others = {
        method: runs for method in PRIMARY if (runs := results.by_seed(method, PRIMARY_SPARSITY)) and own.keys() & runs
    }
    if not others:
        return None

    def draw(axes: Axes) -> None:
        for place, runs in enumerate(others.values()):
            seeds = sorted(own.keys() & runs)
            values = [own[s].metrics["test_accuracy"] - runs[s].metrics["test_accuracy"] for s in seeds]
            spread = [place + 0.05 * (index - (len(seeds) - 1) / 2) for index in range(len(seeds))]
            axes.plot(values, spread, linestyle="none", marker="o", markerfacecolor="none", color=INK, markersize=6)
            if gain := minus(own, runs):
                axes.errorbar(
                    gain["value"], place + 0.33, xerr=_half(gain), marker="D", color=SPARSE, capsize=4, markersize=7
                )
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(others)), [f"minus {method}" for method in others])
        axes.set_ylim(-0.5, len(others) - 0.3)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.1f}"))
        axes.set_xlabel(f"test accuracy of {REFERENCE} minus the other's, points; circles: seeds, diamond: mean, 95%")

    return _drawn(draw, "paired")


def by_c(results: Results) -> str | None:
    """Validation accuracy and exploration rate against c, and where the bonus meets the gradients."""
    found = sweep(results)
    if len(found) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, top = new_figure(720, 460)
        figure.delaxes(top)
        above, below = figure.subplots(2, 1, sharex=True)
        x = [float(run.c or 0) for run in found]
        for axes, key, label, number in (
            (above, "validation_accuracy", "validation accuracy", 0),
            (below, "exploration_rate", "exploration rate", 1),
        ):
            axes.plot(x, [run.metrics[key] for run in found], color=SPARSE, marker=MARKERS[number], linewidth=1.4)
            axes.set_ylabel(label)
            low, high = _meeting(found)
            axes.axvspan(low, high, facecolor="none", edgecolor=INK, hatch="//", alpha=0.35, linewidth=0)
            axes.set_xscale("log")
            axes.set_xticks(x, [run.c or "" for run in found])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(length=3)
        # With the standard error of each, so that noise does not look like a trend.
        accuracies = [run.metrics["validation_accuracy"] for run in found]
        errors = [(each * (1 - each) / VALIDATION) ** 0.5 for each in accuracies]
        above.errorbar(x, accuracies, yerr=errors, linestyle="none", color=SPARSE, capsize=3)
        above.yaxis.set_major_formatter(_per_cent(1))
        above.yaxis.set_major_locator(MultipleLocator(0.005))
        below.set_xlabel(
            "c; hatched: bonus of a never-active weight = mean abs gradient, from the least layer to the largest"
        )
        return _svg(figure, "c")


def latency(results: Results) -> str | None:
    """Accuracy in onnxruntime against latency, file by file."""
    found = [each for each in files(results) if each.timed and each.timed["latency_ms"]["p50"]]
    if not found:
        return None

    def draw(axes: Axes) -> None:
        labels = [file_label(*network) for network in FILES]
        for each in found:
            assert each.timed is not None
            number = labels.index(each.label)
            p50, dense = each.timed["latency_ms"]["p50"], each.label.startswith("dense")
            x, y = p50["value"], each.accuracy["value"]
            axes.errorbar(
                x,
                y,
                yerr=_half(each.accuracy),
                marker=MARKERS[number % len(MARKERS)],
                markersize=8,
                markerfacecolor="none" if each.label.endswith("int8") else None,
                color=DENSE if dense else SPARSE if each.label.startswith(REFERENCE) else INK,
                linestyle="none",
                capsize=3,
                label=each.label,
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("median latency of one image, ms, 1 thread (left is faster); hollow: int8")
        axes.set_ylabel("test accuracy in onnxruntime")

    return _drawn(draw, "latency")


def _meeting(found: Sequence[Run]) -> tuple[float, float]:
    """The c at which the bonus equals the mean gradient of the layer with the least, and with the largest."""
    per_c = bonus(found[0], 0) / float(found[0].c or 0)
    scales = [value / per_c for each in found for value in layer_gradients(each).values()]
    return min(scales), max(scales)


def _points(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Mapping[str, Any]],
    label: str,
    number: int,
    styles: Sequence[Any],
) -> None:
    axes.errorbar(
        x,
        [each["value"] for each in estimates],
        yerr=[_half(each) for each in estimates],
        label=label,
        color=SPARSE if label == REFERENCE else INK,
        marker=MARKERS[number],
        markersize=6,
        linestyle=styles[number % len(styles)],
        linewidth=1.4,
        capsize=3,
    )


def _half(estimate: Estimate) -> float:
    """Half of an interval; 0 for a single seed."""
    return 0.0 if estimate["high"] is None else estimate["high"] - estimate["value"]


def _per_cent(digits: int) -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{100 * value:.{digits}f}{NARROW}%")


def _drawn(draw: Callable[[Axes], None], name: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(720, 400)
        draw(axes)
        if name != "paired":
            axes.yaxis.set_major_formatter(_per_cent(1))
            axes.yaxis.set_major_locator(MaxNLocator(8))
            figure.legend(loc="outside upper left", ncols=3, handlelength=3.2)
        return _svg(figure, name)


def _svg(figure: Figure, name: str) -> str:
    return standalone(to_svg(figure, name, FIGURES[name][1]))


FIGURES: dict[str, tuple[Callable[[Results], str | None], str]] = {
    "accuracy": (accuracy, "Test accuracy of each method against sparsity"),
    "exploration": (exploration, "Validation accuracy of each run against its exploration rate, at each sparsity"),
    "paired": (paired, f"DST-EE minus RigL and SET at {100 * PRIMARY_SPARSITY:g}%, seed by seed"),
    "c": (by_c, "Validation accuracy and exploration rate of DST-EE against c"),
    "latency": (latency, "Test accuracy of each file against its latency"),
}
"""Each by the end of its file's name, with what it shows; they give None before there are rows to draw."""
