"""`sparsepipe report`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sparsepipe.cli import common


@click.command("report")
@click.argument("sources", nargs=-1, required=True, type=common.existing_path())
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR|PAGE.html",
    help="Output folder. Default: report/ in the run folder. PAGE.html makes the page of the benchmarks and profiles "
    "that the sources hold, with PAGE.json and PAGE.md beside it.",
)  # fmt: skip
@click.option("--title", help="Title of the page. Default: name of the run folder.")
@click.option(
    "--into", type=common.existing_path(dir_okay=False), metavar="FILE.md",
    help="For the result of a suite: put its tables between the lines <!-- NAME --> and <!-- /NAME --> of this "
    "document, NAME being the name of the result's file.",
)  # fmt: skip
@common.output_options
def command(sources: tuple[Path, ...], out: Path | None, title: str | None, into: Path | None, as_json: bool) -> None:
    """Write one self-contained HTML page about everything that a run folder holds.

    With --out PAGE.html: the page of one or several results of `bench` and `profile` (JSON files, or folders).
    SOURCE may also be the JSON file of `bench --suite` alone; its tables are printed as Markdown.

    \b
    sparsepipe report runs/quickstart
    sparsepipe report bench.json profile.json --out page.html
    sparsepipe report examples/results/kernels.json --into README.md
    """
    source = sources[0]
    if out is not None and out.suffix == ".html":
        if into is not None:
            raise click.UsageError("--into belongs to the tables of a suite, not to a page.")
        _bench_page(sources, out, title, as_json)
    elif len(sources) > 1:
        raise click.UsageError("Several sources need --out PAGE.html.")
    elif source.is_file():
        _tables(source, into)
    elif into is not None:
        raise click.UsageError("--into belongs to the result of a suite, a JSON file.")
    else:
        _page(source, out, title, as_json)


def _tables(source: Path, into: Path | None) -> None:
    from sparsepipe.artefact import write_text
    from sparsepipe.reporting import markdown, peers, speed
    from sparsepipe.stages import suite

    result = suite.read(source)
    if result["suite"] == "peers":
        drawn = source.with_suffix(".png")
        peers.picture(result, drawn)
        place = into.parent if into else Path()
        text = peers.markdown(result, link=Path(os.path.relpath(drawn, place)).as_posix())
    else:
        text = speed.markdown(result)
    if into is None:
        click.echo(text)
    else:
        document = markdown.with_block(into.read_text(encoding="utf-8"), source.name, text, where=str(into))
        write_text(into, document)
        click.echo(str(into))


def _bench_page(sources: tuple[Path, ...], out: Path, title: str | None, as_json: bool) -> None:
    from sparsepipe.stages import bench_report

    data = bench_report.write(sources, out, title=title or "")
    if as_json:
        common.print_json(data)
    else:
        click.echo(str(out))


def _page(source: Path, out: Path | None, title: str | None, as_json: bool) -> None:
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
