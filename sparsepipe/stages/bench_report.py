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
        ArtefactError: a source is no result.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        from sparsepipe.reporting import bench_page
    except ImportError as error:
        raise MissingExtraError(error.name or "matplotlib", "report", "The report") from error
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
            accuracy |= _accuracy(source)
    data = bench_page.page(results, title=title or sources[0].resolve().stem, accuracy=accuracy)
    page = bench_page.render(data)
    write_json(out.with_suffix(".json"), data)
    write_text(out.with_suffix(".md"), bench_page.markdown(data))
    write_text(out, page)
    return data


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
