"""What settings are made of, of recipes and of registries alike: typed sections, choices by name, and their errors."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from sparsepipe.errors import RecipeError


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(BaseModel):
    """Something chosen by name from a registry; the other keys are its options, checked by the registry."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def from_short_form(value: Any) -> Any:
    """A name alone as the section that it stands for."""
    return {"name": value} if isinstance(value, str) else value


NamedChoice = Annotated[Choice, BeforeValidator(from_short_form)]

ModelT = TypeVar("ModelT", bound=BaseModel)


def check(model: type[ModelT], table: dict[str, Any], *, where: str) -> ModelT:
    """Validate `table` as `model`; every problem is named with its key and what is allowed there.

    Raises:
        RecipeError: with all problems in one paragraph.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        found = error.errors()
        inside = {problem["loc"][:depth] for problem in found for depth in range(len(problem["loc"]))}
        # A list that lost a bad entry is too short for pydantic, too; that the entry is bad says it all.
        told = [problem for problem in found if problem["type"] != "too_short" or problem["loc"] not in inside]
        raise RecipeError(f"{'; '.join(_describe(model, problem) for problem in told)}.", where=where) from error


def _describe(model: type[BaseModel], problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in path if part) or "recipe"
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(model, path[:-1])
        close = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        return f"unknown key '{key}'{hint}; allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"the key '{key}' is missing"
    if problem["type"] == "model_type":
        chosen = problem["ctx"]["class_name"] == Choice.__name__
        keys = "a section with the keys " + ", ".join(_allowed_keys(model, path))
        wanted = "a name, or a section of a name and its options" if chosen else keys
        return f"'{key}' = {problem['input']!r}: it should be {wanted}"
    if problem["type"] == "too_short":
        return f"'{key}' = {problem['input']!r}: it should have at least one entry"
    if problem["type"] == "tuple_type":
        return f'\'{key}\' = {problem["input"]!r}: it should be a list, as [1, 2] or ["a", "b"]'
    if problem["type"] == "string_type":
        return f"'{key}' = {problem['input']!r}: it should be text, in quotes"
    message = problem["msg"].removeprefix("Value error, ")
    return f"'{key}' = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _allowed_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        for name, field in model.model_fields.items():
            if part in (name, field.alias) and isinstance(field.annotation, type):
                model = field.annotation
    return [field.alias or name for name, field in model.model_fields.items()]
