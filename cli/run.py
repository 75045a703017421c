"""`sparsepipe run`: the whole chain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsepipe.cli import common

if TYPE_CHECKING:
    from sparsepipe.pipeline import Stage


@click.command("run")
@common.recipe_options()
@click.option("--force", is_flag=True, help="Run every stage from the start, also where nothing has changed.")
@common.output_options
def command(recipe: Path, out: Path | None, force: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run a whole recipe: train, freeze, convert, export, validate, bench, report.

    Stages whose inputs and settings have not changed since the last run are skipped; an interrupted training goes on
    from its last checkpoint. Exits with 1 if the exported files do not compute what the trained network does.
    """
    from sparsepipe import pipeline
    from sparsepipe.progress import log
    from sparsepipe.reporting import summary

    loaded, folder = common.load_recipe(recipe, overrides, out)
    common.check_threads(loaded.bench.threads)
    common.check_recipe_copy(recipe, loaded, folder)

    def announce(stage: Stage, skipped: bool) -> None:
        if stage.needs:  # training has accepted the recipe, so it may take the place of the one that stands there
            common.write_recipe_copy(recipe, loaded, folder)
        log.info("%s: unchanged, skipped" if skipped else "%s", stage.name)

    outcomes = pipeline.run(loaded, folder, force=force, announce=announce)
    artefacts = {name: outcome.artefact for name, outcome in outcomes.items()}
    result = summary.summarise(artefacts)
    report = artefacts["report"].file("report.html")
    passed = bool(artefacts["validate"].metric("passed"))
    if as_json:
        stages = {
            name: {"folder": str(done.artefact.folder), "skipped": done.skipped, "seconds": round(done.seconds, 3)}
            for name, done in outcomes.items()
        }
        common.print_json({"out": str(folder), "stages": stages, "summary": result, "report": str(report)})
    else:
        headers, rows = summary.rows(result)
        common.print_table(headers, rows, title=f"{loaded.name}: {folder}")
        headers, lines = summary.files(result)
        if lines:
            common.print_table(headers, [[str(cell) for cell in line] for line in lines])
        for note in result["notes"]:
            click.echo(f"Note: {note}")
        click.echo(f"Report: {report}")
    if not passed:
        click.echo("The exported files differ from the trained network; see the report.", err=True)
        raise click.exceptions.Exit(1)
