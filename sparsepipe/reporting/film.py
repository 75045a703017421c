"""The film of a mask: the same window of one layer's weights at several moments, one small SVG for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from sparsepipe.artefact import Artefact
from sparsepipe.formats.film import Film, load_film
from sparsepipe.formats.masks import Mask
from sparsepipe.reporting import units
from sparsepipe.spec import FILM_FILE

ROWS, COLUMNS = 32, 48
"""The window: so many output channels, and about so many inputs times kernel taps, from the first ones on."""
CELL = 10
"""Side of one weight in units of the SVG."""
GLYPHS = {"kept": (2, 6), "grown": (0, 10), "dropped": (1, 8)}
"""How far inside its cell the square of a weight begins, and its side: sizes differ, so that no colour is needed."""


@dataclass(frozen=True)
class Frame:
    """One moment. The numbers are of the whole layer: active now, and grown and dropped since the frame before."""

    step: int
    update: int
    active: int
    grown: int
    dropped: int
    svg: Markup


@dataclass(frozen=True)
class Strip:
    """A film, ready to be shown; `window` is (rows, columns) of the `extent` of the mask [O, I*k*k]."""

    layer: str
    shape: tuple[int, ...]
    window: tuple[int, int]
    extent: tuple[int, int]
    frames: tuple[Frame, ...]
    survivors: float | None
    """Share of the weights active at the end that were active at the start too; those may have been away between."""

    @property
    def whole(self) -> bool:
        return self.window == self.extent


def read(artefact: Artefact | None) -> Film | None:
    """The film of a training; None where there is no artefact, or it holds none.

    Raises:
        ArtefactError: not a file of a film.
        FormatError: the film is malformed.
    """
    if artefact is None or FILM_FILE not in artefact.manifest.outputs:
        return None
    return load_film(artefact.file(FILM_FILE))


def strip(film: Film) -> Strip | None:
    """The frames of a film; None where its mask never changed."""
    masks = [mask.reshape(mask.shape[0], -1) for mask in film.masks]
    if all(np.array_equal(mask, masks[0]) for mask in masks):
        return None
    shape = film.masks[0].shape
    taps = int(np.prod(shape[2:], dtype=np.int64))
    rows, columns = min(shape[0], ROWS), min(masks[0].shape[1], max(COLUMNS // taps, 1) * taps)
    frames = []
    for number, (update, step, mask) in enumerate(zip(film.updates, film.steps, masks, strict=True)):
        before = masks[max(number - 1, 0)]
        grown, dropped = mask & ~before, before & ~mask
        alt = (
            f"{film.layer} after step {step}: {int(mask.sum())} weights are active, {int(grown.sum())} grown and "
            f"{int(dropped.sum())} dropped since the frame before."
        )
        cut = {"kept": mask & before, "grown": grown, "dropped": dropped}
        svg = _svg({role: which[:rows, :columns] for role, which in cut.items()}, taps, alt)
        frames.append(Frame(step, update, int(mask.sum()), int(grown.sum()), int(dropped.sum()), svg))
    last = int(masks[-1].sum())
    survivors = int((masks[0] & masks[-1]).sum()) / last if last else None
    return Strip(film.layer, shape, (rows, columns), masks[0].shape, tuple(frames), survivors)


def glyph(role: str) -> Markup:
    """The mark of one weight, for a legend."""
    cell = np.ones((1, 1), dtype=bool)
    mark = '<svg class="glyph" viewBox="-1 -1 12 12" role="img" aria-label="{}">{}</svg>'
    return Markup(mark).format(role, _squares(role, cell))


def _svg(weights: dict[str, Mask], taps: int, alt: str) -> Markup:
    rows, columns = weights["kept"].shape
    lines = "".join(f"M{CELL * at} 0V{CELL * rows}" for at in range(taps, columns, taps)) if taps > 1 else ""
    content = Markup("").join(_squares(role, which) for role, which in weights.items())
    return Markup(
        f'<svg class="frame" viewBox="-4 -4 {CELL * columns + 8} {CELL * rows + 8}" role="img" aria-label="{{}}">'
        f'<path class="taps" d="{lines}"/>{{}}</svg>'
    ).format(escape(units.printable(alt)), content)


def _squares(role: str, which: Mask) -> Markup:
    inset, side = GLYPHS[role]
    squares = _path(np.argwhere(which).tolist(), inset, side)
    return Markup(f'<path class="{role}" d="{squares}"/>')


def _path(places: Iterable[Sequence[int]], inset: int, side: int) -> str:
    return "".join(f"M{CELL * column + inset} {CELL * row + inset}h{side}v{side}h-{side}z" for row, column in places)
