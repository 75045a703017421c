"""`sparsepipe compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common

SUFFIX = "-compared"
"""Of the default output folder."""


def _vary(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    found = {}
    for text in texts:
        key, separator, values = text.partition("=")
        parts = tuple(part.strip() for part in values.split(",") if part.strip())
        if not separator or not parts:
            raise click.BadParameter(f"'{text}' is not of the form KEY=VALUE,VALUE, as method.c=1e-4,1e-3.")
        found[key.strip()] = parts
    return found


@click.command("compare")
@common.recipe_options(SUFFIX)
@click.option(
    "--methods", callback=common.list_of(str), default="dst-ee,rigl,set,dense", show_default=True, metavar="LIST",
    help="The first is what the others are compared with.",
)  # fmt: skip
@click.option(
    "--sparsities", callback=common.list_of(float), metavar="LIST", help="As 0.9,0.95. Default: that of the recipe."
)
@click.option(
    "--seeds", callback=common.list_of(int), default="0,1,2", show_default=True, metavar="LIST", help="As 0,1,2."
)
@click.option(
    "--vary", multiple=True, callback=_vary, metavar="KEY=LIST",
    help="Another key of the recipe with its values, e.g. --vary method.pattern=unstructured,4x4 (repeatable).",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(0), default=0, help="Trainings at once. Default: as many as cores.")
@click.option(
    "--backend", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="ray: on the cluster that RAY_ADDRESS names, or on one started on this machine.",
)  # fmt: skip
@click.option(
    "--rows", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Keep one small JSON file of each finished training here, and take what has one for finished: its folder is "
    "not needed any more. Grids of one recipe can share it.",
)  # fmt: skip
@common.output_options
def command(
    recipe: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    methods: tuple[str, ...],
    sparsities: tuple[float, ...],
    seeds: tuple[int, ...],
    vary: Mapping[str, tuple[str, ...]],
    jobs: int,
    backend: str,
    rows: Path | None,
    as_json: bool,
) -> None:
    """Train a recipe with several methods, sparsities and seeds, and compare their accuracies.

    Each training stands in a folder of its own, and what is finished is not trained again: the command can be
    interrupted, repeated, and called with more methods or seeds. It writes comparison.json, comparison.md and, where
    matplotlib is installed, comparison.svg into the output folder. Exits with 1 if a training failed.

    The test split is read once by each training. To choose an option, go by the column `validation`.

    \b
    sparsepipe compare examples/quickstart.toml --methods dst-ee,rigl,set,dense --sparsities 0.9,0.95 --seeds 0,1,2
    """
    from sparsepipe import comparison
    from sparsepipe.reporting.comparison import table

    grid = comparison.Grid(methods, sparsities, seeds, vary)
    _, folder = common.load_recipe(recipe, overrides, out, SUFFIX)
    result = comparison.compare(
        recipe, grid, folder, overrides=overrides, workers=jobs, backend=backend, kept=rows, write_up=_write_up
    )
    failed = [run for run in result["runs"] if run["error"]]
    if as_json:
        common.print_json(result)
    else:
        shown = table(result)
        common.print_table(shown.headers, shown.rows, title=shown.title)
        click.echo(f"Written to {folder}.")
    for run in failed:
        click.echo(f"Failed: {run['command']}\n{run['error']}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


def _write_up(result: Mapping[str, Any], folder: Path) -> None:
    from sparsepipe.reporting import comparison

    common.write_up(folder, "comparison", comparison.table(result).markdown(), lambda: comparison.figure(result))
