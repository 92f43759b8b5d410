"""Checks of the fields of a dataclass: their types, and the range of whole numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = {"seed": 2**64 - 1}
"""The largest value of a whole number where it is not 2^31 - 1: torch takes no larger seed."""


def check_types(values: Any) -> None:
    """Check that each field of a dataclass has the type that it is annotated with, and that floats are finite.

    An int counts as a float, a bool not as an int, and a list as a tuple.

    Raises:
        ValueError: naming the first field that does not fit, its type and its value.
    """
    hints = get_type_hints(type(values))
    for field in fields(values):
        value = getattr(values, field.name)
        if not _fits(value, hints[field.name]):
            raise ValueError(f"{field.name} must be {_words(hints[field.name])}, got {shortened(value)}")


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
    if origin is Literal:
        return isinstance(value, str)  # which of them is checked with the other values
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
    if origin is Literal:
        return "text"
    if origin in (tuple, list):
        return f"a list, each {_words(inner[0])}"
    return names.get(kind, "a table of names and values")
