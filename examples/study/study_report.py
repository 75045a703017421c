"""What the rows of the study say: the tables and figures of examples/RESULTS.md, made from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median

import study_choice
from scipy import stats
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

from sparsepipe.reporting.markdown import Table
from sparsepipe.reporting.units import MISSING, percent, plural, points, scientific

METHODS = ("dst-ee", "rigl", "set", "erk-static", "gmp")
SPARSITIES = (0.9, 0.95, 0.98)
PRIMARY, PRIMARY_SPARSITY = ("rigl", "set"), 0.98
PLANNED_PAIRS = 8
"""For a verdict: one that is looked for after every pair is found too often."""
EXPLORING = (
    {},
    {"c": "1e-3"},
    {"c": "1e-2"},
    {"c": "1e-3", "update_every": "10"},
    {"c": "1e-3", "stop_at": "0.95"},
)
"""Options of DST-EE with which masks explore more, the comparison's own first."""
VALIDATION = 5000
"""Images."""


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
        f"{_points(gain)} ({plural(gain['pairs'], 'pair')})" if gain else MISSING,
        _number(mean(runs, "exploration_rate"), 3) + (f" ({bound:.2f})" if bound else ""),
        _fresh(runs) if bound else MISSING,
        _number(mean(runs, "training_flops_multiple"), 3) + "\u202f×",
        f"{median(run.metrics['cpu_seconds'] for run in runs.values()) / 60:.1f}",
    ]


def verdicts(results: Results) -> str:
    """In words, whether the rows tell DST-EE from the other methods.

    Of so many differences some leave their interval by chance. So two are named before the rows are there, and share
    the 5% (Bonferroni): those with PRIMARY at PRIMARY_SPARSITY. The others say where to look, and decide nothing.
    """
    said = []
    for method in PRIMARY:
        pairs = minus(results.by_seed(REFERENCE, PRIMARY_SPARSITY), results.by_seed(method, PRIMARY_SPARSITY))
        where = f"- At {100 * PRIMARY_SPARSITY:g}% DST-EE minus {method}"
        if pairs is None or pairs["pairs"] < PLANNED_PAIRS:
            made = pairs["pairs"] if pairs else 0
            said.append(f"{where}: {made} of {PLANNED_PAIRS} pairs; the verdict comes with the last.")
            continue
        half = pairs["high"] - pairs["value"]
        half *= _quantile(1 - 0.05 / len(PRIMARY), pairs["pairs"]) / _quantile(0.95, pairs["pairs"])
        interval = f"{points(pairs['value'] - half)} to {points(pairs['value'] + half)}"
        level = f"{100 * (1 - 0.05 / len(PRIMARY)):g}%"
        verdict = f"{where}: {points(pairs['value'])} over {pairs['pairs']} pairs, {level} interval {interval}: "
        if abs(pairs["value"]) > half:
            verdict += f"**DST-EE is {'better' if pairs['value'] > 0 else 'worse'}**."
        else:
            verdict += f"**not told apart**; these pairs would show a difference of {100 * half:.2f} points."
        said.append(verdict)
    return "\n".join(said)


def _quantile(confidence: float, pairs: int) -> float:
    """Of Student's t, two-sided."""
    return float(stats.t.ppf((1 + confidence) / 2, pairs - 1))


def why_table(results: Results) -> Table:
    """Whether DST-EE gains where its masks explore more than in the comparison, at the same sparsity."""
    base = results.by_seed(REFERENCE, PRIMARY_SPARSITY)
    lines = []
    for others in EXPLORING:
        runs = results.by_seed(REFERENCE, PRIMARY_SPARSITY, **others)
        if not runs:
            continue
        greedy = results.by_seed("rigl", PRIMARY_SPARSITY, **{k: v for k, v in others.items() if k != "c"})
        first = next(iter(runs.values()))
        gains = [minus(runs, greedy), minus(runs, base) if runs != base else None]
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
                *(f"{_points(gain)} ({plural(gain['pairs'], 'pair')})" if gain else MISSING for gain in gains),
            ]
        )
    headers = ["c", "update every", "stop at", "seeds", "exploration rate (bound)", "of RigL", "new of what grew"]
    headers += ["test accuracy", "minus RigL with the same updates", f"minus c = {results.c}, first line"]
    return Table(f"DST-EE at {100 * PRIMARY_SPARSITY:g}%, with more exploration", headers, lines)


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


def conditions(results: Results) -> str:
    """What all rows have in common, where they were made, and what is missing."""
    run_rows = [run.row for run in results.runs]
    trained = sorted({(row["config"]["data"]["name"], row["config"]["train"]["epochs"]) for row in run_rows})
    machines = sorted({row["machine"]["cpu"] for row in run_rows})
    seeds = sorted({run.training.seed for run in results.runs})
    versions = sorted({f"torch {row['versions']['torch']}" for row in run_rows})
    commits = sorted({(row["commit"] or "unknown")[:12] for row in run_rows})
    return "\n".join(
        [
            f"- {len(run_rows)} of {results.planned} trainings have a row; seeds {', '.join(map(str, seeds))}.",
            *(f"- Data: `{Path(data.partition(':')[2]).name or data}`, {epochs} epochs." for data, epochs in trained),
            f"- Machine: {', '.join(machines)}, one thread for each training; {', '.join(versions)}.",
            f"- Sources: {', '.join(commits)}.",
        ]
    )


def meaning(results: Results) -> str:
    """How much the c that was chosen explores, between the least and the largest."""
    found = sweep(results)
    chosen = next((run for run in found if run.c == results.c), None)
    if chosen is None or len(found) < 2:
        return "There are too few rows yet."
    least, largest = found[0], found[-1]
    rates = [run.metrics["exploration_rate"] for run in (least, chosen, largest)]
    share = (rates[1] - rates[0]) / (rates[2] - rates[0])
    accuracies = [run.metrics["validation_accuracy"] for run in found]
    error = math.sqrt(chosen.metrics["validation_accuracy"] * (1 - chosen.metrics["validation_accuracy"]) / VALIDATION)
    return (
        f"Highest on validation is c = {results.c}, although all {len(found)} values lie within "
        f"{100 * (max(accuracies) - min(accuracies)):.2f} points, and one has a standard error of {100 * error:.2f} on "
        f"{VALIDATION:,} images. **It explores little more than RigL**: masks reached {rates[1]:.3f} of all weights, "
        f"{percent(share, 0)} of the way from {rates[0]:.3f} (c = {least.c}) to {rates[2]:.3f} (c = {largest.c}). So "
        "the comparison above is of RigL with a method close to it; the table below has larger c."
    )


BLOCKS: dict[str, Callable[[Results], str]] = {
    "study: conditions": conditions,
    "study: methods": lambda results: methods_table(results).markdown(),
    "study: verdicts": verdicts,
    "study: why": lambda results: why_table(results).markdown(),
    "study: c": lambda results: sweep_table(results).markdown(),
    "study: meaning": meaning,
    "study: files": study_choice.files_table,
    "study: speed": study_choice.speed_conditions,
    "study: blocks": study_choice.blocks_cost,
}
"""What stands in the document, by the name of its place."""
