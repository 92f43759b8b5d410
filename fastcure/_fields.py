"""Checks of the fields of a dataclass by their annotations: types, choices, and the range of whole numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = {"seed": 2**64 - 1}
"""The largest value of a whole number where it is not 2^31 - 1: torch takes no larger seed."""


@dataclass(frozen=True)
class OneOf:
    """The annotation of a text that names an entry of a registry: `Annotated[str, OneOf(MODELS)]`."""

    known: Collection[Any]
    forms: Collection[str] = ()
    """What else there may be, each with a colon in it: `npz:PATH`. Whoever takes the value checks it."""

    __hash__ = object.__hash__

    def takes(self, value: Any) -> bool:
        """Tell whether a value is a choice."""
        return value in self.known or (bool(self.forms) and ":" in value)

    def __str__(self) -> str:
        return ", ".join(map(str, [*self.known, *self.forms]))


def check_types(values: Any) -> None:
    """Check that each field of a dataclass has the type that it is annotated with, and is one of its choices.

    An int counts as a float, a bool not as an int, and a list as a tuple. Floats must be finite.

    Raises:
        ValueError: naming the first field that does not fit, what would, and its value.
    """
    hints = field_annotations(type(values))
    for name, hint in hints.items():
        value = getattr(values, name)
        if not _fits(value, hint):
            raise ValueError(f"{name} must be {_words(hint)}, got {shortened(value)}")
    for name, hint in hints.items():
        value, choices = getattr(values, name), choices_of(hint)
        for each in value if isinstance(value, tuple | list) else [value]:
            if choices is not None and each is not None and not choices.takes(each):
                raise ValueError(f"{name} must be one of {choices}, got {shortened(each)}")


_annotations: dict[type[Any], dict[str, Any]] = {}
"""Of each dataclass that was looked at: to evaluate them takes a millisecond."""


def field_annotations(kind: type[Any]) -> dict[str, Any]:
    """Return the annotation of each field of a dataclass."""
    if kind not in _annotations:
        hints = get_type_hints(kind, include_extras=True)
        _annotations[kind] = {field.name: hints[field.name] for field in fields(kind)}
    return _annotations[kind]


def choices_of(hint: Any) -> OneOf | None:
    """Return the choices that an annotation names, if it does."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return OneOf(inner)
    if origin is Annotated:
        return next((each for each in inner[1:] if isinstance(each, OneOf)), None)
    if origin is tuple:
        return choices_of(inner[0])
    if origin in (Union, UnionType):
        return next((found for one in inner if (found := choices_of(one)) is not None), None)
    return None


def plain_type(hint: Any) -> Any:
    """Return the type of a value that is there: `int` of `int | None`, `str` of `Annotated[str, ...]`; so in tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return plain_type(next(one for one in inner if one is not NoneType))
    if origin is Annotated:
        return plain_type(inner[0])
    if origin is Literal:
        return type(inner[0])
    return tuple[plain_type(inner[0]), ...] if origin is tuple else origin or hint  # type: ignore[misc]


def check_whole_numbers(values: Any, least: Mapping[str, int]) -> None:
    """Check that whole numbers, None apart, are not below `least` nor too large for torch.

    Raises:
        ValueError: naming the first that is.
    """
    for name, low in least.items():
        value, high = getattr(values, name), LARGEST.get(name, 2**31 - 1)
        if value is not None and value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
        if value is not None and value > high:
            raise ValueError(f"{name} must be <= {high}, got {shortened(value)}")


def shortened(value: object) -> str:
    """Return `repr(value)`, cut off where it is longer than a line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError) as error:  # nested too deeply; an int of too many digits
        return f"{type(value).__name__} ({error})"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin is Literal:  # its choices are checked apart
        return _fits(value, type(inner[0]))
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(one, inner[0]) for one in value)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        # An int beyond the range of floats is none either.
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _words(kind: Any) -> str:
    """Name a type as a user knows it."""
    origin, inner = get_origin(kind), get_args(kind)
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", NoneType: "nothing"}
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in inner)
    if origin is Annotated or origin is Literal:
        return _words(plain_type(kind))
    if origin in (tuple, list):
        return f"a list, each {_words(inner[0])}"
    return names.get(kind, "a table of names and values")
