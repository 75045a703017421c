"""Train one recipe with several methods and seeds, and write the test accuracies with their paired differences.

    python examples/compare_methods.py examples/quickstart.toml --methods dst-ee dense --seeds 0 1 2 \
        --out runs/compare --result examples/results/quickstart_seeds.json

Runs that are finished are not trained again, so the command can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from sparsepipe import pipeline, recipe
from sparsepipe.artefact import write_json
from sparsepipe.environment import describe_machine, package_versions


def train(path: Path, method: str, seed: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """Metrics of one training, made now or found in `out`."""
    loaded = recipe.load(path, [*overrides, f"method={method}", f"seed={seed}", "train.dense_twin=false"])
    stage = pipeline.stages(loaded)[0]
    folder = out / f"{method}-{seed}" / stage.name
    artefact = pipeline.unchanged(stage, {}, folder) or stage.run(stage.config, {}, folder)
    kept = ("test_accuracy", "test_correct", "test_samples", "validation_accuracy", "sparsity", "exploration_rate")
    return {"method": method, "seed": seed} | {key: artefact.metrics[key] for key in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare training methods on one recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--methods", nargs="+", default=["dst-ee", "dense"], help="the last one is the reference")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()

    runs = [
        train(arguments.recipe, method, seed, arguments.overrides, arguments.out)
        for seed in arguments.seeds
        for method in arguments.methods
    ]
    accuracy = {
        method: np.array([run["test_accuracy"] for run in runs if run["method"] == method])
        for method in arguments.methods
    }
    reference = arguments.methods[-1]
    summary = {
        method: {
            "mean": float(values.mean()),
            "standard_deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
            f"mean_minus_{reference}": float((values - accuracy[reference]).mean()),
        }
        for method, values in accuracy.items()
    }
    result = {
        "recipe": str(arguments.recipe),
        "overrides": arguments.overrides,
        "data": recipe.load(arguments.recipe, arguments.overrides).data.model_dump(),
        "test_accuracy": summary,
        "runs": runs,
        "machine": describe_machine(),
        "versions": package_versions(),
    }
    write_json(arguments.result, result)
    for method, values in summary.items():
        print(f"{method}: {values['mean']:.2%}")


if __name__ == "__main__":
    main()
