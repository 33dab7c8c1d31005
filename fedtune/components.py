"""Recipe text to frozen dataclass: `"dirichlet(alpha=0.3)"` becomes `Dirichlet(alpha=0.3)`.

A part of a recipe that has parameters of its own is written as it would be called. The name is
looked up in a plain dict, the arguments are the fields of a frozen dataclass and the values are
Python literals: a recipe that arrives over the network can select code but never bring any. An
unknown name or argument is an error with the nearest name.
"""

import ast
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fedtune.errors import RecipeError

T = TypeVar("T")


def nearest(word: str, words: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `words`, or the empty string."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def split_call(text: str, kind: str) -> tuple[str, dict[str, Any]]:
    """The name and the keyword arguments of `text`, e.g. ("dirichlet", {"alpha": 0.3}).

    Raises:
        RecipeError: `text` is not a name or a call with literal keyword arguments.
    """
    shape = f"{kind} = {text!r} is not of the form name or name(field=value, ...)"
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RecipeError(f"{shape}.") from error
    if isinstance(tree, ast.Name):
        return tree.id, {}
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        raise RecipeError(f"{shape}.")
    if tree.args:
        raise RecipeError(f"{shape}: name its arguments, as in {tree.func.id}(field=value).")
    arguments: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise RecipeError(f"{shape}.")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise RecipeError(f"{shape}: the value of '{keyword.arg}' is no literal.") from error
    return tree.func.id, arguments


def fits(value: object, kind: type) -> bool:
    """Whether a literal may stand for a field of type `kind`; an int may stand for a float."""
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def signature(part: type) -> str:
    """The fields of a component with their defaults, e.g. `alpha=0.5, column='label'`."""
    shown = []
    for field in dataclasses.fields(part):
        required = field.default is dataclasses.MISSING
        shown.append(field.name if required else f"{field.name}={field.default!r}")
    return ", ".join(shown)


def build(text: str, registry: Mapping[str, type[T]], kind: str) -> T:
    """The component that `text` describes.

    Args:
        text: `name` or `name(field=value, ...)`.
        registry: names to frozen dataclasses whose fields are bool, int, float or str.
        kind: the recipe's key, for messages.

    Raises:
        RecipeError: an unknown name, an unknown, missing or mistyped parameter, or a value that the
            dataclass refuses.
    """
    name, arguments = split_call(text, kind)
    if name not in registry:
        known = ", ".join(sorted(registry))
        raise RecipeError(f"{kind} '{name}' is unknown.{nearest(name, registry)} Known: {known}.")
    part = registry[name]
    fields = {field.name: field for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    parameters = f"Its parameters: {signature(part)}." if fields else "It has none."
    for key, value in arguments.items():
        if key not in fields:
            raise RecipeError(f"{kind} '{name}' has no parameter '{key}'. {parameters}")
        expected = fields[key].type
        if not (isinstance(expected, type) and fits(value, expected)):
            shown = getattr(expected, "__name__", expected)
            raise RecipeError(f"{kind} '{name}': {key} = {value!r} is not of type {shown}.")
    missing = [
        field.name
        for field in fields.values()
        if field.default is dataclasses.MISSING and field.name not in arguments
    ]
    if missing:
        raise RecipeError(f"{kind} '{name}' needs {', '.join(missing)}. {parameters}")
    try:
        return part(**arguments)
    except ValueError as error:
        raise RecipeError(f"{kind} '{name}': {error}") from error
