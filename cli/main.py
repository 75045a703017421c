"""The `sparsepipe` command. Each verb lives in a module of its own, imported only when it is called."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

from sparsepipe import launch
from sparsepipe.errors import InterruptedBySignal, SparsepipeError

# verb -> one line for the list of commands. The module `sparsepipe.cli.<verb>` holds the command `command`.
VERBS = {
    "run": "Run a whole recipe: train, freeze, convert, export, validate, bench, report.",
    "train": "Train a network sparse from scratch.",
    "compare": "Train a recipe with several methods, sparsities and seeds.",
    "emc": "Search for the largest sample that a network, dense or sparse, fits.",
    "freeze": "Fix the masks: exact zeros, no training state.",
    "convert": "Choose a compact format for every layer.",
    "export": "Write ONNX files.",
    "validate": "Compare an ONNX file with what it was made from.",
    "bench": "Measure latency, memory and size of ONNX files, interleaved.",
    "profile": "Show layer by layer what an ONNX file takes, and why it is not faster.",
    "report": "Write the HTML report of a run folder.",
    "inspect": "Show what a file or a folder holds, layer by layer.",
    "models": "List the networks that a recipe can name.",
    "methods": "List the training methods.",
    "datasets": "List the data sources.",
    "doctor": "Show versions, processor and what is installed.",
}

REPEATED = "The same command goes on with what is not finished."
GOES_ON = {
    "train": "`sparsepipe train --resume` goes on with the training.",
    "run": REPEATED,
    "compare": REPEATED,
    "emc": REPEATED,
}
"""What to do after an interruption, for the verbs that do not start anew."""


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports a verb's module only to run it or to show its help."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        if launch.world_size() > 1 and name != "train":
            raise click.UsageError(
                f"Only `sparsepipe train` runs in several processes. Run `sparsepipe {name}` without torchrun."
            )
        command: click.Command = import_module(f"sparsepipe.cli.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sparsepipe")
def sparsepipe() -> None:
    """Train a network sparse from scratch, freeze it, and deploy it as ONNX.

    \b
    Start here:  sparsepipe run examples/quickstart.toml
    """


def main() -> None:
    """Entry point: errors that a user can mend become one paragraph on stderr and exit code 2.

    SIGTERM is an exception as Ctrl-C is, so that what was begun is cleaned up and the jobs of this process end.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        # Outside its standalone mode click hands back the code of an Exit; a verb itself returns nothing.
        launch.leave(sparsepipe.main(prog_name="sparsepipe", standalone_mode=False) or 0)
    except SparsepipeError as error:
        _fail(str(error), 2)
    except click.ClickException as error:
        with _last_words() as reporting:
            if reporting:
                error.show()
        launch.leave(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error  # click makes one of the other
        number = cause.number if isinstance(cause, InterruptedBySignal) else signal.SIGINT
        verb = next(iter(sys.argv[1:]), "")
        _fail(" ".join(["Interrupted.", *([GOES_ON[verb]] if verb in GOES_ON else [])]), 128 + number)
    except BrokenPipeError:
        # The reader of our output has gone (`sparsepipe models | head`); that is no error of ours.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(f"{error.filename or 'Input or output'}: {error.strerror or error}.", 2)
    except (MemoryError, RecursionError) as error:
        _fail(f"The input is too large or too deeply nested ({type(error).__name__}: {error}).", 2)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise InterruptedBySignal(number)


@contextmanager
def _last_words() -> Iterator[bool]:
    """As `launch.one_report`, for a process that has nothing left to clean up and may be ended at any moment."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with launch.one_report() as reporting:
        yield reporting


def _fail(message: str, code: int) -> NoReturn:
    with _last_words() as reporting:
        if reporting:
            origin = f"process {launch.rank()}: " if launch.rank() else ""
            click.echo(f"Error: {origin}{message}", err=True)
    launch.leave(code)
