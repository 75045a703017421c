"""What the rows of the study say in sentences: conditions, verdicts, what c means, and how far apart methods are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from scipy import stats
from study_rows import REFERENCE, VALIDATION, Results, Run, half, mean, minus, sweep

from sparsepipe.reporting.units import percent, points

SPARSITIES = (0.9, 0.95, 0.98)
PRIMARY, PRIMARY_SPARSITY = ("rigl", "set"), 0.98
PLANNED_PAIRS = 8
"""For a verdict: one that is looked for after every pair is found too often."""
LEAD = {"c": "1e-3", "update_every": "10"}
"""Where DST-EE was furthest ahead of RigL over three seeds: the largest of several differences, so partly chance."""
NEW_SEEDS = (3, 4, 5, 6, 7)
"""Trained to see whether that holds. They alone decide, as the seeds that gave the hint would favour it."""


def conditions(results: Results) -> str:
    """What all rows have in common, where they were made, and what is missing."""
    run_rows = [run.row for run in results.runs]
    trained = sorted({(row["config"]["data"]["name"], row["config"]["train"]["epochs"]) for row in run_rows})
    machines = sorted({row["machine"]["cpu"] for row in run_rows})
    seeds = sorted({run.training.seed for run in results.runs})
    versions = sorted({f"torch {row['versions']['torch']}" for row in run_rows})
    commits = sorted({(row["commit"] or "unknown")[:12] for row in run_rows})
    made = f"{len(run_rows)} of {results.planned} trainings have a row"
    if len(run_rows) < results.planned:
        made += ": the study is **not complete**, and a setting without a line has no row yet"
    return "\n".join(
        [
            f"- {made}; seeds {', '.join(map(str, seeds))}.",
            *(f"- Data: `{Path(data.partition(':')[2]).name or data}`, {epochs} epochs." for data, epochs in trained),
            f"- Machine: {', '.join(machines)}, one thread for each training; {', '.join(versions)}.",
            f"- Sources: {', '.join(commits)}.",
        ]
    )


def verdicts(results: Results) -> str:
    """In words, whether the rows tell DST-EE from the other methods.

    Of so many differences some leave their interval by chance. So only those with PRIMARY at PRIMARY_SPARSITY decide,
    and they share the 5% (Bonferroni); the others say where to look.
    """
    said = []
    for method in PRIMARY:
        pairs = minus(results.by_seed(REFERENCE, PRIMARY_SPARSITY), results.by_seed(method, PRIMARY_SPARSITY))
        where = f"- At {100 * PRIMARY_SPARSITY:g}% DST-EE minus {method}"
        if pairs is None or pairs["pairs"] < PLANNED_PAIRS:
            made = pairs["pairs"] if pairs else 0
            said.append(f"{where}: {made} of {PLANNED_PAIRS} pairs; the verdict comes with the last.")
            continue
        width = pairs["high"] - pairs["value"]
        width *= _quantile(1 - 0.05 / len(PRIMARY), pairs["pairs"]) / _quantile(0.95, pairs["pairs"])
        interval = f"{points(pairs['value'] - width)} to {points(pairs['value'] + width)}"
        level = f"{100 * (1 - 0.05 / len(PRIMARY)):g}%"
        verdict = f"{where}: {points(pairs['value'])} over {pairs['pairs']} pairs, {level} interval {interval}: "
        if abs(pairs["value"]) > width:
            verdict += f"**DST-EE is {'better' if pairs['value'] > 0 else 'worse'}**."
        else:
            verdict += "**not told apart**."
        said.append(verdict)
    return "\n".join(said)


def confirmation(results: Results) -> str:
    """Whether the lead of three seeds is there in seeds that had no part in finding it."""
    own, greedy = (
        {seed: run for seed, run in results.by_seed(method, PRIMARY_SPARSITY, **options).items() if seed in NEW_SEEDS}
        for method, options in ((REFERENCE, LEAD), ("rigl", {k: v for k, v in LEAD.items() if k != "c"}))
    )
    gain = minus(own, greedy)
    settings = f"updates every {LEAD['update_every']} steps and c = {LEAD['c']}"
    where = f"- At {100 * PRIMARY_SPARSITY:g}%, {settings}, DST-EE minus rigl"
    made = gain["pairs"] if gain else 0
    if gain is None or made < len(NEW_SEEDS):
        return f"{where}: {made} of {len(NEW_SEEDS)} new pairs; the verdict comes with the last."
    interval = f"{points(gain['low'])} to {points(gain['high'])}"
    said = f"{where}: {points(gain['value'])} over {made} new pairs, 95% interval {interval}"
    if gain["low"] <= 0 <= gain["high"]:
        return f"{said}: **not told apart**."
    return f"{said}: **DST-EE is {'better' if gain['value'] > 0 else 'worse'}**."


def _quantile(confidence: float, pairs: int) -> float:
    """Of Student's t, two-sided."""
    return float(stats.t.ppf((1 + confidence) / 2, pairs - 1))


def distances(results: Results) -> str:
    """How far DST-EE is from dense training, from masks that stay, and from pruning a dense network."""
    others = {
        "dense training": "dense",
        "masks that stay (erk-static)": "erk-static",
        "pruning while training from dense (gmp)": "gmp",
    }
    lines = []
    for what, method in others.items():
        found = []
        for sparsity in (0.8, *SPARSITIES):
            own = results.by_seed(REFERENCE, sparsity)
            other = results.by_seed(method, 0.0 if method == "dense" else sparsity)
            if gain := minus(own, other):
                found.append(f"{points(gain['value'])}{half(gain)} at {100 * sparsity:g}%{_spent(own, other)}")
        if found:
            lines.append(f"- DST-EE minus {what}: {'; '.join(found)}.")
    return "\n".join(lines) or "There are too few rows yet."


def _spent(own: Mapping[int, Run], other: Mapping[int, Run]) -> str:
    """Training FLOPs of the first in parts of those of the second."""
    costs = [mean(runs, "training_flops_multiple") for runs in (own, other)]
    assert costs[0] is not None
    assert costs[1] is not None
    return f", for {costs[0]['value'] / costs[1]['value']:.2f} of its training FLOPs"


def meaning(results: Results) -> str:
    """How much the c that was chosen explores, between the least and the largest."""
    found = sweep(results)
    chosen = next((run for run in found if run.c == results.c), None)
    if chosen is None or len(found) < 2:
        return "There are too few rows yet."
    least, largest = found[0], found[-1]
    rates = [run.metrics["exploration_rate"] for run in (least, chosen, largest)]
    accuracies = {run.c: run.metrics["validation_accuracy"] for run in found}
    best = max(accuracies, key=lambda c: accuracies[c])
    error = math.sqrt(accuracies[chosen.c] * (1 - accuracies[chosen.c]) / VALIDATION)
    spread = max(accuracies.values()) - min(accuracies.values())
    taken = "" if best == chosen.c else f"; the comparison has c = {chosen.c}, {percent(accuracies[chosen.c])}"
    said = (
        f"Highest on validation is c = {best}{taken}. All {len(found)} values lie within {100 * spread:.2f} points, "
        f"and one has a standard error of {100 * error:.2f} on {VALIDATION:,} images. With c = {chosen.c} masks "
        f"reached {rates[1]:.3f} of all weights, between {rates[0]:.3f} with c = {least.c}, which is next to RigL, and "
        f"{rates[2]:.3f} with c = {largest.c}"
    )
    if rates[1] - rates[0] < 0.2 * (rates[2] - rates[0]):
        said += ": **it explores little more than RigL**. So the comparison above is of RigL with a method close to it"
    return f"{said}; the table below has other c."
