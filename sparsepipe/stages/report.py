"""The stage `report`: whatever artefacts there are -> one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from sparsepipe.artefact import Artefact, draft, write_text
from sparsepipe.errors import ArtefactError, MissingExtraError
from sparsepipe.recipe import Validation
from sparsepipe.reporting import contents as contents_of
from sparsepipe.reporting import summary
from sparsepipe.settings import Section

STAGES = contents_of.STAGES
"""The stages whose artefacts the report shows; any subset will do."""

REPORT_FILE = "report.html"
_TRAINING_KEYS = ("seed", "model", "data", "method", "augment", "optimizer", "schedule", "train")
_COMMANDS = {
    "train": "sparsepipe train recipe.toml --out DIR",
    "freeze": "sparsepipe freeze DIR",
    "convert": "sparsepipe convert DIR",
    "export": "sparsepipe export DIR --format onnx",
    "validate": "sparsepipe validate DIR/export/*.onnx --against DIR",
    "bench": "sparsepipe bench DIR/export/*.onnx",
    "report": "sparsepipe report DIR",
}


class ReportConfig(Section):
    title: str = ""
    """Heading of the page; by default what was trained, and on what."""


def run(config: ReportConfig, inputs: Mapping[str, Artefact], out: Path) -> Artefact:
    """Write `report.html`; the metrics are those of `reporting.summary.summarise`.

    Args:
        config: settings of the page.
        inputs: any of the stages train, train-dense, freeze, convert, export, validate, bench, by name.
        out: folder of the report.

    Raises:
        ArtefactError: no artefact was given, or one of them is damaged.
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    contents = contents_of.read(inputs)
    if not contents.artefacts:
        raise ArtefactError(
            "There is nothing to report on.",
            where=str(out),
            advice=f"Name a folder that holds at least one of: {', '.join(contents_of.STAGES)}.",
        )
    try:
        from sparsepipe.reporting import html
    except ImportError as error:
        raise MissingExtraError(error.name or "matplotlib", "report", "The report") from error
    digests = {name: artefact.digest for name, artefact in inputs.items()}
    with draft(out, "report", config, digests) as building:
        page = html.render(
            contents,
            title=config.title or "sparsepipe report",
            recipe=recipe_text(contents.artefacts),
            commands=commands(contents.artefacts),
        )
        write_text(building.folder / REPORT_FILE, page)
        building.metrics.update(summary.summarise_contents(contents))
    return Artefact.read(out, "report")


def recipe_text(artefacts: Mapping[str, Artefact]) -> str:
    """The settings of all stages, every default filled in, as the TOML of a recipe (without what no stage records)."""
    table: dict[str, Any] = {}
    if "train" in artefacts:
        training = artefacts["train"].manifest.config
        table.update({key: training[key] for key in _TRAINING_KEYS if key in training})
        if "train-dense" in artefacts:  # the twin is a run of its own, so the configuration of this one is silent on it
            table["train"] = {**table.get("train", {}), "dense_twin": True}
    for stage in ("convert", "export", "validate", "bench"):
        if stage in artefacts:
            table[stage] = artefacts[stage].manifest.config
    if "validate" in table:  # its configuration holds the data, too, which the recipe names once for all stages
        table["validate"] = {key: table["validate"][key] for key in Validation.model_fields if key in table["validate"]}
    return tomli_w.dumps(_without_none(table))


def commands(artefacts: Mapping[str, Artefact]) -> list[str]:
    """What to type to make these artefacts again: all at once, and one by one."""
    whole = ["sparsepipe run recipe.toml --out DIR"] if "train" in artefacts else []
    return [*whole, *(_COMMANDS[stage] for stage in artefacts if stage in _COMMANDS), _COMMANDS["report"]]


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is not set is left out."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value if inner is not None] if isinstance(value, list) else value
