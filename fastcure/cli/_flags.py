"""Flags from the annotations of a dataclass of settings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

from fastcure._fields import choices_of, field_annotations, plain_type, shortened


def add_flags(parser: argparse.ArgumentParser, settings: type[Any], without: Collection[str] = ()) -> None:
    """Add a flag for each field but those `without`, of its type; the help names its choices and its default.

    What is not set is left out, so that defaults are the dataclass's, and so are checks: an error is one line.
    """
    hints = field_annotations(settings)
    for field in fields(settings):
        if field.name in without:
            continue
        name, default, hint = field.name, field.default, hints[field.name]
        flag, words, kind = "--" + name.replace("_", "-"), field.metadata["help"], plain_type(hint)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=words)
            continue
        if (choices := choices_of(hint)) is not None:
            words += f" One of {choices}."
        shown = ",".join(map(_shown, default)) if isinstance(default, tuple) else default
        if shown:
            words += f" ({shown})"
        if field.metadata["repeat"]:
            parser.add_argument(flag, action="append", metavar=name.upper(), help=words.replace("%", "%%"))
            continue
        alone = field.metadata["alone"]
        optional: dict[str, Any] = {} if alone is None else {"nargs": "?", "const": alone}
        parser.add_argument(
            flag, type=READERS.get(kind, kind), metavar=name.upper(), help=words.replace("%", "%%"), **optional
        )


def _numbers(text: str) -> tuple[float, ...]:
    """Read `8/255,0.1`."""
    try:
        parts = [[float(number) for number in part.split("/")] for part in text.split(",")]
        found = tuple(top / bottom for top, bottom in ([*part, 1.0] if len(part) == 1 else part for part in parts))
    except (ValueError, ZeroDivisionError):
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"finite numbers such as 8/255,0.1, got {shortened(text)}")
    return found


def _words(text: str) -> tuple[str, ...]:
    """Read `fgsm,pgd`."""
    return tuple(text.split(","))


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


READERS: dict[Any, Callable[[str], Any]] = {tuple[float, ...]: _numbers, tuple[str, ...]: _words}
"""Reads the text of a flag, by its type; other types read it themselves."""
