"""What the rows of the study say in tables, and where each table and sentence stands in examples/RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean, median

import study_choice
import study_words
from study_rows import (
    REFERENCE,
    SWEEP_SPARSITY,
    Estimate,
    Results,
    Run,
    bonus,
    coverage_bound,
    half,
    layer_gradients,
    mean,
    minus,
    new_share,
    percent_over,
    sweep,
)
from study_words import PRIMARY_SPARSITY, SPARSITIES

from sparsepipe.reporting.markdown import Table
from sparsepipe.reporting.units import MISSING, percent, plural, points, scientific

METHODS = ("dst-ee", "rigl", "set", "erk-static", "gmp")
EXPLORING = (
    {},
    {"c": "1e-3"},
    {"c": "1e-2"},
    {"c": "1e-3", "update_every": "10"},
    {"c": "1e-3", "stop_at": "0.95"},
)
"""Options of DST-EE with which masks explore more, the comparison's own first; each adds one to a line above it."""


def methods_table(results: Results) -> Table:
    """Every method at every sparsity of which there is at least one row."""
    lines = [_line(results, "dense", 0.0)]
    lines += [_line(results, method, sparsity) for sparsity in SPARSITIES for method in METHODS]
    headers = [
        "sparsity",
        "method",
        "seeds",
        "validation",
        "test accuracy",
        "DST-EE minus it",
        "exploration rate (bound)",
        "new of what grew",
        "training FLOPs",
        "CPU minutes",
    ]
    title = "Mean over seeds ± half of the 95% interval (none for one seed); differences in points, paired by seed"
    return Table(title, headers, [line for line in lines if line])


def _line(results: Results, method: str, sparsity: float) -> list[str]:
    runs = results.by_seed(method, sparsity)
    if not runs:
        return []
    bound = coverage_bound(next(iter(runs.values()))) if method in ("dst-ee", "rigl", "set") else None
    gain = minus(results.by_seed(REFERENCE, sparsity), runs) if method not in ("dense", REFERENCE) else None
    return [
        percent(sparsity, 0) if sparsity else MISSING,
        method,
        str(len(runs)),
        percent_over(mean(runs, "validation_accuracy")),
        percent_over(mean(runs, "test_accuracy")),
        _gain(gain),
        _number(mean(runs, "exploration_rate"), 3) + (f" ({bound:.2f})" if bound else ""),
        _fresh(runs) if bound else MISSING,
        _number(mean(runs, "training_flops_multiple"), 3) + "\u202f×",
        f"{median(run.metrics['cpu_seconds'] for run in runs.values()) / 60:.1f}",
    ]


def why_table(results: Results) -> Table:
    """Whether DST-EE gains where its masks explore more than in the comparison, at the same sparsity."""
    lines = []
    for others in EXPLORING:
        runs = results.by_seed(REFERENCE, PRIMARY_SPARSITY, **others)
        if not runs:
            continue
        greedy = results.by_seed("rigl", PRIMARY_SPARSITY, **{k: v for k, v in others.items() if k != "c"})
        first = next(iter(runs.values()))
        lines.append(
            [
                first.c or MISSING,
                str(first.method["update_every"]),
                f"{first.method['stop_at']:g}",
                str(len(runs)),
                f"{_number(mean(runs, 'exploration_rate'), 3)} ({coverage_bound(first):.2f})",
                _number(mean(greedy, "exploration_rate"), 3),
                _fresh(runs),
                percent_over(mean(runs, "test_accuracy")),
                _gain(minus(runs, greedy)),
                _over_base(results, runs, others),
            ]
        )
    headers = ["c", "update every", "stop at", "seeds", "exploration rate (bound)", "of RigL", "new of what grew"]
    headers += ["test accuracy", "minus RigL with the same updates", "minus DST-EE with"]
    return Table(f"DST-EE at {100 * PRIMARY_SPARSITY:g}%, with more exploration", headers, lines)


def _over_base(results: Results, runs: Mapping[int, Run], others: Mapping[str, str]) -> str:
    """The difference from the line without the last of the options, and what that line has in its place."""
    if not others:
        return MISSING
    *kept, (added, _) = others.items()
    base = results.by_seed(REFERENCE, PRIMARY_SPARSITY, **dict(kept))
    if (gain := minus(runs, base)) is None:
        return MISSING
    before = results.c if added == "c" else next(iter(base.values())).method[added]
    return f"{added.replace('_', ' ')} {before}: {_gain(gain)}"


def _gain(gain: Estimate | None) -> str:
    return f"{_points(gain)} ({plural(gain['pairs'], 'pair')})" if gain else MISSING


def sweep_table(results: Results) -> Table:
    """c against the gradients that it stands beside."""
    lines = []
    for run in sweep(results):
        gradients = layer_gradients(run)
        ratios = [bonus(run, 0) / value for value in gradients.values()]
        lines.append(
            [
                run.c or MISSING,
                percent(run.metrics["validation_accuracy"]),
                f"{run.metrics['exploration_rate']:.3f}",
                f"{new_share(run):.2f}",
                f"{scientific(min(gradients.values()))} – {scientific(max(gradients.values()))}",
                scientific(bonus(run, 0)),
                scientific(bonus(run, 1)),
                f"{_ratio(min(ratios))} – {_ratio(max(ratios))}",
            ]
        )
    headers = [
        "c",
        "validation",
        "exploration rate",
        "new of what grew",
        "mean abs gradient of inactive weights, least – largest layer",
        "bonus, never active",
        "bonus, once active",
        "bonus, never active / mean gradient",
    ]
    title = f"DST-EE at {100 * SWEEP_SPARSITY:g}%, seed 0, by c"
    return Table(title, headers, lines)


def _fresh(runs: Mapping[int, Run]) -> str:
    return f"{fmean(map(new_share, runs.values())):.2f}" if runs else MISSING


def _points(estimate: Estimate) -> str:
    return points(estimate["value"]) + half(estimate)


def _number(estimate: Estimate | None, digits: int) -> str:
    return MISSING if estimate is None else f"{estimate['value']:.{digits}f}"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


BLOCKS: dict[str, Callable[[Results], str]] = {
    "study: conditions": study_words.conditions,
    "study: methods": lambda results: methods_table(results).markdown(),
    "study: verdicts": study_words.verdicts,
    "study: distances": study_words.distances,
    "study: why": lambda results: why_table(results).markdown(),
    "study: confirmation": study_words.confirmation,
    "study: c": lambda results: sweep_table(results).markdown(),
    "study: meaning": study_words.meaning,
    "study: files": study_choice.files_table,
    "study: speed": study_choice.speed_conditions,
    "study: blocks": study_choice.blocks_cost,
}
"""What stands in the document, by the name of its place."""
