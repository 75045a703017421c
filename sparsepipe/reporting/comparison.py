"""The result of a comparison as a table and as a figure of accuracy against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsepipe.reporting.markdown import Table
from sparsepipe.reporting.units import MISSING, percent, points

NARROW = "\u202f"
MARKERS = "os^vDPX*<>"
STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)))


def table(result: Mapping[str, Any]) -> Table:
    """Means over seeds with 95% intervals; differences are in percentage points of test accuracy."""
    lines = result["table"]
    keys = list(dict.fromkeys(key for line in lines for key in line["others"]))
    reference = result["reference"]
    with_auc = any(line["means"].get("test_auc") for line in lines)
    with_dense = any(line["minus_dense"] for line in lines) and reference != "dense"
    headers = [
        "method",
        "sparsity",
        *keys,
        "seeds",
        "validation",
        "test accuracy",
        *(["test ROC-AUC"] if with_auc else []),
        f"minus {reference}",
        *(["minus dense"] if with_dense else []),
        "exploration rate",
        "training FLOPs",
    ]
    rows = [
        [
            line["method"],
            percent(_sparsity(line), 1),
            *(line["others"].get(key, MISSING) for key in keys),
            str(len(line["seeds"])),
            _value(line["means"]["validation_accuracy"], percent),
            _value(line["means"]["test_accuracy"], percent) + _half(line["means"]["test_accuracy"]),
            *([_value(line["means"].get("test_auc"), "{:.4f}".format)] if with_auc else []),
            _value(line["minus"], points) + _half(line["minus"]),
            *([_value(line["minus_dense"], points) + _half(line["minus_dense"])] if with_dense else []),
            _value(line["means"]["exploration_rate"], "{:.2f}".format),
            _value(line["means"]["training_flops_multiple"], "{:.2f}\u202f×".format),
        ]
        for line in lines
    ]
    return Table(_title(result), headers, rows)


def _sparsity(line: Mapping[str, Any]) -> float | None:
    """What was asked for, else what came out; None for dense training."""
    reached = line["means"]["sparsity"]
    found: float | None = line["sparsity"] or (reached and reached["value"])
    return found or None


def _title(result: Mapping[str, Any]) -> str:
    on = f" on {result['data']['name']}" if result["data"] else ""
    epochs = f", {result['epochs']} epochs" if result["epochs"] else ""
    return f"{result['recipe']}{on}{epochs}; mean over seeds ± half of the 95% interval, differences paired by seed"


def _value(estimate: Any, show: Any) -> str:
    value = estimate["value"] if isinstance(estimate, Mapping) else estimate
    return MISSING if value is None else str(show(value))


def _half(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate["high"] is None:
        return ""
    return f" ± {100 * (estimate['high'] - estimate['value']):.2f}"


def figure(result: Mapping[str, Any]) -> str | None:
    """Test accuracy against sparsity, a line for each method, as a standalone SVG; None before two points are known."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter

    from sparsepipe.reporting.svg import DENSE, INK, SPARSE, STYLE, new_figure, standalone, to_svg

    lines = _lines(result["table"])
    flat = [line for line in result["table"] if line["method"] == "dense" and line["means"]["test_accuracy"]]
    if sum(len(line) for line in lines.values()) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        drawing, axes = new_figure(720, 400)
        for number, (label, found) in enumerate(lines.items()):
            estimates = [line["means"]["test_accuracy"] for line in found]
            centre = [each["value"] for each in estimates]
            # Side by side, so that intervals can be told apart.
            shift = 0.0015 * (number - (len(lines) - 1) / 2)
            axes.errorbar(
                [(_sparsity(line) or 0.0) + shift for line in found],
                centre,
                yerr=[(each["high"] or value) - value for each, value in zip(estimates, centre, strict=True)],
                label=label,
                color=SPARSE if label.split(",")[0] == result["reference"] else INK,
                marker=MARKERS[number % len(MARKERS)],
                markersize=6,
                linestyle=STYLES[number % len(STYLES)],
                linewidth=1.4,
                capsize=3,
            )
        for line in flat[:1]:
            axes.axhline(line["means"]["test_accuracy"]["value"], color=DENSE, linewidth=1.6, label="dense")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}{NARROW}%"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.1f}{NARROW}%"))
        axes.set_xticks(sorted({_sparsity(line) or 0.0 for found in lines.values() for line in found}))
        axes.set_xlabel("sparsity")
        axes.set_ylabel("test accuracy")
        drawing.legend(loc="outside upper left", ncols=4, handlelength=3.2)
        text = to_svg(drawing, "comparison", "Test accuracy against sparsity for each method, with 95% intervals.")
    return standalone(text)


def _lines(table: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for line in table:
        if _sparsity(line) and line["means"]["test_accuracy"]:
            others = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in line["others"].items())
            lines.setdefault(f"{line['method']}{', ' if others else ''}{others}", []).append(line)
    return {label: sorted(found, key=lambda line: _sparsity(line) or 0.0) for label, found in lines.items()}
