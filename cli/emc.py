"""`sparsepipe emc`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sparsepipe.cli import common

SUFFIX = "-emc"
"""Of the default output folder."""


@click.command("emc")
@common.recipe_options(SUFFIX)
@click.option(
    "--sparsities", callback=common.list_of(float), metavar="LIST", help="As 0,0.5,0.9. Default: that of the recipe."
)
@click.option(
    "--methods", callback=common.list_of(str), default="dense,static,dst-ee", show_default=True, metavar="LIST"
)
@click.option("--seeds", callback=common.list_of(int), default="0,1,2", show_default=True, metavar="LIST")
@click.option(
    "--labels", type=click.Choice(["semantic", "random"]),
    help="Those of the data, or drawn at random. Default: semantic; random for random inputs.",
)  # fmt: skip
@click.option(
    "--inputs", type=click.Choice(["data", "random"]), default="data", show_default=True,
    help="The data's, or standard normal values of their shape.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(0), default=0.05, show_default=True,
    help="Search until fit and unfit numbers of samples differ by this share at most.",
)  # fmt: skip
@click.option(
    "--max-steps", type=click.IntRange(1),
    help="Of a training; one that has not converged gets up to four times as many. Default: those of the recipe on the "
    "whole training split.",
)  # fmt: skip
@common.output_options
def command(
    recipe: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    sparsities: tuple[float, ...],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    labels: Any,
    inputs: Any,
    tolerance: float,
    max_steps: int | None,
    as_json: bool,
) -> None:
    """Search for the effective model complexity: the largest sample that a training fits to 100% accuracy.

    Samples are nested: the first n of one order for each seed. The number is doubled until a training fails, then
    bisected. A training fails once its gradient has vanished or its loss stopped falling; before that its steps are
    doubled, twice at most. Trials are written as they end: the command can be interrupted, repeated and widened. It
    writes emc.json, emc.md and, where matplotlib is installed, emc.svg into the output folder. Exits with 1 if a
    training ended with an error; the other searches go on.

    Augmentation is off, but weight decay and label smoothing are the recipe's; they make it harder to fit.

    \b
    sparsepipe emc examples/methods/emc.toml --sparsities 0.5,0.9 --methods dense,static,dst-ee --labels random
    """
    from sparsepipe.comparison import Grid
    from sparsepipe.emc import measure
    from sparsepipe.reporting.emc import table

    _, folder = common.load_recipe(recipe, overrides, out, SUFFIX)
    task = measure.Task(labels or ("random" if inputs == "random" else "semantic"), inputs, tolerance, max_steps)
    grid = Grid(methods, sparsities, seeds, {})
    result = measure.measure(recipe, grid, task, folder, overrides=overrides, write_up=_write_up)
    if as_json:
        common.print_json(result)
    else:
        shown = table(result)
        common.print_table(shown.headers, shown.rows, title=shown.title)
        click.echo(f"Written to {folder}.")
    for search in result["failed"]:
        sparsity = "" if search["sparsity"] is None else f" at sparsity {search['sparsity']:g}"
        click.echo(f"Failed: {search['method']}{sparsity}, seed {search['seed']}\n{search['error']}", err=True)
    if result["failed"]:
        raise click.exceptions.Exit(1)


def _write_up(result: Mapping[str, Any], folder: Path) -> None:
    from sparsepipe.reporting import emc

    common.write_up(folder, "emc", emc.table(result).markdown(), lambda: emc.figure(result))
