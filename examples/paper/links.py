"""Link prediction on ia-email-EU: every training, the exported networks, and the tables of examples/paper/LINKS.md.

    python examples/paper/links.py run --data ../shared/data/ia-email-eu/ia-email-EU.mtx --jobs 2
    python examples/paper/links.py report

`run` trains what is not trained yet, exports one network of each kind, and writes examples/results/links_ia_email.json;
`report` makes the tables of that file alone. Run both from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy import stats

from sparsepipe import comparison, rows
from sparsepipe.artefact import Artefact, read_json, write_json, write_text
from sparsepipe.comparison import Grid, over_seeds
from sparsepipe.data.edges import divide, read
from sparsepipe.data.embedding import adjacency
from sparsepipe.data.options import EdgeOptions
from sparsepipe.errors import SparsepipeError
from sparsepipe.ranking import roc_auc
from sparsepipe.reporting.markdown import Table, with_block
from sparsepipe.reporting.units import MISSING, percent, size

HERE = Path("examples/paper")
RESULT = Path("examples/results/links_ia_email.json")
REPORT = HERE / "LINKS.md"
OUT = Path("runs/links")
RECIPES = {"mlp": HERE / "links_ia_email.toml", "gnn": HERE / "links_ia_email_gnn.toml"}

METHODS = ("dst-ee", "rigl", "set", "gmp", "magnitude-oneshot", "dense")
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEEDS = (0, 1, 2)
SWEEP = {"mlp": ("1e-4", "1e-3", "1e-2", "1e-1"), "gnn": ("1e-6", "1e-5", "1e-4", "1e-3", "1e-2")}
"""Values of c that are tried at 95%; the recipes hold the one of highest validation ROC-AUC."""
SHIPPED = Grid(("dst-ee",), (0.95,), (0,), {})
"""The training that goes through the rest of the chain."""

Row = Mapping[str, Any]


def run(data: str, jobs: int) -> None:
    """Train, export, and write the results.

    Raises:
        SparsepipeError: the recipes or the data are not valid.
        subprocess.CalledProcessError: a training failed, or an exported file computes something else.
    """
    read(Path(data))  # what is wrong with it is told once, and not by each training
    found: list[dict[str, Any]] = []
    environments: list[dict[str, Any]] = []
    configs: list[dict[str, Any]] = []
    shipped: dict[str, Any] = {}
    for network, recipe in RECIPES.items():
        kept, out = OUT / "rows" / network, OUT / network
        # Of the training that is shipped its folder is needed, not its row alone.
        for grid, rows_of in (*((each, kept) for each in grids(network)), (SHIPPED, None)):
            result = comparison.compare(recipe, grid, out, overrides=overrides(data), workers=jobs, kept=rows_of)
            for each in result["runs"]:
                if each["error"]:
                    sys.exit(f"Failed: {each['command']}\n{each['error']}")
        shipped[network] = _chain(out / SHIPPED.settings()[0].folder(SHIPPED.seeds[0]))
        for path in sorted(kept.glob("*.json")):
            row = rows.read(path)
            made = {key: row[key] for key in ("machine", "versions")}
            shared = {key: value for key, value in row["config"].items() if key not in ("method", "seed")}
            for known, this in ((environments, made), (configs, shared)):
                if this not in known:
                    known.append(this)
            found.append(
                {
                    "network": network,
                    "name": path.stem,
                    "seed": row["config"]["seed"],
                    "method": row["config"]["method"],
                    "config": configs.index(shared),
                    "environment": environments.index(made),
                    **{key: row[key] for key in ("recipe_digest", "command", "commit", "created", "metrics")},
                }
            )
    result = {"data": "ia-email-EU", "environments": environments, "configs": configs}
    result |= {"rows": found, "exported": shipped}
    write_json(RESULT, {**result, "heuristics": heuristics(Path(data))})


def grids(network: str) -> tuple[Grid, Grid]:
    """What is trained with a network."""
    return (
        Grid(METHODS, SPARSITIES, SEEDS, {}),
        Grid(("dst-ee",), (0.95,), SWEEP_SEEDS, {"method.c": SWEEP[network]}),
    )


def overrides(data: str) -> tuple[str, ...]:
    """What every training has beyond its recipe."""
    return f"data=edgelist:{data}", "train.threads=1"


def heuristics(file: Path) -> dict[str, dict[str, float | None]]:
    """Test ROC-AUC of what needs no training, for both kinds of negative samples."""
    edges, nodes = read(file)
    found = {}
    for kind in ("degree", "uniform"):
        parts = divide(edges, nodes, EdgeOptions(negatives=kind), str(file))
        graph = adjacency(parts.graph, nodes)
        degrees, (first, second) = graph.sum(axis=1), parts.test.pairs.T
        scores = {
            "product of the degrees": degrees[first] * degrees[second],
            "common neighbours": graph[first].multiply(graph[second]).sum(axis=1),
        }
        found[kind] = {name: roc_auc(score, parts.test.labels) for name, score in scores.items()}
    return found


def _chain(folder: Path) -> dict[str, Any]:
    """Freeze, convert, export and validate a training: size, accuracy and ROC-AUC of each file in onnxruntime."""
    for verb in ("freeze", "convert", "export"):
        _sparsepipe(verb, str(folder))
    export = Artefact.read(folder / "export")
    files = {name: export.file(file["name"]) for name, file in export.metrics["files"].items()}
    told = _sparsepipe("validate", *map(str, files.values()), "--against", str(folder), "--json")
    checked = {result["candidates"][0]["file"]: result["candidates"][0] for result in json.loads(told)["results"]}
    return {
        name: {
            "bytes": path.stat().st_size,
            **{key: checked[path.name][key] for key in ("passed", "max_relative", "agreement", "auc", "reference_auc")},
            "accuracy": checked[path.name]["accuracy"]["value"],
        }
        for name, path in files.items()
    }


def _sparsepipe(*arguments: str) -> str:
    command = [sys.executable, "-c", "from sparsepipe.cli.main import main; main()", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def report() -> None:
    """Put the tables into the document."""
    text = REPORT.read_text(encoding="utf-8")
    for name, content in blocks(read_json(RESULT)).items():
        text = with_block(text, name, content, where=str(REPORT))
    write_text(REPORT, text)


def blocks(result: Mapping[str, Any]) -> dict[str, str]:
    """What the document says between its marks, by their names."""
    return {
        "links: conditions": conditions(result["rows"], result["environments"]),
        "links: heuristics": without_training(result["heuristics"]),
        **{f"links: {network}": methods(result["rows"], network) for network in RECIPES},
        "links: against rigl": against_rigl(result["rows"]),
        "links: sweep": sweep(result["rows"]),
        "links: exported": exported(result["exported"]),
    }


def methods(found: Sequence[Row], network: str) -> str:
    """Every method at every sparsity: means over seeds, and the difference of DST-EE to it, paired by seed."""
    lines = []
    for sparsity in SPARSITIES:
        reference = _of(found, network, f"dst-ee_{sparsity:g}")
        for method in METHODS:
            runs = _of(found, network, method if method == "dense" else f"{method}_{sparsity:g}")
            lines.append(
                [
                    percent(sparsity, 0),
                    method,
                    str(len(runs)),
                    _interval(runs, "test_auc", "{:.4f}".format),
                    _interval(runs, "test_accuracy", percent),
                    MISSING if method == "dst-ee" else _difference(reference, runs, "test_auc"),
                    _mean(runs, "exploration_rate", "{:.2f}".format),
                    _mean(runs, "training_flops_multiple", "{:.2f}".format),
                ]
            )
    headers = ["sparsity", "method", "seeds", "test ROC-AUC", "test accuracy", "DST-EE minus this, ROC-AUC"]
    headers += ["exploration rate", "training FLOPs / dense"]
    return Table(f"`link-{network}`, mean over seeds and 95% interval", headers, lines).markdown()


def sweep(found: Sequence[Row]) -> str:
    """What c does at 95%, on validation samples."""
    lines = [
        [
            f"link-{network}",
            c,
            _mean(runs, "validation_auc", "{:.4f}".format),
            _mean(runs, "validation_accuracy", percent),
            _mean(runs, "exploration_rate", "{:.2f}".format),
        ]
        for network, values in SWEEP.items()
        for c in values
        if (runs := _of(found, network, f"dst-ee_0.95_c={c}"))
    ]
    headers = ["network", "c", "validation ROC-AUC", "validation accuracy", "exploration rate"]
    return Table("DST-EE at 95%, mean of the same seeds", headers, lines).markdown()


def against_rigl(found: Sequence[Row]) -> str:
    """In words, whether DST-EE differs from RigL in any cell, each for itself and all together (Holm)."""
    cells: dict[str, tuple[float, float]] = {}
    for network in RECIPES:
        for sparsity in SPARSITIES:
            own, other = (_of(found, network, f"{method}_{sparsity:g}") for method in ("dst-ee", "rigl"))
            differences = [own[seed]["test_auc"] - other[seed]["test_auc"] for seed in sorted({*own} & {*other})]
            p = float(stats.ttest_1samp(differences, 0).pvalue)
            cells[f"`link-{network}` at {100 * sparsity:g}%"] = fmean(differences), p
    outside = {cell: value for cell, (value, p) in cells.items() if p < 0.05}
    ordered = sorted(p for _, p in cells.values())
    kept = [p < 0.05 / (len(ordered) - rank) for rank, p in enumerate(ordered)]
    together = kept.index(False) if False in kept else len(kept)
    named = "; ".join(f"{cell}, {value:+.4f}".replace("-0", "−0") for cell, value in outside.items())
    return (
        f"DST-EE minus RigL, test ROC-AUC: of {len(cells)} cells {len(outside)} differ from 0 by their own interval"
        f"{f' ({named})' if named else ''}, and {together} by Holm's over all of them."
    )


def exported(shipped: Mapping[str, Mapping[str, Row]]) -> str:
    """The files of one network of each kind, as they run in onnxruntime."""
    lines = [
        [
            f"link-{network}",
            f"model.{name}.onnx",
            size(file["bytes"]),
            percent(file["accuracy"]),
            f"{file['auc']:.4f}",
            f"{file['reference_auc']:.4f}",
            f"{file['max_relative']:.1e}",
        ]
        for network, files in shipped.items()
        for name, file in files.items()
    ]
    headers = ["network", "file", "size", "test accuracy", "test ROC-AUC", "in PyTorch", "largest difference"]
    return Table("DST-EE at 95%, seed 0, in onnxruntime", headers, lines).markdown()


def without_training(found: Mapping[str, Mapping[str, float]]) -> str:
    """What simple scores reach."""
    lines = [[name, *(f"{found[kind][name]:.4f}" for kind in found)] for name in found["degree"]]
    return Table("Test ROC-AUC by the kind of negative samples", ["score", *found], lines).markdown()


def conditions(found: Sequence[Row], environments: Sequence[Mapping[str, Any]]) -> str:
    """What the rows were made with and on."""
    machines = {f"{made['machine']['cpu']}, {made['machine']['cores_logical']} cores" for made in environments}
    versions = {f"torch {made['versions']['torch']}, scipy {made['versions']['scipy']}" for made in environments}
    commits = sorted({(row["commit"] or "unknown")[:10] for row in found})
    spent = sum(row["metrics"]["cpu_seconds"] for row in found) / 60
    return (
        f"{len(found)} trainings at commit {', '.join(commits)}: {'; '.join(sorted(versions))}; on "
        f"{'; '.join(sorted(machines))}; one thread each, {spent:.0f} minutes of processor time in all."
    )


def _of(found: Sequence[Row], network: str, name: str) -> dict[int, Row]:
    """The metrics of the trainings of a setting, by seed."""
    return {
        row["seed"]: row["metrics"]
        for row in found
        if row["network"] == network and row["name"].rpartition("_s")[0] == name
    }


def _mean(runs: Mapping[int, Row], key: str, show: Any) -> str:
    found = over_seeds([metrics[key] for metrics in runs.values()])
    return MISSING if found is None else str(show(found["value"]))


def _interval(runs: Mapping[int, Row], key: str, show: Any) -> str:
    found = over_seeds([metrics[key] for metrics in runs.values()])
    if found is None or found["low"] is None:
        return _mean(runs, key, show)
    return f"{show(found['value'])} ({show(found['low'])} to {show(found['high'])})"


def _difference(runs: Mapping[int, Row], others: Mapping[int, Row], key: str) -> str:
    """Mean over pairs of the same seed, and its interval."""
    found = over_seeds([runs[seed][key] - others[seed][key] for seed in sorted({*runs} & {*others})])
    if found is None or found["low"] is None:
        return MISSING
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})".replace("-", "−")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train what is not trained yet, export, and write the results")
    running.add_argument("--data", required=True, help="the file of the graph, as ia-email-EU.mtx")
    running.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    commands.add_parser("report", help="make the tables of the results alone")
    options = parser.parse_args()
    try:
        if options.command == "run":
            run(options.data, options.jobs)
        report()
    except SparsepipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
