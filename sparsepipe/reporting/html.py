"""The page: contents of a run -> one self-contained HTML text.

Everything that comes from an artefact is escaped by the template engine, and a content security policy in the page
forbids scripts and every request, should that ever fail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from sparsepipe.reporting import summary, units, views
from sparsepipe.reporting.contents import Contents

MAX_TEXT = 20_000
"""Characters of one value that are shown; a longer one is cut."""


def render(contents: Contents, *, title: str, recipe: str, commands: list[str]) -> str:
    """The page as text; equal contents give equal text.

    Args:
        contents: what the artefacts hold; absent parts are named as left out.
        title: heading of the page.
        recipe: the settings as TOML.
        commands: what to type to make the run again.
    """
    headline = summary.summarise_contents(contents)
    page = {
        "title": title,
        "subject": views.subject(contents),
        "summary": headline,
        "rows": summary.headline(headline),
        "files": summary.files(headline),
        "chain": views.chain(contents),
        "recipe": recipe,
        "commands": commands,
        "training": views.training(contents),
        "motion": views.motion(contents),
        "layers": views.layers(contents),
        "masks": views.mask_pictures(contents),
        "sizes": views.sizes(contents),
        "validation": views.validation(contents),
        "speed": views.speed(contents),
        "versions": views.versions(contents),
    }
    return fill("page.html", page)


def fill(template: str, page: Mapping[str, Any]) -> str:
    """A template with its values, as text that can be written."""
    text = _environment().get_template(template).render(page)
    # A lone surrogate that slipped through cannot be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (*_FILTERS, breakable):
        environment.filters[function.__name__] = function
    return environment


_FILTERS = (
    units.percent,
    units.percent_interval,
    units.count,
    units.size,
    units.milliseconds,
    units.milliseconds_interval,
    units.ratio,
    units.ratio_interval,
    units.scientific,
    units.duration,
    units.flops,
    units.dims,
    units.short_digest,
)


def _template(name: str) -> str:
    return files("sparsepipe.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def breakable(name: str) -> Markup:
    """A dotted name or a path that may be broken after each of its parts."""
    text = str(escape(units.printable(name[:MAX_TEXT])))
    return Markup(re.sub(r"([./_])", r"\1<wbr>", text))


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = units.printable(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
