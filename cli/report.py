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
    SOURCE may also be the JSON file of `bench --suite` alone; its tables are printed as Markdown. With --into they go
    into a document, and the picture of `--suite peers` beside the result.

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
        common.refuse_idle({"out": ("--out PAGE.html or a run folder",), "title": ("a page",)}, [])
        _tables(source, into, as_json)
    elif into is not None:
        raise click.UsageError("--into belongs to the result of a suite, a JSON file.")
    else:
        _page(source, out, title, as_json)


def _tables(source: Path, into: Path | None, as_json: bool) -> None:
    from sparsepipe.artefact import write_text
    from sparsepipe.reporting import markdown, peers, speed
    from sparsepipe.stages import suite

    result = suite.read(source)
    drawn = source.with_suffix(".png") if into is not None and result["suite"] == "peers" else None
    link = "" if into is None or drawn is None else Path(os.path.relpath(drawn, into.parent)).as_posix()
    text = peers.markdown(result, link=link) if result["suite"] == "peers" else speed.markdown(result)
    if into is not None:
        document = markdown.with_block(into.read_text(encoding="utf-8"), source.name, text, where=str(into))
        if drawn is not None:
            peers.picture(result, drawn)
        write_text(into, document)
    if as_json:
        common.print_json(result)
    else:
        click.echo(text if into is None else str(into))


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
