"""`sparsepipe report`."""

from __future__ import annotations

from pathlib import Path

import click

from sparsepipe.cli import common


@click.command("report")
@click.argument("source", type=common.existing_path(file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), help="Output folder. Default: report/ in the run folder.")
@click.option("--title", help="Title of the page. Default: name of the run folder.")
@common.output_options
def command(source: Path, out: Path | None, title: str | None, as_json: bool) -> None:
    """Write one self-contained HTML page about everything that a run folder holds."""
    from sparsepipe.artefact import find
    from sparsepipe.errors import ArtefactError
    from sparsepipe.stages import report

    found = {
        name: artefact
        for name in report.STAGES
        if (artefact := find(source / name, name.removesuffix("-dense"))) is not None
    }
    if not found:
        raise ArtefactError("No stage has finished in this folder.", where=str(source))
    config = report.ReportConfig(title=title or source.resolve().name)
    artefact = report.run(config, found, out if out is not None else source / "report")
    if as_json:
        common.print_json(common.artefact_json(artefact))
    else:
        click.echo(str(artefact.file("report.html")))
