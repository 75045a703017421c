"""Tables in Markdown, and the blocks of a document that are made from files of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsepipe.errors import ArtefactError


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        return "\n".join([f"{self.title}:", "", *(f"| {' | '.join(map(_cell, line))} |" for line in lines)])


def block(text: str, name: str, *, where: str) -> str:
    """What stands between the lines `<!-- NAME -->` and `<!-- /NAME -->` of a document.

    Raises:
        ArtefactError: it has no such lines.
    """
    start, end = _bounds(text, name, where)
    return text[start:end].strip("\n")


def with_block(text: str, name: str, content: str, *, where: str) -> str:
    """The document with `content` between the lines `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ArtefactError: it has no such lines.
    """
    start, end = _bounds(text, name, where)
    return f"{text[:start]}\n{content}\n\n{text[end:]}"


def _bounds(text: str, name: str, where: str) -> tuple[int, int]:
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    start, end = text.find(opening), text.find(closing)
    if not 0 <= start < end:
        raise ArtefactError(
            "The document has no place for the tables.",
            where=where,
            advice=f"Put the lines {opening.strip()} and {closing} where they shall stand.",
        )
    return start + len(opening), end


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
