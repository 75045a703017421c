"""The study of methods on a CPU: which trainings there are, and how they are made.

    python examples/study/study.py run --jobs 2     # trains what has no row yet, in the order of PARTS

Each training that ends leaves a row in examples/results/study: a small JSON file with its recipe, commit, environment,
accuracies and what happened in each epoch. What has a row is not trained again, so `run` goes on wherever it was
interrupted, also in a fresh checkout. A row's `command` makes that one training again. Run all of this from the root of
the repository, with the data in ../shared/data/cifar10-jpeg.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from sparsepipe import comparison
from sparsepipe.comparison import Grid, Training

RECIPE = Path("examples/study/resnet8.toml")
ROWS = Path("examples/results/study")
OUT = Path("runs/study")

DYNAMIC = ("dst-ee", "rigl", "set")
ALL = (*DYNAMIC, "erk-static", "gmp")
SEEDS = (0, 1, 2)
PAIRED_SEEDS = tuple(range(8))
C = "1e-3"
"""Of DST-EE wherever c is not what is studied: provisional until the sweep below has all its rows, then the value of
highest validation accuracy there."""


def _sweep(*values: str) -> Grid:
    return Grid(("dst-ee",), (0.95,), (0,), {"method.c": values})


def _methods(names: tuple[str, ...], sparsity: float, seeds: tuple[int, ...] = SEEDS) -> Grid:
    return Grid(names, (sparsity,), seeds, {"method.c": (C,)})


def _blocks(pattern: str, *sparsities: float) -> Grid:
    return Grid(("dst-ee",), sparsities, SEEDS, {"method.c": (C,), "method.pattern": (pattern,)})


PARTS = (
    Grid(("dense",), (), (0,), {}),
    _sweep("1e-3", "1e-2", "1e-4", "1e-1", "1e-5", "1e-6"),
    Grid(("dense",), (), SEEDS, {}),
    _methods(DYNAMIC, 0.98, PAIRED_SEEDS),
    _methods(ALL, 0.95),
    _methods(ALL, 0.9),
    _methods(ALL, 0.98),
    _blocks("4x4", 0.8),
    _methods(("dst-ee",), 0.8),
    _blocks("4x1", 0.9, 0.95),
)
"""All trainings, the most valuable first."""


def trainings(parts: tuple[Grid, ...] = PARTS) -> list[Training]:
    """All trainings of the parts, each once, in their order."""
    found: dict[str, Training] = {}
    for grid in parts:
        for training in comparison.plan(RECIPE, grid, (), OUT):
            found.setdefault(training.folder.name, training)
    return list(found.values())


def run(jobs: int) -> None:
    """Train what has no row."""
    waiting = [each for each in trainings() if each.finished(RECIPE, ROWS) is None]
    print(f"{len(waiting)} trainings to go", flush=True)
    for index, found, error in comparison.train(RECIPE, waiting, jobs, kept=ROWS):
        said = f"validation {found['metrics']['validation_accuracy']:.2%}" if found else error
        print(f"{datetime.datetime.now():%H:%M:%S} {waiting[index].folder.name}: {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train what has no row yet")
    running.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    options = parser.parse_args()
    run(options.jobs)


if __name__ == "__main__":
    main()
