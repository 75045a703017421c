"""The one exception family. Each error says what was wrong, where, and what to do about it."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The message of another library's error up to its first line break, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """The whole message of another library's error as one sentence, without line breaks."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text or type(error).__name__}."


class SparsepipeError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        what: what is wrong, as a full sentence.
        where: the file, recipe key, tensor or layer that it is wrong in.
        advice: what to do about it, as a full sentence.
    """

    def __init__(self, what: str, *, where: str | None = None, advice: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.advice = advice

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} {self.advice}" if self.advice else text


class RecipeError(SparsepipeError):
    """A recipe, or an option of one of its parts, is not valid."""


class ArtefactError(SparsepipeError):
    """A folder or a file that a stage reads is missing, incomplete or damaged."""


class DataError(SparsepipeError):
    """A dataset cannot be found or read, or does not have the promised shape."""


class ModelError(SparsepipeError):
    """A network cannot be found or built, or does not fit its weights or its data."""


class FormatError(SparsepipeError):
    """A compressed weight is malformed, or a weight does not fit its format."""


class GraphError(SparsepipeError):
    """An ONNX file cannot be read, rewritten or run."""


class NotOnnxError(GraphError):
    """A file is no ONNX model: another kind of file, or the beginning of one.

    Args:
        where: the file.
    """

    def __init__(self, where: str) -> None:
        super().__init__(
            "This is not an ONNX file, or it was cut off.",
            where=where,
            advice="Compare its size with the original, or export it again.",
        )


class InterruptedBySignal(KeyboardInterrupt):
    """Ctrl-C, or the system's wish that this process ends.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class MissingExtraError(SparsepipeError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{module}', which is not installed.",
            advice=f'Install it with: pip install "sparsepipe[{extra}]"',
        )
