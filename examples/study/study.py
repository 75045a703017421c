"""The study of methods on a CPU: which trainings there are, and how they are made.

    python examples/study/study.py run --jobs 2     # trains what has no row yet, in the order of GRIDS

Each training that ends leaves a row in examples/results/study: a small JSON file with its recipe, commit, environment,
accuracies and what happened in each epoch. What has a row is not trained again, so the command goes on wherever it was
interrupted, also in a fresh checkout. A row's `command` makes that one training again. Run it from the root of the
repository, with the data in ../shared/data/cifar10-jpeg.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import dataclass, field
from pathlib import Path

from sparsepipe import comparison
from sparsepipe.comparison import Grid, Training

ROOT = Path(__file__).parents[2]
RECIPE = Path("examples/study/resnet8.toml")
ROWS = Path("examples/results/study")
OUT = Path("runs/study")
DYNAMIC = ("dst-ee", "rigl", "set")
ALL = (*DYNAMIC, "erk-static", "gmp")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Part:
    """Trainings that one table is made of.

    Attributes:
        grid: methods, sparsities, seeds and what else varies.
        overrides: further `KEY=VALUE` for all.
    """

    grid: Grid
    overrides: tuple[str, ...] = field(default=())


def by_c(*values: str) -> Part:
    """DST-EE at 95% with each c, one seed; judged on validation alone."""
    return Part(Grid(("dst-ee",), (0.95,), (0,), {"method.c": values}))


def methods(names: tuple[str, ...], sparsity: float, seeds: tuple[int, ...] = SEEDS) -> Part:
    return Part(Grid(names, (sparsity,), seeds, {}))


SWEEP = by_c("1e-3", "1e-2", "1e-4", "1e-1", "1e-5", "1e-6")
DENSE = Part(Grid(("dense",), (), SEEDS, {}))
AT_98 = methods(DYNAMIC, 0.98, tuple(range(8)))
PARTS = (Part(Grid(("dense",), (), (0,), {})), SWEEP, DENSE)


def trainings(parts: tuple[Part, ...] = PARTS) -> list[Training]:
    """All trainings of the parts, each once, in their order."""
    found: dict[str, Training] = {}
    for part in parts:
        for training in comparison.plan(RECIPE, part.grid, part.overrides, OUT):
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
