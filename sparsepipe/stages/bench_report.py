"""The page of one or several results of `bench` and `profile`: HTML, and the same data as JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsepipe.artefact import find, read_json, write_json, write_text
from sparsepipe.errors import ArtefactError, MissingExtraError

PROFILE = "profile"


def write(sources: Sequence[Path], out: Path, *, title: str = "") -> dict[str, Any]:
    """Write the page `out`, and beside it `.json` and `.md`.

    Args:
        sources: JSON files of results, folders that `--out` of bench or profile made, and run folders; of a run folder
            with `validate`, accuracies are shown, too.
        out: the HTML file.
        title: heading of the page; by default the name of the first source.

    Returns:
        What the JSON holds.

    Raises:
        ArtefactError: a source is no result, or a file beside the page would be lost that `report` did not write.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        from sparsepipe.reporting import bench_page
    except ImportError as error:
        raise MissingExtraError(error.name or "matplotlib", "report", "The report") from error
    _check_free(sources, out)
    results: dict[str, Any] = {}
    accuracy: dict[str, Any] = {}
    for source in sources:
        if source.is_file():
            results[str(source)] = read_json(source)
        else:
            found = _folder(source)
            if not found:
                raise ArtefactError(
                    "There is no result of bench or profile here.",
                    where=str(source),
                    advice="Name a JSON result, a folder that `bench --out` or `profile --out` made, or a run folder.",
                )
            results |= found
            # Files of two runs have the same names.
            accuracy |= dict.fromkeys(found, _accuracy(source))
    data = bench_page.page(results, title=title or sources[0].resolve().stem, accuracy=accuracy)
    page = bench_page.render(data)
    write_json(out.with_suffix(".json"), data)
    write_text(out.with_suffix(".md"), bench_page.markdown(data))
    write_text(out, page)
    return data


def _check_free(sources: Sequence[Path], out: Path) -> None:
    """Refuse to write a page in whose place, or beside which, something else than an older page would be lost."""
    data, text = out.with_suffix(".json"), out.with_suffix(".md")
    for path in (out, data, text):
        if path.exists() and any(path.samefile(source) for source in sources):
            raise ArtefactError(
                f"The page would take the place of this source: beside {out.name} come {data.name} and {text.name}.",
                where=str(path),
                advice="Name another page with --out.",
            )
    title = _title(data)
    for path in (data, text):
        if not path.exists():
            continue
        if title is None or not (path == data or path.read_bytes().startswith(f"# {title}\n".encode())):
            raise ArtefactError(
                f"This file has the name of one that belongs beside {out.name}, and is not of an older page.",
                where=str(path),
                advice="Move it elsewhere, or name another page with --out.",
            )


def _title(data: Path) -> str | None:
    """The title of the page whose data this file holds; None for any other file, and for none."""
    try:
        held = read_json(data)
    except (ArtefactError, OSError):
        return None
    return str(held.get("title")) if isinstance(held, dict) and held.get("kind") == "report" else None


def _folder(source: Path) -> dict[str, Any]:
    found = {}
    for stage in ("bench", "whatif", PROFILE):
        for place in (source, source / stage):
            artefact = find(place, stage)
            if artefact is not None:
                found[str(artefact.folder)] = artefact.metrics
    return found


def _accuracy(source: Path) -> Mapping[str, Any]:
    artefact = find(source / "validate", "validate") or find(source, "validate")
    if artefact is None:
        return {}
    from sparsepipe.reporting.contents import read

    validated = read({"validate": artefact}).validate
    candidates = validated.candidates if validated else []
    known: dict[str, Any] = {}
    for candidate in candidates:
        if candidate.accuracy is not None:
            known[Path(candidate.file).name] = candidate.accuracy.model_dump()
        if candidate.reference and candidate.reference_accuracy is not None:
            known.setdefault(Path(candidate.reference).name, candidate.reference_accuracy.model_dump())
    return known
