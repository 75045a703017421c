"""The study of methods on a CPU: which trainings there are, how they are made, and what they say.

    python examples/study/study.py run --jobs 2     # trains what has no row yet, in the order of PARTS
    python examples/study/study.py again NAME ...   # trains what has a row once more, and replaces the row
    python examples/study/study.py files            # exports the networks trained here, and tests the files
    python examples/study/study.py speed            # times one file of each network in turns, on an idle machine
    python examples/study/study.py report           # rebuilds the tables and figures of examples/RESULTS.md

Each training that ends leaves a row in examples/results/study: a small JSON file with its recipe, commit, environment,
accuracies and what happened in each epoch. What has a row is not trained again, so `run` goes on wherever it was
interrupted, also in a fresh checkout. Run all of this from the root of the repository, with the data in
../shared/data/cifar10-jpeg.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import study_choice
import study_report
import study_rows
import study_words

from sparsepipe import comparison, rows
from sparsepipe.artefact import write_text
from sparsepipe.comparison import Grid, Training
from sparsepipe.errors import RecipeError, SparsepipeError
from sparsepipe.reporting import markdown

RECIPE = Path("examples/study/resnet8.toml")
ROWS = Path("examples/results/study")
OUT = Path("runs/study")
FILES = Path("examples/results/study_files")
DOCUMENT = Path("examples/RESULTS.md")

DYNAMIC = ("dst-ee", "rigl", "set")
ALL = (*DYNAMIC, "erk-static", "gmp")
SEEDS = (0, 1, 2)
PAIRED_SEEDS = tuple(range(study_words.PLANNED_PAIRS))
C = "1e-4"
"""Of DST-EE wherever c is not what is studied: the value of highest validation accuracy in the sweep below."""


def _sweep(*values: str) -> Grid:
    return Grid(("dst-ee",), (0.95,), (0,), {"method.c": values})


def _methods(names: tuple[str, ...], sparsity: float, seeds: tuple[int, ...] = SEEDS) -> Grid:
    return Grid(names, (sparsity,), seeds, {"method.c": (C,)})


def _exploring(names: tuple[str, ...], *c: str, seeds: tuple[int, ...] = SEEDS, **others: str) -> Grid:
    """Where masks explore more than in the comparison at 98%: what keeps DST-EE from gaining by it?"""
    varied = {f"method.{name}": (value,) for name, value in others.items()}
    return Grid(names, (0.98,), seeds, {"method.c": c, **varied})


def _blocks(pattern: str, *sparsities: float, seeds: tuple[int, ...] = SEEDS) -> Grid:
    return Grid(("dst-ee",), sparsities, seeds, {"method.c": (C,), "method.pattern": (pattern,)})


PARTS = (
    Grid(("dense",), (), (0,), {}),
    _sweep("1e-3", "1e-2", "1e-4", "1e-1", "1e-5", "1e-6"),
    Grid(("dense",), (), SEEDS, {}),
    *(_blocks(pattern, sparsity, seeds=(0,)) for pattern, sparsity in (("4x4", 0.8), ("4x1", 0.95))),
    _methods(("dst-ee",), 0.8),
    _blocks("4x4", 0.8),
    _methods(("dst-ee",), 0.9),
    _methods(DYNAMIC, 0.98, PAIRED_SEEDS),
    _exploring(("dst-ee",), "1e-3", "1e-2"),
    _methods(ALL, 0.95),
    _exploring(("dst-ee", "rigl"), "1e-3", update_every="10"),
    _blocks("4x1", 0.9, 0.95),
    _methods(ALL, 0.9),
    _methods(ALL, 0.98),
    _exploring(("dst-ee",), "1e-3", stop_at="0.95"),
    _exploring(("dst-ee", "rigl"), "1e-3", seeds=study_words.NEW_SEEDS, update_every="10"),
)
"""All trainings, the most valuable first."""


def trainings() -> list[Training]:
    """All trainings of the parts, each once, in their order."""
    found: dict[str, Training] = {}
    for grid in PARTS:
        for training in comparison.plan(RECIPE, grid, (), OUT):
            found.setdefault(training.folder.name, training)
    return list(found.values())


def run(jobs: int) -> int:
    """Train what has no row; the number of trainings that failed."""
    failures = 0
    waiting = [each for each in trainings() if each.finished(RECIPE, ROWS) is None]
    print(f"{len(waiting)} trainings to go", flush=True)
    for index, found, error in comparison.train(RECIPE, waiting, jobs, kept=ROWS):
        said = f"validation {found['metrics']['validation_accuracy']:.2%}" if found else error
        print(f"{datetime.datetime.now():%H:%M:%S} {waiting[index].folder.name}: {said}", flush=True)
        failures += found is None
    return failures


def again(names: list[str], jobs: int) -> int:
    """Train once more what has a row, and replace the row; the number of trainings that failed."""
    listed = {each.folder.name: each for each in trainings()}
    if unknown := sorted({*names} - {*listed}):
        raise RecipeError(f"The study has no training {', '.join(unknown)}.", advice=f"It has: {', '.join(listed)}.")
    names = list(dict.fromkeys(names))
    wanted = [listed[name] for name in names]
    failures = 0
    for index, found, error in comparison.train(RECIPE, wanted, jobs, again=True):
        if found is not None:
            rows.write(ROWS / f"{names[index]}.json", found)
        print(f"{names[index]}: {error or 'its row is written'}", flush=True)
        failures += found is None
    return failures


def files() -> None:
    """Export and test the networks that a table of files shows, as far as they were trained here; name the others."""
    import study_files

    shown = [each for each in trainings() if any(_is(each, *network[:3]) for network in study_choice.FILES)]
    written = study_files.accuracies(shown, FILES)
    missing = [each.folder.name for each in shown if not (FILES / f"{each.folder.name}.json").is_file()]
    if written:
        print("written:", *written, sep="\n  ")
    if missing:
        print("not trained here (`study.py again` trains what has a row):", *missing, sep="\n  ")


def speed(seconds: float) -> None:
    """Time the files that `files` exported, of each network the first seed that is here, the dense fp32 one first."""
    import study_files

    found: dict[str, tuple[str, Path]] = {}
    for method, sparsity, pattern, key in study_choice.FILES:
        label = study_choice.file_label(method, sparsity, pattern, key)
        for training in trainings():
            path = training.folder / "export" / f"model.{key}.onnx"
            if _is(training, method, sparsity, pattern) and path.is_file():
                found.setdefault(label, (training.folder.name, path))
    if (dense := study_choice.file_label(*study_choice.FILES[0])) not in found:
        raise RecipeError(
            f"There is no file '{dense}' to compare with.", where=str(OUT), advice="Run `again dense_s0`, then `files`."
        )
    print(study_files.speed(found, FILES, seconds))


def _is(training: Training, method: str, sparsity: float, pattern: str) -> bool:
    """Whether a training is of this network, with the study's c."""
    return study_rows.identity(training) == study_rows.network(method, sparsity, C, pattern=pattern)


def report(kept: Path = ROWS, exported: Path = FILES, document: Path = DOCUMENT) -> list[Path]:
    """Rebuild the tables in a document, between the lines that name them, and the figures in the folder of the rows.

    Returns:
        The files that were written.
    """
    from study_figures import FIGURES  # needs matplotlib, which training does not

    results = study_rows.Results(trainings(), kept, exported, C)
    blocks = {name: block(results) for name, block in study_report.BLOCKS.items()}
    written = []
    for name, (draw, alt) in FIGURES.items():
        path = kept.with_name(f"{kept.name}_{name}.svg")
        if (drawn := draw(results)) is not None:
            write_text(path, drawn)
            written.append(path)
        link = f"![{alt}]({path.relative_to(document.parent)})"
        blocks[f"study: figure {name}"] = link if drawn else "There are too few rows for a figure yet."
    text = document.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = markdown.with_block(text, name, block, where=str(document))
    write_text(document, text)
    return [document, *written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train what has no row yet")
    running.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    repeating = commands.add_parser("again", help="train once more what has a row, and replace the row")
    repeating.add_argument("names", nargs="+", metavar="NAME", help="of a row, as dense_s0")
    repeating.add_argument("--jobs", type=int, default=2, help="trainings at once, one thread each")
    commands.add_parser("report", help="rebuild tables and figures from the rows")
    commands.add_parser("files", help="export the networks that were trained here, and test the files")
    timing = commands.add_parser("speed", help="time one file of each network on an idle machine")
    timing.add_argument("--seconds", type=float, default=6.0, help="measuring time for each file")
    options = parser.parse_args()
    try:
        if options.command == "run":
            sys.exit(1 if run(options.jobs) else 0)
        elif options.command == "again":
            sys.exit(1 if again(options.names, options.jobs) else 0)
        elif options.command == "files":
            files()
        elif options.command == "speed":
            speed(options.seconds)
        else:
            print(*report(), sep="\n")
    except SparsepipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
