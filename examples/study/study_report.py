"""What the rows of the study say: the tables and figures of examples/RESULTS.md, made from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import study_files

from sparsepipe import rows
from sparsepipe.artefact import read_json
from sparsepipe.comparison import difference, over_seeds
from sparsepipe.reporting.markdown import Table
from sparsepipe.reporting.units import MISSING, milliseconds, percent, points, ratio, scientific, size
from sparsepipe.sparsity.schedule import UpdateSchedule, cosine

REFERENCE = "dst-ee"
METHODS = ("dst-ee", "rigl", "set", "erk-static", "gmp")
SPARSITIES = (0.9, 0.95, 0.98)
SWEEP_SPARSITY = 0.95
INPUT_SHAPE, CLASSES = (3, 32, 32), 10
"""Of the data, which need not be here when a report is made."""
FILES = (
    ("dense", 0.0, "unstructured", "dense"),
    ("dense", 0.0, "unstructured", "dense.int8"),
    ("dst-ee", 0.8, "unstructured", "universal"),
    ("dst-ee", 0.9, "unstructured", "universal"),
    ("dst-ee", 0.95, "unstructured", "universal"),
    ("dst-ee", 0.9, "4x1", "universal"),
    ("dst-ee", 0.95, "4x1", "universal"),
    ("dst-ee", 0.8, "4x4", "universal"),
    ("dst-ee", 0.8, "4x4", "universal.int8"),
)
"""What a user chooses from: method, sparsity, pattern, and the key of the exported file."""

Estimate = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One row, read.

    Attributes:
        sparsity: what was asked for; 0 for dense training.
        c: None where the method takes none.
        samples: of the training split, to count the steps by.
    """

    name: str
    method: str
    sparsity: float
    c: float | None
    pattern: str
    seed: int
    metrics: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    cpu: str
    commit: str | None

    @classmethod
    def of(cls, name: str, row: Mapping[str, Any]) -> Run:
        options = row["config"]["method"]
        dense = options["name"] == "dense"
        return cls(
            name,
            options["name"],
            0.0 if dense else options["sparsity"],
            float(options["c"]) if options["name"] == "dst-ee" else None,
            options.get("pattern", "unstructured"),
            row["config"]["seed"],
            row["metrics"],
            row["epochs"],
            row["config"],
            row["machine"]["cpu"],
            row["commit"],
        )


class Results:
    """All rows, what became of the networks as files, and the c that DST-EE has wherever c is not what is studied.

    Args:
        folder: of the rows.
        files: folder of what `study_files` writes; it may not be there.
        c: of DST-EE.
    """

    def __init__(self, folder: Path, files: Path, c: float) -> None:
        self.runs = [Run.of(path.stem, rows.read(path)) for path in sorted(folder.glob("*.json"))]
        self.files = {each["training"]: each["files"] for each in study_files.read(files)}
        timed = files / study_files.SPEED_FILE
        self.speed: dict[str, Any] | None = read_json(timed) if timed.is_file() else None
        self.c = c

    def by_seed(
        self, method: str, sparsity: float = 0.0, *, c: float | None = None, pattern: str = "unstructured"
    ) -> dict[int, Run]:
        """The trainings of one setting; of DST-EE those with the study's c, unless another is given."""
        wanted = (c or self.c) if method == REFERENCE else None
        return {
            run.seed: run
            for run in self.runs
            if (run.method, run.sparsity, run.pattern) == (method, sparsity, pattern) and run.c == wanted
        }

    def minus(self, other: Mapping[int, Run], sparsity: float) -> dict[str, Any] | None:
        """Test accuracy of DST-EE minus that of another method at the same sparsity, paired by seed."""
        own = self.by_seed(REFERENCE, sparsity)
        return difference(*({seed: run.metrics for seed, run in runs.items()} for runs in (own, other)))


def mean(runs: Mapping[int, Run], key: str) -> dict[str, Any] | None:
    """Over seeds, with the 95% interval."""
    return over_seeds([run.metrics[key] for run in runs.values()])


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
    minus = results.minus(runs, sparsity) if method not in ("dense", REFERENCE) else None
    return [
        percent(sparsity, 0) if sparsity else MISSING,
        method,
        str(len(runs)),
        _percent(mean(runs, "validation_accuracy")),
        _percent(mean(runs, "test_accuracy")),
        f"{_points(minus)} ({minus['pairs']} pairs)" if minus else MISSING,
        _number(mean(runs, "exploration_rate"), 3) + (f" ({bound:.2f})" if bound else ""),
        _number(mean(runs, "training_flops_multiple"), 3) + "\u202f×",
        f"{median(run.metrics['cpu_seconds'] for run in runs.values()) / 60:.1f}",
    ]


def verdicts(results: Results) -> str:
    """In words, whether the rows tell DST-EE from the other methods."""
    said = []
    for sparsity in SPARSITIES:
        for method in METHODS[1:]:
            minus = results.minus(results.by_seed(method, sparsity), sparsity)
            if minus is None:
                continue
            where = f"At {100 * sparsity:g}% DST-EE minus {method} is {_points(minus)} over {minus['pairs']} "
            where += "pair" if minus["pairs"] == 1 else "pairs"
            if minus["low"] is None:
                said.append(f"- {where}: one pair says nothing about the difference.")
            elif minus["low"] > 0:
                said.append(f"- {where}: **DST-EE is better**.")
            elif minus["high"] < 0:
                said.append(f"- {where}: **DST-EE is worse**.")
            else:
                said.append(f"- {where}: the interval holds 0, so these rows do not tell the two apart.")
    return "\n".join(said) or "There are no two methods with rows of the same seed and sparsity yet."


def sweep(results: Results) -> list[Run]:
    """DST-EE at one sparsity with each c that has a row, of the first seed; by c."""
    found = [
        run
        for run in results.runs
        if (run.method, run.sparsity, run.pattern, run.seed) == (REFERENCE, SWEEP_SPARSITY, "unstructured", 0)
    ]
    return sorted(found, key=lambda run: run.c or 0.0)


def sweep_table(results: Results) -> Table:
    """c against the gradients that it stands beside."""
    lines = []
    for run in sweep(results):
        assert run.c is not None
        gradients = layer_gradients(run)
        ratios = [bonus(run, 0) / value for value in gradients.values()]
        lines.append(
            [
                f"{run.c:.0e}".replace("e-0", "e-"),
                percent(run.metrics["validation_accuracy"]),
                f"{run.metrics['exploration_rate']:.3f}",
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
        "mean abs gradient of inactive weights, least – largest layer",
        "bonus, never active",
        "bonus, once active",
        "bonus, never active / mean gradient",
    ]
    title = f"DST-EE at {100 * SWEEP_SPARSITY:g}%, seed 0, by c"
    return Table(title, headers, lines)


@dataclass(frozen=True)
class File:
    """One kind of file in the mean over seeds, and how fast that of the first seed was.

    Attributes:
        label: what to call it.
        accuracy: test accuracy in onnxruntime.
        lost: accuracy of the trained network in PyTorch minus that of the file, paired by seed.
        bytes: of the file, in the mean.
        timed: row of the benchmark, or None.
    """

    label: str
    seeds: int
    accuracy: dict[str, Any]
    lost: dict[str, Any]
    bytes: float
    timed: Mapping[str, Any] | None


def files(results: Results) -> list[File]:
    """Those of `FILES` of which at least one seed was exported."""
    found = []
    for method, sparsity, pattern, key in FILES:
        runs = results.by_seed(method, sparsity, pattern=pattern)
        tested = [results.files[run.name][key] for run in runs.values() if key in results.files.get(run.name, {})]
        if not tested:
            continue
        label = file_label(method, sparsity, pattern, key)
        accuracy = over_seeds([each["accuracy"]["value"] for each in tested])
        lost = over_seeds([each["reference_accuracy"]["value"] - each["accuracy"]["value"] for each in tested])
        assert accuracy is not None
        assert lost is not None
        stored = sum(each["bytes"] for each in tested) / len(tested)
        timed = next((row for row in (results.speed or {}).get("results", ()) if row["file"] == label), None)
        found.append(File(label, len(tested), accuracy, lost, stored, timed))
    return found


def file_label(method: str, sparsity: float, pattern: str, key: str) -> str:
    precision = "int8" if key.endswith("int8") else "fp32"
    return f"dense {precision}" if method == "dense" else f"{100 * sparsity:g}% {pattern} {precision}"


def files_table(results: Results) -> str:
    found = files(results)
    if not found:
        return "No network of the study has been exported yet."
    headers = ["file", "seeds", "test accuracy in onnxruntime", "points lost by the file", "size"]
    headers += ["median latency", "times faster than dense fp32", "resident memory of the session"]
    lines = [
        [
            each.label,
            str(each.seeds),
            _percent(each.accuracy),
            f"{100 * each.lost['value']:.2f}{_half(each.lost)}",
            size(each.bytes),
            *_speed(each.timed),
        ]
        for each in found
    ]
    title = (
        "DST-EE networks as files beside dense ones; accuracies over seeds, speed of one seed's file, 1 thread, batch 1"
    )
    return Table(title, headers, lines).markdown()


def _speed(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or not row["latency_ms"]["p50"]:
        return [MISSING] * 3
    gain = row["speedup"]
    memory = None if row["rss_bytes"] is None else row["rss_bytes"] - (row["idle_rss_bytes"] or 0)
    return [
        milliseconds(row["latency_ms"]["p50"]["value"]),
        f"{ratio(gain['value'])} ({gain['low']:.2f}–{gain['high']:.2f})" if gain else MISSING,
        size(memory),
    ]


def speed_conditions(results: Results) -> str:
    """On what the files were timed, and whether the machine was quiet."""
    if results.speed is None:
        return "No file has been timed yet."
    machine, (verdict,) = results.speed["environment"], results.speed["verdicts"]
    state = "**noisy**" if verdict["noisy"] else "quiet"
    apart = MISSING if verdict["difference"] is None else percent(verdict["difference"], 1)
    return (
        f"Timed on {machine['cpu']} ({', '.join(machine['isa'])}), onnxruntime {machine['versions']['onnxruntime']}, "
        f"{machine['measured'][:10]}, files in turns. The machine was {state}: other processes disturbed "
        f"{verdict['blocks_disturbed']} of {verdict['blocks']} blocks of calls, and the same file in two processes "
        f"differed by {apart}."
    )


def layer_gradients(run: Run) -> dict[str, float]:
    """Of each layer, the mean absolute gradient of its inactive weights: the median over the epochs with updates."""
    found: dict[str, list[float]] = {}
    for epoch in run.epochs:
        for name, value in (epoch["inactive_gradient_mean"] or {}).items():
            if value:
                found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def bonus(run: Run, rounds: int) -> float:
    """c ln(t) / (N + eps) half-way to the last update, for a weight that was active after N updates."""
    assert run.c is not None
    return run.c * math.log(stop_step(run) / 2) / (rounds + run.config["method"].get("eps", 1.0))


def stop_step(run: Run) -> int:
    """The optimizer step from which on masks stay as they are."""
    return int(run.config["method"]["stop_at"] * run.epochs[-1]["step"])


def coverage_bound(run: Run) -> float:
    """The exploration rate that no method can exceed: of each layer min(1, d (1 + sum p)), d its density."""
    method = run.config["method"]
    updates = UpdateSchedule(method["update_every"], 1, stop_step(run))
    fraction = cosine(method["drop_fraction"], updates.stop)
    spread = 1 + sum(fraction(step) for step in range(1, updates.stop) if updates.due(step))
    sizes, densities = layer_sizes(run), run.epochs[0]["density"]
    reached = sum(min(1.0, densities[name] * spread) * size for name, size in sizes.items())
    return reached / sum(sizes.values())


def layer_sizes(run: Run) -> dict[str, int]:
    """Weights of each layer that has a mask."""
    import torch

    from sparsepipe.models.registry import create

    options = {key: value for key, value in run.config["model"].items() if key != "name"}
    with torch.device("meta"):
        network = create(run.config["model"]["name"], input_shape=INPUT_SHAPE, classes=CLASSES, options=options)
    return {name: network.get_parameter(name).numel() for name in run.epochs[0]["density"]}


def _percent(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else percent(estimate["value"]) + _half(estimate)


def _points(estimate: Estimate) -> str:
    return points(estimate["value"]) + _half(estimate)


def _half(estimate: Estimate) -> str:
    return "" if estimate["high"] is None else f" ± {100 * (estimate['high'] - estimate['value']):.2f}"


def _number(estimate: Estimate | None, digits: int) -> str:
    return MISSING if estimate is None else f"{estimate['value']:.{digits}f}"


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def conditions(results: Results) -> str:
    """What all rows have in common, and where they were made."""
    runs = results.runs
    trained = sorted({(run.config["data"]["name"], run.config["train"]["epochs"]) for run in runs})
    machines = sorted({run.cpu for run in runs})
    commits = sorted({(run.commit or "unknown")[:12] for run in runs})
    return "\n".join(
        [
            f"- {len(runs)} trainings have a row.",
            *(f"- Data: `{Path(data.partition(':')[2]).name or data}`, {epochs} epochs." for data, epochs in trained),
            f"- Machine: {', '.join(machines)}, one thread for each training. Sources: {', '.join(commits)}.",
        ]
    )


BLOCKS: dict[str, Callable[[Results], str]] = {
    "study: conditions": conditions,
    "study: methods": lambda results: methods_table(results).markdown(),
    "study: verdicts": verdicts,
    "study: c": lambda results: sweep_table(results).markdown(),
    "study: files": files_table,
    "study: speed": speed_conditions,
}
"""What stands in the document, by the name of its place."""
