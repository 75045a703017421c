"""Options and output that the verbs share."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from sparsepipe import launch
from sparsepipe.errors import ArtefactError, RecipeError
from sparsepipe.folders import RECIPE_FILE, partial_of

if TYPE_CHECKING:
    from sparsepipe.artefact import Artefact
    from sparsepipe.recipe import Recipe
    from sparsepipe.settings import Choice

F = TypeVar("F", bound=Callable[..., Any])

TIME = "%H:%M:%S"
NUMBER = re.compile(r"–|-?\d[^ ]*( \w{1,2}| \([^)]*\))?")
"""A cell that holds a number, as `12`, `3.1 kB`, `80%`, `1033/5184` or `0.29 (0.28–0.30)`, or none."""


def output_options(function: F) -> F:
    """Adds `--json`, `--verbose` and `--quiet`, and sets up logging before the verb runs."""

    def set_level(level: int) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(context: click.Context, parameter: click.Parameter, given: bool) -> None:
            if given:
                logging.getLogger("sparsepipe").setLevel(level)

        return callback

    @functools.wraps(function)
    def with_logging(*arguments: Any, **options: Any) -> Any:
        _start_logging()
        return function(*arguments, **options)

    for flags, level, text in (
        (("-v", "--verbose"), logging.DEBUG, "Log details."),
        (("-q", "--quiet"), logging.WARNING, "Log warnings only."),
    ):
        option = click.option(*flags, is_flag=True, expose_value=False, callback=set_level(level), help=text)
        with_logging = option(with_logging)
    json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
    return cast(F, json_option(with_logging))


def overrides_option(function: F) -> F:
    """Adds `--set KEY=VALUE`, which can be given many times."""
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE",
        help="Override a key of the recipe, e.g. --set method.sparsity=0.95 (repeatable).",
    )(function)  # fmt: skip


def recipe_options(suffix: str = "") -> Callable[[F], F]:
    """Adds what a verb that reads a recipe takes: RECIPE, `--out`, whose default ends with `suffix`, and `--set`."""

    def decorate(function: F) -> F:
        function = overrides_option(function)
        function = click.option(
            "--out", type=click.Path(path_type=Path), help=f"Output folder. Default: runs/<recipe's name>{suffix}."
        )(function)
        return click.argument("recipe", type=click.Path(path_type=Path))(function)

    return decorate


def list_of(convert: Callable[[str], Any]) -> Callable[..., tuple[Any, ...]]:
    """A callback for an option that reads `0,1,2`, given once or several times; what is named twice counts once."""

    def read(context: click.Context, parameter: click.Parameter, value: str | Sequence[str] | None) -> tuple[Any, ...]:
        texts = [value] if isinstance(value, str) else value or ()
        parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
        if texts and not parts:
            raise click.BadParameter("the list is empty.")
        try:
            return tuple(dict.fromkeys(convert(part) for part in parts))
        except ValueError as error:
            kind = "whole numbers" if convert is int else "numbers"
            raise click.BadParameter(f"'{','.join(parts)}' is not a list of {kind} separated by ','.") from error

    return read


def model_option(function: F) -> F:
    """Adds `--model`, by which the user vouches for a network's own code."""
    return click.option(
        "--model", "trusted_model", metavar="MODULE:FUNCTION",
        help="Run this code to build the network, if the source was made with it.",
    )(function)  # fmt: skip


def input_option(function: F) -> F:
    """Adds `--input [NAME=]1x3x224x224`, which can be given once for each input, as a dict `input_`."""

    def read(context: click.Context, parameter: click.Parameter, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for text in texts:
            name, _, sizes = text.rpartition("=")
            try:
                shapes[name] = tuple(int(size) for size in sizes.split("x"))
            except ValueError as error:
                raise click.BadParameter(
                    f"'{text}' is not a shape: sizes separated by 'x', batch first, as 1x3x224x224."
                ) from error
        return shapes

    return click.option(
        "--input", "input_", multiple=True, callback=read, metavar="[NAME=]1x3x224x224",
        help="Shape of an input, batch first, where a file leaves sizes open; without a name, of the only input "
        "(repeatable).",
    )(function)  # fmt: skip


def on_command_line() -> dict[str, str]:
    """Name of each parameter of the running verb that was given, with what a user calls it: `--max-drop`, `SOURCE`."""
    context = click.get_current_context()
    return {
        parameter.name: parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name
        for parameter in context.command.params
        if parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }


def refuse_idle(belongs: Mapping[str, Sequence[str]], here: Collection[str]) -> None:
    """Refuse the options on the command line that would have no effect.

    Args:
        belongs: name of a parameter -> what it belongs to: one of these must hold. Others belong everywhere.
        here: what holds in this call.

    Raises:
        UsageError: an option was given that belongs to nothing in `here`.
    """
    for name, flag in on_command_line().items():
        if name in belongs and not set(belongs[name]) & set(here):
            raise click.UsageError(f"{flag} belongs to {' or '.join(belongs[name])}; here it has no effect.")


def check_threads(counts: Iterable[int]) -> None:
    """Refuse to measure more threads than there are cores: they would wait for one another, spinning."""
    from sparsepipe import environment

    cores = environment.usable_cores()
    if (most := max(counts)) > cores:
        raise RecipeError(
            f"{most} threads cannot be measured: this process may use {cores} core{'' if cores == 1 else 's'}.",
            where="threads",
            advice=f"Give a number up to {cores}.",
        )


def existing_path(**options: Any) -> click.Path:
    return click.Path(exists=True, path_type=Path, **options)


def _start_logging() -> None:
    from rich.logging import RichHandler

    from sparsepipe.progress import console

    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format=TIME)
    else:  # a file or a pipe: whole lines, each with its time
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", TIME))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logger = logging.getLogger("sparsepipe")
    if launch.rank() > 0:  # process 0 says the same
        logger.setLevel(logging.ERROR)
    elif logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
    """A table on stdout; a column of numbers, with their units and intervals, is right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    lines = [[_text(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column, header in enumerate(headers):
        cells = [line[column] for line in lines]
        numeric = bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    plain = functools.partial(Console, markup=False, emoji=False)  # a name may hold "[b]" or ":x:"
    console = plain()
    if not console.is_terminal:  # a file or a pipe has no width to fit into
        console = plain(width=240)
    console.print(table)


def _text(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def artefact_json(artefact: Artefact) -> dict[str, Any]:
    """What `--json` prints for a verb that makes an artefact."""
    return {
        "stage": artefact.manifest.stage,
        "folder": str(artefact.folder),
        "digest": artefact.digest,
        "files": {name: str(artefact.folder / name) for name in artefact.manifest.outputs},
        "metrics": artefact.metrics,
    }


def find_input(source: Path, stages: Sequence[str]) -> Artefact:
    """The artefact that `source` (a run folder or one stage's folder) holds, of the first of `stages` found.

    Raises:
        ArtefactError: `source` holds none of them.
    """
    from sparsepipe.artefact import find

    for stage in stages:
        if artefact := find(source, stage):
            return artefact
    wanted = " or ".join(f"'{stage}'" for stage in stages)
    partial = (source / f"{stages[-1]}.partial").is_dir() or partial_of(source).is_dir()
    raise ArtefactError(
        f"There is no finished output of {wanted} here.",
        where=str(source),
        advice="An interrupted run is here; finish it with `sparsepipe train RECIPE --resume`."
        if partial
        else "Name a run folder or the output folder of that stage; `sparsepipe inspect` shows what a folder holds.",
    )


def output_folder(out: Path | None, artefact: Artefact, stage: str) -> Path:
    """Where a verb writes: `--out` if given, else beside the artefact that it reads, named after the stage.

    Raises:
        UsageError: `--out` is needed, because the artefact does not stand in a run folder under its usual name.
    """
    if out is not None:
        return out
    folder = artefact.folder
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if folder.name != artefact.manifest.stage:
        raise click.UsageError(
            f"--out DIR is needed: '{artefact.folder}' is not the folder '{artefact.manifest.stage}' of a run."
        )
    return folder.parent / stage


def required_out(out: Path | None, source: Path) -> Path:
    """`--out`, which must be given where `source` is a single file."""
    if out is None:
        raise click.UsageError(f"--out DIR is needed: '{source}' is a file, so there is no run folder to write into.")
    return out


def section(source: Path | None, name: str, overrides: Sequence[str], flags: Mapping[str, Any]) -> Any:
    """The recipe section `name` for a verb used on its own.

    The recipe of the run folder that `source` lies in is the start, where there is one; then `--set`, then the verb's
    own flags.

    Args:
        source: what the verb reads: a run folder, a stage's folder, or a file in one; None for a file from elsewhere.
        name: the section as recipes write it.
        overrides: what `--set` gave.
        flags: the verb's flags; those that were not given (None or empty) change nothing.
    """
    from sparsepipe import recipe
    from sparsepipe.settings import check

    path = run_recipe(source) if source else None
    table = recipe.read_table(path) if path else {"model": "unknown", "data": "unknown"}
    attribute = "validation" if name == "validate" else name
    loaded = getattr(recipe.parse(table, overrides, where=str(path or "recipe")), attribute)
    given = {key: value for key, value in flags.items() if value not in (None, ())}
    # What nobody set stays unset: some settings, such as the opset, mean "as it is" then.
    return check(type(loaded), {**loaded.model_dump(exclude_unset=True), **given}, where=name)


def dataset(name: str | None, overrides: Sequence[str]) -> Choice | None:
    """The dataset that an option names, with the options that `--set data.KEY=VALUE` gives it, as in a recipe."""
    from sparsepipe import recipe

    options = [override for override in overrides if override.strip().startswith("data.")]
    return recipe.parse({"model": "unknown", "data": name}, options).data if name else None


def run_recipe(source: Path) -> Path | None:
    """The recipe of the run folder that `source` is, or lies in."""
    from sparsepipe.artefact import MANIFEST

    source = source.absolute()
    if (source / RECIPE_FILE).is_file():
        return source / RECIPE_FILE
    for stage_folder in (source, source.parent):
        if (stage_folder / MANIFEST).is_file() and (stage_folder.parent / RECIPE_FILE).is_file():
            return stage_folder.parent / RECIPE_FILE
    return None


def load_recipe(path: Path, overrides: Sequence[str], out: Path | None, suffix: str = "") -> tuple[Recipe, Path]:
    """Read a recipe; the output folder is `--out`, or `runs/<name of the recipe><suffix>`."""
    from sparsepipe import recipe

    loaded = recipe.load(path, overrides)
    return loaded, out if out is not None else Path("runs") / f"{loaded.name}{suffix}"


def check_recipe_copy(path: Path, loaded: Recipe | None, folder: Path) -> None:
    """Refuse to let the copy of the recipe in the run folder take the place of the recipe that the user wrote.

    Args:
        path: what the user wrote.
        loaded: what the run goes by; None where it is not known before the end.
        folder: the run folder.

    Raises:
        RecipeError: `path` is the very file that the copy would replace, and it says something else than `loaded`.
    """
    from sparsepipe import recipe

    if _is_its_own_copy(path, folder) and (
        loaded is None or recipe.digest(recipe.load(path, ())) != recipe.digest(loaded)
    ):
        raise RecipeError(
            "The output folder is that of the recipe, whose place its copy with the changed settings would take.",
            where=str(path),
            advice="Write the settings into the recipe, or name another folder with --out.",
        )


def write_recipe_copy(path: Path, loaded: Recipe, folder: Path) -> None:
    """Write `loaded` into the run folder, unless the user's recipe `path` stands there as it is."""
    from sparsepipe import recipe

    if not _is_its_own_copy(path, folder):
        recipe.write(loaded, folder / RECIPE_FILE)


def _is_its_own_copy(path: Path, folder: Path) -> bool:
    copy = folder / RECIPE_FILE
    return copy.exists() and copy.samefile(path)


def write_up(folder: Path, name: str, text: str, draw: Callable[[], str | None]) -> None:
    """Write a table as `<name>.md` and, where matplotlib is installed and there is enough to draw, `<name>.svg`.

    Args:
        folder: where to write.
        name: of both files.
        text: the table in Markdown.
        draw: makes the figure; None before it has enough points.
    """
    from sparsepipe.artefact import write_text

    write_text(folder / f"{name}.md", text + "\n")
    try:
        drawn = draw()
    except ModuleNotFoundError as error:
        logging.getLogger("sparsepipe").debug("There is no figure without %s.", error.name)
        return
    if drawn is not None:
        write_text(folder / f"{name}.svg", drawn)
